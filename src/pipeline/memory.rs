//! How a generation fits into memory, decided before anything is read.
//!
//! What is needed follows from the weights' headers ([`Weights`]) and from the request's size ([`Activations`]); what
//! there is, from the device, the host, or a limit that was given ([`Budget`]). [`MemoryPlan::choose`] takes the first
//! rung of the ladder that fits:
//!
//! 1. everything stays on the device, so that the next video reads nothing;
//! 2. the encoders of audio, text and image leave the device as soon as they have been heard;
//! 3. of the DiT's blocks, the last ones are brought to the device one by one, each time they are needed;
//! 4. the request is refused, with what it needs and what there is.
//!
//! On a GPU, what leaves is kept in host memory where that has room. On the CPU the two are the same memory, so what
//! leaves is read again when it is needed.

use candle_core::Device;

use super::load;
use super::settings::Settings;
use crate::device::{self, Capacity, Processor};
use crate::media::image::Size;
use crate::models::wan;
use crate::registry::ModelSpec;
use crate::{Error, ErrorKind, Result};

/// [`Error::reason`] of a video that was refused before anything was read.
pub const MEMORY_PLAN: &str = "MEMORY_PLAN";

/// Bytes of one f32.
const F32: u64 = 4;

/// Blocks that are on the device while blocks are brought there: the one at work and the next.
pub(super) const BLOCKS_IN_FLIGHT: usize = 2;

/// What of a request decides how much memory and time it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Height and width of the video in pixels.
    pub size: Size,
    /// Frames of the video.
    pub frames: usize,
    /// One or two persons.
    pub persons: usize,
}

/// Bytes that a generation needs beside the weights, at its peak in each of its two parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// Embedding the voices, encoding prompts and portrait.
    pub encode: u64,
    /// Denoising and decoding a window.
    pub window: u64,
}

impl Activations {
    /// Those of `extent` under `settings`, on a processor of this kind.
    pub fn of(spec: &ModelSpec, settings: &Settings, extent: Extent, on: Processor) -> Self {
        let Extent { size: Size { height, width }, frames, persons } = extent;
        let sampling = &settings.sampling;
        let window = sampling.frames_per_window;
        let stride = spec.vae.config.spatial_stride();
        let latent_frames = (window - 1) / spec.vae.config.temporal_stride() + 1;
        let dit = &spec.dit.config;
        let of_dit = wan::Extent {
            latents: (latent_frames, height / stride, width / stride),
            image_rows: spec.image_encoder.config.rows(),
            persons,
            dtype: on.dtype(spec.dit.stored_dtype()),
            on_cpu: on == Processor::Cpu,
        };
        let branches = sampling.guidance.branches();
        let prompts = 1 + usize::from(settings.needs_negative_prompt());

        let video = (3 * window * height * width) as u64 * F32;
        let embeds = &spec.audio_encoder.config;
        let row = (embeds.hidden_size * frames.max(window)) as u64 * F32;
        let voices = persons as u64 * row * embeds.num_hidden_layers as u64;
        let text = &spec.text_encoder.config;
        let scores = (text.num_heads * dit.text_len * dit.text_len) as u64 * F32;
        let rows = (dit.text_len * (8 * text.dim + 3 * text.dim_ffn)) as u64 * F32;
        // Reference, latents and the condition that is made of both stay, and are no more than the reference's frame
        // once per latent frame.
        let scene = (latent_frames * 3 * height * width) as u64 * F32;
        let kept = voices + scene;

        let encode_video = spec.vae.config.encode_cost(height, width).values * F32 + 2 * video;
        let encode = kept + encode_video.max(AUDIO_ROWS * row).max(3 * scores + rows);
        let caches = match &sampling.teacache {
            Some(_) => branches.len() as u64 * dit.token_bytes(&of_dit),
            None => 0,
        };
        let denoise = caches + dit.forward_bytes(&of_dit);
        let decode = spec.vae.config.decode_cost(height, width).values * F32 + video;
        // Frames as they were decoded, as they are matched, and as they go out.
        let matched = 3 * video;
        let window = kept + dit.kept_bytes(&of_dit, prompts) + denoise.max(decode).max(matched);
        Self { encode, window }
    }

    /// The most of the two.
    pub fn most(&self) -> u64 {
        self.encode.max(self.window)
    }
}

/// Tensors of (frames, width) that embedding a voice holds at once (`wav2vec2::Model::embed`).
const AUDIO_ROWS: u64 = 12;

