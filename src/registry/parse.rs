//! TOML text → checked models.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::DType;
use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::config::{NamedConfig, name_or_table};
use super::source::{RepoFiles, Source, TokenizerSource};
use super::{Generation, LoraSpec, ModelSpec, NetworkSpec, PRESETS, SIZES, SizeSpec, TeaCacheSpec};
use crate::media::image::Buckets;
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::{Error, ErrorKind, Result};

/// The models in `text`.
pub(super) fn models(text: &str, origin: &str) -> Result<BTreeMap<String, ModelSpec>> {
    let file: RawRegistry = toml::from_str(text).map_err(|e| {
        let failure = Failure { span: e.span().unwrap_or_default(), message: e.message().to_owned() };
        failure.into_error(text, origin).with_source(e)
    })?;
    let mut models = BTreeMap::new();
    for (name, raw) in &file.models {
        let model = complete(name, raw, &file.models).and_then(|model| {
            check(&model, raw)?;
            Ok(model)
        });
        models.insert(name.clone(), model.map_err(|failure| failure.into_error(text, origin))?);
    }
    if models.is_empty() {
        return Err(Failure { span: 0..0, message: "there is no `models.<name>`".to_owned() }
            .into_error(text, origin));
    }
    Ok(models)
}

/// What is wrong with which bytes of the text.
struct Failure {
    span: Range<usize>,
    message: String,
}

impl Failure {
    fn new(span: Range<usize>, message: impl Into<String>) -> Self {
        Self { span, message: message.into() }
    }

    fn into_error(self, text: &str, origin: &str) -> Error {
        let start = self.span.start.min(text.len());
        let before = &text.as_bytes()[..start];
        let line = before.iter().filter(|b| **b == b'\n').count();
        let shown = text.lines().nth(line).unwrap_or_default().trim();
        let message = format!("{origin} line {}: {}, in `{shown}`", line + 1, self.message);
        Error::new(ErrorKind::InvalidInput, message).with_reason("MODEL_REGISTRY")
    }
}

type Checked<T> = std::result::Result<T, Failure>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegistry {
    models: BTreeMap<String, Spanned<RawModel>>,
}

/// A model as written; what is absent comes from the model that it extends.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    extends: Option<Spanned<String>>,
    description: Option<String>,
    dit: Option<RawNetwork<wan::Config>>,
    vae: Option<RawNetwork<wan_vae::Config>>,
    text_encoder: Option<RawNetwork<umt5::Config>>,
    image_encoder: Option<RawNetwork<clip_vision::Config>>,
    audio_encoder: Option<RawNetwork<wav2vec2::Config>>,
    tokenizer: Option<TokenizerSource>,
    sizes: Option<BTreeMap<String, Spanned<RawSize>>>,
    default_size: Option<Spanned<String>>,
    #[serde(default)]
    loras: BTreeMap<String, RawLora>,
    #[serde(default)]
    generation: Overrides,
    presets: Option<BTreeMap<String, Spanned<Overrides>>>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, bound = "C: NamedConfig")]
struct RawNetwork<C> {
    #[serde(deserialize_with = "name_or_table")]
    config: C,
    #[serde(deserialize_with = "dtype")]
    dtype: DType,
    source: Source,
    #[serde(default)]
    unused: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSize {
    #[serde(deserialize_with = "name_or_table")]
    buckets: Buckets,
    #[serde(deserialize_with = "shift")]
    shift: f64,
    teacache_coefficients: Option<[f64; 5]>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLora {
    source: RepoFiles,
    #[serde(deserialize_with = "finite")]
    scale: f64,
    #[serde(default)]
    ignored: Vec<String>,
}

/// Settings of a model or a preset; what is absent comes from the next place.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Overrides {
    #[serde(default, deserialize_with = "steps")]
    steps: Option<usize>,
    #[serde(default, deserialize_with = "some_shift")]
    shift: Option<f64>,
    #[serde(default, deserialize_with = "guidance")]
    text_guidance: Option<f64>,
    #[serde(default, deserialize_with = "guidance")]
    audio_guidance: Option<f64>,
    frames_per_window: Option<Spanned<usize>>,
    motion_frames: Option<Spanned<usize>>,
    #[serde(default, deserialize_with = "share")]
    color_correction: Option<f64>,
    /// The threshold; 0 = no caching.
    #[serde(default, deserialize_with = "guidance")]
    teacache: Option<f64>,
    pub(super) loras: Option<Vec<String>>,
    prompt: Option<String>,
    negative_prompt: Option<String>,
}

impl Overrides {
    /// These settings, completed by `rest`.
    pub(super) fn or(self, rest: &Self) -> Self {
        let rest = rest.clone();
        Self {
            steps: self.steps.or(rest.steps),
            shift: self.shift.or(rest.shift),
            text_guidance: self.text_guidance.or(rest.text_guidance),
            audio_guidance: self.audio_guidance.or(rest.audio_guidance),
            frames_per_window: self.frames_per_window.or(rest.frames_per_window),
            motion_frames: self.motion_frames.or(rest.motion_frames),
            color_correction: self.color_correction.or(rest.color_correction),
            teacache: self.teacache.or(rest.teacache),
            loras: self.loras.or(rest.loras),
            prompt: self.prompt.or(rest.prompt),
            negative_prompt: self.negative_prompt.or(rest.negative_prompt),
        }
    }

