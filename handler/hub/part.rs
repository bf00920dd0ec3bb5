//! A file in the making: its bytes, where they belong, and a map of which are there. Both survive `kill -9`.
//!
//! The file is cut into pieces that several connections fill from the front to the back. `<name>.map` has eight bytes
//! for each piece: how many of its bytes are there. What a part is told from others by makes its name.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tokio::sync::Notify;

/// Pieces are this long, and longer in files of which there would be too many.
const PIECE_BYTES: u64 = 8 << 20;
const MAX_PIECE_BYTES: u64 = 64 << 20;
const PIECES: u64 = 64;
/// A part that nobody has gone on with for this long is deleted.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 3600);

/// The part, open.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    map_path: PathBuf,
    file: File,
    map: File,
    size: u64,
    piece_bytes: u64,
    /// Bytes that are there of each piece.
    done: Vec<AtomicU64>,
    /// Told of each write.
    pub(super) written: Notify,
}

impl Part {
    /// The part of a file of `size` bytes with this `identity`, as far as an earlier attempt got, or a new one.
    pub(super) fn open(folder: &Path, identity: &str, size: u64) -> io::Result<Self> {
        let (path, map_path) = paths(folder, identity);
        let (piece_bytes, count) = pieces(size);
        let known = read_map(&path, &map_path, size);
        let open =
            |path: &Path| File::options().read(true).write(true).create(true).truncate(false).open(path);
        let (file, map) = (open(&path)?, open(&map_path)?);
        let done = match known {
            Some(done) => done,
            None => {
                // The map first: it must not tell of bytes that are gone.
                map.set_len(0)?;
                map.set_len(count * 8)?;
                file.set_len(0)?;
                file.set_len(size)?;
                vec![0; usize::try_from(count).map_err(io::Error::other)?]
            }
        };
        let done = done.into_iter().map(AtomicU64::new).collect();
        Ok(Self { path, map_path, file, map, size, piece_bytes, done, written: Notify::new() })
    }

    /// The pieces that are not complete, from the front.
    pub(super) fn missing(&self) -> Vec<usize> {
        (0..self.done.len()).filter(|piece| self.done_of(*piece) < self.len_of(*piece)).collect()
    }

    /// The first byte of `piece` that is not there, and the end of the piece.
    pub(super) fn rest(&self, piece: usize) -> (u64, u64) {
        let start = piece as u64 * self.piece_bytes;
        (start + self.done_of(piece), start + self.len_of(piece))
    }

    /// Forgets what is there of `piece`.
    pub(super) fn reset(&self, piece: usize) -> io::Result<()> {
        self.record(piece, 0)
    }

    /// Adds `bytes` to `piece`.
    pub(super) fn append(&self, piece: usize, bytes: &[u8]) -> io::Result<()> {
        let (at, _) = self.rest(piece);
        self.file.write_all_at(bytes, at)?;
        self.record(piece, self.done_of(piece) + bytes.len() as u64)
    }

    /// Reads from `at`, which is there.
    pub(super) fn read(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }

    /// Bytes from the beginning of the file without a gap.
    pub(super) fn prefix(&self) -> u64 {
        let mut prefix = 0;
        for piece in 0..self.done.len() {
            prefix += self.done_of(piece);
            if self.done_of(piece) < self.len_of(piece) {
                break;
            }
        }
        prefix
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that the file will have.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are there.
    pub(super) fn done(&self) -> u64 {
        self.done.iter().map(|done| done.load(Ordering::Acquire)).sum()
    }

    /// Waits until everything is safe on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives the file, complete and safe on disk, its name.
    pub(super) fn publish(&self, target: &Path) -> io::Result<()> {
        let folder = target.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        fs::rename(&self.path, target)?;
        File::open(folder)?.sync_all()?;
        fs::remove_file(&self.map_path)
    }

    /// Deletes it.
    pub(super) fn discard(&self) {
        // Whatever of it stays is gone on with or abandoned.
        let _ = fs::remove_file(&self.map_path);
        let _ = fs::remove_file(&self.path);
    }

    fn record(&self, piece: usize, done: u64) -> io::Result<()> {
        self.map.write_all_at(&done.to_le_bytes(), piece as u64 * 8)?;
        self.done[piece].store(done, Ordering::Release);
        self.written.notify_one();
        Ok(())
    }

    fn done_of(&self, piece: usize) -> u64 {
        self.done[piece].load(Ordering::Acquire)
    }

    fn len_of(&self, piece: usize) -> u64 {
        (self.size - piece as u64 * self.piece_bytes).min(self.piece_bytes)
    }
}

/// Bytes that an earlier attempt has left of a file.
pub(super) fn bytes_there(folder: &Path, identity: &str, size: u64) -> u64 {
    let (path, map_path) = paths(folder, identity);
    read_map(&path, &map_path, size).map_or(0, |done| done.iter().sum())
}

/// Deletes what an earlier attempt has left of a file that is complete.
pub(super) fn remove(folder: &Path, identity: &str) {
    let (path, map_path) = paths(folder, identity);
    let _ = fs::remove_file(map_path);
    let _ = fs::remove_file(path);
}

/// The length of a piece of a file of `size` bytes, and how many there are.
fn pieces(size: u64) -> (u64, u64) {
    let bytes = size.div_ceil(PIECES).clamp(PIECE_BYTES, MAX_PIECE_BYTES);
    (bytes, size.div_ceil(bytes))
}

/// The bytes that are there of each piece; `None` where part and map are not of one file of `size` bytes.
fn read_map(path: &Path, map_path: &Path, size: u64) -> Option<Vec<u64>> {
    let (piece_bytes, count) = pieces(size);
    let map = fs::read(map_path).ok().filter(|map| map.len() as u64 == count * 8)?;
    let is_whole = fs::metadata(path).is_ok_and(|metadata| metadata.len() == size);
    let entries = map.chunks_exact(8).zip(0..).map(|(entry, piece)| {
        let done = u64::from_le_bytes(entry.try_into().unwrap_or_default());
        done.min(size - piece * piece_bytes).min(piece_bytes)
    });
    is_whole.then(|| entries.collect())
}

/// Deletes parts that nobody goes on with.
pub(super) fn remove_abandoned(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = path.extension().is_some_and(|extension| extension == "part" || extension == "map");
        let changed = entry.metadata().and_then(|metadata| metadata.modified());
        let age = changed.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
        if is_ours && age.is_ok_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(path);
        }
    }
}

