//! Pieces of work to time, each with a name and a shape: the networks of a model, attention and the video encoder
//! alone, and a whole video, all with weights drawn from a seed.
//!
//! `handler bench` and `cargo bench` (`tests/benches/stages.rs`) time the same stages. A stage serialises to what
//! `tests/benches/peer.py` needs to do the same work in PyTorch.

mod video;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Serialize;
use std::time::{Duration, Instant};
use talkie::Result;
use talkie::media::video::{H264Encoder, I420, Quality};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::nn::{Mask, attention};
use talkie::registry::ModelSpec;
use talkie::weights::Weights;

pub use video::Video;

/// Rows of CLIP's output: a class token and 16 × 16 patches.
const IMAGE_ROWS: usize = 257;
/// Text rows of a prompt of a sentence or two.
const PROMPT_TOKENS: usize = 64;
/// Speech in the stages of the audio encoder: four seconds at 16 kHz, as long as the shipped example.
const SAMPLES: usize = 4 * 16_000;
/// A timestep in the middle of a generation.
const TIMESTEP: f64 = 857.3;
/// Any seed: speed does not depend on it.
const SEED: u64 = 42;

/// A named piece of work.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// Unique among the stages of a model. With `real_` in front, a layer has the width of the real checkpoint.
    pub name: &'static str,
    /// What is done, and on which shapes.
    #[serde(flatten)]
    pub work: Work,
}

/// What a stage does. Configs are those of the networks; sizes are in elements.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "there are a dozen of them")]
pub enum Work {
    /// Softmax attention over q, k, v (B, L, N, D), without a mask.
    Attention {
        /// B, L, N, D.
        shape: [usize; 4],
    },
    /// Speech to features of all layers, at 25 per second.
    Wav2vec2 {
        /// The network.
        network: wav2vec2::Config,
        /// Samples at 16 kHz.
        samples: usize,
    },
    /// Token ids to text rows.
    Umt5 {
        /// The network.
        network: umt5::Config,
        /// How many ids.
        tokens: usize,
    },
    /// A portrait to image rows, resizing included.
    Clip {
        /// The network.
        network: clip_vision::Config,
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
    },
    /// A video to latents.
    VaeEncode {
        /// The network.
        network: wan_vae::Config,
        /// Frames, 4n+1.
        frames: usize,
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
    },
    /// Latents to a video.
    VaeDecode {
        /// The network.
        network: wan_vae::Config,
        /// 16, T, h, w.
        latents: [usize; 4],
    },
    /// One pass of the DiT: tokens, blocks, head. Keys and values of text, image and audio are there already.
    DitForward {
        /// The network.
        network: wan::Config,
        /// 16, T, h, w.
        latents: [usize; 4],
        /// Text rows before padding.
        tokens: usize,
    },
    /// RGB frames to H.264, colour conversion included.
    H264Encode {
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
        /// How many frames.
        frames: usize,
    },
    /// Speech, prompt and portrait to RGB frames, without encoding them.
    Video(Video),
}

/// Something to do again and again.
pub type Run = Box<dyn FnMut() -> Result<()>>;

/// The stages of a model, at its default size with a square portrait, and layers of the real checkpoints that take
/// no more than seconds on two slow cores.
///
/// # Errors
/// As [`ModelSpec::generation`] and [`ModelSpec::size`].
pub fn stages(model: &ModelSpec) -> Result<Vec<Stage>> {
    let video = Video::of(model, SAMPLES, PROMPT_TOKENS)?;
    let Video { height, width, frames_per_window: frames, .. } = video;
    let latents = [16, (frames - 1) / 4 + 1, height / 8, width / 8];
    let dit = model.dit.config.clone();
    let tokens = dit.tokens((latents[1], latents[2], latents[3]));
    let vae = model.vae.config.clone();
    let wav2vec2 = model.audio_encoder.config.clone();
    let own = [
        ("wav2vec2", Work::Wav2vec2 { network: wav2vec2, samples: SAMPLES }),
        ("umt5", Work::Umt5 { network: model.text_encoder.config.clone(), tokens: PROMPT_TOKENS }),
        ("clip", Work::Clip { network: model.image_encoder.config.clone(), height, width }),
        ("vae_encode", Work::VaeEncode { network: vae.clone(), frames, height, width }),
        ("attention", Work::Attention { shape: [1, tokens, dit.num_heads, dit.head_dim()] }),
        ("dit_forward", Work::DitForward { network: dit, latents, tokens: PROMPT_TOKENS }),
        ("vae_decode", Work::VaeDecode { network: vae, latents }),
        ("h264_encode", Work::H264Encode { height, width, frames }),
        ("video", Work::Video(video)),
    ];
    Ok(own.into_iter().chain(real()).map(|(name, work)| Stage { name, work }).collect())
}

