//! Weight files and the tensors in them, read by position. A memory map would fail on network volumes and would let
//! the page cache decide how much memory a load takes.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind as Io};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use safetensors::Dtype;

use super::convert;
use crate::{Error, ErrorKind, Result};

/// What offsets, lengths and addresses of direct reads are multiples of: the largest block that disks have.
const ALIGNMENT: usize = 4096;

/// Places at which a file is probed for being in memory already.
const PROBES: u64 = 16;

/// The most bytes that a tensor may be strewn over: they are read as a whole, and copied once.
const MAX_STRIDED_BYTES: u64 = 192 << 20;

/// An open file.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// The same file past the page cache, where the file system allows that.
    direct: Option<File>,
    direct_fails: AtomicBool,
    cached: OnceLock<bool>,
}

/// Bytes at an aligned address, reused from read to read.
#[derive(Default)]
pub(super) struct Buffer(Vec<u8>);

/// What a thread has read, how long its steps took, and memory that it reuses.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) bytes: u64,
    pub(super) read: Duration,
    pub(super) convert: Duration,
    pub(super) to_device: Duration,
    /// A block's values.
    pub(super) values: Vec<f32>,
}

impl WeightFile {
    pub(super) fn open(path: &Path) -> Result<Arc<Self>> {
        let fail = |e: IoError| {
            let kind =
                if e.kind() == Io::NotFound { ErrorKind::ModelNotFound } else { ErrorKind::ModelCorrupt };
            let message = format!("weight file {} cannot be opened: {e}", path.display());
            Error::new(kind, message).with_source(e)
        };
        let file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() {
            return Err(fail(IoError::new(Io::InvalidInput, "it is no regular file")));
        }
        Ok(Arc::new(Self {
            direct: open_direct(path, &file),
            path: path.to_owned(),
            file,
            bytes: metadata.len(),
            direct_fails: AtomicBool::new(false),
            cached: OnceLock::new(),
        }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// For directories at the end of a file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// An error about the file.
    pub(super) fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::ModelCorrupt, format!("weight file {}: {what}", self.path.display()))
    }

    /// An error about one tensor of the file.
    pub(super) fn corrupt_tensor(&self, tensor: &str, what: impl std::fmt::Display) -> Error {
        self.corrupt(format_args!("tensor `{tensor}` {what}"))
    }

    /// Reads `out.len()` bytes from `offset` through the page cache. Fails with the place that cannot be read.
    pub(super) fn read_exact(&self, offset: u64, out: &mut [u8]) -> Result<(), (u64, IoError)> {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            match self.file.read_at(&mut out[done..], at) {
                Ok(0) => return Err((at, IoError::new(Io::UnexpectedEof, "the file ends there"))),
                Ok(n) => done += n,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err((at, e)),
            }
        }
        Ok(())
    }

