//! The zip archives of `torch.save`: a pickle that says which tensor is which view of which storage, and one stored
//! entry for each storage. Neither is believed: see [`pickle`] for the one, and here for the other.
//!
//! | what is saved | its tensors' names |
//! |---|---|
//! | a dict | the keys |
//! | dicts and lists in it | their keys and indices, joined by `.` |
//! | a dict that holds tensors below one of the keys `state_dict`, `model` and `module` only | those below it |
//!
//! Numbers, texts and other values that are no tensors are passed over.

mod globals;
mod pickle;

use std::collections::{HashMap, HashSet};
use std::io::{BufReader, Read, Result as IoResult, Seek, SeekFrom};
use std::sync::Arc;

use safetensors::Dtype;
use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use self::pickle::{Node, Pickle, Value};
use super::file::{FileTensor, WeightFile};
use super::{MAX_NAME_BYTES, MAX_TENSORS};
use crate::Result;

/// Bytes of the archive's directory and of its entries' headers that are read: they then take less than 128 MiB.
const MAX_DIRECTORY_BYTES: u64 = 16 << 20;

/// What one read of the directory takes: headers are short and far apart.
const DIRECTORY_READ_BYTES: usize = 128;

/// Dicts in dicts.
const MAX_DEPTH: usize = 16;

/// Keys that whole checkpoints are put under.
const WRAPPERS: [&str; 3] = ["state_dict", "model", "module"];

/// Reads the directory and the pickle of `file` and checks that every tensor lies in its storage, and every storage in
/// the file. Reads no tensor.
pub(super) fn index(file: &Arc<WeightFile>) -> Result<Vec<FileTensor>> {
    let archive = Archive::open(file)?;
    let bytes = archive.read("data.pkl", pickle::MAX_BYTES)?;
    let pickle = pickle::read(&bytes).map_err(|what| file.corrupt(what))?;
    let is_big_endian = match archive.entries.contains_key(&archive.name("byteorder")) {
        false => false, // Not written before torch 2.1, which ran on little-endian machines.
        true => match archive.read("byteorder", 16)?.as_slice() {
            b"little" => false,
            b"big" => true,
            other => {
                let other = String::from_utf8_lossy(other);
                return Err(
                    file.corrupt(format_args!("the byte order `{other}`, expected `little` or `big`"))
                );
            }
        },
    };
    if !matches!(pickle.node(pickle.root), Some(Node::Dict(_) | Node::Tensor(_))) {
        return Err(file.corrupt("a pickle of something else, expected a dict of tensors"));
    }
    let mut names = Names { pickle: &pickle, found: Vec::new(), visited: 0 };
    names.walk(pickle.root, "", 0).map_err(|what| file.corrupt(what))?;
    let mut seen = HashSet::new();
    let mut tensors = Vec::with_capacity(names.found.len());
    for (name, tensor) in names.found {
        let place = archive.place(&pickle, tensor).map_err(|what| file.corrupt_tensor(&name, what))?;
        if !seen.insert(name.clone()) {
            return Err(file.corrupt_tensor(&name, "is there twice"));
        }
        tensors.push(FileTensor {
            file: Arc::clone(file),
            name,
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            offset: place.offset,
            strides: place.is_strided.then(|| tensor.strides.clone()),
            is_big_endian,
        });
    }
    Ok(tensors)
}

/// The entries of an archive.
struct Archive<'a> {
    file: &'a WeightFile,
    /// The folder that all entries of one `torch.save` lie in, with its slash.
    folder: String,
    entries: HashMap<String, Entry>,
}

/// One entry.
struct Entry {
    offset: u64,
    len: u64,
    /// Whether its bytes lie in the file as they are.
    is_stored: bool,
}

/// Where a tensor's first element lies.
struct Place {
    offset: u64,
    is_strided: bool,
}

impl<'a> Archive<'a> {
    fn open(file: &'a WeightFile) -> Result<Self> {
        let entries = directory(file)
            .map_err(|e| file.corrupt(format_args!("as a zip archive: {e}")).with_source(e))?;
        let entries = entries
            .ok_or_else(|| file.corrupt("as a zip archive: entries overlap, or two have the same name"))?;
        let mut folders = entries.keys().filter_map(|name| name.strip_suffix("data.pkl"));
        let folder = folders.find(|folder| folder.ends_with('/') && folder.matches('/').count() == 1);
        let Some(folder) = folder.map(str::to_owned) else {
            let hint = "a file of torch.save is needed, not another archive";
            return Err(file.corrupt("a zip archive without `<folder>/data.pkl`").with_hint(hint));
        };
        Ok(Self { file, folder, entries })
    }

