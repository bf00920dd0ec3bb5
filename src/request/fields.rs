//! The table of input fields: the parser reads it, and so do the JSON Schema and the help text, so that
//! what is documented is what is accepted.

/// What kind of medium a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Medium {
    /// A still image.
    Image,
    /// A sound recording.
    Audio,
}

/// Which JSON values a field takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A URL, a `data:` URI or base64 text.
    Media(Medium),
    /// Text of at most this many characters.
    Text(usize),
    /// A short name: letters, digits, `.`, `_`, `-`; at most [`NAME_CHARS`] characters.
    Name,
    /// One of `values`; `synonyms` are pairs of what is accepted as well and what it means.
    Choice {
        /// The canonical values.
        values: &'static [&'static str],
        /// Other spellings, each with its canonical value.
        synonyms: &'static [(&'static str, &'static str)],
    },
    /// An integer from `min` to `max`, both allowed.
    Integer {
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
    },
    /// An integer of the form 4n+1 from `min` to `max`: frames, as the causal VAE counts them.
    Frames {
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
    },
    /// A number from `min` to `max`, both allowed.
    Number {
        /// Smallest value.
        min: f64,
        /// Largest value.
        max: f64,
    },
    /// `true` or `false`.
    Flag,
    /// Two boxes, `[row_min, column_min, row_max, column_max]` each, in pixels of the source image.
    Boxes,
    /// An object with these fields.
    Object(&'static [Field]),
}

/// How a field stands to the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Part of the contract; must be given.
    Required,
    /// Part of the contract; may be left out.
    Optional,
    /// Another way of giving the named field, taken for the sake of existing clients.
    InsteadOf(&'static str),
    /// Taken and left unread, with a warning.
    Ignored,
    /// Never taken.
    Refused,
}

/// One field of the input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Field {
    /// The canonical name.
    pub name: &'static str,
    /// Other names for the same value.
    pub aliases: &'static [&'static str],
    /// Which values it takes.
    pub kind: Kind,
    /// How it stands to the contract.
    pub role: Role,
    /// What it means, its unit, and what applies when it is absent.
    pub about: &'static str,
}

/// Frames per second of every video.
pub const FPS: u32 = 25;
/// Longest [`Kind::Name`] in characters.
pub const NAME_CHARS: usize = 64;
/// Longest prompt in characters. UMT5 reads the first 512 tokens, and a token seldom spans more than 8 characters;
/// a text that is longer than that by some is no reason to refuse a request.
pub const PROMPT_CHARS: usize = 16_384;
/// Longest URL in bytes.
pub const URL_BYTES: usize = 8192;
/// Longest video that can be asked for: ten hours.
const MAX_SECONDS: u32 = 36_000;
/// The largest seed. 32 bits pass through every JSON reader unharmed.
const MAX_SEED: i64 = u32::MAX as i64;
/// S3's limit for a presigned URL: seven days.
const MAX_EXPIRES_SECONDS: i64 = 604_800;

const SIZES: Kind = Kind::Choice {
    values: &["480p", "720p"],
    synonyms: &[("480", "480p"), ("720", "720p"), ("infinitetalk-480", "480p"), ("infinitetalk-720", "720p")],
};
/// The words of other services' speed settings stand beside our own.
const PRESETS: Kind = Kind::Choice {
    values: &["draft", "fast", "balanced", "quality"],
    synonyms: &[("none", "quality"), ("regular", "balanced"), ("high", "fast")],
};
const SPEAKERS: Kind =
    Kind::Choice { values: &["together", "in_turn"], synonyms: &[("para", "together"), ("add", "in_turn")] };
const PIXELS: Kind = Kind::Integer { min: 64, max: 8192 };
const GUIDANCE: Kind = Kind::Number { min: 1.0, max: 20.0 };