/// Bytes of the weights on the device. A network that is not needed has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weights {
    /// The audio encoder.
    pub audio_encoder: u64,
    /// The text encoder; 0 where the prompts' embeddings are stored.
    pub text_encoder: u64,
    /// The image encoder.
    pub image_encoder: u64,
    /// The video autoencoder.
    pub vae: u64,
    /// The DiT, blocks included.
    pub dit: u64,
    /// One of its blocks.
    pub block: u64,
    /// How many it has.
    pub blocks: usize,
}

impl Weights {
    /// Those of the model `spec`, whatever of it is installed: they follow from its dimensions.
    ///
    /// # Errors
    /// [`ErrorKind::Inference`] for dimensions that a network does not implement.
    pub fn of(spec: &ModelSpec, on: Processor) -> Result<Self> {
        load::weights_of(spec, on)
    }

    fn encoders(&self) -> [u64; 3] {
        [self.audio_encoder, self.text_encoder, self.image_encoder]
    }

    /// All networks.
    pub fn total(&self) -> u64 {
        self.encoders().iter().sum::<u64>() + self.vae + self.dit
    }

    /// VAE and DiT with `resident` blocks, and those in flight where that is not all.
    fn generator(&self, resident: usize) -> u64 {
        if resident >= self.blocks {
            return self.vae + self.dit;
        }
        let rest = self.dit.saturating_sub(self.block * self.blocks as u64);
        self.vae + rest + self.block * (resident + BLOCKS_IN_FLIGHT) as u64
    }
}

/// Bytes that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// On the device that computes.
    pub device: u64,
    /// On the host, where that is another memory.
    pub host: Option<u64>,
}

impl Budget {
    /// What `device` and host have, and no more than `limit` of the device.
    ///
    /// # Errors
    /// `DeviceUnavailable` when the device does not tell.
    pub fn of(device: &Device, limit: Option<u64>) -> Result<Self> {
        let Capacity { device, host } = device::capacity(device)?;
        Ok(Self { device, host }.within(limit))
    }

    /// The same, with no more than `limit` of the device.
    pub fn within(self, limit: Option<u64>) -> Self {
        Self { device: limit.map_or(self.device, |limit| self.device.min(limit)), ..self }
    }

    /// What a GPU of `memory` bytes has while nothing runs there, beside `host` bytes of the host.
    pub fn of_gpu(memory: u64, host: u64) -> Self {
        Self { device: memory.saturating_sub(device::GPU_RESERVE), host: Some(host) }
    }
}

/// Where the encoders are when they are not at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the device.
    Device,
    /// In host memory.
    Host,
    /// Nowhere: they are read when they are needed.
    Files,
}

/// A rung of the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Everything stays on the device.
    Resident,
    /// The encoders leave it.
    EncodersLeave,
    /// They do, and blocks of the DiT are brought there one by one.
    BlocksStreamed,
}

impl Rung {
    /// As it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::EncodersLeave => "encoders_leave",
            Self::BlocksStreamed => "blocks_streamed",
        }
    }
}

/// How a generation fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Where the encoders are when they are not at work.
    pub encoders: Place,
    /// Blocks of the DiT that stay on the device.
    pub resident_blocks: usize,
    /// The most bytes in use on the device.
    pub device_bytes: u64,
    /// The most bytes of weights in host memory, where that is another one.
    pub host_bytes: u64,
    /// What it was chosen for.
    pub weights: Weights,
    /// What it was chosen for.
    pub activations: Activations,
    /// What it was chosen for.
    pub budget: Budget,
}

impl MemoryPlan {
    /// The first rung that fits.
    ///
    /// # Errors
    /// `OutOfMemory` naming what is needed at least and what there is.
    pub fn choose(weights: Weights, activations: Activations, budget: Budget) -> Result<Self> {
        let working = activations.most();
        let plan = |encoders, resident_blocks, device_bytes, host_bytes| Self {
            encoders,
            resident_blocks,
            device_bytes,
            host_bytes,
            weights,
            activations,
            budget,
        };
        let blocks = weights.blocks;
        let everything = weights.total() + working;
        if everything <= budget.device {
            return Ok(plan(Place::Device, blocks, everything, 0));
        }
        let encoders = weights.encoders();
        let largest = encoders.into_iter().max().unwrap_or(0) + working;
        let without_encoders = |resident| largest.max(weights.generator(resident) + working);
        let fits = (0..=blocks).rev().find(|&resident| without_encoders(resident) <= budget.device);
        let Some(resident) = fits else {
            return Err(refusal("device", without_encoders(0), budget.device));
        };
        let streamed = weights.block * (blocks - resident) as u64;
        let kept = encoders.iter().sum::<u64>();
        let (place, host_bytes) = match budget.host {
            None => (Place::Files, 0),
            Some(host) if streamed > host => return Err(refusal("host", streamed, host)),
            Some(host) if streamed + kept <= host => (Place::Host, streamed + kept),
            Some(_) => (Place::Files, streamed),
        };
        Ok(plan(place, resident, without_encoders(resident), host_bytes))
    }

