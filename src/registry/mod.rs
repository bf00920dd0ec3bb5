//! `models.toml`: which networks, files, dtypes and generation defaults a model consists of. It is the only place
//! that knows files; what it says is checked when it is read, and an error names the key and the line.
//!
//! ```text
//! Registry ─► ModelSpec ─► dit, vae, text_encoder, image_encoder, audio_encoder: NetworkSpec (config, dtype, source)
//!                      ├─► tokenizer, loras, prepared
//!                      └─► generation(size, preset) ─► Generation (steps, shift, guidance, windows, caching)
//! ```

mod check;
mod config;
mod expand;
mod parse;
mod source;
mod storage;
mod strict;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};

pub use config::{Named, NamedConfig};
pub use source::{FileSpec, Learned, Prepared, RepoFiles, Source, TokenizerSource};
pub use storage::{ModelStorage, Receipt};

use crate::media::image::Buckets;
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::{Error, ErrorKind, Result, device};

/// The registry that is built in.
const BUILT_IN: &str = include_str!("../../models.toml");

/// The names of the sizes that a model may define, smallest first.
pub const SIZES: [&str; 2] = ["480p", "720p"];

/// The names of the presets that every model defines, quickest first.
pub const PRESETS: [&str; 4] = ["draft", "fast", "balanced", "quality"];

/// All known models.
#[derive(Clone, Debug)]
pub struct Registry {
    models: BTreeMap<String, ModelSpec>,
}

/// One model: its networks, where their files are, and how it generates unless a request says otherwise.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// The name of the profile, such as `infinitetalk`.
    pub name: String,
    /// One sentence for people.
    pub description: String,
    /// Noise, text, image and audio to velocity.
    pub dit: NetworkSpec<wan::Config>,
    /// Pixels to latents and back.
    pub vae: NetworkSpec<wan_vae::Config>,
    /// Token ids to text rows.
    pub text_encoder: NetworkSpec<umt5::Config>,
    /// The portrait to image rows.
    pub image_encoder: NetworkSpec<clip_vision::Config>,
    /// Speech to features of each video frame.
    pub audio_encoder: NetworkSpec<wav2vec2::Config>,
    /// Text to token ids.
    pub tokenizer: TokenizerSource,
    /// LoRAs of the DiT that presets may name.
    pub loras: BTreeMap<String, LoraSpec>,
    /// Where files lie that were prepared from those above.
    pub prepared: Prepared,
    sizes: Vec<SizeSpec>,
    default_size: String,
    defaults: parse::Overrides,
    presets: BTreeMap<String, parse::Overrides>,
}

/// One network of a model.
#[derive(Clone, Debug)]
pub struct NetworkSpec<C> {
    /// The architecture.
    pub config: C,
    /// Where the weights come from.
    pub source: Source,
    /// The map of a quantised network, one file for each number of persons; empty for one that is not quantised.
    pub quantization: Vec<RepoFiles>,
    /// Patterns (`*` = any characters) of tensors that are in the files and not in the network.
    pub unused: Vec<String>,
    dtype: DType,
}

impl<C> NetworkSpec<C> {
    /// The map of the quantised weights for `speakers` persons; none where they are not quantised.
    pub fn quantization(&self, speakers: usize) -> Option<&RepoFiles> {
        self.quantization.iter().find(|map| map.is_for(speakers))
    }

    /// Every file for `speakers` persons, the map among them.
    pub fn files(&self, speakers: usize) -> impl Iterator<Item = &RepoFiles> {
        self.source.files(speakers).chain(self.quantization(speakers))
    }

    /// The dtype to load the weights as: the registry's on a device that computes in it, f32 on the CPU.
    pub fn dtype(&self, device: &Device) -> DType {
        if device.is_cpu() { device::compute_dtype(device) } else { self.dtype }
    }

    /// The dtype that the registry gives the weights, in which they are prepared.
    pub fn stored_dtype(&self) -> DType {
        self.dtype
    }
}

/// A LoRA of the DiT.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Its one file.
    pub source: RepoFiles,
    /// What its changes are multiplied by.
    pub scale: f64,
    /// Patterns (`*` = any characters) of keys that are passed over.
    pub ignored: Vec<String>,
}

/// One of the sizes of a model's videos.
#[derive(Clone, Debug, PartialEq)]
pub struct SizeSpec {
    /// One of [`SIZES`].
    pub name: String,
    /// Heights and widths in pixels, of which the portrait's shape chooses one.
    pub buckets: Buckets,
    /// The timestep shift unless defaults or preset say otherwise.
    pub shift: f64,
    /// The polynomial of TeaCache, highest power first; `None` where it was not fitted.
    pub teacache_coefficients: Option<[f64; 5]>,
}

/// How to generate: what a request does not say is taken from here.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Denoising steps per window, at least 1.
    pub steps: usize,
    /// Timestep shift, above 0.
    pub shift: f64,
    /// Weight of the prompt; 1 = no guidance.
    pub text_guidance: f64,
    /// Weight of the voice; 1 = no guidance.
    pub audio_guidance: f64,
    /// Frames of one window, 4n + 1.
    pub frames_per_window: usize,
    /// Frames that a window takes over from the one before, 4n + 1, less than `frames_per_window`.
    pub motion_frames: usize,
    /// Weight of the colour matching to the portrait, 0–1.
    pub color_correction: f64,
    /// Reuse of the block stack's result between steps.
    pub teacache: Option<TeaCacheSpec>,
    /// The names of the LoRAs to merge, in order.
    pub loras: Vec<String>,
    /// The prompt of a request that has none.
    pub prompt: String,
    /// The negative prompt of a request that has none.
    pub negative_prompt: String,
}

