//! Prepared files that no model has a use for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};

use super::key::{FileFacts, NetworkFacts};
use super::part::{remove, unwritable};
use super::prompts::PromptFacts;
use super::record::{self, MadeFrom, Record};
use super::{NetworkKey, NetworkKind, Selection};
use crate::Result;
use crate::registry::{ModelSpec, ModelStorage, PRESETS, Prepared as Folder, Registry};

/// A file that was, or would be, removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
}

/// Removes the prepared files in `storage`, complete or not, that no model of `registry` would use: with one or two
/// persons, any of its presets, in any precision. With `dry_run` they are only listed. A source file whose hash is not
/// known may be the one that a prepared file was made from.
///
/// # Errors
/// Those of [`Selection::key`]; `Unwritable` naming what cannot be listed or removed.
pub fn prune(registry: &Registry, storage: &ModelStorage, dry_run: bool) -> Result<Vec<Pruned>> {
    let wanted = Wanted::by(registry, storage)?;
    let folders: BTreeSet<_> = registry
        .models()
        .filter_map(|spec| match &spec.prepared {
            Folder::Folder(_) => Some(spec.prepared.folder(storage)),
            // What a repository has is the repository's business.
            Folder::Repo { .. } => None,
        })
        .collect();
    let mut pruned = Vec::new();
    for folder in folders {
        pruned.extend(prune_folder(&folder, &wanted, dry_run)?);
    }
    Ok(pruned)
}

fn prune_folder(folder: &Path, wanted: &Wanted, dry_run: bool) -> Result<Vec<Pruned>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unwritable(folder, &e)),
    };
    // What belongs together has the name up to the first dot in common.
    let mut groups: BTreeMap<String, Vec<Pruned>> = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(|e| unwritable(folder, &e))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let stem = name.split('.').next().unwrap_or_default();
        let size = entry.metadata().map_or(0, |found| found.len());
        if owner(stem).is_some() && entry.path().is_file() {
            groups.entry(stem.to_owned()).or_default().push(Pruned { path: entry.path(), size });
        }
    }
    let mut pruned = Vec::new();
    for (stem, files) in groups {
        let record = Record::read(&record::record_path(folder, &stem)).ok().flatten();
        if wanted.has(&stem, record.as_ref()) {
            continue;
        }
        for file in files {
            if !dry_run {
                remove(&file.path)?;
            }
            pruned.push(file);
        }
    }
    pruned.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(pruned)
}

/// What a file is of, by its name: a network, or prompts.
fn owner(stem: &str) -> Option<&str> {
    let (what, digits) = stem.rsplit_once('-')?;
    let is_key = digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let is_known = what == record::PROMPTS || NetworkKind::ALL.iter().any(|kind| kind.as_str() == what);
    (is_key && is_known).then_some(what)
}

/// What the models of a registry would use.
struct Wanted {
    networks: Vec<NetworkKey>,
    tokenizers: Vec<Vec<FileFacts>>,
}

impl Wanted {
    fn by(registry: &Registry, storage: &ModelStorage) -> Result<Self> {
        let mut wanted = Self { networks: Vec::new(), tokenizers: Vec::new() };
        for spec in registry.models() {
            for speakers in [1, 2] {
                for loras in lora_sets(spec)? {
                    let selection = Selection { spec, storage, speakers, loras: &loras };
                    for kind in NetworkKind::ALL {
                        for precision in selection.preparable(kind) {
                            wanted.networks.push(selection.key(kind, precision)?);
                        }
                    }
                    wanted.tokenizers.push(selection.tokenizer_facts()?);
                }
            }
        }
        Ok(wanted)
    }

    /// Whether the files called `stem`, which have `record` when they are complete, are of use.
    fn has(&self, stem: &str, record: Option<&Record>) -> bool {
        match record.map(Record::made_from) {
            Some(MadeFrom::Weights(made)) => self.networks.iter().any(|key| key.facts().may_be(made)),
            Some(MadeFrom::Prompts(PromptFacts { text_encoder, tokenizer, .. })) => {
                self.networks.iter().any(|key| key.facts().may_be(text_encoder))
                    && self.tokenizers.iter().any(|files| FileFacts::may_all_be(files, tokenizer))
            }
            // A part has no record to tell what it is made from.
            None => {
                let of_kind = |key: &&NetworkKey| owner(stem) == Some(key.kind().as_str());
                self.networks
                    .iter()
                    .filter(of_kind)
                    .any(|key| key.stem() == stem || !key.unverified().is_empty())
            }
        }
    }
}

/// The LoRAs that requests for `spec` can ask for.
fn lora_sets(spec: &ModelSpec) -> Result<Vec<Vec<String>>> {
    let mut sets = Vec::new();
    for preset in iter::once(None).chain(PRESETS.map(Some)) {
        let loras = spec.generation(None, preset)?.loras;
        if !sets.contains(&loras) {
            sets.push(loras);
        }
    }
    Ok(sets)
}

impl NetworkFacts {
    /// Whether `made` is the same, as far as hashes are known here.
    fn may_be(&self, made: &Self) -> bool {
        let mut this = self.clone();
        let files = this.files_mut().zip(made.files());
        files.for_each(|(file, made)| file.fill_in(made));
        this == *made
    }
}

impl FileFacts {
    /// Takes the hash of `made` where none is known.
    fn fill_in(&mut self, made: &Self) {
        if self.sha256.is_none() {
            self.sha256.clone_from(&made.sha256);
            self.local = None;
        }
    }

    fn may_all_be(these: &[Self], made: &[Self]) -> bool {
        let mut these = these.to_vec();
        these.iter_mut().zip(made).for_each(|(file, made)| file.fill_in(made));
        these == made
    }
}