/// Layers as wide as those of the real checkpoints. The DiT has the width and heads of Wan's 1.3B model and two of
/// its layers: the 14B model's weights of a single layer would take most of the time to draw.
fn real() -> [(&'static str, Work); 6] {
    let dit = wan::Config {
        dim: 1536,
        num_heads: 12,
        ffn_dim: 8960,
        num_layers: 2,
        ..wan::Config::infinitetalk_14b()
    };
    let vae = wan_vae::Config::wan2_1();
    [
        ("real_attention", Work::Attention { shape: [1, 2048, 12, 128] }),
        ("real_wav2vec2", Work::Wav2vec2 { network: wav2vec2::Config::chinese_base(), samples: SAMPLES }),
        ("real_vae_encode", Work::VaeEncode { network: vae.clone(), frames: 5, height: 128, width: 128 }),
        ("real_vae_decode", Work::VaeDecode { network: vae, latents: [16, 2, 16, 16] }),
        (
            "real_dit_forward",
            Work::DitForward { network: dit, latents: [16, 5, 28, 28], tokens: PROMPT_TOKENS },
        ),
        ("real_h264_encode", Work::H264Encode { height: 640, width: 640, frames: 25 }),
    ]
}

impl Stage {
    /// The shapes in a few words.
    pub fn shape(&self) -> String {
        match &self.work {
            Work::Attention { shape: [_, l, n, d] } => format!("L={l} N={n} D={d}"),
            Work::Wav2vec2 { network, samples } => {
                format!(
                    "{:.1} s, dim {} × {}",
                    *samples as f64 / 16e3,
                    network.hidden_size,
                    network.num_hidden_layers
                )
            }
            Work::Umt5 { network, tokens } => {
                format!("L={tokens}, dim {} × {}", network.dim, network.num_layers)
            }
            Work::Clip { network, .. } => {
                format!("L={IMAGE_ROWS}, dim {} × {}", network.vision_dim, network.vision_layers - 1)
            }
            Work::VaeEncode { network, frames, height, width } => {
                format!("{frames}×{height}×{width}, dim {}", network.dim)
            }
            Work::VaeDecode { network, latents: [_, t, h, w] } => {
                format!("{}×{}×{}, dim {}", 4 * t - 3, 8 * h, 8 * w, network.dim)
            }
            Work::DitForward { network, .. } => {
                format!("L={}, dim {} × {}", self.dit_tokens(), network.dim, network.num_layers)
            }
            Work::H264Encode { height, width, frames } => format!("{frames}×{height}×{width}"),
            Work::Video(video) => video.shape(),
        }
    }

    /// How much is done in one run, and in which unit.
    pub fn amount(&self) -> (f64, &'static str) {
        match &self.work {
            Work::Attention { shape: [b, l, n, d] } => {
                (4e-9 * (b * n * d) as f64 * (*l as f64).powi(2), "GFLOP")
            }
            Work::Wav2vec2 { samples, .. } => (*samples as f64 / 16e3, "s of speech"),
            Work::Umt5 { tokens, .. } => (*tokens as f64, "tokens"),
            Work::Clip { .. } => (1.0, "images"),
            Work::VaeEncode { frames, .. } | Work::H264Encode { frames, .. } => (*frames as f64, "frames"),
            Work::VaeDecode { latents: [_, t, ..], .. } => ((4 * t - 3) as f64, "frames"),
            Work::DitForward { network, .. } => {
                (1e-9 * network.forward_flops(self.dit_tokens(), IMAGE_ROWS), "GFLOP")
            }
            Work::Video(video) => (video.frames as f64, "frames"),
        }
    }

    /// Tokens of the DiT's latents; 0 for other work.
    fn dit_tokens(&self) -> usize {
        match &self.work {
            Work::DitForward { network, latents: [_, t, h, w], .. } => network.tokens((*t, *h, *w)),
            _ => 0,
        }
    }

    /// Builds the networks and inputs of the stage on `device`, and returns what is to be timed.
    ///
    /// # Errors
    /// [`talkie::ErrorKind::Inference`] when a network cannot be built from its config.
    pub fn prepare(&self, device: &Device) -> Result<Run> {
        Ok(match self.work.clone() {
            Work::Attention { shape } => {
                let [q, k, v] = [randn(&shape, device)?, randn(&shape, device)?, randn(&shape, device)?];
                let scale = (shape[3] as f64).powf(-0.5);
                Box::new(move || {
                    attention(&q, &k, &v, scale, &Mask::None)?;
                    Ok(())
                })
            }
            Work::Wav2vec2 { network, samples } => {
                let model = wav2vec2::Model::new(&network, weights(device))?;
                let speech = randn(samples, device)?.to_vec1::<f32>()?;
                let frames = wav2vec2::Model::frames(samples);
                Box::new(move || {
                    model.embed(&speech, frames)?;
                    Ok(())
                })
            }
            Work::Umt5 { network, tokens } => {
                let model = umt5::Model::new(&network, weights(device))?;
                let ids = token_ids(tokens, network.vocab);
                Box::new(move || {
                    model.encode(&ids)?;
                    Ok(())
                })
            }
            Work::Clip { network, height, width } => {
                let model = clip_vision::Model::new(&network, weights(device))?;
                let frame = randn((3, 1, height, width), device)?;
                Box::new(move || {
                    model.forward(&model.preprocess(&frame)?)?;
                    Ok(())
                })
            }
            Work::VaeEncode { network, frames, height, width } => {
                let vae = wan_vae::Vae::new(&network, weights(device))?;
                let video = randn((3, frames, height, width), device)?.clamp(-1f32, 1f32)?;
                Box::new(move || {
                    vae.encode(&video)?;
                    Ok(())
                })
            }
            Work::VaeDecode { network, latents } => {
                let vae = wan_vae::Vae::new(&network, weights(device))?;
                let latents = randn(&latents, device)?;
                Box::new(move || {
                    vae.decode(&latents)?;
                    Ok(())
                })
            }
            Work::DitForward { network, latents, tokens } => dit_forward(&network, latents, tokens, device)?,
            Work::H264Encode { height, width, frames } => h264_encode(height, width, frames)?,
            Work::Video(video) => video.prepare(device)?,
        })
    }
}

fn dit_forward(cfg: &wan::Config, latents: [usize; 4], tokens: usize, device: &Device) -> Result<Run> {
    let [_, t, h, w] = latents;
    let model = wan::Model::new(cfg, weights(device))?;
    let prompt = randn((tokens, cfg.text_dim), device)?;
    let context = model.encode_context(&prompt, &randn((1, IMAGE_ROWS, cfg.clip_dim), device)?)?;
    let frames = cfg.vae_scale * (t - 1) + 1;
    let audio = randn((1, frames, cfg.audio_window, cfg.audio_blocks, cfg.audio_channels), device)?;
    let audio = model.encode_audio(&audio)?;
    let latents = randn(&latents, device)?;
    let y = randn((cfg.in_dim - cfg.out_dim, t, h, w), device)?;
    Ok(Box::new(move || {
        model.forward(&latents, &y, TIMESTEP, &context, &audio, None)?;
        Ok(())
    }))
}

fn h264_encode(height: usize, width: usize, frames: usize) -> Result<Run> {
    // A smooth picture that moves by a pixel a frame: a codec's easy case, as a talking head is.
    let value = |f: usize, i: usize| (((i / 3 % width + f) * 255 / width) ^ (i / 3 / width / 8)) as u8;
    let pictures: Vec<Vec<u8>> =
        (0..frames).map(|f| (0..height * width * 3).map(|i| value(f, i)).collect()).collect();
    Ok(Box::new(move || {
        let mut encoder = H264Encoder::new(width, height, Quality::default())?;
        let mut picture = I420::new(width, height)?;
        for rgb in &pictures {
            picture.convert_from_rgb(rgb)?;
            encoder.encode(&picture)?;
        }
        Ok(())
    }))
}

/// The milliseconds of each of `runs` runs on `device`, after one that is not counted. Work that the device does in
/// the background is waited for before the clock stops.
///
/// # Errors
/// What the work returns.
pub fn measure(run: &mut Run, runs: usize, device: &Device) -> Result<Vec<f64>> {
    let mut once = || -> Result<Duration> {
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        Ok(start.elapsed())
    };
    once()?;
    (0..runs).map(|_| Ok(once()?.as_secs_f64() * 1e3)).collect()
}

/// Weights in the dtype that `device` computes in.
fn weights(device: &Device) -> VarBuilder<'static> {
    Weights::random(SEED).var_builder(talkie::device::compute_dtype(device), device)
}

