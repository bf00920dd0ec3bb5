//! Pieces of work to time, each with a name and a shape: the networks of a model, attention and the video encoder
//! alone, and a whole video, all with weights drawn from a seed.
//!
//! `handler bench` and `cargo bench` (`tests/benches/stages.rs`) time the same stages. A stage serialises to what
//! `tests/benches/peer.py` needs to do the same work in PyTorch.

mod measure;
pub mod parity;
mod roofline;
mod video;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Serialize;
use talkie::Result;
use talkie::device::compute_dtype;
use talkie::media::video::{H264Encoder, I420, Quality};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::nn::{Mask, attention};
use talkie::registry::{ModelSpec, Source};
use talkie::weights::Weights;

pub use measure::{Measured, measure};
pub use roofline::Roofline;
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
    /// The dtype of weights and activations.
    #[serde(skip)]
    pub dtype: DType,
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

/// How much less than the whole model is timed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cut {
    /// Layers of each transformer, at most.
    pub layers: Option<usize>,
    /// Frames of a window, 4n + 1, in place of the model's.
    pub frames: Option<usize>,
}

impl Cut {
    fn apply(&self, model: &ModelSpec) -> ModelSpec {
        let mut model = model.clone();
        if let Some(most) = self.layers {
            let cut = |layers: &mut usize| *layers = most.min(*layers);
            cut(&mut model.dit.config.num_layers);
            cut(&mut model.text_encoder.config.num_layers);
            cut(&mut model.audio_encoder.config.num_hidden_layers);
            // The last layer of CLIP is not used.
            let clip = &mut model.image_encoder.config.vision_layers;
            *clip = (most + 1).min(*clip);
        }
        model
    }
}

/// The stages of a model on `device`, at its default size with a square portrait. A model that is small enough to have
/// random weights has a whole video among them, and layers of the real checkpoints that take no more than seconds on
/// two slow cores.
///
/// # Errors
/// As [`ModelSpec::generation`] and [`ModelSpec::size`].
pub fn stages(model: &ModelSpec, device: &Device, cut: Cut) -> Result<Vec<Stage>> {
    let model = &cut.apply(model);
    let mut video = Video::of(model, SAMPLES, PROMPT_TOKENS)?;
    video.frames_per_window = cut.frames.unwrap_or(video.frames_per_window);
    let Video { height, width, frames_per_window: frames, .. } = video;
    let latents = [16, (frames - 1) / 4 + 1, height / 8, width / 8];
    let dit = model.dit.config.clone();
    let tokens = dit.tokens((latents[1], latents[2], latents[3]));
    let vae = model.vae.config.clone();
    let wav2vec2 = model.audio_encoder.config.clone();
    let umt5 = Work::Umt5 { network: model.text_encoder.config.clone(), tokens: PROMPT_TOKENS };
    let clip = Work::Clip { network: model.image_encoder.config.clone(), height, width };
    let attention = Work::Attention { shape: [1, tokens, dit.num_heads, dit.head_dim()] };
    let (dit_dtype, vae_dtype) = (model.dit.dtype(device), model.vae.dtype(device));
    let stage = |name, dtype, work| Stage { name, dtype, work };
    let mut stages = vec![
        stage("wav2vec2", DType::F32, Work::Wav2vec2 { network: wav2vec2, samples: SAMPLES }),
        stage("umt5", model.text_encoder.dtype(device), umt5),
        stage("clip", model.image_encoder.dtype(device), clip),
        stage("vae_encode", vae_dtype, Work::VaeEncode { network: vae.clone(), frames, height, width }),
        stage("attention", dit_dtype, attention),
        stage("dit_forward", dit_dtype, Work::DitForward { network: dit, latents, tokens: PROMPT_TOKENS }),
        stage("vae_decode", vae_dtype, Work::VaeDecode { network: vae, latents }),
        stage("h264_encode", DType::U8, Work::H264Encode { height, width, frames }),
    ];
    if matches!(model.dit.source, Source::Random(_)) {
        stages.push(stage("video", dit_dtype, Work::Video(video)));
        stages.extend(real().map(|(name, work)| stage(name, compute_dtype(device), work)));
    }
    Ok(stages)
}

/// The steps and passes of the estimate: the preset of the step-distilled LoRA, guided by neither text nor audio.
const ESTIMATED_STEPS: usize = 4;