/// TeaCache of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct TeaCacheSpec {
    /// The accumulated change from which on the blocks are computed again, above 0.
    pub threshold: f64,
    /// The polynomial of the change, highest power first.
    pub coefficients: [f64; 5],
}

impl Registry {
    /// The registry that is built in; it names no variable.
    ///
    /// # Errors
    /// None in a build that passes its tests.
    pub fn built_in() -> Result<Self> {
        Self::parse(BUILT_IN, "models.toml", &|_| None)
    }

    /// The registry in the file at `path`, in place of the one that is built in; `lookup` as for [`Registry::parse`].
    ///
    /// # Errors
    /// `ModelNotFound` if the file cannot be read; those of [`Registry::parse`].
    pub fn open(path: impl AsRef<Path>, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| {
            let message = format!("model registry {}: {e}", path.display());
            Error::new(ErrorKind::ModelNotFound, message).with_source(e)
        })?;
        Self::parse(&text, &path.display().to_string(), lookup)
    }

    /// Reads `text`; `origin` names it in messages, `lookup` knows the values of `$NAME` in it.
    ///
    /// # Errors
    /// `InvalidInput` naming the line, the key and what was expected, if a key is unknown or missing, a value is
    /// impossible, a variable is not set, or a revision is neither a commit nor `"learn"`.
    pub fn parse(text: &str, origin: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        Ok(Self { models: parse::models(text, origin, lookup)? })
    }

    /// The model called `name`.
    ///
    /// # Errors
    /// `ModelNotFound` naming those that exist.
    pub fn model(&self, name: &str) -> Result<&ModelSpec> {
        self.models.get(name).ok_or_else(|| {
            let known = self.names().collect::<Vec<_>>().join(", ");
            Error::new(
                ErrorKind::ModelNotFound,
                format!("there is no model `{name}`, expected one of {known}"),
            )
        })
    }

    /// The models' names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.keys().map(String::as_str)
    }

    /// The models in the order of their names.
    pub fn models(&self) -> impl Iterator<Item = &ModelSpec> {
        self.models.values()
    }
}

impl ModelSpec {
    /// The same model with weights drawn from `seed`, a tokenizer of bytes and no LoRA: nothing has to be installed,
    /// and it takes the same time.
    pub fn with_random_weights(mut self, seed: u64) -> Self {
        macro_rules! draw {
            ($($network:ident)*) => {$(
                self.$network.source = Source::Random(seed);
                self.$network.quantization.clear();
            )*};
        }
        draw!(dit vae text_encoder image_encoder audio_encoder);
        self.tokenizer = TokenizerSource::Bytes;
        self.loras.clear();
        for overrides in self.presets.values_mut().chain([&mut self.defaults]) {
            overrides.loras = None;
        }
        self
    }

    /// Every file that videos of `speakers` persons need, with these of the model's LoRAs, by repository.
    pub fn files(&self, speakers: usize, loras: &[String]) -> impl Iterator<Item = &RepoFiles> {
        let tokenizer = match &self.tokenizer {
            TokenizerSource::Bytes => &[],
            TokenizerSource::Files(files) => files.as_slice(),
        };
        let loras = loras.iter().filter_map(|name| self.loras.get(name)).map(|lora| &lora.source);
        tokenizer
            .iter()
            .chain(self.audio_encoder.files(speakers))
            .chain(self.text_encoder.files(speakers))
            .chain(self.image_encoder.files(speakers))
            .chain(self.vae.files(speakers))
            .chain(self.dit.files(speakers))
            .chain(loras)
    }

    /// The sizes of the model's videos, smallest first.
    pub fn sizes(&self) -> &[SizeSpec] {
        &self.sizes
    }

    /// The size called `name`, or the default.
    ///
    /// # Errors
    /// `InvalidInput` naming those that the model has.
    pub fn size(&self, name: Option<&str>) -> Result<&SizeSpec> {
        let name = name.unwrap_or(&self.default_size);
        self.sizes.iter().find(|size| size.name == name).ok_or_else(|| {
            let known = self.sizes.iter().map(|size| size.name.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("`size` is {name:?}, expected one that model {} has: {known}", self.name);
            Error::new(ErrorKind::InvalidInput, message)
        })
    }

    /// How to generate at `size` with `preset`; without one, with the model's own settings.
    ///
    /// # Errors
    /// `InvalidInput` if the model has no such size or preset.
    pub fn generation(&self, size: Option<&str>, preset: Option<&str>) -> Result<Generation> {
        let size = self.size(size)?;
        let preset = preset.map(|name| {
            self.presets.get(name).ok_or_else(|| {
                let message = format!("`preset` is {name:?}, expected one of {}", PRESETS.join(", "));
                Error::new(ErrorKind::InvalidInput, message)
            })
        });
        let settings = match preset.transpose()? {
            Some(preset) => preset.clone().or(&self.defaults),
            None => self.defaults.clone(),
        };
        Ok(settings.resolve(size))
    }
}

#[cfg(test)]
mod tests;
