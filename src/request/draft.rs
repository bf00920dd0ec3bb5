//! A request in the making: read from JSON by the table of fields, overridden field by field, then complete.

use serde_json::{Map, Value};

use super::fields::{COND_AUDIO_FIELDS, FIELDS, FPS, Field, Medium, OUTPUT_FIELDS, Role, find, nearest};
use super::media::{self, Limits, MediaSource};
use super::read::{self, describe, wrong};
use super::{GenerateRequest, OutputOptions, Preset, Size, Speakers};
use crate::{Error, ErrorKind, Result};

/// A request of which image and audio may still be missing.
#[derive(Clone, Debug)]
pub struct Draft {
    image: Option<MediaSource>,
    audio: Option<MediaSource>,
    /// All other fields; its own image and audio are empty until [`Draft::finish`].
    rest: GenerateRequest,
    limits: Limits,
    warnings: Vec<String>,
}

/// One value of the input: the field that it belongs to and the name that the caller wrote.
struct Given<'a> {
    field: &'static Field,
    spelled: String,
    value: &'a Value,
}

impl Draft {
    /// A request of which nothing is known. Media that come with it may be as large as `limits` says.
    pub fn new(limits: Limits) -> Self {
        let nothing = || MediaSource::Bytes(Vec::new());
        let rest = GenerateRequest::new(nothing(), nothing());
        Self { image: None, audio: None, rest, limits, warnings: Vec::new() }
    }

    /// Reads the object that stands under `input`, or an object with `input` in it. A value of `null` is a
    /// field that was not given.
    ///
    /// # Errors
    /// Those of [`GenerateRequest::parse`] but for missing fields.
    pub fn parse(input: &Value, limits: &Limits) -> Result<Self> {
        let input = input.get("input").unwrap_or(input);
        let Value::Object(input) = input else { return Err(wrong("input", &describe(input), "an object")) };
        let mut draft = Self::new(*limits);
        let given = collect(input, &mut draft.warnings)?;
        let (instead, canonical): (Vec<_>, Vec<_>) =
            given.iter().partition(|g| matches!(g.field.role, Role::InsteadOf(_)));
        for g in &canonical {
            draft.read(g.field, &g.spelled, g.value)?;
        }
        let canonical_name =
            |name| canonical.iter().find(|g| g.field.name == name).map(|g| g.spelled.as_str());
        draft.read_width_and_height(&instead, canonical_name("size"))?;
        draft.read_max_frame(&instead, canonical_name("max_seconds"))?;
        draft.read_presigned_url(&instead)?;
        Ok(draft)
    }