    /// The settings at `size`; what is absent in all places has the reference's default.
    pub(super) fn resolve(self, size: &SizeSpec) -> Generation {
        let threshold = self.teacache.filter(|threshold| *threshold > 0.0);
        let frames = |value: Option<Spanned<usize>>, default| value.map_or(default, Spanned::into_inner);
        Generation {
            steps: self.steps.unwrap_or(40),
            shift: self.shift.unwrap_or(size.shift),
            text_guidance: self.text_guidance.unwrap_or(5.0),
            audio_guidance: self.audio_guidance.unwrap_or(4.0),
            frames_per_window: frames(self.frames_per_window, 81),
            motion_frames: frames(self.motion_frames, 9),
            color_correction: self.color_correction.unwrap_or(1.0),
            teacache: threshold
                .zip(size.teacache_coefficients)
                .map(|(threshold, coefficients)| TeaCacheSpec { threshold, coefficients }),
            loras: self.loras.unwrap_or_default(),
            prompt: self.prompt.unwrap_or_default(),
            negative_prompt: self.negative_prompt.unwrap_or_default(),
        }
    }
}

/// The model `name`, completed by the one that it extends.
fn complete(
    name: &str,
    spanned: &Spanned<RawModel>,
    all: &BTreeMap<String, Spanned<RawModel>>,
) -> Checked<ModelSpec> {
    let raw = spanned.get_ref();
    let parent = match &raw.extends {
        None => None,
        Some(parent) => match all.get(parent.get_ref()).map(Spanned::get_ref) {
            Some(model) if model.extends.is_none() => Some(model),
            // One step is all that is needed, and it cannot go in circles.
            Some(_) => {
                let message = format!("`extends` names `{}`, which extends another model", parent.get_ref());
                return Err(Failure::new(parent.span(), message));
            }
            None => {
                let message = format!("`extends` names `{}`, which is not there", parent.get_ref());
                return Err(Failure::new(parent.span(), message));
            }
        },
    };
    let need = Need { name, span: spanned.span() };
    macro_rules! field {
        ($field:ident) => {
            need.value(stringify!($field), raw.$field.as_ref().or(parent.and_then(|p| p.$field.as_ref())))?
        };
    }
    let sizes = sizes(field!(sizes))?;
    let default_size = field!(default_size);
    if !sizes.iter().any(|size| size.name == *default_size.get_ref()) {
        let message = format!("`default_size` is {:?}, which is not in `sizes`", default_size.get_ref());
        return Err(Failure::new(default_size.span(), message));
    }
    let loras = parent.into_iter().flat_map(|parent| &parent.loras).chain(&raw.loras);
    let loras = loras.map(|(name, lora)| {
        let RawLora { source, scale, ignored } = lora.clone();
        (name.clone(), LoraSpec { source, scale, ignored })
    });
    Ok(ModelSpec {
        name: name.to_owned(),
        description: field!(description).clone(),
        dit: network(field!(dit)),
        vae: network(field!(vae)),
        text_encoder: network(field!(text_encoder)),
        image_encoder: network(field!(image_encoder)),
        audio_encoder: network(field!(audio_encoder)),
        tokenizer: field!(tokenizer).clone(),
        loras: loras.collect(),
        default_size: default_size.get_ref().clone(),
        defaults: parent.map_or_else(|| raw.generation.clone(), |p| raw.generation.clone().or(&p.generation)),
        presets: presets(field!(presets), spanned.span())?,
        sizes,
    })
}

/// Asks for the fields of one model.
struct Need<'a> {
    name: &'a str,
    span: Range<usize>,
}

impl Need<'_> {
    fn value<'v, T>(&self, field: &str, value: Option<&'v T>) -> Checked<&'v T> {
        value.ok_or_else(|| Failure::new(self.span.clone(), format!("model `{}` lacks `{field}`", self.name)))
    }
}

fn network<C: Clone>(raw: &RawNetwork<C>) -> NetworkSpec<C> {
    let RawNetwork { config, dtype, source, unused } = raw.clone();
    NetworkSpec { config, source, unused, dtype }
}

fn sizes(raw: &BTreeMap<String, Spanned<RawSize>>) -> Checked<Vec<SizeSpec>> {
    if let Some((name, size)) = raw.iter().find(|(name, _)| !SIZES.contains(&name.as_str())) {
        let message = format!("there is no size `{name}`, expected one of {}", SIZES.join(", "));
        return Err(Failure::new(size.span(), message));
    }
    let in_order = SIZES.iter().filter_map(|name| raw.get(*name).map(|size| (name, size.get_ref())));
    let spec = |(name, size): (&&str, &RawSize)| SizeSpec {
        name: (*name).to_owned(),
        buckets: size.buckets.clone(),
        shift: size.shift,
        teacache_coefficients: size.teacache_coefficients,
    };
    Ok(in_order.map(spec).collect())
}