    /// Reads a large piece into `buffer`, past the page cache unless the file is in it. Fails with the place that
    /// cannot be read.
    pub(super) fn read_piece<'b>(
        &self,
        range: Range<u64>,
        buffer: &'b mut Buffer,
    ) -> Result<&'b [u8], (u64, IoError)> {
        let start = range.start / ALIGNMENT as u64 * ALIGNMENT as u64;
        let (skip, len) = ((range.start - start) as usize, (range.end - range.start) as usize);
        let bytes = buffer.aligned((skip + len).next_multiple_of(ALIGNMENT));
        if !self.read_direct(start, bytes, skip + len) {
            self.read_exact(range.start, &mut bytes[skip..skip + len])?;
        }
        Ok(&bytes[skip..skip + len])
    }

    /// Whether at least the first `needed` of `bytes` could be read from `start`, both aligned. What is wrong when
    /// they could not shows when the page cache is asked.
    fn read_direct(&self, start: u64, bytes: &mut [u8], needed: usize) -> bool {
        let Some(direct) = &self.direct else { return false };
        if self.direct_fails.load(Ordering::Relaxed) || *self.cached.get_or_init(|| self.is_cached()) {
            return false;
        }
        match direct.read_at(bytes, start) {
            Ok(n) => n >= needed,
            Err(_) => {
                self.direct_fails.store(true, Ordering::Relaxed);
                false
            }
        }
    }

    /// Whether the page cache seems to hold the file, as after a restart: it then is several times faster than the
    /// disk.
    #[cfg(target_os = "linux")]
    fn is_cached(&self) -> bool {
        let mut byte = [0];
        (0..PROBES).all(|i| {
            let offset = self.bytes.saturating_sub(1) / PROBES * i;
            let slices = &mut [std::io::IoSliceMut::new(&mut byte)];
            matches!(
                rustix::io::preadv2(&self.file, slices, offset, rustix::io::ReadWriteFlags::NOWAIT),
                Ok(1)
            )
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn is_cached(&self) -> bool {
        true
    }
}

/// `path` once more, for direct reads; only if it is `file` still.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path, file: &File) -> Option<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let direct = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let id = |file: &File| file.metadata().ok().map(|m| (m.dev(), m.ino()));
    (id(&direct) == id(file)).then_some(direct)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path, _: &File) -> Option<File> {
    None
}

impl Buffer {
    fn aligned(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len + ALIGNMENT {
            self.0 = vec![0; len + ALIGNMENT];
        }
        let skip = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[skip..skip + len]
    }
}

/// One tensor of an open file.
#[derive(Clone, Debug)]
pub(super) struct FileTensor {
    pub(super) file: Arc<WeightFile>,
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Of the first element, in bytes from the start of the file.
    pub(super) offset: u64,
    /// In elements, where the tensor is not stored row by row without gaps.
    pub(super) strides: Option<Vec<usize>>,
    /// Whether the bytes of an element are stored in reverse.
    pub(super) is_big_endian: bool,
}

impl FileTensor {
    /// The number of elements.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of one element, or why none can be read.
    pub(super) fn element_bytes(&self) -> Result<usize> {
        convert::element_bytes(self.dtype)
            .ok_or_else(|| self.corrupt(format_args!("is {:?}, which no network here uses", self.dtype)))
    }

    /// The bytes of the file that elements `start..end` lie in, where they lie without gaps and as they are decoded.
    pub(super) fn range(&self, start: usize, end: usize) -> Result<Option<Range<u64>>> {
        if self.strides.is_some() {
            return Ok(None);
        }
        let size = self.element_bytes()? as u64;
        Ok(Some(self.offset + start as u64 * size..self.offset + end as u64 * size))
    }

    /// Reads elements `start..start + out.len()` as f32, through the page cache.
    pub(super) fn read(&self, start: usize, out: &mut [f32], tally: &mut Tally) -> Result<()> {
        let bytes = match self.range(start, start + out.len())? {
            Some(range) => self.read_range(range, tally)?,
            None => {
                let size = self.element_bytes()?;
                self.gather(tally)?[start * size..][..out.len() * size].to_vec()
            }
        };
        self.decode(&bytes, out);
        Ok(())
    }

    /// Decodes elements of the tensor.
    pub(super) fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        match convert::element_bytes(self.dtype) {
            Some(size) if self.is_big_endian && size > 1 => {
                let mut bytes = bytes.to_vec();
                bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
                convert::decode(self.dtype, &bytes, out);
            }
            _ => convert::decode(self.dtype, bytes, out),
        }
    }

    /// The bytes of all elements, row by row without gaps.
    pub(super) fn gather(&self, tally: &mut Tally) -> Result<Vec<u8>> {
        let (size, len) = (self.element_bytes()?, self.len());
        let Some(strides) = &self.strides else {
            return self.read_range(self.offset..self.offset + (len * size) as u64, tally);
        };
        let last: usize = self.shape.iter().zip(strides).map(|(dim, stride)| (dim - 1) * stride).sum();
        let span = (last as u64 + 1) * size as u64;
        if span > MAX_STRIDED_BYTES {
            let what = format!(
                "is a view that is strewn over {span} bytes, expected at most {MAX_STRIDED_BYTES} or a contiguous one"
            );
            let hint = "save it with `.contiguous()`";
            return Err(self.corrupt(what).with_hint(hint));
        }
        let stored = self.read_range(self.offset..self.offset + span, tally)?;
        let mut bytes = Vec::with_capacity(len * size);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..len {
            let at: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
            bytes.extend_from_slice(&stored[at * size..][..size]);
            for (i, dim) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *dim {
                    break;
                }
                *i = 0;
            }
        }
        Ok(bytes)
    }

    fn read_range(&self, range: Range<u64>, tally: &mut Tally) -> Result<Vec<u8>> {
        let started = Instant::now();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_exact(range.start, &mut bytes).map_err(|e| self.unreadable(e))?;
        tally.read += started.elapsed();
        tally.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// An error about the place of the tensor that could not be read.
    pub(super) fn unreadable(&self, (offset, e): (u64, IoError)) -> Error {
        self.corrupt(format_args!("cannot be read at byte {offset}: {e}")).with_source(e)
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        self.file.corrupt_tensor(&self.name, what)
    }
}
