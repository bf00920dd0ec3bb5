//! What of a model is asked for: its networks by key, from prepared files where there are any.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use candle_core::DType;
use serde::Serialize;
use serde_json::Value;

use super::key::{FileFacts, LocalFacts, LoraFacts, NetworkFacts, SourceFacts};
use super::record::{self, Lookup, Prepared};
use super::{FORMAT, NetworkKey, NetworkKind, Precision};
use crate::registry::{LoraSpec, ModelSpec, ModelStorage, NetworkSpec, RepoFiles, Source, TokenizerSource};
use crate::tokenizer::Tokenizer;
use crate::weights::{Lora, Weights, quant};
use crate::{Error, ErrorKind, Result};

/// A model, for so many persons, with these LoRAs.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Where its files lie.
    pub storage: &'a ModelStorage,
    /// One or two: which audio adapter is meant.
    pub speakers: usize,
    /// LoRAs of the model to merge into the DiT, by name, in order.
    pub loras: &'a [String],
}

/// Where the weights of a network come from.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which weights they are.
    pub key: NetworkKey,
    /// The prepared file; `None` where the sources are read.
    pub prepared: Option<Prepared>,
    /// Patterns of tensors that are there and that the network does not ask for.
    pub unused: Vec<String>,
    /// Why there is no prepared file although there seems to be one, in a sentence for people.
    pub note: Option<String>,
}

/// What the registry says of one network, whatever its architecture.
pub(super) struct Network<'a> {
    config: Value,
    source: &'a Source,
    /// The map of weights that are quantised already.
    quantization: Option<&'a RepoFiles>,
    pub(super) unused: &'a [String],
    dtype: DType,
}

impl<'a> Selection<'a> {
    /// The identity of the weights of `kind` in `precision`.
    ///
    /// # Errors
    /// `ModelNotFound` naming a LoRA that the model does not have; `ModelCorrupt` naming a receipt that cannot be read.
    pub fn key(&self, kind: NetworkKind, precision: Precision) -> Result<NetworkKey> {
        let network = self.network(kind);
        let source = match network.source {
            Source::Random(seed) => SourceFacts::Random(*seed),
            Source::Files(_) => SourceFacts::Files(self.file_facts(network.source.files(self.speakers))?),
        };
        let loras = self.loras_of(kind)?.into_iter().map(|lora| {
            let LoraSpec { source, scale, ignored } = lora;
            let file = self.file_facts([source])?.into_iter().next().ok_or_else(no_file)?;
            Ok(LoraFacts { file, scale: *scale, ignored: ignored.clone() })
        });
        Ok(NetworkKey::new(NetworkFacts {
            format: FORMAT,
            network: kind,
            source,
            loras: loras.collect::<Result<_>>()?,
            unused: network.unused.to_vec(),
            config: network.config,
            precision,
        }))
    }

    /// The precision in which models.toml wants the weights of `kind`.
    pub fn precision(&self, kind: NetworkKind) -> Precision {
        Precision::of(self.network(kind).dtype)
    }

    /// The precisions in which `kind` can be prepared, the exact one first; none where there is nothing to gain,
    /// because the weights are drawn or are quantised already.
    pub fn preparable(&self, kind: NetworkKind) -> Vec<Precision> {
        let exact = self.precision(kind);
        let network = self.network(kind);
        match (network.source, kind) {
            (Source::Random(_), _) => Vec::new(),
            _ if network.quantization.is_some() => Vec::new(),
            (_, NetworkKind::Dit | NetworkKind::TextEncoder) => vec![exact, Precision::Fp8],
            _ => vec![exact],
        }
    }

    /// The prepared file of `kind` in `precision`, if it is there.
    ///
    /// # Errors
    /// Those of [`Selection::key`]; `ModelCorrupt` naming a file that has another length than its record says.
    pub fn prepared(&self, kind: NetworkKind, precision: Precision) -> Result<Option<Prepared>> {
        match record::find(&self.folder(), &self.key(kind, precision)?)? {
            Lookup::Ready(file) => Ok(Some(*file)),
            Lookup::Ignored(_) | Lookup::Absent => Ok(None),
        }
    }

