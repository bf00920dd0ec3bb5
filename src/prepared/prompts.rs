//! UMT5's rows for the texts that models.toml names, so that the largest encoder need not be read for them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::{fs, iter};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::{self, FileFacts, NetworkFacts};
use super::part::{remove, unwritable};
use super::record::{self, Lookup, MadeFrom, Prepared, Record};
use super::{FORMAT, NetworkKind, Precision, Selection};
use crate::models::umt5;
use crate::registry::{ModelSpec, PRESETS};
use crate::text_cleaning::clean;
use crate::weights::{LoadMonitor, Weights};
use crate::{Error, ErrorKind, Result};

/// The rows of some texts, as the text encoder of one model gives them on one kind of device.
///
/// They are stored as they come out, in the dtype that the encoder computes in there: bf16 on a GPU, f32 on the CPU.
/// The two differ in more than rounding, so each has a file of its own, and what is looked up is what would have been
/// computed, bit for bit.
#[derive(Clone, Debug)]
pub struct PromptEmbeds(HashMap<String, Tensor>);

impl PromptEmbeds {
    /// Reads the rows for the text encoder of `selection` on `device`; none if they were not prepared.
    ///
    /// # Errors
    /// `ModelCorrupt` naming a file that is damaged; candle's if the device refuses.
    pub fn open(selection: &Selection, device: &Device) -> Result<Self> {
        let nothing = Self(HashMap::new());
        let Some(key) = PromptsKey::new(selection, device)? else { return Ok(nothing) };
        match key.find(selection)? {
            Some(file) => Self::read(&file, key.dtype, device),
            None => Ok(nothing),
        }
    }

    fn read(file: &Prepared, dtype: DType, device: &Device) -> Result<Self> {
        let weights = Weights::open(&[&file.path])?;
        let vb = weights.var_builder(dtype, device);
        let rows = weights.names().into_iter().map(|name| {
            let rows = vb.get_unchecked(&name)?;
            Ok((name, rows))
        });
        Ok(Self(rows.collect::<Result<_>>()?))
    }

    /// The rows (ids, D) of `text`, as many as it has ids.
    pub fn get(&self, text: &str) -> Option<&Tensor> {
        self.0.get(&name(text))
    }
}

/// A file of rows that is to be written.
pub struct PromptPreparation<'a> {
    selection: Selection<'a>,
    key: PromptsKey,
    /// What is there already.
    rows: PromptEmbeds,
    missing: Vec<String>,
}

impl<'a> PromptPreparation<'a> {
    /// The rows of `texts` on `device`; `None` where rows are not stored, because the encoder is drawn or the hash of
    /// a file is not known.
    ///
    /// # Errors
    /// Those of [`Selection::find`].
    pub fn new(selection: Selection<'a>, texts: &BTreeSet<String>, device: &Device) -> Result<Option<Self>> {
        let Some(key) = PromptsKey::new(&selection, device)? else { return Ok(None) };
        // What is damaged is made again.
        let rows = PromptEmbeds::open(&selection, device).unwrap_or(PromptEmbeds(HashMap::new()));
        let missing = texts.iter().filter(|text| rows.get(text).is_none()).cloned().collect();
        Ok(Some(Self { selection, key, rows, missing }))
    }

    /// The file, if it is complete.
    ///
    /// # Errors
    /// `ModelCorrupt` if it has another length than its record says.
    pub fn finished(&self) -> Result<Option<Prepared>> {
        if self.missing.is_empty() { self.key.find(&self.selection) } else { Ok(None) }
    }

