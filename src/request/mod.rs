//! What a caller may ask for: every field of a generation with its unit, range and default, and the way from
//! JSON to the validated type.
//!
//! [`FIELDS`] is the table of names, aliases and ranges; [`Draft`] reads a JSON object by that table, lets a
//! command line override what the object says, and becomes a [`GenerateRequest`] once nothing is missing.

mod draft;
mod fields;
mod json;
mod media;
mod read;
#[cfg(test)]
mod tests;

use std::fmt;

use serde_json::Value;

pub use draft::Draft;
pub use fields::{FIELDS, FPS, Field, Kind, Medium, NAME_CHARS, OUTPUT_FIELDS, Role, find};
pub use json::read_json;
pub use media::{Limits, MediaSource, redact_url};

use crate::Result;

/// One video to make. Every value is within its range; what is `None` comes from the preset or the model.
#[derive(Clone, PartialEq)]
pub struct GenerateRequest {
    /// The portrait.
    pub image: MediaSource,
    /// The voice, or that of the first of two persons.
    pub audio: MediaSource,
    /// The voice of the second person.
    pub audio_2: Option<MediaSource>,
    /// Whether two voices sound together or in turn; [`Speakers::Together`] by default.
    pub speakers: Speakers,
    /// Where the two persons are in the source image; the left and the right half by default.
    pub bbox: Option<[BBox; 2]>,
    /// What the video shows, at most 16 384 characters.
    pub prompt: Option<String>,
    /// What the video must not show, at most 16 384 characters.
    pub negative_prompt: Option<String>,
    /// The profile of models.toml; the caller chooses when it is absent.
    pub model: Option<String>,
    /// The size bucket; [`Size::P480`] by default.
    pub size: Size,
    /// Settings that go together.
    pub preset: Option<Preset>,
    /// Denoising steps per window, 1–100.
    pub steps: Option<u32>,
    /// Timestep shift, 0.1–50.
    pub shift: Option<f64>,
    /// Weight of the prompt, 1–20; 1 means no guidance.
    pub text_guidance: Option<f64>,
    /// Weight of the voice, 1–20; 1 means no guidance.
    pub audio_guidance: Option<f64>,
    /// Seed of the noise; random when absent.
    pub seed: Option<u32>,
    /// The most frames the video may have, at 25 a second, 1–900 000; as long as the audio when absent.
    pub max_frames: Option<u32>,
    /// How far each window's colours are drawn to the portrait's, 0–1.
    pub color_correction: Option<f64>,
    /// Frames of overlap between windows, 4n+1 in 1–77, less than `frames_per_window`.
    pub motion_frames: Option<usize>,
    /// Frames denoised at once, 4n+1 in 5–161.
    pub frames_per_window: Option<usize>,
    /// Where the video goes.
    pub output: OutputOptions,
    /// Fail rather than lower the size or the settings; `false` by default.
    pub strict: bool,
}

impl GenerateRequest {
    /// Reads a request: the object that stands under `input`, or an object with `input` in it. Beside the
    /// request there are warnings about fields that were left unread.
    ///
    /// # Errors
    /// [`ErrorKind::MissingField`], [`ErrorKind::UnknownField`] (naming the nearest known one),
    /// [`ErrorKind::InvalidInput`] (naming the field, what it was and what was expected), and for media that
    /// came with the request [`ErrorKind::InvalidImage`], [`ErrorKind::InvalidAudio`],
    /// [`ErrorKind::ImageTooLarge`], [`ErrorKind::AudioTooLarge`].
    ///
    /// [`ErrorKind::MissingField`]: crate::ErrorKind::MissingField
    /// [`ErrorKind::UnknownField`]: crate::ErrorKind::UnknownField
    /// [`ErrorKind::InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`ErrorKind::InvalidImage`]: crate::ErrorKind::InvalidImage
    /// [`ErrorKind::InvalidAudio`]: crate::ErrorKind::InvalidAudio
    /// [`ErrorKind::ImageTooLarge`]: crate::ErrorKind::ImageTooLarge
    /// [`ErrorKind::AudioTooLarge`]: crate::ErrorKind::AudioTooLarge
    pub fn parse(input: &Value) -> Result<(Self, Vec<String>)> {
        Draft::parse(input, &Limits::default())?.finish()
    }

