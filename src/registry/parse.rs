//! TOML text → checked models.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::DType;
use serde::{Deserialize, Deserializer, de};
use toml::Spanned;
use toml::de::DeTable;

use super::check::{check, check_repositories};
use super::config::{NamedConfig, name_or_table};
use super::expand::{self, Lookup};
use super::source::{Prepared, RawSource, RawTokenizer, RepoFiles, plain};
use super::{Generation, LoraSpec, ModelSpec, NetworkSpec, PRESETS, SIZES, SizeSpec, TeaCacheSpec};
use crate::media::image::Buckets;
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::{Error, ErrorKind, Result};

/// The models in `text`.
pub(super) fn models(text: &str, origin: &str, lookup: Lookup) -> Result<BTreeMap<String, ModelSpec>> {
    let not_toml = |e: toml::de::Error| {
        let failure = Failure { span: e.span().unwrap_or_default(), message: e.message().to_owned() };
        failure.into_error(text, origin).with_source(e)
    };
    let fail = |failure: Failure| failure.into_error(text, origin);
    let mut document = DeTable::parse(text).map_err(not_toml)?;
    expand::table(document.get_mut(), lookup).map_err(fail)?;
    let file = RawRegistry::deserialize(toml::Deserializer::from(document)).map_err(not_toml)?;
    check_repositories(file.models.values().map(Spanned::get_ref)).map_err(fail)?;
    let mut models = BTreeMap::new();
    for (name, raw) in &file.models {
        models.insert(name.clone(), complete(name, raw, &file.models).map_err(fail)?);
    }
    if models.is_empty() {
        return Err(fail(Failure::new(0..0, "there is no `models.<name>`")));
    }
    Ok(models)
}

/// What is wrong with which bytes of the text.
pub(super) struct Failure {
    span: Range<usize>,
    message: String,
}

impl Failure {
    pub(super) fn new(span: Range<usize>, message: impl Into<String>) -> Self {
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

pub(super) type Checked<T> = std::result::Result<T, Failure>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegistry {
    models: BTreeMap<String, Spanned<RawModel>>,
}

/// A model as written; what is absent comes from the model that it extends.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawModel {
    extends: Option<Spanned<String>>,
    description: Option<String>,
    pub(super) dit: Option<RawNetwork<wan::Config>>,
    pub(super) vae: Option<RawNetwork<wan_vae::Config>>,
    pub(super) text_encoder: Option<RawNetwork<umt5::Config>>,
    pub(super) image_encoder: Option<RawNetwork<clip_vision::Config>>,
    pub(super) audio_encoder: Option<RawNetwork<wav2vec2::Config>>,
    pub(super) tokenizer: Option<RawTokenizer>,
    sizes: Option<BTreeMap<String, Spanned<RawSize>>>,
    default_size: Option<Spanned<String>>,
    pub(super) loras: Option<BTreeMap<String, RawLora>>,
    prepared: Option<Prepared>,
    #[serde(default)]
    generation: Overrides,
    presets: Option<BTreeMap<String, Spanned<Overrides>>>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, bound = "C: NamedConfig")]
pub(super) struct RawNetwork<C> {
    #[serde(deserialize_with = "name_or_table")]
    config: C,
    #[serde(deserialize_with = "dtype")]
    dtype: DType,
    pub(super) source: RawSource,
    #[serde(default)]
    pub(super) quantization: Vec<Spanned<RepoFiles>>,
    pub(super) unused: Option<Spanned<Vec<String>>>,
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
pub(super) struct RawLora {
    pub(super) source: Spanned<RepoFiles>,
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
    pub(super) frames_per_window: Option<Spanned<usize>>,
    pub(super) motion_frames: Option<Spanned<usize>>,
    #[serde(default, deserialize_with = "share")]
    color_correction: Option<f64>,
    /// The threshold; 0 = no caching.
    pub(super) teacache: Option<Spanned<f64>>,
    pub(super) loras: Option<Spanned<Vec<String>>>,
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
        let threshold = self.teacache.map(Spanned::into_inner).filter(|threshold| *threshold > 0.0);
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
            loras: self.loras.map(Spanned::into_inner).unwrap_or_default(),
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
    let no_loras = BTreeMap::new();
    let loras = raw.loras.as_ref().or(parent.and_then(|p| p.loras.as_ref())).unwrap_or(&no_loras);
    let loras = loras.iter().map(|(name, lora)| {
        let RawLora { source, scale, ignored } = lora.clone();
        (name.clone(), LoraSpec { source: source.into_inner(), scale, ignored })
    });
    let prepared = raw.prepared.as_ref().or(parent.and_then(|p| p.prepared.as_ref()));
    let model = ModelSpec {
        name: name.to_owned(),
        description: field!(description).clone(),
        dit: network(field!(dit)),
        vae: network(field!(vae)),
        text_encoder: network(field!(text_encoder)),
        image_encoder: network(field!(image_encoder)),
        audio_encoder: network(field!(audio_encoder)),
        tokenizer: field!(tokenizer).into(),
        loras: loras.collect(),
        prepared: prepared.cloned().unwrap_or_else(|| Prepared::Folder("prepared".into())),
        default_size: default_size.get_ref().clone(),
        defaults: parent.map_or_else(|| raw.generation.clone(), |p| raw.generation.clone().or(&p.generation)),
        presets: presets(field!(presets), spanned.span())?,
        sizes,
    };
    check(&model, raw, spanned.span())?;
    Ok(model)
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
    NetworkSpec {
        config: raw.config.clone(),
        source: (&raw.source).into(),
        quantization: plain(&raw.quantization),
        unused: raw.unused.as_ref().map(|unused| unused.get_ref().clone()).unwrap_or_default(),
        dtype: raw.dtype,
    }
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