    /// Computes what is missing with the text encoder, which is loaded for it under the eyes of `monitor`, and writes the file and its record.
    ///
    /// # Errors
    /// Those of loading and running the encoder; `InsufficientDisk` or `Unwritable` naming the file.
    pub fn run(mut self, device: &Device, monitor: Arc<LoadMonitor>) -> Result<Prepared> {
        let selection = &self.selection;
        let found = selection.find(NetworkKind::TextEncoder)?;
        let config = &selection.spec.text_encoder.config;
        let weights = selection.open(&found)?.watched_by(monitor);
        let encoder =
            weights.load(self.key.dtype, device, &found.unused, |vb| umt5::Model::new(config, vb))?;
        let tokenizer = selection.tokenizer()?;
        for text in &self.missing {
            self.rows.0.insert(name(text), encoder.encode(&tokenizer.encode(text)?)?);
        }
        let folder = selection.folder();
        let stem = self.key.stem();
        let (path, record_path) = (record::file_path(&folder, &stem), record::record_path(&folder, &stem));
        let bytes =
            safetensors::serialize(self.rows.0.iter().collect::<BTreeMap<_, _>>(), None).map_err(|e| {
                Error::new(ErrorKind::Inference, format!("{}: {e}", path.display())).with_source(e)
            })?;
        let (size, sha256) = (bytes.len() as u64, hex::encode(Sha256::digest(&bytes)));
        fs::create_dir_all(&folder).map_err(|e| unwritable(&folder, &e))?;
        // While the two do not fit together there is no file.
        remove(&record_path)?;
        record::write_whole(&path, &bytes)?;
        let made_from = MadeFrom::Prompts(self.key.facts.clone());
        let record = Record::new(made_from, &self.key.digest, self.rows.0.len(), size, sha256);
        record.write(&record_path)?;
        Ok(Prepared { path, record })
    }
}

/// The prompts and negative prompts that `spec` has for requests without one.
pub fn fixed_texts(spec: &ModelSpec) -> Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for size in spec.sizes() {
        for preset in iter::once(None).chain(PRESETS.map(Some)) {
            let generation = spec.generation(Some(&size.name), preset)?;
            texts.extend([generation.prompt, generation.negative_prompt]);
        }
    }
    Ok(texts)
}

/// The name of the rows of `text`: spellings that are cleaned to the same text have the same rows.
fn name(text: &str) -> String {
    hex::encode(Sha256::digest(clean(text)))
}

/// What rows are made from, in the order of the canonical JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PromptFacts {
    format: u32,
    pub(super) text_encoder: NetworkFacts,
    /// Empty where ids are bytes.
    pub(super) tokenizer: Vec<FileFacts>,
    device: DeviceKind,
    dtype: Precision,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DeviceKind {
    Cpu,
    Cuda,
    Metal,
}

/// The identity of a file of rows.
struct PromptsKey {
    facts: PromptFacts,
    digest: String,
    /// Of the rows.
    dtype: DType,
}

impl PromptsKey {
    /// `None` where rows are not stored: the encoder is drawn, or the hash of a file is not known.
    fn new(selection: &Selection, device: &Device) -> Result<Option<Self>> {
        let text_encoder = selection.find(NetworkKind::TextEncoder)?.key;
        let tokenizer = selection.tokenizer_facts()?;
        let unknown = tokenizer.iter().any(|file| file.sha256.is_none());
        if text_encoder.is_random() || !text_encoder.unverified().is_empty() || unknown {
            return Ok(None);
        }
        let device_kind = match device {
            Device::Cpu => DeviceKind::Cpu,
            Device::Cuda(_) => DeviceKind::Cuda,
            Device::Metal(_) => DeviceKind::Metal,
        };
        let dtype = selection.spec.text_encoder.dtype(device);
        let facts = PromptFacts {
            format: FORMAT,
            text_encoder: text_encoder.facts().clone(),
            tokenizer,
            device: device_kind,
            dtype: Precision::of(dtype),
        };
        Ok(Some(Self { digest: key::digest(&facts), facts, dtype }))
    }

    /// The file that was made for this.
    fn find(&self, selection: &Selection) -> Result<Option<Prepared>> {
        match record::find_file(&selection.folder(), &self.stem(), &self.digest)? {
            Lookup::Ready(file) => Ok(Some(*file)),
            Lookup::Ignored(_) | Lookup::Absent => Ok(None),
        }
    }

    fn stem(&self) -> String {
        key::stem(record::PROMPTS, &self.digest)
    }
}
