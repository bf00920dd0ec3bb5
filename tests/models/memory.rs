//! The memory plan: each rung is taken, gives the same video, and keeps what it says.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use talkie::ErrorKind;
use talkie::device::Processor;
use talkie::models::{wan, wan_vae};
use talkie::pipeline::{Activations, Extent, MEMORY_PLAN, Pipeline, Rung, Weights};
use talkie::registry::ModelStorage;
use talkie::weights::Weights as Files;

use crate::{peak, studio};

/// Kernels of the tiny VAE's 8 channels are padded to the lanes of the CPU, which the plan does not count: the channels
/// of the real one are multiples of them.
const PADDING: u64 = 6 << 20;

/// What the video of [`studio::make`] needs.
fn needs() -> (Weights, Activations) {
    let spec = studio::heavy();
    let settings = studio::settings(&spec);
    let size = settings.video_size(studio::inputs().portrait.size());
    let extent = Extent { size, frames: 13, persons: 1 };
    let activations = Activations::of(&spec, &settings, extent, Processor::Cpu);
    (Weights::of(&spec, Processor::Cpu).unwrap(), activations)
}

/// The least bytes at which each rung is taken, and one less than the last.
fn limits() -> [(Option<Rung>, u64); 4] {
    let (weights, activations) = needs();
    let rest = weights.dit - weights.block * weights.blocks as u64;
    let without = weights.vae + weights.dit;
    let text = weights.text_encoder;
    let streamed = text.max(weights.vae + rest + 2 * weights.block);
    [
        (Some(Rung::Resident), weights.total() + activations.most()),
        (Some(Rung::EncodersLeave), text.max(without) + activations.most()),
        (Some(Rung::BlocksStreamed), streamed + activations.most()),
        (None, streamed + activations.most() - 1),
    ]
}

/// In a process of its own: makes the video where no more is to be had than the limit that it was planned for, less the
/// bytes after `-`; prints rung, hash of the file and the most bytes in use.
#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn a_video_under_a_limit() {
    let case = std::env::var(peak::CASE).unwrap();
    let (limit, missing) = case.split_once('-').unwrap_or((&case, "0"));
    let (limit, missing): (u64, u64) = (limit.parse().unwrap(), missing.parse().unwrap());
    let (spec, storage) = (studio::heavy(), ModelStorage::at("/nonexistent"));
    // What is made once in a process, such as tables and threads, is not the video's.
    studio::make(&mut Pipeline::new(Device::Cpu, None), &studio::tiny(), &storage).video.unwrap();
    let mut pipeline = Pipeline::new(Device::Cpu, Some(limit));
    let granted = limit + PADDING - missing;
    let (made, bytes) = peak::within(granted, || studio::make(&mut pipeline, &spec, &storage));
    let plan = made.video.unwrap().plan.unwrap();
    let hash: u64 =
        made.bytes.iter().fold(0, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    println!("result: {} {hash} {bytes}", plan.rung().as_str());
}

#[test]
fn every_rung_makes_the_same_video_within_its_limit() {
    let mut before: Option<(String, u64)> = None;
    for (rung, limit) in limits() {
        let Some(rung) = rung else { continue };
        let result = peak::in_a_process("memory::a_video_under_a_limit", &limit.to_string());
        let [taken, hash, bytes] = result.split(' ').collect::<Vec<_>>().try_into().expect("three words");
        let bytes: u64 = bytes.parse().unwrap();
        println!("{taken}: {bytes} of {limit} bytes");
        assert_eq!(taken, rung.as_str());
        if let Some((before_hash, before_bytes)) = &before {
            assert_eq!(hash, before_hash, "{taken} makes another video");
            assert!(bytes < *before_bytes, "{taken} takes no less than the rung before");
        }
        before = Some((hash.to_owned(), bytes));
    }
}

#[test]
fn a_video_that_gets_less_than_was_planned_ends_its_process() {
    let (_, limit) = limits()[2];
    let run = peak::run("memory::a_video_under_a_limit", &format!("{limit}-{}", limit / 2));
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && said.contains("memory allocation of"), "the allocator refuses: {said}");
}

#[test]
fn what_ran_out_of_memory_is_planned_with_less() {
    let (spec, storage) = (studio::heavy(), ModelStorage::at("/nonexistent"));
    let mut pipeline = Pipeline::new(Device::Cpu, None);
    let make = |pipeline: &mut Pipeline| {
        let made = studio::make(pipeline, &spec, &storage);
        (made.video.unwrap().plan.unwrap(), made.bytes)
    };
    let (before, bytes) = make(&mut pipeline);
    assert_eq!(before.rung(), Rung::Resident);
    pipeline.step_down();
    let (after, same) = make(&mut pipeline);
    assert_ne!(after.rung(), Rung::Resident);
    assert!(after.device_bytes <= before.device_bytes / 8 * 7 + 8, "{before:?} {after:?}");
    assert!(bytes == same, "less memory makes another video");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_loaded() {
    let (_, limit) = limits()[3];
    let mut pipeline = Pipeline::new(Device::Cpu, Some(limit));
    let made = studio::make(&mut pipeline, &studio::heavy(), &ModelStorage::at("/nonexistent"));
    let error = made.video.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::OutOfMemory, Some(MEMORY_PLAN)));
    assert!(error.to_string().contains(&format!("needs {} bytes", limit + 1)), "{error}");
    assert!(made.progress.is_empty(), "nothing was begun");
}

