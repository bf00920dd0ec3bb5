//! A whole video: every network, every window, step and pass.

use candle_core::{DType, Device};
use serde::{Serialize, Serializer, ser::SerializeMap};
use talkie::media::image::{Size, frames_to_rgb};
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::pipeline::{
    Cancel, Conditioning, Control, Guidance, Networks, Reference, Sampling, generate_windows,
};
use talkie::registry::{Generation, ModelSpec};

use super::{Result, Run, randn, token_ids, weights};

/// A video of random speech and a random portrait.
#[derive(Clone, Debug)]
pub struct Video {
    model: ModelSpec,
    generation: Generation,
    /// Samples of speech at 16 kHz.
    pub samples: usize,
    /// Ids of the prompt, and of the negative prompt.
    pub tokens: usize,
    /// Frames of the video.
    pub frames: usize,
    /// Frames of a window.
    pub frames_per_window: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

impl Serialize for Video {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { model, generation, .. } = self;
        let networks = serde_json::json!({
            "dit": model.dit.config,
            "vae": model.vae.config,
            "clip": model.image_encoder.config,
            "wav2vec2": model.audio_encoder.config,
            "umt5": model.text_encoder.config,
        });
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("networks", &networks)?;
        map.serialize_entry("samples", &self.samples)?;
        map.serialize_entry("tokens", &self.tokens)?;
        map.serialize_entry("frames", &self.frames)?;
        map.serialize_entry("frames_per_window", &self.frames_per_window)?;
        map.serialize_entry("motion_frames", &generation.motion_frames)?;
        map.serialize_entry("steps", &generation.steps)?;
        map.serialize_entry("shift", &generation.shift)?;
        map.serialize_entry("text_guidance", &generation.text_guidance)?;
        map.serialize_entry("audio_guidance", &generation.audio_guidance)?;
        map.serialize_entry("color_correction", &generation.color_correction)?;
        map.serialize_entry("height", &self.height)?;
        map.serialize_entry("width", &self.width)?;
        map.end()
    }
}

impl Video {
    /// A video of `model` at its default size and settings, with a square portrait.
    pub(super) fn of(model: &ModelSpec, samples: usize, tokens: usize) -> Result<Self> {
        let generation = model.generation(None, None)?;
        let square = Size { height: 1, width: 1 };
        let Size { height, width } = model.size(None)?.buckets.choose(square).size;
        let frames = wav2vec2::Model::frames(samples);
        let frames_per_window = generation.frames_per_window;
        Ok(Self {
            model: model.clone(),
            generation,
            samples,
            tokens,
            frames,
            frames_per_window,
            height,
            width,
        })
    }

    pub(super) fn shape(&self) -> String {
        let Self { frames, height, width, generation, .. } = self;
        let passes = guidance(generation).branches().len();
        format!("{frames}×{height}×{width}, {} steps × {passes} passes", generation.steps)
    }

    pub(super) fn prepare(self, device: &Device) -> Result<Run> {
        let Self { model, generation, .. } = &self;
        let dit = wan::Model::new(&model.dit.config, weights(model.dit.dtype(device), device))?;
        let vae = wan_vae::Vae::new(&model.vae.config, weights(model.vae.dtype(device), device))?;
        let clip_weights = weights(model.image_encoder.dtype(device), device);
        let clip = clip_vision::Model::new(&model.image_encoder.config, clip_weights)?;
        let wav2vec2 = wav2vec2::Model::new(&model.audio_encoder.config, weights(DType::F32, device))?;
        let umt5_weights = weights(model.text_encoder.dtype(device), device);
        let umt5 = umt5::Model::new(&model.text_encoder.config, umt5_weights)?;
        let speech = randn(self.samples, device)?.to_vec1::<f32>()?;
        let portrait = randn((3, 1, self.height, self.width), device)?.clamp(-1f32, 1f32)?;
        let ids = token_ids(self.tokens, model.text_encoder.config.vocab);
        let sampling = Sampling {
            frames_per_window: self.frames_per_window,
            motion_frames: generation.motion_frames,
            max_frames: self.frames,
            num_steps: generation.steps,
            shift: generation.shift,
            guidance: guidance(generation),
            color_correction: generation.color_correction,
            teacache: None,
        };
        let (frames, device) = (self.frames, device.clone());
        Ok(Box::new(move || {
            let context = umt5.encode(&ids)?;
            let image_embeds = Reference::image_embeds(&clip, &portrait)?;
            let window = sampling.frames_per_window;
            let reference = Reference::encode(&vae, portrait.clone(), image_embeds, window)?;
            let conditioning = Conditioning {
                references: vec![(0, reference)],
                audio_embeds: vec![wav2vec2.embed(&speech, frames)?],
                negative_context: Some(context.clone()),
                context,
                masks: None,
            };
            let networks = Networks { dit: &dit, vae: &vae };
            let mut control = Control { cancel: &Cancel::default(), progress: &mut |_| {} };
            let mut noise = |_, shape| randn(shape, &device);
            let mut sink = |video| {
                frames_to_rgb(&video)?;
                Ok(())
            };
            generate_windows(networks, &conditioning, &sampling, &mut noise, &mut control, &mut sink)?;
            Ok(())
        }))
    }
}

fn guidance(generation: &Generation) -> Guidance {
    Guidance { text: generation.text_guidance, audio: generation.audio_guidance, apg: None }
}
