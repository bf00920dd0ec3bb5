//! The networks, narrow but with the heads and channels of the real ones, and a whole small video.

use candle_core::{DType, Device, Tensor};
use talkie::Result;
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::pipeline::{
    Cancel, Conditioning, Control, Guidance, Networks, Reference, Sampling, generate_windows,
};
use talkie::registry::{ModelSpec, Registry};

use super::{Bench, EXACT, Report, Way, drawn, input, weights};
use crate::job::JobError;

/// Rows of CLIP's output for a picture of 224 × 224.
const IMAGE_ROWS: usize = 257;
const TIMESTEP: f64 = 857.3;

pub(super) fn run(bench: &Bench, report: &mut Report) -> Result<(), JobError> {
    let plain = Way { dtype: DType::BF16, plain: true };
    let [bf16, f32] = bench.ways();
    let ways = [bf16, plain, f32];
    bench.compare("DiT", &ways, EXACT, |dtype, device| dit(1, dtype, device), report)?;
    // With two persons, a token shows the one with the larger value, and bf16 leaves many values equal.
    bench.compare("DiT, two persons", &[f32], EXACT, |dtype, device| dit(2, dtype, device), report)?;
    bench.compare("UMT5", &ways, EXACT, umt5, report)?;
    bench.compare("CLIP", &ways, bench.with_convolutions(), clip, report)?;
    // The others are f32 in the reference.
    let alone = [f32, Way { plain: true, ..f32 }];
    let ways = if bench.device.is_cpu() { &alone[..1] } else { &alone[..] };
    bench.compare("wav2vec2", ways, bench.with_convolutions(), wav2vec2, report)?;
    bench.compare("VAE, encoder", ways, bench.with_convolutions(), vae_encode, report)?;
    bench.compare("VAE, decoder", ways, bench.with_convolutions(), vae_decode, report)?;
    bench.compare("video", &[bf16, f32], bench.with_convolutions(), video, report)
}

fn dit(persons: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let cfg = wan::Config {
        dim: 256,
        num_heads: 2,
        ffn_dim: 384,
        num_layers: 2,
        text_len: 40,
        text_dim: 64,
        clip_dim: 64,
        audio_blocks: 2,
        audio_channels: 32,
        intermediate_dim: 64,
        output_dim: 64,
        ..wan::Config::infinitetalk_14b()
    };
    let (frames, height, width) = (3, 10, 14);
    let model = wan::Model::new(&cfg, weights(dtype, device))?;
    let f32 = |seed, shape: &[usize]| input(seed, shape, DType::F32, device);
    let context =
        model.encode_context(&f32(1, &[9, cfg.text_dim])?, &f32(2, &[1, IMAGE_ROWS, cfg.clip_dim])?)?;
    let windows = [persons, 4 * frames - 3, cfg.audio_window, cfg.audio_blocks, cfg.audio_channels];
    let audio = model.encode_audio(&f32(3, &windows)?.to_dtype(dtype)?)?;
    let latents = f32(4, &[cfg.out_dim, frames, height, width])?;
    let y = f32(5, &[cfg.in_dim - cfg.out_dim, frames, height, width])?;
    let masks = halves(height, width, device)?;
    Ok(model.forward(&latents, &y, TIMESTEP, &context, &audio, Some(&masks))?)
}

/// The first person on the left, the second on the right, nothing between them.
fn halves(height: usize, width: usize, device: &Device) -> Result<Tensor> {
    let of = |from: usize, to: usize| {
        (0..height * width).map(move |i| if (from..to).contains(&(i % width)) { 1f32 } else { 0.0 })
    };
    let third = width / 3;
    let values: Vec<f32> =
        of(0, third).chain(of(width - third, width)).chain(of(third, width - third)).collect();
    Ok(Tensor::from_vec(values, (3, height, width), device)?)
}