fn presets(
    raw: &BTreeMap<String, Spanned<Overrides>>,
    model: Range<usize>,
) -> Checked<BTreeMap<String, Overrides>> {
    if let Some((name, preset)) = raw.iter().find(|(name, _)| !PRESETS.contains(&name.as_str())) {
        let message = format!("there is no preset `{name}`, expected {}", PRESETS.join(", "));
        return Err(Failure::new(preset.span(), message));
    }
    if let Some(name) = PRESETS.iter().find(|name| !raw.contains_key(**name)) {
        return Err(Failure::new(model, format!("the preset `{name}` is missing")));
    }
    Ok(raw.iter().map(|(name, preset)| (name.clone(), preset.get_ref().clone())).collect())
}

/// Checks what one value alone does not show.
fn check(model: &ModelSpec, raw: &Spanned<RawModel>) -> Checked<()> {
    let fail = |message: String| Err(Failure::new(raw.span(), format!("model `{}`: {message}", model.name)));
    let (dit, audio) = (&model.dit.config, &model.audio_encoder.config);
    let joints = [
        ("dit.text_dim", dit.text_dim, "text_encoder.dim", model.text_encoder.config.dim),
        ("dit.clip_dim", dit.clip_dim, "image_encoder.vision_dim", model.image_encoder.config.vision_dim),
        ("dit.audio_channels", dit.audio_channels, "audio_encoder.hidden_size", audio.hidden_size),
        ("dit.audio_blocks", dit.audio_blocks, "audio_encoder.num_hidden_layers", audio.num_hidden_layers),
        ("dit.out_dim", dit.out_dim, "vae.z_dim", model.vae.config.z_dim),
    ];
    for (left, value, right, other) in joints {
        if value != other {
            return fail(format!("`{left}` is {value} and `{right}` is {other}, expected the same"));
        }
    }
    for (name, settings) in [("generation", None)].into_iter().chain(PRESETS.map(|name| (name, Some(name)))) {
        let overrides = match settings {
            Some(preset) => model.presets[preset].clone().or(&model.defaults),
            None => model.defaults.clone(),
        };
        check_windows(&overrides)?;
        if let Some(lora) = overrides.loras.iter().flatten().find(|lora| !model.loras.contains_key(*lora)) {
            return fail(format!("`{name}` uses the LoRA `{lora}`, which is not in `loras`"));
        }
        let uses_cache = overrides.teacache.is_some_and(|threshold| threshold > 0.0);
        if let Some(size) = model.sizes.iter().find(|size| uses_cache && size.teacache_coefficients.is_none())
        {
            return fail(format!("`{name}` uses `teacache`, but size `{}` has no coefficients", size.name));
        }
    }
    Ok(())
}

fn check_windows(settings: &Overrides) -> Checked<()> {
    for (name, value) in
        [("frames_per_window", &settings.frames_per_window), ("motion_frames", &settings.motion_frames)]
    {
        if let Some(value) = value.as_ref().filter(|value| value.get_ref() % 4 != 1) {
            let (span, value) = (value.span(), value.get_ref());
            return Err(Failure::new(span, format!("`{name}` is {value}, expected 4n+1 (for example 81)")));
        }
    }
    let (Some(frames), Some(motion)) = (&settings.frames_per_window, &settings.motion_frames) else {
        return Ok(());
    };
    if motion.get_ref() >= frames.get_ref() {
        let message = format!(
            "`motion_frames` is {}, expected less than `frames_per_window`, {}",
            motion.get_ref(),
            frames.get_ref()
        );
        return Err(Failure::new(motion.span(), message));
    }
    Ok(())
}

fn dtype<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<DType, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        other => {
            Err(de::Error::custom(format!("`dtype` is {other:?}, expected \"f32\", \"bf16\" or \"f16\"")))
        }
    }
}

/// A number within `range`.
fn number<'de, D: Deserializer<'de>>(
    deserializer: D,
    range: Range<f64>,
    what: &str,
) -> std::result::Result<f64, D::Error> {
    let value = f64::deserialize(deserializer)?;
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(de::Error::custom(format!("is {value}, expected {what}")))
    }
}

fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    number(deserializer, f64::MIN..f64::INFINITY, "a finite number")
}

fn shift<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    number(deserializer, f64::MIN_POSITIVE..1000.0, "a number above 0 and below 1000")
}

fn some_shift<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f64>, D::Error> {
    shift(deserializer).map(Some)
}

fn guidance<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f64>, D::Error> {
    number(deserializer, 0.0..1000.0, "a number of at least 0 and below 1000").map(Some)
}

fn share<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f64>, D::Error> {
    number(deserializer, 0.0..1.0f64.next_up(), "a number from 0 to 1").map(Some)
}

fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    match usize::deserialize(deserializer)? {
        n @ 1..=1000 => Ok(Some(n)),
        n => Err(de::Error::custom(format!("is {n}, expected 1 to 1000 steps"))),
    }
}
