//! Where each tensor lies in a prepared file, known before the first byte is written.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use candle_core::DType;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{NetworkKind, Precision};
use crate::weights::{LoadPlan, PlannedTensor};

/// The data starts at a multiple of this, so that it can be read past the page cache.
const ALIGNMENT: usize = 4096;
/// Bytes that are read, converted, written and committed together. A few of them are in memory at a time.
#[cfg(not(test))]
pub(super) const BATCH: usize = 64 << 20;
/// Small enough that tests see several.
#[cfg(test)]
pub(super) const BATCH: usize = 8 << 10;

/// A prepared file.
pub(super) struct Layout {
    /// In the order of the file.
    pub(super) entries: Vec<Entry>,
    /// Length and header, up to the first byte of the data.
    pub(super) head: Vec<u8>,
    /// Of the whole file.
    pub(super) size: u64,
}

/// One tensor of the file.
pub(super) struct Entry {
    /// What the network asks for.
    pub(super) tensor: PlannedTensor,
    pub(super) content: Content,
    pub(super) shape: Vec<usize>,
    /// Of the first byte, from the start of the file.
    pub(super) offset: u64,
    dtype: Dtype,
    bytes: u64,
}

/// What an entry holds of its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The values.
    Values,
    /// The values of each row divided by its scale.
    Codes,
    /// The scales of the rows, whose codes are the entry before.
    Scales,
}

impl Layout {
    /// The file of a network of `kind` that asks for the tensors of `plan`; `key` is written into its header.
    pub(super) fn new(kind: NetworkKind, precision: Precision, plan: &LoadPlan, key: &str) -> Self {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        for tensor in plan.tensors.iter().filter(|tensor| seen.insert(&tensor.name)) {
            if precision == Precision::Fp8 && is_linear_weight(kind, tensor) {
                entries.extend([Content::Codes, Content::Scales].map(|content| Entry::new(tensor, content)));
            } else {
                entries.push(Entry::new(tensor, Content::Values));
            }
        }
        let head = head(&entries, key);
        let mut size = head.len() as u64;
        for entry in &mut entries {
            entry.offset = size;
            size += entry.bytes;
        }
        Self { entries, head, size }
    }

    /// What is still to be written when the bytes before `start`, the end of a tensor, are there.
    pub(super) fn batches(&self, start: u64) -> Vec<Batch> {
        let mut batches = Vec::new();
        let mut batch = Batch::default();
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.offset >= start) {
            // A tensor that fits into a batch is not split, so that most batches end with a tensor.
            if entry.content != Content::Scales && batch.bytes_loaded + entry.bytes_loaded() > BATCH {
                batches.extend(batch.take());
            }
            let (elements, step) = (entry.elements(), entry.elements_in(BATCH));
            for start in (0..elements).step_by(step) {
                let slice = Slice { entry: index, elements: start..elements.min(start + step) };
                let bytes_loaded = slice.elements.len() * entry.tensor.dtype.size_in_bytes();
                if entry.content != Content::Scales && batch.bytes_loaded + bytes_loaded > BATCH {
                    batches.extend(batch.take());
                }
                batch.ends_tensor = slice.elements.end == elements && entry.content != Content::Codes;
                batch.bytes_loaded += bytes_loaded;
                batch.slices.push(slice);
            }
        }
        batches.extend(batch.take());
        batches
    }
}

impl Entry {
    fn new(tensor: &PlannedTensor, content: Content) -> Self {
        let dims = tensor.shape.dims();
        let (dtype, shape) = match content {
            Content::Values => (stored(tensor.dtype), dims.to_vec()),
            Content::Codes => (Dtype::F8_E4M3, dims.to_vec()),
            Content::Scales => (Dtype::BF16, vec![dims[0], 1]),
        };
        let bytes = (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
        Self { tensor: tensor.clone(), content, shape, offset: 0, dtype, bytes }
    }

    /// The name in the file, in the layout of optimum-quanto.
    fn name(&self) -> String {
        match self.content {
            Content::Values => self.tensor.name.clone(),
            Content::Codes => format!("{}._data", self.tensor.name),
            Content::Scales => format!("{}._scale", self.tensor.name),
        }
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the tensor as it is read; the scales are there when the codes are.
    fn bytes_loaded(&self) -> usize {
        match self.content {
            Content::Scales => 0,
            Content::Values | Content::Codes => self.elements() * self.tensor.dtype.size_in_bytes(),
        }
    }

    /// How many elements of `bytes` are written at once: whole rows of codes, because a row has one scale, and all
    /// scales.
    fn elements_in(&self, bytes: usize) -> usize {
        let most = (bytes / self.tensor.dtype.size_in_bytes()).max(1);
        match (self.content, &self.shape[..]) {
            (Content::Codes, [_, width]) => (most / width).max(1) * width,
            (Content::Scales, _) => self.elements().max(1),
            _ => most,
        }
    }
}

/// What is read, converted and written in one go.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) slices: Vec<Slice>,
    /// Whether it ends with a complete tensor, so that the writer may be ended here and go on later.
    pub(super) ends_tensor: bool,
    bytes_loaded: usize,
}

impl Batch {
    /// The batch, if there is anything in it; leaves an empty one.
    fn take(&mut self) -> Option<Self> {
        Some(std::mem::take(self)).filter(|batch| !batch.slices.is_empty())
    }
}

/// Some elements of an entry.
pub(super) struct Slice {
    pub(super) entry: usize,
    pub(super) elements: Range<usize>,
}

/// Whether `tensor` is the weight of a linear layer of a network that is stored in fp8. Of UMT5's matrices the tables
/// are none; the DiT has no others, since its patch embedding is a convolution.
fn is_linear_weight(kind: NetworkKind, tensor: &PlannedTensor) -> bool {
    let Some(module) = tensor.name.strip_suffix(".weight") else { return false };
    let is_matrix = tensor.shape.rank() == 2;
    match kind {
        NetworkKind::Dit => is_matrix,
        NetworkKind::TextEncoder => is_matrix && !module.ends_with("embedding"),
        NetworkKind::AudioEncoder | NetworkKind::ImageEncoder | NetworkKind::Vae => false,
    }
}

fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// The length of the header and the header, with spaces after it up to the alignment.
fn head(entries: &[Entry], key: &str) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!(BTreeMap::from([("format", "pt"), ("key", key)])));
    let mut offset = 0;
    for entry in entries {
        let end = offset + entry.bytes;
        let dtype = serde_json::to_value(entry.dtype).unwrap_or_default();
        let shape = Value::from(entry.shape.clone());
        header.insert(entry.name(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let text = Value::Object(header).to_string();
    let len = (8 + text.len()).next_multiple_of(ALIGNMENT);
    let mut head = ((len - 8) as u64).to_le_bytes().to_vec();
    head.extend(text.as_bytes());
    head.resize(len, b' ');
    head
}