    /// Sets the field of this canonical name from a JSON value, whatever it was before.
    ///
    /// # Errors
    /// As for that field in [`GenerateRequest::parse`]; [`ErrorKind::UnknownField`] for a name that is not
    /// canonical.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let field = find(FIELDS, name).filter(|f| matches!(f.role, Role::Required | Role::Optional));
        self.read(field.ok_or_else(|| unknown("", FIELDS, name))?, name, value)
    }

    /// Sets `image`.
    pub fn set_image(&mut self, image: MediaSource) {
        self.image = Some(image);
    }

    /// Sets `audio`.
    pub fn set_audio(&mut self, audio: MediaSource) {
        self.audio = Some(audio);
    }

    /// Sets `audio_2`.
    pub fn set_audio_2(&mut self, audio: MediaSource) {
        self.rest.audio_2 = Some(audio);
    }

    /// Whether neither `image` nor `audio` is given.
    pub fn has_no_media(&self) -> bool {
        self.image.is_none() && self.audio.is_none()
    }

    /// The request, and warnings about what in it has no effect.
    ///
    /// # Errors
    /// [`ErrorKind::MissingField`] without image or audio; [`ErrorKind::InvalidInput`] for values that do not
    /// go together.
    pub fn finish(self) -> Result<(GenerateRequest, Vec<String>)> {
        let Self { image, audio, mut rest, mut warnings, .. } = self;
        rest.image = image.ok_or_else(|| missing("image"))?;
        rest.audio = audio.ok_or_else(|| missing("audio"))?;
        if let (Some(motion), Some(window)) = (rest.motion_frames, rest.frames_per_window)
            && motion >= window
        {
            let expected = format!("less than `frames_per_window`, which is {window}");
            return Err(wrong("motion_frames", &motion.to_string(), &expected));
        }
        if rest.audio_2.is_none() && rest.bbox.is_some() {
            warnings.push("`bbox` has no effect without `audio_2`".to_string());
        }
        if rest.audio_2.is_none() && rest.speakers == Speakers::InTurn {
            warnings.push("`speakers` has no effect without `audio_2`".to_string());
        }
        Ok((rest, warnings))
    }

    /// Reads one field of the contract into its place.
    fn read(&mut self, field: &'static Field, name: &str, value: &Value) -> Result<()> {
        let kind = field.kind;
        let rest = &mut self.rest;
        match field.name {
            "image" => self.image = Some(medium(name, Medium::Image, value, &self.limits)?),
            "audio" => self.audio = Some(medium(name, Medium::Audio, value, &self.limits)?),
            "audio_2" => rest.audio_2 = Some(medium(name, Medium::Audio, value, &self.limits)?),
            "prompt" => rest.prompt = read::text(name, kind, value)?,
            "negative_prompt" => rest.negative_prompt = read::text(name, kind, value)?,
            "model" => rest.model = Some(read::word(name, value)?),
            "size" => {
                let (size, snapped) = read::size(name, kind, value)?;
                rest.size = size;
                if snapped {
                    self.warnings.push(snapped_to(name, size));
                }
            }
            "preset" => {
                rest.preset = Some(match read::choice(name, kind, value)? {
                    "draft" => Preset::Draft,
                    "fast" => Preset::Fast,
                    "balanced" => Preset::Balanced,
                    _ => Preset::Quality,
                });
            }
            "steps" => rest.steps = narrow(read::integer(name, kind, value)?),
            "shift" => rest.shift = Some(read::number(name, kind, value)?),
            "text_guidance" => rest.text_guidance = Some(read::number(name, kind, value)?),
            "audio_guidance" => rest.audio_guidance = Some(read::number(name, kind, value)?),
            // −1 asks for a random seed and fits no u32.
            "seed" => rest.seed = narrow(read::integer(name, kind, value)?),
            "max_seconds" => rest.max_frames = Some(frames_in(read::number(name, kind, value)?)),
            "color_correction" => rest.color_correction = Some(read::number(name, kind, value)?),
            "motion_frames" => rest.motion_frames = narrow(read::integer(name, kind, value)?),
            "frames_per_window" => rest.frames_per_window = narrow(read::integer(name, kind, value)?),
            "speakers" => {
                rest.speakers = match read::choice(name, kind, value)? {
                    "in_turn" => Speakers::InTurn,
                    _ => Speakers::Together,
                };
            }
            "bbox" => rest.bbox = Some(read::boxes(name, value)?),
            "output" => rest.output = output(name, value)?,
            "strict" => rest.strict = read::flag(name, value)?,
            _ => return Err(unknown("", FIELDS, name)),
        }
        Ok(())
    }

    /// `width` and `height` choose a bucket together.
    fn read_width_and_height(&mut self, given: &[&Given], size: Option<&str>) -> Result<()> {
        let side = |name| -> Result<Option<u32>> {
            let Some(g) = given.iter().find(|g| g.field.name == name) else { return Ok(None) };
            Ok(narrow(read::integer(&g.spelled, g.field.kind, g.value)?))
        };
        let bucket = match (side("width")?, side("height")?) {
            (Some(width), Some(height)) => Size::snap(width, height),
            (None, None) => return Ok(()),
            (Some(_), None) => return Err(wrong("width", "given alone", "`height` beside it")),
            (None, Some(_)) => return Err(wrong("height", "given alone", "`width` beside it")),
        };
        match size {
            Some(size) if bucket != self.rest.size => return Err(conflict("width", size)),
            Some(_) => {}
            None => {
                self.rest.size = bucket;
                self.warnings.push(snapped_to("width` × `height", bucket));
            }
        }
        Ok(())
    }

    /// `max_frame` is `max_seconds` in another unit.
    fn read_max_frame(&mut self, given: &[&Given], max_seconds: Option<&str>) -> Result<()> {
        let Some(g) = given.iter().find(|g| g.field.name == "max_frame") else { return Ok(()) };
        let frames = narrow(read::integer(&g.spelled, g.field.kind, g.value)?);
        match max_seconds {
            Some(seconds) if frames != self.rest.max_frames => Err(conflict(&g.spelled, seconds)),
            _ => {
                self.rest.max_frames = frames;
                Ok(())
            }
        }
    }

    /// `presigned_url` is `output.put_url`.
    fn read_presigned_url(&mut self, given: &[&Given]) -> Result<()> {
        let Some(g) = given.iter().find(|g| g.field.name == "presigned_url") else { return Ok(()) };
        let url = read::text(&g.spelled, g.field.kind, g.value)?;
        let put_url = &mut self.rest.output.put_url;
        if put_url.is_some() && *put_url != url {
            return Err(conflict("presigned_url", "output.put_url"));
        }
        *put_url = url;
        Ok(())
    }
}

/// Sorts the fields of `input` by the table. Of one field given under two names the first is kept when the
/// values are equal.
fn collect<'a>(input: &'a Map<String, Value>, warnings: &mut Vec<String>) -> Result<Vec<Given<'a>>> {
    let mut all: Vec<Given<'a>> = Vec::new();
    for (name, value) in input {
        let Some(field) = find(FIELDS, name) else {
            return Err(if name.ends_with("_path") { refused_path(name) } else { unknown("", FIELDS, name) });
        };
        match field.role {
            Role::Refused => return Err(refused(name, field.about)),
            Role::Ignored => warnings.push(format!("`{name}` is ignored: {}", field.about)),
            _ if value.is_null() => {}
            _ if field.name == "cond_audio" => {
                for given in cond_audio(name, value)? {
                    add(&mut all, given)?;
                }
            }
            _ => add(&mut all, Given { field, spelled: name.clone(), value })?,
        }
    }
    Ok(all)
}

