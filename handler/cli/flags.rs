//! The flags of `handler generate`, and the request that they and a request file make together.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use talkie::request::{Draft, FIELDS, GenerateRequest, Kind, Limits, MediaSource, Medium, find, read_json};

use super::display::Display;
use crate::generate::DeviceChoice;
use crate::inputs::read_file;
use crate::job::{Code, JobError};

pub(super) const EXAMPLE_IMAGE: &[u8] = include_bytes!("../../examples/portrait.png");
pub(super) const EXAMPLE_AUDIO: &[u8] = include_bytes!("../../examples/voice.wav");

/// Flags of `handler generate`. Values are text here: the request's own parser reads them, so that a flag and
/// a field of the request file are checked alike.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(
    args_override_self = true,
    after_help = "Without --input, --image and --audio, the example portrait and voice are used."
)]
pub struct Args {
    /// A request as JSON, - for standard input; flags override its fields
    #[arg(long, env = "TALKIE_INPUT", value_name = "FILE")]
    input: Option<PathBuf>,
    /// The portrait: a file, URL or data URI; PNG, JPEG or WebP
    #[arg(long, env = "TALKIE_IMAGE", value_name = "FILE|URL")]
    image: Option<String>,
    /// The voice: a file, URL or data URI; WAV, MP3, FLAC, OGG, M4A, Opus or WebM
    #[arg(long, env = "TALKIE_AUDIO", value_name = "FILE|URL")]
    audio: Option<String>,
    /// The voice of a second person
    #[arg(long, env = "TALKIE_AUDIO_2", value_name = "FILE|URL")]
    audio_2: Option<String>,
    #[arg(long, env = "TALKIE_SPEAKERS", value_name = "together|in_turn", help = about("speakers"))]
    speakers: Option<String>,
    #[arg(long, env = "TALKIE_BBOX", value_name = "JSON", help = about("bbox"))]
    bbox: Option<String>,
    #[arg(long, env = "TALKIE_PROMPT", value_name = "TEXT", help = about("prompt"))]
    prompt: Option<String>,
    #[arg(long, env = "TALKIE_NEGATIVE_PROMPT", value_name = "TEXT", help = about("negative_prompt"))]
    negative_prompt: Option<String>,
    #[arg(long, env = "TALKIE_MODEL", value_name = "NAME", help = about("model"))]
    model: Option<String>,
    #[arg(long, env = "TALKIE_SIZE", value_name = "480p|720p", help = about("size"))]
    size: Option<String>,
    #[arg(long, env = "TALKIE_PRESET", value_name = "draft|fast|balanced|quality", help = about("preset"))]
    preset: Option<String>,
    #[arg(long, env = "TALKIE_STEPS", value_name = "1-100", help = about("steps"))]
    steps: Option<String>,
    #[arg(long, env = "TALKIE_SHIFT", value_name = "0.1-50", help = about("shift"))]
    shift: Option<String>,
    #[arg(long, env = "TALKIE_TEXT_GUIDANCE", value_name = "1-20", help = about("text_guidance"))]
    text_guidance: Option<String>,
    #[arg(long, env = "TALKIE_AUDIO_GUIDANCE", value_name = "1-20", help = about("audio_guidance"))]
    audio_guidance: Option<String>,
    #[arg(long, env = "TALKIE_SEED", value_name = "N", allow_hyphen_values = true, help = about("seed"))]
    seed: Option<String>,
    #[arg(long, env = "TALKIE_MAX_SECONDS", value_name = "SECONDS", help = about("max_seconds"))]
    max_seconds: Option<String>,
    #[arg(long, env = "TALKIE_COLOR_CORRECTION", value_name = "0-1", help = about("color_correction"))]
    color_correction: Option<String>,
    #[arg(long, env = "TALKIE_MOTION_FRAMES", value_name = "4n+1", help = about("motion_frames"))]
    motion_frames: Option<String>,
    #[arg(long, env = "TALKIE_FRAMES_PER_WINDOW", value_name = "4n+1", help = about("frames_per_window"))]
    frames_per_window: Option<String>,
    #[arg(
        long,
        env = "TALKIE_STRICT",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help = about("strict")
    )]
    strict: Option<String>,
    /// Where the video goes; replaced only by a complete one
    #[arg(short, long, env = "TALKIE_OUTPUT", value_name = "FILE", default_value = "out.mp4")]
    pub(super) output: PathBuf,
    /// Where a JPEG of the first frame goes
    #[arg(long, env = "TALKIE_THUMBNAIL", value_name = "FILE")]
    pub(super) thumbnail: Option<PathBuf>,
    /// A models.toml in place of the built-in one
    #[arg(long, env = "TALKIE_MODELS_FILE", value_name = "FILE")]
    pub(super) models_file: Option<PathBuf>,
    /// Where the networks run
    #[arg(long, env = "TALKIE_DEVICE", value_enum, default_value_t)]
    pub(super) device: DeviceChoice,
    /// No progress and no notes on standard error, only errors
    #[arg(short, long, env = "TALKIE_QUIET")]
    pub(super) quiet: bool,
}