fn umt5(dtype: DType, device: &Device) -> Result<Tensor> {
    let cfg = umt5::Config {
        vocab: 384,
        dim: 128,
        dim_attn: 128,
        dim_ffn: 256,
        num_heads: 2,
        num_layers: 2,
        ..umt5::Config::umt5_xxl()
    };
    let ids: Vec<u32> = (0..37).map(|i| i * 10 % 384).collect();
    Ok(umt5::Model::new(&cfg, weights(dtype, device))?.encode(&ids)?)
}

fn clip(dtype: DType, device: &Device) -> Result<Tensor> {
    let cfg = clip_vision::Config {
        vision_dim: 160,
        vision_heads: 2,
        vision_layers: 3,
        ..clip_vision::Config::vit_h_14()
    };
    let model = clip_vision::Model::new(&cfg, weights(dtype, device))?;
    let frame = input(1, &[3, 1, 96, 64], DType::F32, device)?;
    Ok(model.forward(&model.preprocess(&frame)?)?)
}

fn wav2vec2(dtype: DType, device: &Device) -> Result<Tensor> {
    let cfg = wav2vec2::Config { num_hidden_layers: 2, ..wav2vec2::Config::chinese_base() };
    let speech = drawn(1, &[8000])?.to_vec1::<f32>()?;
    Ok(wav2vec2::Model::new(&cfg, weights(dtype, device))?.embed(&speech, 12)?)
}

fn vae(dtype: DType, device: &Device) -> Result<wan_vae::Vae> {
    Ok(wan_vae::Vae::new(&wan_vae::Config::wan2_1(), weights(dtype, device))?)
}

fn vae_encode(dtype: DType, device: &Device) -> Result<Tensor> {
    let video = (input(1, &[3, 5, 32, 48], DType::F32, device)? / 2.0)?;
    Ok(vae(dtype, device)?.encode(&video)?)
}

fn vae_decode(dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(vae(dtype, device)?.decode(&input(1, &[16, 2, 4, 6], DType::F32, device)?)?)
}

/// One window of the small model, denoised in four steps of one pass. `dtype` is that of the DiT; the other networks
/// have theirs.
fn video(dtype: DType, device: &Device) -> Result<Tensor> {
    let registry = Registry::built_in()?;
    let ModelSpec { dit, vae, image_encoder, .. } = registry.model("tiny")?;
    let clip_weights = weights(image_encoder.dtype(device), device);
    let clip = clip_vision::Model::new(&image_encoder.config, clip_weights)?;
    let vae = wan_vae::Vae::new(&vae.config, weights(vae.dtype(device), device))?;
    let (frames, cfg) = (17, &dit.config);
    let dit = wan::Model::new(cfg, weights(dtype, device))?;
    let f32 = |seed, shape: &[usize]| input(seed, shape, DType::F32, device);
    let portrait = (f32(1, &[3, 1, 64, 64])? / 2.0)?;
    let image_embeds = Reference::image_embeds(&clip, &portrait)?;
    let conditioning = Conditioning {
        references: vec![(0, Reference::encode(&vae, portrait, image_embeds, frames)?)],
        audio_embeds: vec![f32(2, &[frames + 2, cfg.audio_blocks, cfg.audio_channels])?],
        context: f32(3, &[9, cfg.text_dim])?,
        negative_context: None,
        masks: None,
    };
    let sampling = Sampling {
        frames_per_window: frames,
        motion_frames: 9,
        max_frames: frames,
        num_steps: 4,
        shift: 2.0,
        guidance: Guidance { text: 1.0, audio: 1.0, apg: None },
        // It is the processor's on every device, and where colours are clipped it makes much of little.
        color_correction: 0.0,
        teacache: None,
    };
    let mut parts = Vec::new();
    let mut control = Control { cancel: &Cancel::default(), progress: &mut |_| {} };
    let mut noise = |_, shape: (usize, usize, usize, usize)| f32(4, &[shape.0, shape.1, shape.2, shape.3]);
    let mut sink = |part| {
        parts.push(part);
        Ok(())
    };
    let networks = Networks { dit: &dit, vae: &vae };
    generate_windows(networks, &conditioning, &sampling, &mut noise, &mut control, &mut sink)?;
    Ok(Tensor::cat(&parts, 1)?)
}