/// Every field of the input, in the order of the contract.
pub const FIELDS: &[Field] = &[
    required(
        "image",
        &["image_url", "image_base64", "cond_video", "cond_image", "source_url", "input_reference"],
        Kind::Media(Medium::Image),
        "The portrait: URL, data URI or base64 of a PNG, JPEG or WebP",
    ),
    required(
        "audio",
        &["audio_url", "audio_base64", "wav_url", "wav_base64"],
        Kind::Media(Medium::Audio),
        "The voice: URL, data URI or base64 of a WAV, MP3, FLAC, OGG, M4A, Opus or WebM",
    ),
    optional(
        "prompt",
        &["positive_prompt"],
        Kind::Text(PROMPT_CHARS),
        "What the video shows; the model's sentence when absent or empty",
    ),
    optional(
        "negative_prompt",
        &["n_prompt"],
        Kind::Text(PROMPT_CHARS),
        "What the video must not show; the model's list when absent or empty",
    ),
    optional("model", &[], Kind::Name, "Profile of models.toml; the installed one when absent"),
    optional(
        "size",
        &["resolution"],
        SIZES,
        "Size bucket, 480p when absent; the aspect follows the image; WIDTHxHEIGHT is snapped to the nearer one",
    ),
    optional(
        "preset",
        &["speed_mode", "acceleration"],
        PRESETS,
        "Steps, guidance, shift, LoRA and cache together; the model's own settings when absent",
    ),
    optional(
        "steps",
        &["sample_steps", "sampling_steps", "num_inference_steps"],
        Kind::Integer { min: 1, max: 100 },
        "Denoising steps per window; from the preset when absent",
    ),
    optional(
        "shift",
        &["sample_shift"],
        Kind::Number { min: 0.1, max: 50.0 },
        "Timestep shift; from the preset when absent",
    ),
    optional(
        "text_guidance",
        &["sample_text_guide_scale", "text_guide_scale"],
        GUIDANCE,
        "Weight of the prompt, 1 = no guidance; from the preset when absent",
    ),
    optional(
        "audio_guidance",
        &["sample_audio_guide_scale", "audio_guide_scale", "audio_cfg"],
        GUIDANCE,
        "Weight of the voice, 1 = no guidance; from the preset when absent",
    ),
    optional(
        "seed",
        &["base_seed"],
        Kind::Integer { min: -1, max: MAX_SEED },
        "Seed of the noise; random when absent or -1, and echoed in the output",
    ),
    optional(
        "max_seconds",
        &["seconds"],
        Kind::Number { min: 0.04, max: MAX_SECONDS as f64 },
        "Cuts the video to this many seconds; as long as the audio when absent",
    ),
    instead_of(
        "max_seconds",
        "max_frame",
        &["max_frame_num", "num_frames"],
        Kind::Integer { min: 1, max: (MAX_SECONDS * FPS) as i64 },
        "`max_seconds` in frames, 25 a second",
    ),
    optional(
        "color_correction",
        &["color_correction_strength"],
        Kind::Number { min: 0.0, max: 1.0 },
        "How far each window's colours are drawn to the portrait's; from the model when absent",
    ),
    optional(
        "motion_frames",
        &["motion_frame"],
        Kind::Frames { min: 1, max: 77 },
        "Frames of overlap between windows, 4n+1; 9 when absent",
    ),
    optional(
        "frames_per_window",
        &["frame_num"],
        Kind::Frames { min: 5, max: 161 },
        "Frames denoised at once, 4n+1, more than `motion_frames`; 81 when absent",
    ),
    optional(
        "audio_2",
        &["wav_url_2"],
        Kind::Media(Medium::Audio),
        "The voice of a second person, in any form of `audio`",
    ),
    optional(
        "speakers",
        &["audio_type"],
        SPEAKERS,
        "Whether two voices sound together or one after the other; together when absent",
    ),
    optional(
        "bbox",
        &[],
        Kind::Boxes,
        "Where the two persons are: {\"person1\": box, \"person2\": box}, a box being [row_min, column_min, row_max, column_max] in pixels of the image; left and right half when absent",
    ),
    optional("output", &[], Kind::Object(OUTPUT_FIELDS), "Where the video goes and how it is handed out"),
    optional(
        "strict",
        &[],
        Kind::Flag,
        "true: fail rather than lower the size or the settings; false when absent",
    ),
    instead_of("size", "width", &[], PIXELS, "With `height`: snapped to a size bucket, pixels"),
    instead_of("size", "height", &[], PIXELS, "With `width`: snapped to a size bucket, pixels"),
    instead_of(
        "audio",
        "cond_audio",
        &[],
        Kind::Object(COND_AUDIO_FIELDS),
        "`audio` and `audio_2` as the reference's request file has them",
    ),
    instead_of(
        "output",
        "presigned_url",
        &[],
        Kind::Text(URL_BYTES),
        "`output.put_url`: a presigned URL that the video is PUT to",
    ),
    ignored("aspect_ratio", "the aspect follows the image"),
    ignored("enable_safety_checker", "there is no safety checker"),
    ignored("force_offload", "what stays in memory is planned by the worker"),
    ignored("low_vram", "what stays in memory is planned by the worker"),
    ignored("quant", "the model profile says how weights are stored"),
    ignored("use_teacache", "caching is part of `preset`"),
    ignored("use_apg", "guidance is part of `preset`"),
    ignored("mode", "the video is always as long as the audio"),
    Field {
        name: "video_url",
        aliases: &[],
        kind: Kind::Media(Medium::Image),
        role: Role::Refused,
        about: "a reference video is not supported; send a still as `image`",
    },
];