    /// A request for `image` and `audio` with every default.
    pub fn new(image: MediaSource, audio: MediaSource) -> Self {
        Self {
            image,
            audio,
            audio_2: None,
            speakers: Speakers::Together,
            bbox: None,
            prompt: None,
            negative_prompt: None,
            model: None,
            size: Size::P480,
            preset: None,
            steps: None,
            shift: None,
            text_guidance: None,
            audio_guidance: None,
            seed: None,
            max_frames: None,
            color_correction: None,
            motion_frames: None,
            frames_per_window: None,
            output: OutputOptions::default(),
            strict: false,
        }
    }
}

/// Prompts are private and media are long: neither is shown.
impl fmt::Debug for GenerateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chars =
            |text: &Option<String>| text.as_ref().map(|text| format!("{} characters", text.chars().count()));
        f.debug_struct("GenerateRequest")
            .field("image", &self.image)
            .field("audio", &self.audio)
            .field("audio_2", &self.audio_2)
            .field("speakers", &self.speakers)
            .field("bbox", &self.bbox)
            .field("prompt", &chars(&self.prompt))
            .field("negative_prompt", &chars(&self.negative_prompt))
            .field("model", &self.model)
            .field("size", &self.size)
            .field("preset", &self.preset)
            .field("steps", &self.steps)
            .field("shift", &self.shift)
            .field("text_guidance", &self.text_guidance)
            .field("audio_guidance", &self.audio_guidance)
            .field("seed", &self.seed)
            .field("max_frames", &self.max_frames)
            .field("color_correction", &self.color_correction)
            .field("motion_frames", &self.motion_frames)
            .field("frames_per_window", &self.frames_per_window)
            .field("output", &self.output)
            .field("strict", &self.strict)
            .finish()
    }
}

/// The size bucket; the aspect follows the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {
    /// About 640 × 640 pixels.
    P480,
    /// About 960 × 960 pixels.
    P720,
}

impl Size {
    /// As requests spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::P480 => "480p",
            Self::P720 => "720p",
        }
    }

    /// The bucket whose area is nearer to that of `width` × `height` pixels, in proportion.
    pub fn snap(width: u32, height: u32) -> Self {
        /// The geometric mean of the two buckets' areas.
        const BETWEEN: u64 = 640 * 960;
        if u64::from(width) * u64::from(height) > BETWEEN { Self::P720 } else { Self::P480 }
    }
}

/// Steps, guidance, shift, LoRA and cache, chosen together. What each means is said in models.toml.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// The quickest look.
    Draft,
    /// Quick.
    Fast,
    /// Between quick and good.
    Balanced,
    /// The best.
    Quality,
}

impl Preset {
    /// As requests spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Fast => "fast",
            Self::Balanced => "balanced",
            Self::Quality => "quality",
        }
    }
}

/// How two voices stand in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Speakers {
    /// Both start at the beginning; the shorter one is followed by silence.
    Together,
    /// The second starts when the first has ended.
    InTurn,
}

impl Speakers {
    /// As requests spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::InTurn => "in_turn",
        }
    }
}

/// A box in pixels of the source image; `row_min < row_max`, `col_min < col_max`, at most 65 535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BBox {
    /// First row.
    pub row_min: u32,
    /// First column.
    pub col_min: u32,
    /// The row after the last.
    pub row_max: u32,
    /// The column after the last.
    pub col_max: u32,
}

/// Where the video goes and how it is handed out.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct OutputOptions {
    /// Folder of the object key, without slashes at its ends.
    pub key_prefix: Option<String>,
    /// Life of the video's URL in seconds, 60–604 800.
    pub expires_seconds: Option<u32>,
    /// Hand the video out as base64 too.
    pub inline: bool,
    /// A presigned URL that the video is PUT to.
    pub put_url: Option<String>,
    /// Make a JPEG of the first frame.
    pub thumbnail: bool,
}

/// The signature in a presigned URL is a secret.
impl fmt::Debug for OutputOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutputOptions")
            .field("key_prefix", &self.key_prefix)
            .field("expires_seconds", &self.expires_seconds)
            .field("inline", &self.inline)
            .field("put_url", &self.put_url.as_deref().map(redact_url))
            .field("thumbnail", &self.thumbnail)
            .finish()
    }
}