fn add<'a>(all: &mut Vec<Given<'a>>, given: Given<'a>) -> Result<()> {
    match all.iter().find(|g| g.field.name == given.field.name) {
        Some(before) if before.value != given.value => Err(conflict(&given.spelled, &before.spelled)),
        Some(_) => Ok(()),
        None => {
            all.push(given);
            Ok(())
        }
    }
}

/// `{"person1": …, "person2": …}` as `audio` and `audio_2`.
fn cond_audio<'a>(name: &str, value: &'a Value) -> Result<Vec<Given<'a>>> {
    let Value::Object(persons) = value else {
        return Err(wrong(name, &describe(value), "{\"person1\": audio, \"person2\": audio}"));
    };
    let mut all = Vec::new();
    for (person, value) in persons {
        let canonical = match person.as_str() {
            "person1" => "audio",
            "person2" => "audio_2",
            _ => return Err(unknown("cond_audio.", COND_AUDIO_FIELDS, person)),
        };
        let field = find(FIELDS, canonical).filter(|_| !value.is_null());
        all.extend(field.map(|field| Given { field, spelled: format!("{name}.{person}"), value }));
    }
    Ok(all)
}

fn medium(name: &str, medium: Medium, value: &Value, limits: &Limits) -> Result<MediaSource> {
    let Some(text) = value.as_str() else {
        return Err(wrong(name, &describe(value), "a URL, a data URI or base64 text"));
    };
    media::parse(name, medium, text, limits)
}

fn output(name: &str, value: &Value) -> Result<OutputOptions> {
    let Value::Object(given) = value else { return Err(wrong(name, &describe(value), "an object")) };
    let mut output = OutputOptions::default();
    for (key, value) in given.iter().filter(|(_, v)| !v.is_null()) {
        let field = find(OUTPUT_FIELDS, key).ok_or_else(|| unknown("output.", OUTPUT_FIELDS, key))?;
        let name = &format!("{name}.{key}");
        match field.name {
            "key_prefix" => output.key_prefix = key_prefix(name, read::text(name, field.kind, value)?)?,
            "expires_seconds" => output.expires_seconds = narrow(read::integer(name, field.kind, value)?),
            "inline" => output.inline = read::flag(name, value)?,
            "put_url" => output.put_url = read::text(name, field.kind, value)?,
            _ => output.thumbnail = read::flag(name, value)?,
        }
    }
    Ok(output)
}

/// Only plain segments: a key that climbs with `..` leaves its bucket on stores that keep objects as files.
fn key_prefix(name: &str, prefix: Option<String>) -> Result<Option<String>> {
    let Some(prefix) = prefix else { return Ok(None) };
    let plain = |segment: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        !segment.is_empty() && !segment.starts_with('.') && segment.bytes().all(allowed)
    };
    let trimmed = prefix.trim_matches('/');
    if trimmed.split('/').all(plain) {
        return Ok(Some(trimmed.to_string()));
    }
    let expected = "segments of letters, digits, `.`, `_`, `-` with `/` between, none starting with `.`";
    Err(wrong(name, &describe(&prefix.into()), expected))
}

/// Frames in `seconds`, a part of a frame being a frame. What floating point adds to a whole number of frames
/// (0.28 × 25 = 7.000000000000001) is not a part of a frame.
fn frames_in(seconds: f64) -> u32 {
    const ROUNDING: f64 = 1e-6;
    (seconds * f64::from(FPS) - ROUNDING).ceil().max(1.0) as u32
}

/// `n` in a type that every value in its field's range fits, but for a seed of −1.
fn narrow<T: TryFrom<i64>>(n: i64) -> Option<T> {
    T::try_from(n).ok()
}

fn snapped_to(name: &str, size: Size) -> String {
    format!("`{name}` is snapped to `{}`: the aspect follows the image", size.as_str())
}

fn missing(name: &str) -> Error {
    let hint = format!("give `{name}` as a URL, a data URI or base64");
    Error::new(ErrorKind::MissingField, format!("`{name}` is missing")).with_hint(hint)
}

fn unknown(parent: &str, fields: &'static [Field], name: &str) -> Error {
    let shown: String = name.chars().take(60).collect();
    let nearest = nearest(fields, name);
    let message =
        format!("`{parent}{shown}` is not a field of the input, the nearest is `{parent}{nearest}`");
    Error::new(ErrorKind::UnknownField, message)
        .with_hint(format!("did you mean `{parent}{nearest}`? `handler schema` lists all fields"))
}

fn refused(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("`{name}` is refused: {why}")).with_reason("FIELD_REFUSED")
}

fn refused_path(name: &str) -> Error {
    let shown: String = name.chars().take(60).collect();
    refused(&shown, "files of the worker's own disk are never opened")
        .with_hint("send the file as a URL, a data URI or base64")
}

fn conflict(name: &str, other: &str) -> Error {
    let message =
        format!("`{name}` and `{other}` mean the same field and have different values, expected one");
    Error::new(ErrorKind::InvalidInput, message).with_reason("CONFLICTING_FIELDS")
}