/// Blocks that are drawn each time they are asked for.
struct Drawn(Files);

impl wan::BlockSource for Drawn {
    fn load(
        &self,
        build: &dyn Fn(VarBuilder<'static>) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        self.0.load(DType::F32, &Device::Cpu, &["*"], build).map_err(candle_core::Error::wrap)
    }
}

#[test]
fn streamed_blocks_give_the_same_velocity_to_the_bit() {
    let cfg = wan::Config { num_layers: 5, ..studio::tiny().dit.config };
    let vb = || Files::random(3).var_builder(DType::F32, &Device::Cpu);
    let run = |model: &wan::Model| {
        let input = |shape: &[usize]| {
            let len = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..len).map(|i| ((i as f64 * 0.7).sin()) as f32).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let context =
            model.encode_context(&input(&[9, cfg.text_dim]), &input(&[1, 5, cfg.clip_dim])).unwrap();
        let audio = input(&[1, 5, cfg.audio_window, cfg.audio_blocks, cfg.audio_channels]);
        let audio = model.encode_audio(&audio).unwrap();
        let (latents, y) = (input(&[16, 2, 8, 8]), input(&[20, 2, 8, 8]));
        model.forward(&latents, &y, 500.0, &context, &audio, None).unwrap()
    };
    let bits = |xs: &Tensor| -> Vec<u32> {
        xs.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let resident = bits(&run(&wan::Model::new(&cfg, vb()).unwrap()));
    for resident_blocks in [0, 2, 4] {
        let source = std::sync::Arc::new(Drawn(Files::random(3)));
        let model = wan::Model::with_streamed_blocks(&cfg, vb(), resident_blocks, source).unwrap();
        assert!(bits(&run(&model)) == resident, "{resident_blocks} resident blocks");
    }
}

/// In a process of its own: the most bytes of one pass, or of the video autoencoder.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn one_network_at_work() {
    let case = std::env::var(peak::CASE).unwrap();
    let device = Device::Cpu;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &device).unwrap();
    let vb = || Files::random(3).var_builder(DType::F32, &device);
    let (used, planned) = match case.as_str() {
        "dit" | "dit of a wide hidden layer" => {
            let (cfg, extent) = dit(&case);
            let model = wan::Model::new(&cfg, vb()).unwrap();
            let (t, h, w) = extent.latents;
            let work = |latents: (usize, usize, usize)| {
                let (t, h, w) = latents;
                let context = model.encode_context(
                    &zeros(&[4, cfg.text_dim]),
                    &zeros(&[1, extent.image_rows, cfg.clip_dim]),
                );
                let frames = 4 * t - 3;
                let audio = zeros(&[1, frames, cfg.audio_window, cfg.audio_blocks, cfg.audio_channels]);
                let (context, audio) = (context.unwrap(), model.encode_audio(&audio).unwrap());
                let (latents, y) = (zeros(&[16, t, h, w]), zeros(&[20, t, h, w]));
                peak::of(|| model.forward(&latents, &y, 500.0, &context, &audio, None).unwrap()).1
            };
            work((1, 4, 4)); // what layers keep once they have run
            (work((t, h, w)), cfg.forward_bytes(&extent))
        }
        _ => {
            let cfg = wan_vae::Config { dim: 16, ..studio::tiny().vae.config };
            let vae = wan_vae::Vae::new(&cfg, vb()).unwrap();
            let (height, width) = (384, 512);
            vae.decode(&zeros(&[16, 1, 2, 2])).unwrap();
            vae.encode(&zeros(&[3, 1, 16, 16])).unwrap();
            match case.as_str() {
                "decode" => {
                    let latents = zeros(&[16, 4, height / 8, width / 8]);
                    let video = (3 * 13 * height * width * 4) as u64;
                    let (_, used) = peak::of(|| vae.decode(&latents).unwrap());
                    (used, cfg.decode_cost(height, width).values * 4 + video)
                }
                _ => {
                    let video = zeros(&[3, 13, height, width]);
                    let (_, used) = peak::of(|| vae.encode(&video).unwrap());
                    (used, cfg.encode_cost(height, width).values * 4)
                }
            }
        }
    };
    println!("result: {used} {planned}");
}

/// A DiT whose activations are large beside all else: a thread packs matrices into buffers of 2 MB and more, which are
/// not planned.
fn dit(case: &str) -> (wan::Config, wan::Extent) {
    let ffn_dim = if case == "dit" { 512 } else { 2048 };
    let cfg = wan::Config { dim: 256, ffn_dim, num_heads: 4, num_layers: 3, ..studio::tiny().dit.config };
    let extent =
        wan::Extent { latents: (5, 64, 96), image_rows: 17, persons: 1, dtype: DType::F32, on_cpu: true };
    (cfg, extent)
}

#[test]
fn activations_are_what_they_were_planned_to_be() {
    for case in ["dit", "dit of a wide hidden layer", "decode", "encode"] {
        let result = peak::in_a_process("memory::one_network_at_work", case);
        let (used, planned) = result.split_once(' ').expect("two numbers");
        let (used, planned): (f64, f64) = (used.parse().unwrap(), planned.parse().unwrap());
        println!("{case}: {used} bytes used, {planned} planned, {:.3}", used / planned);
        // Buffers of threads and copies of small tensors are not counted; nothing of the size of a layer may be
        // forgotten.
        assert!((0.8..1.1).contains(&(used / planned)), "{case}: {used} bytes used, {planned} planned");
    }
}