    /// Where on the ladder it is.
    pub fn rung(&self) -> Rung {
        match (self.encoders, self.resident_blocks < self.weights.blocks) {
            (_, true) => Rung::BlocksStreamed,
            (Place::Device, false) => Rung::Resident,
            (_, false) => Rung::EncodersLeave,
        }
    }

    /// Bytes of the device that networks may take.
    pub fn for_weights(&self) -> u64 {
        self.budget.device.saturating_sub(self.activations.most())
    }
}

fn refusal(memory: &str, needed: u64, available: u64) -> Error {
    let message = format!(
        "this video needs {needed} bytes of {memory} memory, and {available} can be used ({:.1} of {:.1} GB)",
        available as f64 / 1e9,
        needed as f64 / 1e9
    );
    let hint = "ask for 480p or for fewer `frames_per_window`, or take a GPU with more memory; `handler estimate` \
        says what fits where";
    Error::new(ErrorKind::OutOfMemory, message).with_hint(hint).with_reason(MEMORY_PLAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    /// Roughly the published networks in bf16.
    fn weights() -> Weights {
        Weights {
            audio_encoder: GB / 2,
            text_encoder: 11 * GB,
            image_encoder: GB,
            vae: GB / 2,
            dit: 38 * GB,
            block: 9 * GB / 10,
            blocks: 40,
        }
    }

    fn choose(device: u64, host: Option<u64>) -> Result<MemoryPlan> {
        let activations = Activations { encode: 2 * GB, window: 6 * GB };
        MemoryPlan::choose(weights(), activations, Budget { device: device * GB, host: host.map(|h| h * GB) })
    }

    #[test]
    fn each_rung_is_taken_where_the_one_before_does_not_fit() {
        let plan = choose(57, Some(100)).unwrap();
        assert_eq!((plan.rung(), plan.encoders, plan.device_bytes), (Rung::Resident, Place::Device, 57 * GB));
        let plan = choose(56, Some(100)).unwrap();
        assert_eq!(
            (plan.rung(), plan.encoders, plan.host_bytes),
            (Rung::EncodersLeave, Place::Host, 12_500_000_000)
        );
        assert_eq!(plan.device_bytes, 44_500_000_000);
        let plan = choose(44, Some(100)).unwrap();
        // 8.5 GB, and 0.9 for each of 37 blocks and of two in flight.
        assert_eq!((plan.rung(), plan.resident_blocks), (Rung::BlocksStreamed, 37));
        assert!(plan.device_bytes <= 44 * GB);
        let plan = choose(17, Some(100)).unwrap();
        assert_eq!(plan.device_bytes, 17 * GB, "the text encoder decides");
    }

    #[test]
    fn what_fits_nowhere_is_refused_with_both_numbers() {
        let error = choose(16, Some(100)).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::OutOfMemory, Some(MEMORY_PLAN)));
        let message = error.to_string();
        assert!(message.contains("17000000000") && message.contains("16000000000"), "{message}");
        assert!(error.hint().unwrap().contains("480p"));
        let error = choose(20, Some(10)).unwrap_err();
        assert!(error.to_string().contains("host memory"), "{error}");
    }

    #[test]
    fn what_leaves_goes_where_there_is_room() {
        assert_eq!(choose(50, Some(12)).unwrap().encoders, Place::Files);
        assert_eq!(choose(50, None).unwrap().encoders, Place::Files, "one memory");
        let streamed = choose(20, None).unwrap();
        assert_eq!((streamed.rung(), streamed.host_bytes), (Rung::BlocksStreamed, 0));
    }

    #[test]
    fn fewer_bytes_never_take_more_of_the_device() {
        let mut before = u64::MAX;
        for device in (17..60).rev() {
            let plan = choose(device, None).unwrap();
            assert!(plan.device_bytes <= device * GB && plan.device_bytes <= before, "{plan:?}");
            before = plan.device_bytes;
        }
    }
}
