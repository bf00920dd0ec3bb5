//! How the values of one tensor come about: stored, quantised or drawn, then changed by LoRAs.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Shape, Tensor};

use super::convert::{BLOCK, Element};
use super::file::{FileTensor, Tally, WeightFile};
use super::lora::Changes;
use super::quant::Quantized;
use super::random::Generator;
use crate::Result;

/// One tensor as stored.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    File(FileTensor),
    Memory(Tensor),
}

impl Stored {
    pub(super) fn dims(&self) -> &[usize] {
        match self {
            Self::File(tensor) => &tensor.shape,
            Self::Memory(tensor) => tensor.dims(),
        }
    }

    /// The bytes that it takes in a file.
    pub(super) fn file_bytes(&self) -> Result<u64> {
        match self {
            Self::File(tensor) => Ok((tensor.len() * tensor.element_bytes()?) as u64),
            Self::Memory(_) => Ok(0),
        }
    }

    /// Reads elements `start..start + out.len()` as f32.
    pub(super) fn read(&self, start: usize, out: &mut [f32], tally: &mut Tally) -> Result<()> {
        match self {
            Self::File(tensor) => tensor.read(start, out, tally),
            Self::Memory(tensor) => {
                let part = tensor.flatten_all()?.narrow(0, start, out.len())?.to_dtype(DType::F32)?;
                out.copy_from_slice(&part.to_vec1::<f32>()?);
                Ok(())
            }
        }
    }

    /// Reads all elements as f32.
    pub(super) fn read_all(&self, tally: &mut Tally) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.dims().iter().product()];
        self.read(0, &mut out, tally)?;
        Ok(out)
    }
}

/// Something that is read when the first part of a tensor needs it, and given up after the last.
pub(super) struct Needed<T>(Mutex<Option<Arc<T>>>);

impl<T> Default for Needed<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Needed<T> {
    pub(super) fn get(&self, read: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut slot = self.lock();
        match &*slot {
            Some(value) => Ok(Arc::clone(value)),
            None => Ok(Arc::clone(slot.insert(Arc::new(read()?)))),
        }
    }

    pub(super) fn give_up(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Where a tensor's values come from before LoRAs change them.
pub(super) enum Base<'a> {
    Stored(&'a Stored),
    Quantized(Quantized<'a>),
    Random(Generator),
}

/// One tensor to be made, or a part of it.
pub(super) struct Recipe<'a> {
    pub(super) shape: Shape,
    /// Which of its elements: all, or those of a slice.
    pub(super) elements: Range<usize>,
    pub(super) dtype: DType,
    pub(super) base: Base<'a>,
    pub(super) changes: Option<Changes<'a>>,
    /// How many of its parts are still to be made.
    pub(super) parts_left: AtomicUsize,
}

impl<'a> Recipe<'a> {
    /// The tensor in memory that already is what is wanted.
    pub(super) fn ready(&self) -> Option<&'a Tensor> {
        match (&self.base, &self.changes) {
            (Base::Stored(Stored::Memory(tensor)), None) => (tensor.dtype() == self.dtype).then_some(tensor),
            _ => None,
        }
    }

    /// The shape of what is made: the tensor's, or one dimension of a slice.
    pub(super) fn made_shape(&self) -> Shape {
        match self.elements.len() == self.shape.elem_count() {
            true => self.shape.clone(),
            false => self.elements.len().into(),
        }
    }

    /// Bytes of weight files that are read for it.
    pub(super) fn bytes_to_read(&self) -> Result<u64> {
        let base = match &self.base {
            Base::Stored(stored) => stored.file_bytes()?,
            Base::Quantized(quantized) => quantized.file_bytes()?,
            Base::Random(_) => 0,
        };
        Ok(base + self.changes.as_ref().map_or(Ok(0), Changes::file_bytes)?)
    }

    /// The tensor of a file that holds most of its bytes.
    pub(super) fn file_tensor(&self) -> Option<&'a FileTensor> {
        let stored = match &self.base {
            Base::Stored(stored) => stored,
            Base::Quantized(quantized) => quantized.data,
            Base::Random(_) => return None,
        };
        match stored {
            Stored::File(tensor) => Some(tensor),
            Stored::Memory(_) => None,
        }
    }