impl Args {
    /// The request file with the flags over it, or the flags alone.
    pub(super) fn request(
        &self,
        limits: Limits,
        display: &Display,
    ) -> Result<(GenerateRequest, Vec<String>), JobError> {
        let mut draft = match &self.input {
            Some(path) => Draft::parse(&read_request(path, &limits)?, &limits)?,
            None => Draft::new(limits),
        };
        let media = [("image", &self.image), ("audio", &self.audio), ("audio_2", &self.audio_2)];
        for (name, value) in media {
            let Some(value) = value else { continue };
            let medium = if name == "image" { Medium::Image } else { Medium::Audio };
            if is_address(value) {
                draft.set(name, &Value::from(value.as_str()))?;
                continue;
            }
            let bytes = MediaSource::Bytes(read_file(name, medium, Path::new(value), &limits)?);
            match name {
                "image" => draft.set_image(bytes),
                "audio" => draft.set_audio(bytes),
                _ => draft.set_audio_2(bytes),
            }
        }
        if self.input.is_none() && draft.has_no_media() {
            display.note("no --image and no --audio: using the example portrait and voice");
            draft.set_image(MediaSource::Bytes(EXAMPLE_IMAGE.to_vec()));
            draft.set_audio(MediaSource::Bytes(EXAMPLE_AUDIO.to_vec()));
        }
        for (name, text) in self.fields() {
            if let Some(text) = text {
                draft.set(name, &flag_value(name, text))?;
            }
        }
        Ok(draft.finish()?)
    }

    /// The flags that are fields of the request, by their names there.
    fn fields(&self) -> [(&'static str, Option<&str>); 17] {
        [
            ("speakers", self.speakers.as_deref()),
            ("bbox", self.bbox.as_deref()),
            ("prompt", self.prompt.as_deref()),
            ("negative_prompt", self.negative_prompt.as_deref()),
            ("model", self.model.as_deref()),
            ("size", self.size.as_deref()),
            ("preset", self.preset.as_deref()),
            ("steps", self.steps.as_deref()),
            ("shift", self.shift.as_deref()),
            ("text_guidance", self.text_guidance.as_deref()),
            ("audio_guidance", self.audio_guidance.as_deref()),
            ("seed", self.seed.as_deref()),
            ("max_seconds", self.max_seconds.as_deref()),
            ("color_correction", self.color_correction.as_deref()),
            ("motion_frames", self.motion_frames.as_deref()),
            ("frames_per_window", self.frames_per_window.as_deref()),
            ("strict", self.strict.as_deref()),
        ]
    }
}

/// What the table of fields says about a field, for `--help`.
fn about(name: &str) -> &'static str {
    find(FIELDS, name).map_or("", |field| field.about)
}

/// The JSON that `text` stands for in this field; what does not fit stays text, for the parser to refuse.
fn flag_value(name: &str, text: &str) -> Value {
    let value = match find(FIELDS, name).map(|field| field.kind) {
        Some(Kind::Integer { .. } | Kind::Frames { .. }) => text.parse::<i64>().ok().map(Value::from),
        Some(Kind::Number { .. }) => text.parse::<f64>().ok().filter(|n| n.is_finite()).map(Value::from),
        Some(Kind::Flag) => text.parse::<bool>().ok().map(Value::from),
        Some(Kind::Boxes) => read_json(text.as_bytes()).ok(),
        _ => None,
    };
    value.unwrap_or_else(|| text.into())
}

/// Whether a flag's value is a URL or a data URI, and not a path.
fn is_address(value: &str) -> bool {
    let starts_with =
        |prefix: &str| value.get(..prefix.len()).is_some_and(|v| v.eq_ignore_ascii_case(prefix));
    ["http://", "https://", "data:"].into_iter().any(starts_with)
}

fn read_request(path: &Path, limits: &Limits) -> Result<Value, JobError> {
    // Base64 of an image and two voices takes a third more than they do, in lines a little more.
    let most = (limits.image_bytes + 2 * limits.audio_bytes) / 2 * 3 + (1 << 20);
    let mut text = Vec::new();
    let read = |source: &mut dyn Read, text: &mut Vec<u8>| source.take(most + 1).read_to_end(text);
    let read = match path == Path::new("-") {
        true => read(&mut io::stdin().lock(), &mut text),
        false => File::open(path).and_then(|mut file| read(&mut file, &mut text)),
    };
    read.map_err(|e| {
        let message = format!("`--input` is {}, which cannot be read: {e}", path.display());
        JobError::new(Code::InvalidInput, message).with_reason("FILE_UNREADABLE")
    })?;
    if text.len() as u64 > most {
        let message = format!("`--input` has more than {most} bytes");
        return Err(JobError::new(Code::InvalidInput, message));
    }
    Ok(read_json(&text)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use talkie::request::Role;

    use super::*;

    #[test]
    fn every_field_of_the_request_has_a_flag() {
        let args = Args::default();
        let mut flags: Vec<_> = args.fields().iter().map(|(name, _)| *name).collect();
        flags.extend(["image", "audio", "audio_2", "output"]);
        let mut fields: Vec<_> = FIELDS
            .iter()
            .filter(|f| matches!(f.role, Role::Required | Role::Optional))
            .map(|f| f.name)
            .collect();
        flags.sort_unstable();
        fields.sort_unstable();
        assert_eq!(flags, fields);
    }

    #[test]
    fn flags_read_as_the_json_that_they_stand_for() {
        for (name, text, value) in [
            ("steps", "4", json!(4)),
            ("steps", "4.5", json!("4.5")),
            ("seed", "-1", json!(-1)),
            ("shift", "2", json!(2.0)),
            ("shift", "inf", json!("inf")),
            ("prompt", "7", json!("7")),
            ("size", "720p", json!("720p")),
            ("strict", "true", json!(true)),
            ("bbox", "[[0,0,1,1],[1,1,2,2]]", json!([[0, 0, 1, 1], [1, 1, 2, 2]])),
            ("bbox", "left", json!("left")),
        ] {
            assert_eq!(flag_value(name, text), value, "{name} {text}");
        }
    }

    #[test]
    fn paths_are_told_from_addresses() {
        for address in ["https://a.example/x", "HTTP://a.example", "data:image/png;base64,AA"] {
            assert!(is_address(address), "{address}");
        }
        for path in ["a.png", "/tmp/http://x", "dätä", "data", ""] {
            assert!(!is_address(path), "{path}");
        }
    }
}
