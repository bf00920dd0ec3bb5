//! Identities of the network, on random weights; the reference's own values are in `tests/models/vae.rs`.

use candle_core::Device;
use candle_nn::VarMap;

use super::*;

/// Largest difference that the order of summation explains, relative to the largest value.
const ROUNDING: f32 = 1e-5;

fn tiny() -> Config {
    Config { dim: 4, num_res_blocks: 1, ..Config::wan2_1() }
}

fn randn(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// A network of random weights, small enough that no layer saturates.
fn random(cfg: &Config) -> Vae {
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    Vae::new(cfg, vb.clone()).unwrap();
    for (name, var) in weights.data().lock().unwrap().iter() {
        let fan_in = var.elem_count() / var.dim(0).unwrap();
        let values = match name.ends_with("gamma") {
            true => randn(var.dims()).affine(0.1, 1.0).unwrap(),
            false => (randn(var.dims()) / (fan_in as f64).sqrt()).unwrap(),
        };
        var.set(&values).unwrap();
    }
    Vae::new(cfg, vb).unwrap()
}

fn assert_equal(actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.dims(), expected.dims());
    let largest =
        |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let error = largest((actual - expected).unwrap()) / largest(expected.clone());
    assert!(error < ROUNDING, "off by {error:e}");
}

#[test]
fn encoding_in_chunks_of_four_equals_encoding_all_that_follows_the_first_frame_at_once() -> Result<()> {
    let vae = random(&tiny());
    let frames = randn(&[1, 13, 16, 24, 3]);
    let encode = |chunks: &[usize]| {
        let (mut cache, mut start, mut outs) = (Cache::default(), 0, Vec::new());
        for (i, &len) in chunks.iter().enumerate() {
            cache.start_chunk();
            outs.push(vae.encoder.forward(frames.narrow(1, start, len)?, i, &mut cache)?);
            start += len;
        }
        Tensor::cat(&outs, 1)
    };
    let whole = encode(&[1, 12])?;
    assert_eq!(whole.dims(), [1, 4, 2, 3, 32]);
    assert_equal(&encode(&[1, 4, 4, 4])?, &whole);
    assert_equal(&encode(&[1, 8, 4])?, &whole);
    Ok(())
}

#[test]
fn decoding_frame_by_frame_equals_decoding_all_that_follows_the_first_at_once() -> Result<()> {
    let vae = random(&tiny());
    let latents = randn(&[1, 5, 2, 3, 16]);
    let decode = |chunks: &[usize]| {
        let (mut cache, mut start, mut outs) = (Cache::default(), 0, Vec::new());
        for (i, &len) in chunks.iter().enumerate() {
            cache.start_chunk();
            outs.push(vae.decoder.forward(latents.narrow(1, start, len)?, i, &mut cache)?);
            start += len;
        }
        Tensor::cat(&outs, 1)
    };
    let whole = decode(&[1, 4])?;
    assert_eq!(whole.dims(), [1, 17, 16, 24, 3]);
    assert_equal(&decode(&[1, 1, 1, 1, 1])?, &whole);
    assert_equal(&decode(&[1, 3, 1])?, &whole);
    Ok(())
}

#[test]
fn without_temporal_steps_the_whole_clip_is_one_convolution_after_another() -> Result<()> {
    let vae = random(&Config { temperal_downsample: vec![false; 3], ..tiny() });
    let latents = randn(&[1, 4, 2, 2, 16]);
    let mut cache = Cache::default();
    cache.start_chunk();
    let whole = vae.decoder.forward(latents.clone(), 0, &mut cache)?;
    let mut cache = Cache::default();
    let mut chunks = Vec::new();
    for t in 0..4 {
        cache.start_chunk();
        chunks.push(vae.decoder.forward(latents.narrow(1, t, 1)?, t, &mut cache)?);
    }
    assert_equal(&Tensor::cat(&chunks, 1)?, &whole);
    Ok(())
}

#[test]
fn the_future_does_not_change_the_past() -> Result<()> {
    let vae = random(&tiny());
    let (video, latents) = (randn(&[3, 9, 16, 16]), randn(&[16, 3, 2, 2]));
    assert_equal(&vae.encode(&video.narrow(1, 0, 5)?)?, &vae.encode(&video)?.narrow(1, 0, 2)?);
    assert_equal(&vae.decode(&latents.narrow(1, 0, 2)?)?, &vae.decode(&latents)?.narrow(1, 0, 5)?);
    Ok(())
}

#[test]
fn chunks_are_the_frames_of_one_latent_frame_each_and_a_failing_sink_stops() -> Result<()> {
    let vae = random(&tiny());
    let latents = randn(&[16, 3, 2, 2]);
    let mut lengths = Vec::new();
    vae.decode_chunks(&latents, &mut |frames| {
        lengths.push(frames.dims().to_vec());
        Ok(())
    })?;
    assert_eq!(lengths, [[3, 1, 16, 16], [3, 4, 16, 16], [3, 4, 16, 16]]);
    let mut calls = 0;
    let stopped = vae.decode_chunks(&latents, &mut |_| {
        calls += 1;
        candle_core::bail!("full")
    });
    assert!(stopped.is_err() && calls == 1);
    Ok(())
}

#[test]
fn surplus_frames_are_ignored() -> Result<()> {
    let vae = random(&tiny());
    let video = randn(&[3, 8, 16, 16]);
    assert_equal(&vae.encode(&video)?, &vae.encode(&video.narrow(1, 0, 5)?)?);
    Ok(())
}

#[test]
fn what_no_checkpoint_has_is_refused_by_name() {
    let refused = |cfg: Config| {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        Vae::new(&cfg, vb).unwrap_err().to_string()
    };
    assert!(refused(Config { z_dim: 8, ..tiny() }).contains("`z_dim` is 8"));
    assert!(refused(Config { attn_scales: vec![0.5], ..tiny() }).contains("`attn_scales`"));
    assert!(refused(Config { temperal_downsample: vec![true], ..tiny() }).contains("`temperal_downsample`"));
    assert!(refused(Config { temperal_downsample: vec![true; 3], ..tiny() }).contains("more than twice"));
    assert!(refused(Config { dim: 0, ..tiny() }).contains("`dim`"));
}

#[test]
fn inputs_of_another_shape_are_refused() {
    let vae = random(&tiny());
    assert!(vae.encode(&randn(&[3, 1, 12, 16])).unwrap_err().to_string().contains("multiples of 8"));
    assert!(vae.encode(&randn(&[1, 1, 16, 16])).is_err());
    assert!(vae.decode(&randn(&[4, 1, 2, 2])).unwrap_err().to_string().contains("(16, T, h, w)"));
}

#[test]
fn strides_follow_from_the_config() {
    let cfg = Config::wan2_1();
    assert_eq!((cfg.spatial_stride(), cfg.temporal_stride()), (8, 4));
}
