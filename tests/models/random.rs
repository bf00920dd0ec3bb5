//! Random weights: the profile `tiny`, and networks as deep as the real ones, give values that are finite, neither
//! vanish nor explode, and follow their inputs.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::registry::{ModelSpec, Registry, Source};
use talkie::weights::Weights;

const NONE: [&str; 0] = [];

fn tiny() -> ModelSpec {
    Registry::built_in().unwrap().model("tiny").unwrap().clone()
}

fn seed(source: &Source) -> Weights {
    match source {
        Source::Random(seed) => Weights::random(*seed),
        Source::Files(_) => panic!("`tiny` needs no files"),
    }
}

/// Deterministic input in −1…1.
fn input(shape: &[usize], frequency: f64) -> Tensor {
    let len = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..len).map(|i| ((i as f64 * frequency).sin()) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Fails unless `xs` is finite and its values have a standard deviation within `range`.
fn lively(name: &str, xs: &Tensor, range: std::ops::Range<f64>) {
    let values = xs.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    println!("{name}: {:?}, mean {mean:.3}, standard deviation {deviation:.3}", xs.shape());
    assert!(values.iter().all(|v| v.is_finite()), "{name}: values that are not finite");
    assert!(range.contains(&deviation), "{name}: standard deviation {deviation}, expected {range:?}");
}

/// Fails unless the two differ by at least a thousandth of their size.
fn differ(name: &str, a: &Tensor, b: &Tensor) {
    let size = |x: &Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (difference, reference) = (size(&(a - b).unwrap()), size(a));
    println!("{name}: changes the result by {:.1e}", difference / reference);
    assert!(difference > 1e-3 * reference, "{name}: no influence");
}

#[test]
fn the_encoders_of_tiny() {
    let model = tiny();
    let spec = &model.text_encoder;
    let build = |vb| umt5::Model::new(&spec.config, vb);
    let text_encoder = seed(&spec.source).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    let encode = |text: &str| text_encoder.encode(&text.bytes().map(u32::from).collect::<Vec<_>>()).unwrap();
    lively("text", &encode("somebody talks"), 0.3..3.0);
    differ("another text", &encode("somebody talks"), &encode("somebody walks"));

    let spec = &model.image_encoder;
    let build = |vb| clip_vision::Model::new(&spec.config, vb);
    let image_encoder = seed(&spec.source).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    let encode =
        |f| image_encoder.forward(&image_encoder.preprocess(&input(&[3, 1, 96, 128], f)).unwrap()).unwrap();
    lively("image", &encode(0.01), 0.3..5.0);
    differ("another image", &encode(0.01), &encode(0.02));

    let spec = &model.audio_encoder;
    let build = |vb| wav2vec2::Model::new(&spec.config, vb);
    let audio_encoder = seed(&spec.source).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    let encode = |f| {
        let samples = input(&[4 * 16_000], f).to_vec1::<f32>().unwrap();
        audio_encoder.embed(&samples, wav2vec2::Model::frames(samples.len())).unwrap()
    };
    let start = Instant::now();
    lively("audio", &encode(0.1), 0.3..3.0);
    println!("4 s of audio took {:?}", start.elapsed());
    differ("another voice", &encode(0.1), &encode(0.13));
}

#[test]
fn the_vae_of_tiny() {
    let model = tiny();
    let spec = &model.vae;
    let build = |vb| wan_vae::Vae::new(&spec.config, vb);
    let vae = seed(&spec.source).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    let latents = vae.encode(&input(&[3, 9, 64, 64], 0.01)).unwrap();
    lively("latents", &latents, 0.05..3.0);
    let start = Instant::now();
    let decode = |f| vae.decode(&(input(&[16, 3, 8, 8], f) * 1.4).unwrap()).unwrap();
    let video = decode(0.1);
    println!("decoding took {:?}", start.elapsed());
    lively("video", &video, 0.1..0.9);
    let grey = video.abs().unwrap().lt(0.999).unwrap().to_dtype(DType::F32).unwrap().mean_all().unwrap();
    let share = grey.to_scalar::<f32>().unwrap();
    println!("{:.0} % of the values are within the range", share * 100.0);
    assert!(share > 0.5, "{share} of the values are not clipped");
    differ("other latents", &video, &decode(0.11));
}

/// The DiT of `config`: it answers to each of its inputs.
fn dit(config: &wan::Config, seed: u64, name: &str) {
    let build = |vb| wan::Model::new(config, vb);
    let model = Weights::random(seed).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    let (frames, height, width) = (5, 8, 8);
    let video_frames = (frames - 1) * config.vae_scale + 1;
    let condition = config.in_dim - config.out_dim;
    let audio_shape = [1, video_frames, config.audio_window, config.audio_blocks, config.audio_channels];
    let run = |noise: f64, text: f64, image: f64, audio: f64, timestep: f64| {
        let context = input(&[9, config.text_dim], text);
        let context = model.encode_context(&context, &input(&[1, 257, config.clip_dim], image)).unwrap();
        let audio = model.encode_audio(&input(&audio_shape, audio)).unwrap();
        let latents = (input(&[config.out_dim, frames, height, width], noise) * 1.4).unwrap();
        let y = input(&[condition, frames, height, width], 0.3);
        model.forward(&latents, &y, timestep, &context, &audio, None).unwrap()
    };
    let velocity = run(0.7, 0.2, 0.5, 0.9, 700.0);
    lively(&format!("{name}: velocity"), &velocity, 0.3..4.0);
    let others = [
        ("noise", run(0.71, 0.2, 0.5, 0.9, 700.0)),
        ("text", run(0.7, 0.21, 0.5, 0.9, 700.0)),
        ("image", run(0.7, 0.2, 0.51, 0.9, 700.0)),
        ("audio", run(0.7, 0.2, 0.5, 0.91, 700.0)),
        ("timestep", run(0.7, 0.2, 0.5, 0.9, 300.0)),
    ];
    for (what, other) in &others {
        differ(&format!("{name}: {what}"), &velocity, other);
    }
}

#[test]
fn the_dit_of_tiny_and_one_as_deep_as_the_real_one() {
    let tiny = tiny().dit;
    dit(&tiny.config, 42, "tiny");
    dit(
        &wan::Config { num_layers: wan::Config::infinitetalk_14b().num_layers, ..tiny.config },
        7,
        "40 layers",
    );
}

#[test]
fn encoders_as_deep_as_the_real_ones() {
    let model = tiny();
    let config = umt5::Config { num_layers: 24, ..model.text_encoder.config };
    let text_encoder =
        Weights::random(7).load(DType::F32, &Device::Cpu, &NONE, |vb| umt5::Model::new(&config, vb)).unwrap();
    lively("text, 24 layers", &text_encoder.encode(&[5, 6, 7, 1]).unwrap(), 0.3..3.0);
    let config = clip_vision::Config { vision_layers: 32, ..model.image_encoder.config };
    let image_encoder = Weights::random(7)
        .load(DType::F32, &Device::Cpu, &NONE, |vb| clip_vision::Model::new(&config, vb))
        .unwrap();
    let pixels = image_encoder.preprocess(&input(&[3, 1, 64, 64], 0.01)).unwrap();
    lively("image, 32 layers", &image_encoder.forward(&pixels).unwrap(), 0.3..10.0);
}