    /// Where the weights of `kind` come from: the first prepared file of [`Selection::preparable`] that is there, else
    /// the sources.
    ///
    /// # Errors
    /// Those of [`Selection::key`]; `ModelCorrupt` naming a prepared file that has another length than its record says.
    pub fn find(&self, kind: NetworkKind) -> Result<Found> {
        let mut note = None;
        for precision in self.preparable(kind) {
            let key = self.key(kind, precision)?;
            match record::find(&self.folder(), &key)? {
                Lookup::Ready(file) => {
                    return Ok(Found { key, prepared: Some(*file), unused: Vec::new(), note: None });
                }
                Lookup::Ignored(why) => note = note.or(Some(why)),
                Lookup::Absent => {}
            }
        }
        let key = self.key(kind, self.precision(kind))?;
        Ok(Found { key, prepared: None, unused: self.network(kind).unused.to_vec(), note })
    }

    /// The weights that were found. Only headers are read.
    ///
    /// # Errors
    /// `ModelNotFound` naming a file or LoRA that is not there; `ModelCorrupt` naming what is damaged or does not fit.
    pub fn open(&self, found: &Found) -> Result<Weights> {
        match &found.prepared {
            Some(file) => Weights::open(&[&file.path]),
            None => self.open_sources(found.key.kind()),
        }
    }

    /// The weights of `kind` from the files that models.toml names, with the LoRAs.
    ///
    /// # Errors
    /// `ModelNotFound` naming a file or LoRA that is not there; `ModelCorrupt` naming what is damaged or does not fit.
    pub(super) fn open_sources(&self, kind: NetworkKind) -> Result<Weights> {
        let Network { source, quantization, .. } = self.network(kind);
        let mut weights = match source {
            Source::Random(seed) => Weights::random(*seed),
            Source::Files(_) => {
                let repos = source.files(self.speakers);
                Weights::open(&self.storage.paths(repos).collect::<Vec<_>>())?
            }
        };
        if let Some(map) = quantization {
            let path = self.storage.paths([map]).next().ok_or_else(no_file)?;
            let json = fs::read_to_string(&path).map_err(|e| {
                let message = format!("quantisation map {} cannot be read: {e}", path.display());
                Error::new(ErrorKind::ModelNotFound, message).with_source(e)
            })?;
            weights.check_quantized(&quant::Map::parse(&json)?)?;
        }
        for lora in self.loras_of(kind)? {
            let path = self.storage.paths([&lora.source]).next().ok_or_else(no_file)?;
            weights = weights.with_lora(Lora::open(path, &lora.ignored)?, lora.scale)?;
        }
        Ok(weights)
    }