fn paths(folder: &Path, identity: &str) -> (PathBuf, PathBuf) {
    let name = &hex::encode(Sha256::digest(identity))[..32];
    (folder.join(format!("{name}.part")), folder.join(format!("{name}.map")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 2 * PIECE_BYTES + 5;

    #[test]
    fn pieces_are_filled_and_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Part::open(dir.path(), "a", SIZE).unwrap();
        let part = open();
        assert_eq!((part.missing(), part.rest(2)), (vec![0, 1, 2], (2 * PIECE_BYTES, SIZE)));
        part.append(2, b"12345").unwrap();
        part.append(0, &[7; 100]).unwrap();
        assert_eq!((part.prefix(), part.done()), (100, 105));
        drop(part);
        // As after kill -9: what was written is there, and nothing more.
        assert_eq!(bytes_there(dir.path(), "a", SIZE), 105);
        assert_eq!((bytes_there(dir.path(), "b", SIZE), bytes_there(dir.path(), "a", SIZE + 1)), (0, 0));
        let part = open();
        assert_eq!((part.missing(), part.done()), (vec![0, 1], 105));
        drop(part);
        let other = Part::open(dir.path(), "a", SIZE - 1).unwrap();
        assert_eq!((other.missing(), other.done()), (vec![0, 1, 2], 0), "another length is another file");
        drop(other);
        let part = open();
        assert_eq!((part.missing(), part.done()), (vec![0, 1, 2], 0));
        part.append(1, &vec![1; PIECE_BYTES as usize]).unwrap();
        assert_eq!(part.prefix(), 0);
        part.append(0, &vec![1; PIECE_BYTES as usize]).unwrap();
        assert_eq!((part.prefix(), part.missing()), (2 * PIECE_BYTES, vec![2]));
        part.reset(0).unwrap();
        assert_eq!((part.prefix(), open().missing()), (0, vec![0, 2]));
    }

    #[test]
    fn a_complete_part_becomes_the_file_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let part = Part::open(dir.path(), "a", 3).unwrap();
        part.append(0, b"abc").unwrap();
        let target = dir.path().join("x/y/file");
        part.publish(&target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the folder x");
        let part = Part::open(dir.path(), "b", 3).unwrap();
        part.discard();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_map_tells_of_no_more_than_there_is() {
        let dir = tempfile::tempdir().unwrap();
        drop(Part::open(dir.path(), "a", SIZE).unwrap());
        let map = paths(dir.path(), "a").1;
        fs::write(&map, [0xff; 24]).unwrap();
        assert_eq!(Part::open(dir.path(), "a", SIZE).unwrap().done(), SIZE, "the hash decides");
        fs::write(&map, [0xff; 23]).unwrap();
        assert_eq!(Part::open(dir.path(), "a", SIZE).unwrap().done(), 0);
    }

    #[test]
    fn parts_are_kept_for_a_week() {
        let dir = tempfile::tempdir().unwrap();
        let part = Part::open(dir.path(), "a", 3).unwrap();
        remove_abandoned(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        for file in [&part.file, &part.map] {
            file.set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
        }
        fs::write(dir.path().join("lock.1"), "").unwrap();
        remove_abandoned(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
