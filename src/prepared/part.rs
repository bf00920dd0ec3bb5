//! A prepared file in the making: `<name>.part`, which grows from front to back, and `<name>.part.journal`, which says
//! how far it is complete. Whatever ends the process, the next one goes on from the last line of the journal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as Io, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::record::{self, Record};
use crate::{Error, ErrorKind, Result};

/// Bytes read at once while a part is checked.
const READ: usize = 8 << 20;

/// One line of the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark {
    /// The end of a tensor, from the start of the file; everything before it is on disk.
    end: u64,
    /// The SHA-256 of everything before it.
    sha256: String,
}

pub(super) struct Part {
    folder: PathBuf,
    stem: String,
    file: File,
    journal: File,
    hasher: Sha256,
    len: u64,
}

impl Part {
    /// The part of the file `stem`, as far as an earlier process came: what is there is read and compared with the
    /// journal, and cut off where it is not what it should be. `head` is how the file begins. `progress` is told how
    /// many bytes were found good.
    pub(super) fn open(
        folder: &Path,
        stem: &str,
        head: &[u8],
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let path = part_path(folder, stem);
        let final_path = record::file_path(folder, stem);
        let failed = |e: io::Error| unwritable(&path, &e);
        fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        // From here on the file is in the making, whatever it was.
        let record = record::record_path(folder, stem);
        remove(&record)?;
        if final_path.exists() && !path.exists() {
            fs::rename(&final_path, &path).map_err(failed)?;
        }
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
            file.map_err(|e| unwritable(path, &e))
        };
        let (file, journal) = (open(&path)?, open(&journal_path(folder, stem))?);
        let (folder, stem) = (folder.to_owned(), stem.to_owned());
        let mut part = Self { folder, stem, file, journal, hasher: Sha256::new(), len: 0 };
        part.recover(head, progress)?;
        if part.len == 0 {
            part.append(head)?;
            part.commit()?;
        }
        Ok(part)
    }

    /// How many bytes are there.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Finds the last mark up to which the part is sound.
    fn recover(&mut self, head: &[u8], progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let path = part_path(&self.folder, &self.stem);
        let failed = |e: io::Error| unwritable(&path, &e);
        let mut text = Vec::new();
        self.journal.read_to_end(&mut text).map_err(failed)?;
        let mut good = (0, 0, Sha256::new()); // bytes of the part, bytes of the journal, hash of the former
        let mut hasher = Sha256::new();
        let (mut read, mut lines) = (0, 0);
        let mut buffer = vec![0; READ];
        // A line without its end was being written when the process ended.
        for line in text.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n")) {
            lines += line.len() as u64;
            let Ok(mark) = serde_json::from_slice::<Mark>(line) else { break };
            if mark.end < read || (read == 0 && mark.end != head.len() as u64) {
                break;
            }
            let mut short = false;
            while read < mark.end {
                let want = (mark.end - read).min(READ as u64) as usize;
                match self.file.read_exact(&mut buffer[..want]) {
                    Ok(()) => {}
                    Err(e) if e.kind() == Io::UnexpectedEof => {
                        short = true;
                        break;
                    }
                    Err(e) => return Err(failed(e)),
                }
                if read == 0 && buffer[..want] != *head {
                    short = true;
                    break;
                }
                hasher.update(&buffer[..want]);
                read += want as u64;
                progress(read)?;
            }
            if short || hex::encode(hasher.clone().finalize()) != mark.sha256 {
                break;
            }
            good = (mark.end, lines, hasher.clone());
        }
        (self.len, self.hasher) = (good.0, good.2);
        self.file.set_len(self.len).and_then(|()| self.journal.set_len(good.1)).map_err(failed)?;
        self.file.seek(SeekFrom::End(0)).and_then(|_| self.journal.seek(SeekFrom::End(0))).map_err(failed)?;
        Ok(())
    }

    /// Writes `bytes` behind what is there.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| unwritable(&part_path(&self.folder, &self.stem), &e))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes what is there outlast the process and the machine. What is there ends with a complete tensor.
    pub(super) fn commit(&mut self) -> Result<()> {
        let mark = Mark { end: self.len, sha256: hex::encode(self.hasher.clone().finalize()) };
        // Two fields cannot fail to be written.
        let mut line = serde_json::to_vec(&mark).unwrap_or_default();
        line.push(b'\n');
        self.file
            .sync_data()
            .and_then(|()| self.journal.write_all(&line))
            .and_then(|()| self.journal.sync_data())
            .map_err(|e| unwritable(&part_path(&self.folder, &self.stem), &e))
    }

    /// Gives the complete and committed part its name, and writes the record that `describe` makes of its length and
    /// its hash.
    pub(super) fn finish(self, describe: impl FnOnce(u64, String) -> Record) -> Result<Record> {
        let (path, final_path) =
            (part_path(&self.folder, &self.stem), record::file_path(&self.folder, &self.stem));
        let sync_folder = || File::open(&self.folder).and_then(|folder| folder.sync_all());
        fs::rename(&path, &final_path)
            .and_then(|()| sync_folder())
            .map_err(|e| unwritable(&final_path, &e))?;
        let record = describe(self.len, hex::encode(self.hasher.finalize()));
        record.write(&record::record_path(&self.folder, &self.stem))?;
        let journal = journal_path(&self.folder, &self.stem);
        fs::remove_file(&journal).and_then(|()| sync_folder()).map_err(|e| unwritable(&journal, &e))?;
        Ok(record)
    }
}

/// How many bytes of the file `stem` an earlier process left.
pub(super) fn bytes_there(folder: &Path, stem: &str) -> u64 {
    let len = |path: PathBuf| fs::metadata(path).map(|found| found.len());
    len(part_path(folder, stem)).or_else(|_| len(record::file_path(folder, stem))).unwrap_or(0)
}

fn part_path(folder: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.part"))
}

fn journal_path(folder: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.part.journal"))
}

/// Removes the file at `path`, if there is one.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != Io::NotFound => Err(unwritable(path, &e)),
        _ => Ok(()),
    }
}

/// Why a file could not be written.
pub(super) fn unwritable(path: &Path, e: &io::Error) -> Error {
    let kind = match e.kind() {
        Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => ErrorKind::InsufficientDisk,
        _ => ErrorKind::Unwritable,
    };
    Error::new(kind, format!("{} cannot be written: {e}", path.display()))
}
