//! The record beside a prepared file, and looking one up.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::FORMAT;
use super::key::{NetworkFacts, NetworkKey};
use super::part::unwritable;
use super::prompts::PromptFacts;
use crate::weights::LoadMonitor;
use crate::{Error, ErrorKind, Result};

/// Bytes read at once while a file is compared with its record.
const HASHED_AT_ONCE: usize = 8 << 20;

/// What a prepared file was made from, and what it is. It is written last: where it is, the file is complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    format: u32,
    /// The SHA-256 of `made_from`.
    key: String,
    made_from: MadeFrom,
    /// Tensors in the file.
    pub tensors: usize,
    /// Its length in bytes.
    pub size: u64,
    /// The SHA-256 of its bytes, 64 hexadecimal digits.
    pub sha256: String,
    /// The version of Talkie that wrote it.
    version: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum MadeFrom {
    Weights(NetworkFacts),
    Prompts(PromptFacts),
}

/// A complete prepared file.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is.
    pub record: Record,
}

/// What was found of a prepared file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Lookup {
    /// The file, made from what was asked for.
    Ready(Box<Prepared>),
    /// Something else that looks like it, and why it is not used, in a sentence for people.
    Ignored(String),
    /// Nothing.
    Absent,
}

/// The prepared file of the network `key` in `folder`.
///
/// # Errors
/// `ModelCorrupt` naming the file, if it has another length than its record says.
pub(super) fn find(folder: &Path, key: &NetworkKey) -> Result<Lookup> {
    if key.is_random() {
        return Ok(Lookup::Absent);
    }
    if let Some(file) = key.unverified().first() {
        return Ok(match others(folder, key.kind().as_str()) {
            Some(other) => Lookup::Ignored(format!(
                "prepared files such as {other} are not used, because the hash of {} is not known: run `handler \
                 prefetch`",
                file.display()
            )),
            None => Lookup::Absent,
        });
    }
    match find_file(folder, &key.stem(), key.digest())? {
        Lookup::Absent => Ok(match others(folder, key.kind().as_str()) {
            Some(other) => Lookup::Ignored(format!(
                "{other} is not used: it was made from other files or LoRAs, or in another precision, than \
                 models.toml says; run `handler prepare`"
            )),
            None => Lookup::Absent,
        }),
        found => Ok(found),
    }
}

/// The file `stem` that was made from what `digest` is the hash of.
pub(super) fn find_file(folder: &Path, stem: &str, digest: &str) -> Result<Lookup> {
    let file = file_path(folder, stem);
    let record_path = record_path(folder, stem);
    let record = match Record::read(&record_path) {
        Ok(Some(record)) => record,
        Ok(None) => return Ok(Lookup::Absent),
        Err(e) => return Ok(Lookup::Ignored(format!("{} is not used: {e}", file.display()))),
    };
    if record.key != digest || record.format != FORMAT {
        let record = record_path.display();
        return Ok(Lookup::Ignored(format!(
            "{} is not used: {record} says that it was made from something else",
            file.display()
        )));
    }
    match fs::metadata(&file) {
        Ok(found) if found.len() == record.size => {
            Ok(Lookup::Ready(Box::new(Prepared { path: file, record })))
        }
        Ok(found) => {
            let (found, expected) = (found.len(), record.size);
            let message = format!(
                "prepared file {} has {found} bytes, expected {expected} as its record says",
                file.display()
            );
            let hint = "run `handler prepare` to make it again, or delete it";
            Err(Error::new(ErrorKind::ModelCorrupt, message).with_hint(hint))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let record = record_path.display();
            Ok(Lookup::Ignored(format!("{record} is the record of a file that is not there")))
        }
        Err(e) => {
            let message = format!("prepared file {} cannot be looked at: {e}", file.display());
            Err(Error::new(ErrorKind::ModelCorrupt, message).with_source(e))
        }
    }
}

/// A record of a file of this kind.
fn others(folder: &Path, what: &str) -> Option<String> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_of_kind = |name: &String| {
        let digits = name.strip_prefix(what).and_then(|rest| rest.strip_prefix('-'));
        digits.is_some_and(|rest| rest.ends_with(".json"))
    };
    names
        .filter(is_of_kind)
        .min()
        .map(|name| folder.join(name).with_extension("safetensors").display().to_string())
}

impl Prepared {
    /// Reads the file and compares it with its record.
    ///
    /// # Errors
    /// `ModelCorrupt` if it is not what it was or cannot be read; those of `monitor`, which is asked between pieces.
    pub fn verify(&self, monitor: &LoadMonitor) -> Result<()> {
        let failed = |what: String| {
            let message = format!("prepared file {} {what}", self.path.display());
            let hint = "run `handler prepare` to make it again, or delete it";
            Error::new(ErrorKind::ModelCorrupt, message).with_hint(hint)
        };
        let unreadable = |e: io::Error| failed(format!("cannot be read: {e}")).with_source(e);
        let mut file = File::open(&self.path).map_err(unreadable)?;
        let (mut hasher, mut buffer) = (Sha256::new(), vec![0; HASHED_AT_ONCE]);
        loop {
            monitor.check()?;
            match file.read(&mut buffer).map_err(unreadable)? {
                0 => break,
                len => hasher.update(&buffer[..len]),
            }
        }
        let (found, expected) = (hex::encode(hasher.finalize()), &self.record.sha256);
        match found == *expected {
            true => Ok(()),
            false => Err(failed(format!("has the SHA-256 {found}, expected {expected} as its record says"))),
        }
    }
}

impl Record {
    pub(super) fn new(made_from: MadeFrom, key: &str, tensors: usize, size: u64, sha256: String) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { format: FORMAT, key: key.to_owned(), made_from, tensors, size, sha256, version }
    }

    /// Writes the record to `path`, whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        // Words, numbers and lists of them cannot fail to be written.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        write_whole(path, &json)
    }

    pub(super) fn made_from(&self) -> &MadeFrom {
        &self.made_from
    }

    /// What is written at `path`; `None` if nothing is.
    ///
    /// # Errors
    /// `ModelCorrupt` naming a record that cannot be read.
    pub(super) fn read(path: &Path) -> Result<Option<Self>> {
        let unreadable = |e: &dyn std::fmt::Display| {
            Error::new(ErrorKind::ModelCorrupt, format!("record {} cannot be read: {e}", path.display()))
        };
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| unreadable(&e).with_source(e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unreadable(&e).with_source(e)),
        }
    }
}

/// Writes a small file, whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    fs::write(&part, bytes)
        .and_then(|()| File::open(&part)?.sync_all())
        .and_then(|()| fs::rename(&part, path))
        .and_then(|()| path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all()))
        .map_err(|e| unwritable(path, &e))
}

/// What files of prompts are named.
pub(super) const PROMPTS: &str = "prompts";

pub(super) fn file_path(folder: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.safetensors"))
}

pub(super) fn record_path(folder: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.json"))
}