/// How long a window takes, by the stages of `model` that were timed with `cut`, in `medians` (ms): seconds of work,
/// and seconds of new video. `None` where a stage is missing, or a window makes no new frames.
///
/// # Errors
/// As [`ModelSpec::generation`].
pub fn estimate(model: &ModelSpec, cut: Cut, medians: &BTreeMap<&str, f64>) -> Result<Option<(f64, f64)>> {
    let generation = model.generation(None, None)?;
    let frames = cut.frames.unwrap_or(generation.frames_per_window);
    let motion = generation.motion_frames;
    let median = |name: &str| medians.get(name).map(|ms| ms / 1e3);
    let (Some(dit), Some(encode), Some(decode), true) =
        (median("dit_forward"), median("vae_encode"), median("vae_decode"), motion < frames)
    else {
        return Ok(None);
    };
    // All but the layers is little.
    let layers = model.dit.config.num_layers;
    let whole = layers as f64 / cut.layers.map_or(layers, |most| most.min(layers)) as f64;
    // A window after the first encodes the frames that it takes over; what the portrait says is kept.
    let work = ESTIMATED_STEPS as f64 * dit * whole + encode * motion as f64 / frames as f64 + decode;
    Ok(Some((work, (frames - motion) as f64 / f64::from(talkie::request::FPS))))
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
            Work::Attention { .. } => (1.0, "calls"),
            Work::Wav2vec2 { samples, .. } => (*samples as f64 / 16e3, "s of speech"),
            Work::Umt5 { tokens, .. } => (*tokens as f64, "tokens"),
            Work::Clip { .. } => (1.0, "images"),
            Work::VaeEncode { frames, .. } | Work::H264Encode { frames, .. } => (*frames as f64, "frames"),
            Work::VaeDecode { latents: [_, t, ..], .. } => ((4 * t - 3) as f64, "frames"),
            Work::DitForward { .. } => (1.0, "passes"),
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
        let weights = || weights(self.dtype, device);
        Ok(match self.work.clone() {
            Work::Attention { shape } => {
                let drawn = || Ok::<_, talkie::Error>(randn(&shape, device)?.to_dtype(self.dtype)?);
                let [q, k, v] = [drawn()?, drawn()?, drawn()?];
                let scale = (shape[3] as f64).powf(-0.5);
                Box::new(move || {
                    attention(&q, &k, &v, scale, &Mask::None)?;
                    Ok(())
                })
            }
            Work::Wav2vec2 { network, samples } => {
                let model = wav2vec2::Model::new(&network, weights())?;
                let speech = randn(samples, device)?.to_vec1::<f32>()?;
                let frames = wav2vec2::Model::frames(samples);
                Box::new(move || {
                    model.embed(&speech, frames)?;
                    Ok(())
                })
            }
            Work::Umt5 { network, tokens } => {
                let model = umt5::Model::new(&network, weights())?;
                let ids = token_ids(tokens, network.vocab);
                Box::new(move || {
                    model.encode(&ids)?;
                    Ok(())
                })
            }
            Work::Clip { network, height, width } => {
                let model = clip_vision::Model::new(&network, weights())?;
                let frame = randn((3, 1, height, width), device)?;
                Box::new(move || {
                    model.forward(&model.preprocess(&frame)?)?;
                    Ok(())
                })
            }
            Work::VaeEncode { network, frames, height, width } => {
                let vae = wan_vae::Vae::new(&network, weights())?;
                let video = randn((3, frames, height, width), device)?.clamp(-1f32, 1f32)?;
                Box::new(move || {
                    vae.encode(&video)?;
                    Ok(())
                })
            }
            Work::VaeDecode { network, latents } => {
                let vae = wan_vae::Vae::new(&network, weights())?;
                let latents = randn(&latents, device)?;
                Box::new(move || {
                    vae.decode(&latents)?;
                    Ok(())
                })
            }
            Work::DitForward { network, latents, tokens } => {
                dit_forward(&network, latents, tokens, (weights(), device))?
            }
            Work::H264Encode { height, width, frames } => h264_encode(height, width, frames)?,
            Work::Video(video) => video.prepare(device)?,
        })
    }
}

fn dit_forward(
    cfg: &wan::Config,
    latents: [usize; 4],
    tokens: usize,
    (weights, device): (VarBuilder, &Device),
) -> Result<Run> {
    let [_, t, h, w] = latents;
    let model = wan::Model::new(cfg, weights)?;
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

fn weights(dtype: DType, device: &Device) -> VarBuilder<'static> {
    Weights::random(SEED).var_builder(dtype, device)
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
    use std::collections::BTreeSet;

    use talkie::registry::Registry;

    use super::*;

    fn of_model(name: &str, cut: Cut) -> Vec<Stage> {
        stages(Registry::built_in().unwrap().model(name).unwrap(), &Device::Cpu, cut).unwrap()
    }

    fn tiny() -> Vec<Stage> {
        of_model("tiny", Cut::default())
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
    fn a_model_of_full_size_is_timed_by_its_networks_and_can_be_cut() {
        let whole = of_model("infinitetalk", Cut::default());
        let names: Vec<_> = whole.iter().map(|stage| stage.name).collect();
        assert!(
            names.contains(&"dit_forward") && !names.iter().any(|name| name.contains("video")),
            "{names:?}"
        );
        assert!(whole.iter().any(|stage| stage.shape() == "L=33600, dim 5120 × 40"));
        let cut = of_model("infinitetalk", Cut { layers: Some(1), frames: Some(5) });
        assert!(cut.iter().any(|stage| stage.shape() == "L=3200, dim 5120 × 1"));
        assert!(cut.iter().any(|stage| stage.shape() == "L=257, dim 1280 × 1"));
    }

    #[test]
    fn a_window_is_estimated_from_its_parts() {
        let registry = Registry::built_in().unwrap();
        let model = registry.model("infinitetalk").unwrap();
        let medians = BTreeMap::from([("dit_forward", 300.0), ("vae_encode", 900.0), ("vae_decode", 2000.0)]);
        let cut = Cut { layers: Some(4), frames: None };
        let (work, video) = estimate(model, cut, &medians).unwrap().unwrap();
        // Four passes of ten times four layers; 9 of 81 frames encoded; 72 new frames at 25 a second.
        assert!(
            (work - (4.0 * 3.0 + 0.1 + 2.0)).abs() < 1e-9 && (video - 2.88).abs() < 1e-9,
            "{work} {video}"
        );
        assert!(estimate(model, cut, &BTreeMap::new()).unwrap().is_none());
        let short = Cut { layers: None, frames: Some(5) };
        assert!(estimate(model, short, &medians).unwrap().is_none());
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
}
