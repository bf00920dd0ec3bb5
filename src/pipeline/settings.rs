//! A request and a model together: every setting of one generation, with nothing left open.

use super::guidance::Guidance;
use super::infinitetalk::Sampling;
use super::teacache::TeaCache;
use crate::media::audio::Speakers;
use crate::media::image::{Buckets, Rectangle, Size};
use crate::registry::ModelSpec;
use crate::request::{self, GenerateRequest};
use crate::{Error, ErrorKind, Result};

/// Frames per second of every video.
pub const FPS: usize = 25;

/// Every setting of one generation.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The sizes that the video may have; the portrait's shape decides.
    pub buckets: Buckets,
    /// How the windows are sampled; `max_frames` is the request's, or as many as the audio lasts.
    pub sampling: Sampling,
    /// The prompt.
    pub prompt: String,
    /// The negative prompt.
    pub negative_prompt: String,
    /// Whether two voices sound together or in turn.
    pub speakers: Speakers,
    /// Where the two persons are in the portrait; its halves when absent.
    pub boxes: Option<[Rectangle; 2]>,
    /// Seed of the noise.
    pub seed: u64,
    /// LoRAs of the model that are merged, by name.
    pub loras: Vec<String>,
    /// Whether a thumbnail of the first frame is made.
    pub thumbnail: bool,
}

impl Settings {
    /// What `request` says, else its preset, else the size, else the model.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for values that do not fit together, or a preset or size that the model lacks.
    pub fn resolve(request: &GenerateRequest, spec: &ModelSpec) -> Result<Self> {
        let size = Some(request.size.as_str());
        let generation = spec.generation(size, request.preset.map(request::Preset::as_str))?;
        let frames_per_window = request.frames_per_window.unwrap_or(generation.frames_per_window);
        let motion_frames = request.motion_frames.unwrap_or(generation.motion_frames);
        if motion_frames >= frames_per_window {
            let message = format!(
                "`motion_frames` is {motion_frames}, expected fewer than `frames_per_window` ({frames_per_window})"
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let teacache = generation.teacache.map(|t| TeaCache {
            threshold: t.threshold,
            coefficients: t.coefficients,
            warmup_steps: TeaCache::WARMUP_STEPS,
        });
        let sampling = Sampling {
            frames_per_window,
            motion_frames,
            max_frames: request.max_frames.map_or(usize::MAX, |frames| frames as usize),
            num_steps: request.steps.map_or(generation.steps, |steps| steps as usize),
            shift: request.shift.unwrap_or(generation.shift),
            guidance: Guidance {
                text: request.text_guidance.unwrap_or(generation.text_guidance),
                audio: request.audio_guidance.unwrap_or(generation.audio_guidance),
                apg: None,
            },
            color_correction: request.color_correction.unwrap_or(generation.color_correction),
            teacache,
        };
        Ok(Self {
            buckets: spec.size(size)?.buckets.clone(),
            sampling,
            prompt: request.prompt.clone().unwrap_or(generation.prompt),
            negative_prompt: request.negative_prompt.clone().unwrap_or(generation.negative_prompt),
            speakers: match request.speakers {
                request::Speakers::Together => Speakers::Together,
                request::Speakers::InTurn => Speakers::InTurn,
            },
            boxes: request.bbox.map(|boxes| {
                boxes.map(|b| [b.row_min, b.col_min, b.row_max, b.col_max].map(|pixels| pixels as usize))
            }),
            seed: request.seed.map_or_else(|| rand::random::<u32>().into(), u64::from),
            loras: generation.loras,
            thumbnail: request.output.thumbnail,
        })
    }

    /// Whether a guidance pass takes the negative prompt.
    pub fn needs_negative_prompt(&self) -> bool {
        self.sampling.guidance.branches().iter().any(|branch| !branch.has_prompt())
    }

    /// The size of the video for a portrait of this size.
    pub fn video_size(&self, portrait: Size) -> Size {
        self.buckets.choose(portrait).size
    }
}