/// The fields of `output`.
pub const OUTPUT_FIELDS: &[Field] = &[
    optional(
        "key_prefix",
        &[],
        Kind::Text(200),
        "Folder of the object key: letters, digits, `.`, `_`, `-`, `/`",
    ),
    optional(
        "expires_seconds",
        &[],
        Kind::Integer { min: 60, max: MAX_EXPIRES_SECONDS },
        "Life of the video's URL, seconds",
    ),
    optional("inline", &[], Kind::Flag, "true: the video as base64 in the output; false when absent"),
    optional("put_url", &[], Kind::Text(URL_BYTES), "A presigned URL that the video is PUT to"),
    optional("thumbnail", &[], Kind::Flag, "true: a JPEG of the first frame; false when absent"),
];

/// The fields of `cond_audio`.
pub(super) const COND_AUDIO_FIELDS: &[Field] = &[
    optional("person1", &[], Kind::Media(Medium::Audio), "`audio`"),
    optional("person2", &[], Kind::Media(Medium::Audio), "`audio_2`"),
];

/// The field of `fields` that `name` means: its own name or an alias.
pub fn find(fields: &'static [Field], name: &str) -> Option<&'static Field> {
    fields.iter().find(|f| f.name == name || f.aliases.contains(&name))
}

/// The name in `fields` that looks most like `name`: the canonical name, unless an alias is nearer.
pub(super) fn nearest(fields: &'static [Field], name: &str) -> &'static str {
    let likeness = |known: &&str| strsim::jaro_winkler(known, &name.to_lowercase());
    let names = fields.iter().filter(|f| matches!(f.role, Role::Required | Role::Optional));
    let spellings = names.flat_map(|f| std::iter::once(f.name).chain(f.aliases.iter().copied()));
    // Of equals the first, which `min_by` gives and `max_by` does not.
    spellings.min_by(|a, b| likeness(b).total_cmp(&likeness(a))).unwrap_or_default()
}

const fn required(
    name: &'static str,
    aliases: &'static [&'static str],
    kind: Kind,
    about: &'static str,
) -> Field {
    Field { name, aliases, kind, role: Role::Required, about }
}

const fn optional(
    name: &'static str,
    aliases: &'static [&'static str],
    kind: Kind,
    about: &'static str,
) -> Field {
    Field { name, aliases, kind, role: Role::Optional, about }
}

const fn instead_of(
    canonical: &'static str,
    name: &'static str,
    aliases: &'static [&'static str],
    kind: Kind,
    about: &'static str,
) -> Field {
    Field { name, aliases, kind, role: Role::InsteadOf(canonical), about }
}

/// A field that is not read may hold anything; `about` says why it is not needed.
const fn ignored(name: &'static str, about: &'static str) -> Field {
    Field { name, aliases: &[], kind: Kind::Text(URL_BYTES), role: Role::Ignored, about }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_name_is_used_twice() {
        let mut seen = HashSet::new();
        for name in FIELDS.iter().flat_map(|f| std::iter::once(&f.name).chain(f.aliases)) {
            assert!(seen.insert(*name), "{name}");
        }
    }

    #[test]
    fn the_nearest_name_is_the_one_that_was_meant() {
        for (typed, meant) in [
            ("imgae", "image"),
            ("audo", "audio"),
            ("Prompt", "prompt"),
            ("step", "steps"),
            ("num_inference_step", "num_inference_steps"),
            ("sized", "size"),
            ("text_guidence", "text_guidance"),
            ("max_second", "max_seconds"),
            ("bboxes", "bbox"),
            ("negative_promt", "negative_prompt"),
        ] {
            assert_eq!(nearest(FIELDS, typed), meant, "{typed}");
        }
    }

    #[test]
    fn replacements_name_a_field_of_the_contract() {
        for field in FIELDS {
            if let Role::InsteadOf(canonical) = field.role {
                assert!(find(FIELDS, canonical).is_some_and(|f| f.name == canonical), "{}", field.name);
            }
        }
    }
}