    fn name(&self, entry: &str) -> String {
        format!("{}{entry}", self.folder)
    }

    fn entry(&self, name: &str) -> Result<&Entry, String> {
        let name = self.name(name);
        let entry = self.entries.get(&name).ok_or_else(|| format!("the archive has no entry `{name}`"))?;
        match entry.is_stored {
            true => Ok(entry),
            false => Err(format!("the entry `{name}` is compressed or encrypted, expected a stored one")),
        }
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let entry = self.entry(name).map_err(|what| self.file.corrupt(what))?;
        if entry.len > limit {
            let what = format!("the entry `{name}` has {} bytes, expected at most {limit}", entry.len);
            return Err(self.file.corrupt(what));
        }
        let mut bytes = vec![0; entry.len as usize];
        self.file
            .read_exact(entry.offset, &mut bytes)
            .map_err(|(_, e)| self.file.corrupt(&e).with_source(e))?;
        Ok(bytes)
    }

    /// Checks that `tensor` lies in its storage. Fails with what is wrong with it.
    fn place(&self, pickle: &Pickle, tensor: &pickle::Tensor) -> Result<Place, String> {
        let size = (tensor.dtype.bitsize() / 8) as u64;
        let key = pickle.text(tensor.storage.key);
        if key.len() > MAX_NAME_BYTES {
            return Err(format!("lies in a storage with a name of {} bytes", key.len()));
        }
        let entry = self.entry(&format!("data/{key}"))?;
        let storage_size = tensor.storage.dtype.map_or(1, |dtype: Dtype| (dtype.bitsize() / 8) as u64);
        let announced = tensor.storage.len.checked_mul(storage_size);
        if announced != Some(entry.len) {
            let announced = announced.map_or("too many".to_owned(), |n| n.to_string());
            return Err(format!("lies in a storage of {} bytes that is to have {announced}", entry.len));
        }
        let (shape, strides, stored) = (&tensor.shape, &tensor.strides, entry.len / size);
        let Some(len) = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim)) else {
            return Err(format!("has the shape {shape:?}, which overflows"));
        };
        if len == 0 {
            return Ok(Place { offset: entry.offset, is_strided: false });
        }
        let past_last =
            shape.iter().zip(strides).try_fold(tensor.offset.checked_add(1), |n, (dim, stride)| {
                Some(n.and_then(|n| (*dim as u64 - 1).checked_mul(*stride as u64)?.checked_add(n)))
            });
        match past_last.flatten() {
            Some(past_last) if past_last <= stored => {}
            _ => {
                let offset = tensor.offset;
                return Err(format!(
                    "is the view {shape:?} by {strides:?} from {offset} of a storage of {stored} elements: it lies outside"
                ));
            }
        }
        if len as u64 > stored {
            return Err(format!("repeats the elements of its storage: it has {len}, the storage {stored}"));
        }
        let mut expected = 1;
        let is_strided = shape.iter().zip(strides).rev().any(|(dim, stride)| {
            let differs = *dim != 1 && *stride != expected;
            expected *= dim;
            differs
        });
        Ok(Place { offset: entry.offset + tensor.offset * size, is_strided })
    }
}

/// The entries of a zip archive by name; `None` if two of them have the same, or overlap.
fn directory(file: &WeightFile) -> zip::result::ZipResult<Option<HashMap<String, Entry>>> {
    let limited = Limited { file: file.file(), left: MAX_DIRECTORY_BYTES };
    let reader = BufReader::with_capacity(DIRECTORY_READ_BYTES, limited);
    // Left to guess where the archive starts, the crate is wrong about archives that have a record of zip64 which they
    // do not need, as torch's do, when that record and its locator are as long as the first entry of the directory.
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut archive = ZipArchive::with_config(config, reader)?;
    if archive.has_duplicate_names() || archive.has_overlapping_entries()? {
        return Ok(None);
    }
    let mut entries = HashMap::with_capacity(archive.len());
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i)?;
        let (Some(offset), len) = (entry.data_start(), entry.compressed_size()) else { continue };
        let is_stored =
            entry.compression() == CompressionMethod::Stored && !entry.encrypted() && entry.size() == len;
        entries.insert(entry.name()?.into_owned(), Entry { offset, len, is_stored });
    }
    Ok(Some(entries))
}

