//! A model's networks from its files.

use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_nn::VarBuilder;

use super::infinitetalk::Networks;
use super::progress::{Cancel, Progress, Stage};
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::registry::{ModelSpec, NetworkSpec, RepoFiles, Source, TokenizerSource};
use crate::tokenizer::Tokenizer;
use crate::weights::{Lora, Weights};
use crate::{Error, ErrorKind, Result};

/// A model, ready to make videos.
pub struct Pipeline {
    pub(super) networks: Networks,
    pub(super) text_encoder: umt5::Model,
    pub(super) audio_encoder: wav2vec2::Model,
    pub(super) tokenizer: Tokenizer,
    pub(super) device: Device,
}

/// What of a model is loaded, and for what.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// The folder that holds `<repo>/<path>` of every file that the model lists.
    pub storage: &'a Path,
    /// One or two: which audio adapter is read.
    pub speakers: usize,
    /// LoRAs of the model to merge, by name.
    pub loras: &'a [String],
    /// Where the networks run.
    pub device: &'a Device,
}

/// Where the files of hub repositories lie: `<storage>/<repo>/<path>`.
pub fn stored_files<'a>(
    storage: &'a Path,
    repos: impl IntoIterator<Item = &'a RepoFiles> + 'a,
) -> impl Iterator<Item = PathBuf> + 'a {
    repos
        .into_iter()
        .flat_map(move |repo| repo.files.iter().map(move |file| storage.join(&repo.repo).join(&file.path)))
}

impl Pipeline {
    /// Builds every network of `spec`.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`] naming a file or LoRA that is not there, [`ErrorKind::ModelCorrupt`] naming a file
    /// and tensor that do not fit, [`ErrorKind::Cancelled`].
    pub fn load(
        spec: &ModelSpec,
        options: LoadOptions,
        cancel: &Cancel,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let mut next = || -> Result<()> {
            cancel.check()?;
            progress(Progress { stage: Stage::Load, window: 0, windows: 0, step: 0, steps: 0 });
            Ok(())
        };
        next()?;
        check_installed(spec, options)?;
        let tokenizer = match &spec.tokenizer {
            TokenizerSource::Bytes => Tokenizer::bytes(),
            TokenizerSource::Files(repos) => Tokenizer::from_file(only_file(options, repos)?)?,
        };
        let audio_encoder = network(&spec.audio_encoder, options, &[], wav2vec2::Model::new)?;
        next()?;
        let text_encoder = network(&spec.text_encoder, options, &[], umt5::Model::new)?;
        next()?;
        let clip = network(&spec.image_encoder, options, &[], clip_vision::Model::new)?;
        let vae = network(&spec.vae, options, &[], wan_vae::Vae::new)?;
        next()?;
        let loras = options.loras.iter().map(|name| lora(spec, options, name)).collect::<Result<Vec<_>>>()?;
        let dit = network(&spec.dit, options, &loras, wan::Model::new)?;
        let networks = Networks { dit, vae, clip };
        Ok(Self { networks, text_encoder, audio_encoder, tokenizer, device: options.device.clone() })
    }
}

/// Fails before anything is read when a file is not there.
fn check_installed(spec: &ModelSpec, options: LoadOptions) -> Result<()> {
    let files = stored_files(options.storage, spec.files(options.speakers, options.loras));
    let mut missing = files.filter(|file| !file.is_file());
    let Some(first) = missing.next() else { return Ok(()) };
    let message = format!(
        "the model `{}` is not installed: {} of its files are missing, the first is {}",
        spec.name,
        1 + missing.count(),
        first.display()
    );
    let hint = "put the files there, or take `tiny`, which needs none";
    Err(Error::new(ErrorKind::ModelNotFound, message).with_hint(hint))
}

fn only_file(options: LoadOptions, repos: &[RepoFiles]) -> Result<PathBuf> {
    let missing = || Error::new(ErrorKind::ModelNotFound, "models.toml lists no file where one is needed");
    stored_files(options.storage, repos).next().ok_or_else(missing)
}

fn lora(spec: &ModelSpec, options: LoadOptions, name: &str) -> Result<(Lora, f64)> {
    let Some(lora) = spec.loras.get(name) else {
        let message = format!("the model `{}` has no LoRA `{name}`", spec.name);
        return Err(Error::new(ErrorKind::ModelNotFound, message));
    };
    let path = only_file(options, std::slice::from_ref(&lora.source))?;
    Ok((Lora::open(path, &lora.ignored)?, lora.scale))
}

/// Builds one network strictly: a tensor that is missing, misshapen or left over is an error.
fn network<C, N>(
    spec: &NetworkSpec<C>,
    options: LoadOptions,
    loras: &[(Lora, f64)],
    build: impl FnOnce(&C, VarBuilder) -> candle_core::Result<N>,
) -> Result<N> {
    let mut weights = match &spec.source {
        Source::Random(seed) => Weights::random(*seed),
        Source::Files(_) => {
            let repos = spec.source.files(options.speakers);
            Weights::open(&stored_files(options.storage, repos).collect::<Vec<_>>())?
        }
    };
    for (lora, scale) in loras {
        weights = weights.with_lora(lora.clone(), *scale)?;
    }
    let device = options.device;
    weights.load(spec.dtype(device), device, &spec.unused, |vb| build(&spec.config, vb))
}