/// Normally distributed values: the work takes as long for any.
fn randn(shape: impl Into<candle_core::Shape>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(DType::F32)?)
}

fn token_ids(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|i| (i % vocab) as u32).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::rc::Rc;

    use talkie::registry::Registry;

    use super::*;

    fn tiny() -> Vec<Stage> {
        stages(Registry::built_in().unwrap().model("tiny").unwrap()).unwrap()
    }

    fn of(name: &str) -> Stage {
        tiny().into_iter().find(|stage| stage.name == name).unwrap()
    }

    #[test]
    fn names_are_unique_and_every_kind_of_work_is_there() {
        let stages = tiny();
        let names: BTreeSet<_> = stages.iter().map(|stage| stage.name).collect();
        assert_eq!(names.len(), stages.len());
        let kinds: BTreeSet<_> = stages
            .iter()
            .map(|stage| std::mem::discriminant(&stage.work))
            .map(|d| format!("{d:?}"))
            .collect();
        assert_eq!(kinds.len(), 9);
    }

    #[test]
    fn a_description_holds_what_the_peer_needs() {
        let value = serde_json::to_value(of("vae_decode")).unwrap();
        assert_eq!(value["kind"], "vae_decode");
        assert_eq!(value["latents"][0], 16);
        assert_eq!(value["network"]["dim_mult"][3], 4);
        let video = serde_json::to_value(of("video")).unwrap();
        for key in
            ["frames", "frames_per_window", "motion_frames", "steps", "text_guidance", "color_correction"]
        {
            assert!(video[key].is_number(), "{key}: {video}");
        }
        for network in ["dit", "vae", "clip", "wav2vec2", "umt5"] {
            assert!(video["networks"][network].is_object(), "{network}");
        }
    }

    #[test]
    fn operations_are_counted() {
        let stage = |work| Stage { name: "", work };
        // Two products of 2 · 10 · 10 · 4 operations for each of 3 heads.
        let (gflop, unit) = stage(Work::Attention { shape: [1, 10, 3, 4] }).amount();
        assert_eq!(unit, "GFLOP");
        assert!((gflop - 4800e-9).abs() < 1e-12);
        let network = wan::Config {
            dim: 8,
            ffn_dim: 16,
            num_layers: 2,
            text_len: 5,
            context_tokens: 3,
            ..wan::Config::infinitetalk_14b()
        };
        let dit = stage(Work::DitForward { network, latents: [16, 2, 4, 6], tokens: 5 });
        // 2 · (2 · 12 tokens · (8 · 8² + 2 · 8 · 16) + 4 · 12 · (12 + 5 + 257 + 3) · 8)
        assert!((dit.amount().0 - 249_600e-9).abs() < 1e-12, "{}", dit.amount().0);
    }

    #[test]
    fn small_stages_run() {
        for name in ["wav2vec2", "umt5", "clip", "attention", "dit_forward", "h264_encode"] {
            of(name)
                .prepare(&Device::Cpu)
                .and_then(|mut run| run())
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn the_first_run_is_not_counted() {
        let calls = Rc::new(Cell::new(0));
        let counter = Rc::clone(&calls);
        let mut run: Run = Box::new(move || {
            counter.set(counter.get() + 1);
            Ok(())
        });
        assert_eq!(measure(&mut run, 3, &Device::Cpu).unwrap().len(), 3);
        assert_eq!(calls.get(), 4);
    }
}