    /// The files that models.toml names for `kind`: its sources, the map of quantised ones, LoRAs.
    ///
    /// # Errors
    /// `ModelNotFound` naming a LoRA that the model does not have.
    pub fn sources(&self, kind: NetworkKind) -> Result<Vec<&'a RepoFiles>> {
        let Network { source, quantization, .. } = self.network(kind);
        let loras = self.loras_of(kind)?.into_iter().map(|lora| &lora.source);
        Ok(source.files(self.speakers).chain(quantization).chain(loras).collect())
    }

    /// The files that are needed: a network that is prepared needs no sources.
    ///
    /// # Errors
    /// Those of [`Selection::find`].
    pub fn needed(&self) -> Result<Vec<&'a RepoFiles>> {
        let mut repos: Vec<&RepoFiles> = match &self.spec.tokenizer {
            TokenizerSource::Bytes => Vec::new(),
            TokenizerSource::Files(files) => files.iter().collect(),
        };
        for kind in NetworkKind::ALL {
            if self.find(kind)?.prepared.is_none() {
                repos.extend(self.sources(kind)?);
            }
        }
        Ok(repos)
    }

    /// Those of [`Selection::needed`] that are not there.
    ///
    /// # Errors
    /// Those of [`Selection::find`].
    pub fn missing_files(&self) -> Result<Vec<PathBuf>> {
        Ok(self.storage.paths(self.needed()?).filter(|file| !file.is_file()).collect())
    }

    /// Where prepared files lie.
    pub(super) fn folder(&self) -> PathBuf {
        self.spec.prepared.folder(self.storage)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_file`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.spec.tokenizer {
            TokenizerSource::Bytes => Ok(Tokenizer::bytes()),
            TokenizerSource::Files(repos) => {
                Tokenizer::from_file(self.storage.paths(repos).next().ok_or_else(no_file)?)
            }
        }
    }

    /// What is known of the tokenizer's file; nothing where ids are bytes.
    pub(super) fn tokenizer_facts(&self) -> Result<Vec<FileFacts>> {
        match &self.spec.tokenizer {
            TokenizerSource::Bytes => Ok(Vec::new()),
            TokenizerSource::Files(repos) => self.file_facts(repos),
        }
    }

    /// The LoRAs of the network, which only the DiT has.
    fn loras_of(&self, kind: NetworkKind) -> Result<Vec<&'a LoraSpec>> {
        if kind != NetworkKind::Dit {
            return Ok(Vec::new());
        }
        let spec = self.spec;
        let lora = |name: &String| {
            spec.loras.get(name).ok_or_else(|| {
                let message = format!("the model `{}` has no LoRA `{name}`", spec.name);
                Error::new(ErrorKind::ModelNotFound, message)
            })
        };
        self.loras.iter().map(lora).collect()
    }

    pub(super) fn network(&self, kind: NetworkKind) -> Network<'a> {
        fn of<C: Serialize>(spec: &NetworkSpec<C>, speakers: usize) -> Network<'_> {
            // A table of numbers and words cannot fail to be written.
            let config = serde_json::to_value(&spec.config).unwrap_or_default();
            Network {
                config,
                source: &spec.source,
                quantization: spec.quantization(speakers),
                unused: &spec.unused,
                dtype: spec.stored_dtype(),
            }
        }
        match kind {
            NetworkKind::AudioEncoder => of(&self.spec.audio_encoder, self.speakers),
            NetworkKind::TextEncoder => of(&self.spec.text_encoder, self.speakers),
            NetworkKind::ImageEncoder => of(&self.spec.image_encoder, self.speakers),
            NetworkKind::Vae => of(&self.spec.vae, self.speakers),
            NetworkKind::Dit => of(&self.spec.dit, self.speakers),
        }
    }

    /// What is known of the files of `repos`. A hash is models.toml's, else that of the receipt, unless the file has
    /// changed since.
    fn file_facts<'r>(&self, repos: impl IntoIterator<Item = &'r RepoFiles>) -> Result<Vec<FileFacts>> {
        let mut all = Vec::new();
        for repo in repos {
            for file in &repo.files {
                let place = self.storage.path(repo, file);
                let state = fs::metadata(&place).ok().map(|found| {
                    let mtime_ns =
                        found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
                    (found.len(), mtime_ns)
                });
                let sha256 = match file.sha256.known() {
                    Some(known) => Some(known.clone()),
                    None => {
                        let receipt = self.storage.receipt(repo, file)?;
                        let of_this = receipt.filter(|receipt| {
                            state.is_none_or(|state| state == (receipt.size, receipt.mtime_ns))
                        });
                        of_this.map(|receipt| receipt.sha256)
                    }
                };
                let local = sha256.is_none().then_some(LocalFacts { place, state });
                all.push(FileFacts { repo: repo.repo.clone(), path: file.path.clone(), sha256, local });
            }
        }
        Ok(all)
    }
}

/// The parser lets no empty list of files pass.
fn no_file() -> Error {
    Error::new(ErrorKind::ModelNotFound, "models.toml lists no file where one is needed")
}