/// A file of which only so much may be read.
struct Limited<'a> {
    file: &'a std::fs::File,
    left: u64,
}

impl Read for Limited<'_> {
    fn read(&mut self, out: &mut [u8]) -> IoResult<usize> {
        let n = self.file.read(out)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            std::io::Error::other(format!("a directory of more than {MAX_DIRECTORY_BYTES} bytes"))
        })?;
        Ok(n)
    }
}

impl Seek for Limited<'_> {
    fn seek(&mut self, to: SeekFrom) -> IoResult<u64> {
        self.file.seek(to)
    }
}

/// Finds the tensors below a value and names them.
struct Names<'a> {
    pickle: &'a Pickle<'a>,
    found: Vec<(String, &'a pickle::Tensor)>,
    visited: usize,
}

impl<'a> Names<'a> {
    /// Walks what is in `value`, whose own name is `name`, empty at the root and where it was descended to.
    fn walk(&mut self, value: Value, name: &str, depth: usize) -> Result<(), String> {
        self.visited += 1;
        // Parts that are shared are walked as often as they are named.
        if self.visited > 16 * MAX_TENSORS {
            return Err(format!("more than {} values in its dicts", 16 * MAX_TENSORS));
        }
        let pickle = self.pickle;
        match pickle.node(value) {
            Some(Node::Dict(_) | Node::List(_) | Node::Tuple(_)) if depth == MAX_DEPTH => {
                Err(format!("dicts in dicts, more than {MAX_DEPTH}"))
            }
            Some(Node::Dict(items)) => {
                let wrapper = if name.is_empty() { self.wrapper(items) } else { None };
                for (i, (key, value)) in items.iter().enumerate() {
                    match key {
                        _ if wrapper == Some(i) => self.walk(*value, "", depth + 1)?,
                        Value::Text(key) => self.walk(*value, &join(name, pickle.text(*key))?, depth + 1)?,
                        Value::Int(key) => self.walk(*value, &join(name, &key.to_string())?, depth + 1)?,
                        _ if pickle.node(*value).is_none() => {}
                        _ => return Err("a dict with a key that is neither a text nor a number".to_owned()),
                    }
                }
                Ok(())
            }
            Some(Node::List(items) | Node::Tuple(items)) => {
                for (i, value) in items.iter().enumerate() {
                    self.walk(*value, &join(name, &i.to_string())?, depth + 1)?;
                }
                Ok(())
            }
            Some(Node::Tensor(_)) if name.is_empty() => {
                Err("one tensor without a name, expected a dict of tensors".to_owned())
            }
            Some(Node::Tensor(_)) if self.found.len() == MAX_TENSORS => {
                Err(format!("more than {MAX_TENSORS} tensors"))
            }
            Some(Node::Tensor(tensor)) => {
                self.found.push((name.to_owned(), tensor));
                Ok(())
            }
            Some(Node::Storage(_)) | None => Ok(()),
        }
    }

    /// The one item of a dict without tensors of its own that whole checkpoints are put in.
    fn wrapper(&self, items: &[(Value, Value)]) -> Option<usize> {
        let node = |value: &Value| self.pickle.node(*value);
        if items.iter().any(|(_, value)| matches!(node(value), Some(Node::Tensor(_)))) {
            return None;
        }
        let mut wrappers = items.iter().enumerate().filter(|(_, (key, value))| {
            let is_wrapper = matches!(key, Value::Text(key) if WRAPPERS.contains(&self.pickle.text(*key)));
            is_wrapper && matches!(node(value), Some(Node::Dict(_)))
        });
        let (first, more) = (wrappers.next(), wrappers.next());
        first.filter(|_| more.is_none()).map(|(i, _)| i)
    }
}

fn join(name: &str, key: &str) -> Result<String, String> {
    if name.len() + key.len() >= MAX_NAME_BYTES {
        return Err(format!("a tensor's name of more than {MAX_NAME_BYTES} bytes"));
    }
    Ok(if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") })
}