    /// Elements of one part: of whole rows where a row is not longer than that, at most `limit_bytes` of a file, and
    /// all where they are strewn over it.
    pub(super) fn part_len(&self, limit_bytes: usize) -> Result<usize> {
        let len = self.shape.elem_count().max(1);
        let Some(tensor) = self.file_tensor() else { return Ok(BLOCK.min(len)) };
        if tensor.strides.is_some() {
            return Ok(len);
        }
        let (limit, row) = (limit_bytes / tensor.element_bytes()?, self.row_len());
        Ok(match limit / row {
            0 => limit,
            rows => rows * row,
        })
    }

    /// The file and the bytes of it that elements `elements` are made from; `None` where they are not in one piece.
    pub(super) fn range(&self, elements: Range<usize>) -> Result<Option<(&'a Arc<WeightFile>, Range<u64>)>> {
        let Some(tensor) = self.file_tensor() else { return Ok(None) };
        Ok(tensor.range(elements.start, elements.end)?.map(|range| (&tensor.file, range)))
    }

    /// Elements that are converted at once.
    fn block_len(&self) -> usize {
        match (&self.base, &self.changes) {
            // Products of few rows at a time take long.
            (Base::Stored(_) | Base::Quantized(_), Some(changes)) => changes.block_len(self.row_len()),
            _ => BLOCK,
        }
    }

    /// Elements of one row of the tensor as a matrix.
    fn row_len(&self) -> usize {
        self.shape.dims().iter().skip(1).product::<usize>().max(1)
    }

    /// Writes every element of `out`: those from `start`, of which the file has `bytes` where it has any.
    pub(super) fn fill<T: Element>(
        &self,
        start: usize,
        bytes: &[u8],
        out: &mut [std::mem::MaybeUninit<T>],
        tally: &mut Tally,
    ) -> Result<()> {
        let gathered = match self.file_tensor().filter(|tensor| tensor.strides.is_some()) {
            Some(tensor) => Some((tensor.gather(tally)?, tensor.element_bytes()?)),
            None => None,
        };
        let bytes = match &gathered {
            Some((all, size)) => &all[start * size..][..out.len() * size],
            None => bytes,
        };
        if let (Base::Stored(Stored::File(tensor)), None) = (&self.base, &self.changes)
            && tensor.dtype == T::STORED
            && !tensor.is_big_endian
        {
            T::copy(bytes, out);
            return Ok(());
        }
        let size = if out.is_empty() { 0 } else { bytes.len() / out.len() };
        let block_len = self.block_len();
        let mut values = std::mem::take(&mut tally.values);
        for (i, out) in out.chunks_mut(block_len).enumerate() {
            let skip = i * block_len;
            values.resize(out.len(), 0.0);
            self.read(start + skip, &bytes[skip * size..][..out.len() * size], &mut values, tally)?;
            if let Some(changes) = &self.changes {
                changes.add(start + skip, &mut values, tally)?;
            }
            T::round(&values, out);
        }
        tally.values = values;
        Ok(())
    }

    /// The values before LoRAs change them.
    fn read(&self, start: usize, bytes: &[u8], out: &mut [f32], tally: &mut Tally) -> Result<()> {
        match &self.base {
            Base::Stored(Stored::File(tensor)) => tensor.decode(bytes, out),
            Base::Stored(stored) => stored.read(start, out, tally)?,
            Base::Quantized(quantized) => {
                match quantized.data {
                    Stored::File(tensor) => tensor.decode(bytes, out),
                    stored => stored.read(start, out, tally)?,
                }
                quantized.scale(start, out, tally)?;
            }
            Base::Random(generator) => generator.fill(start, out),
        }
        Ok(())
    }

    /// Is told after each part; gives up after the last what the parts shared.
    pub(super) fn part_is_made(&self) {
        if self.parts_left.fetch_sub(1, Ordering::Relaxed) > 1 {
            return;
        }
        if let Base::Quantized(quantized) = &self.base {
            quantized.give_up();
        }
        if let Some(changes) = &self.changes {
            changes.give_up();
        }
    }
}
