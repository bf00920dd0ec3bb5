//! How fast a volume is read, past the system's cache where that can be avoided.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Read at most, and for this long.
const MOST_BYTES: u64 = 1 << 30;
const MOST_TIME: Duration = Duration::from_secs(3);
/// Smaller files tell nothing.
const LEAST_BYTES: u64 = 8 << 20;
/// Written where there is no file to read.
const OWN_BYTES: u64 = 64 << 20;
/// Read at once, and what such reads are aligned to.
const BLOCK: usize = 8 << 20;
const ALIGN: usize = 4096;
/// Folders below the models' folder are looked into this deep.
const DEPTH: usize = 6;

/// What was read, and how long it took.
pub(super) struct Speed {
    pub(super) bytes: u64,
    pub(super) time: Duration,
    /// Whether the system's cache was avoided.
    pub(super) direct: bool,
    /// In words.
    pub(super) how: String,
}

/// Reads the largest weight file below `folder`, or one of our own.
pub(super) fn measure(folder: &Path) -> io::Result<Speed> {
    if let Some(file) = largest_weights(folder, DEPTH).filter(|(bytes, _)| *bytes >= LEAST_BYTES) {
        let (_, path) = file;
        let name = path.file_name().unwrap_or_default().display().to_string();
        return read(&path, &name);
    }
    let there = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let mut own = tempfile::NamedTempFile::new_in(there)?;
    let block = vec![0x5a; BLOCK];
    for _ in 0..OWN_BYTES / BLOCK as u64 {
        own.write_all(&block)?;
    }
    own.as_file().sync_all()?;
    read(own.path(), "a file of our own")
}

fn largest_weights(folder: &Path, depth: usize) -> Option<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let is_weights = |path: &Path| path.extension().is_some_and(|ext| ext == "safetensors" || ext == "pth");
    let found = entries.filter_map(|entry| {
        let (path, kind) = (entry.path(), entry.metadata().ok()?);
        match kind.is_dir() {
            true if depth > 0 => largest_weights(&path, depth - 1),
            false if is_weights(&path) => Some((kind.len(), path)),
            _ => None,
        }
    });
    found.max()
}

fn read(path: &Path, name: &str) -> io::Result<Speed> {
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    // A file system that knows no direct reads refuses the flag, or the first read.
    if let Ok(file) = direct
        && let Ok((bytes, time)) = read_blocks(file)
        && bytes > 0
    {
        return Ok(Speed { bytes, time, direct: true, how: format!("{name}, past the cache") });
    }
    let file = File::open(path)?;
    // SAFETY: the call takes a descriptor that is open and plain numbers. A refusal means that some of the file stays
    // in the cache, which the words below allow for.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    let (bytes, time) = read_blocks(file)?;
    Ok(Speed { bytes, time, direct: false, how: format!("{name}, perhaps from the cache") })
}

fn read_blocks(mut file: File) -> io::Result<(u64, Duration)> {
    let mut buffer = vec![0u8; BLOCK + ALIGN];
    // Direct reads go to aligned memory only.
    let start = buffer.as_ptr().align_offset(ALIGN);
    let block = &mut buffer[start..start + BLOCK];
    let (mut bytes, began) = (0, Instant::now());
    while bytes < MOST_BYTES && began.elapsed() < MOST_TIME {
        match file.read(block)? {
            0 => break,
            len => bytes += len as u64,
        }
    }
    Ok((bytes, began.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_weights_are_read_and_without_any_a_file_of_our_own() {
        let dir = tempfile::tempdir().unwrap();
        let own = measure(dir.path()).unwrap();
        assert_eq!((own.bytes, own.how.contains("of our own")), (OWN_BYTES, true));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "it is removed");
        let repo = dir.path().join("owner/repo");
        fs::create_dir_all(&repo).unwrap();
        fs::write(repo.join("small.safetensors"), vec![1; 9 << 20]).unwrap();
        fs::write(repo.join("large.pth"), vec![1; 12 << 20]).unwrap();
        fs::write(repo.join("video.mp4"), vec![1; 13 << 20]).unwrap();
        let speed = measure(dir.path()).unwrap();
        assert_eq!((speed.bytes, speed.how.starts_with("large.pth, ")), (12 << 20, true));
        assert!(measure(Path::new("/nonexistent/x")).is_ok_and(|speed| speed.bytes > 0) || !can_write("/"));
    }

    fn can_write(folder: &str) -> bool {
        tempfile::tempfile_in(folder).is_ok()
    }
}
