//! Writing a network's prepared file, in bounded memory, from the front to the back.
//!
//! ```text
//! caller:  read a batch (several readers) ─► round, merge, quantise ─┐        the next batch meanwhile
//! writer:                                     append, hash, sync ◄───┘ ─► journal
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::{bf16, f16};

use super::encode;
use super::key::NetworkKey;
use super::layout::{Batch, Content, Entry, Layout};
use super::part::{self, Part};
use super::record::{self, MadeFrom, Record};
use super::{NetworkKind, Precision, Selection};
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use crate::weights::{LoadMonitor, LoadPlan, TensorSlice, Weights};
use crate::{Error, ErrorKind, Result};

/// A prepared file that is to be written.
pub struct Preparation {
    key: NetworkKey,
    folder: PathBuf,
    weights: Weights,
    monitor: Arc<LoadMonitor>,
    layout: Layout,
    bytes_to_read: u64,
}

impl Preparation {
    /// The file of network `kind` in `precision`; what the network needs of its sources is found out, nothing is read
    /// but headers. `monitor` sees what [`Preparation::run`] reads, and can end it.
    ///
    /// # Errors
    /// Those of [`Selection::key`] and `Selection::open_sources`; `ModelNotFound` naming a source whose hash is not
    /// known; `ModelCorrupt` naming tensors that are missing, misshapen or left over.
    pub fn new(
        selection: &Selection,
        kind: NetworkKind,
        precision: Precision,
        monitor: Arc<LoadMonitor>,
    ) -> Result<Self> {
        let key = selection.key(kind, precision)?;
        if let Some(file) = key.unverified().first() {
            let message =
                format!("{} was never verified, so that nothing can be prepared from it", file.display());
            let hint = format!("run `handler prefetch --model {}`", selection.spec.name);
            return Err(Error::new(ErrorKind::ModelNotFound, message).with_hint(hint));
        }
        let weights = selection.open_sources(kind)?.watched_by(Arc::clone(&monitor));
        let plan = plan(selection, kind, precision, &weights)?;
        let layout = Layout::new(kind, precision, &plan, key.digest());
        let folder = selection.folder();
        Ok(Self { key, folder, weights, monitor, layout, bytes_to_read: plan.bytes_to_read })
    }

    /// Which weights.
    pub fn key(&self) -> &NetworkKey {
        &self.key
    }

    /// Where the file will be.
    pub fn path(&self) -> PathBuf {
        record::file_path(&self.folder, &self.key.stem())
    }

    /// The length of the file.
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    /// Bytes of source files that the whole of it is made from.
    pub fn bytes_to_read(&self) -> u64 {
        self.bytes_to_read
    }

    /// Bytes that an earlier process left of it, which are used as far as they are sound.
    pub fn bytes_there(&self) -> u64 {
        part::bytes_there(&self.folder, &self.key.stem()).min(self.size())
    }

    /// Writes what is missing of the file, then its record. The monitor can end it after any batch; what is complete
    /// then is used the next time, as it is after the end of the process at any instant. `written` counts the bytes of
    /// the file that are there.
    ///
    /// # Errors
    /// Those of reading weights; `InsufficientDisk` or `Unwritable` naming the file; those of the monitor.
    pub fn run(self, written: &AtomicU64) -> Result<Record> {
        let stem = self.key.stem();
        let mut part = Part::open(&self.folder, &stem, &self.layout.head, &mut |bytes| {
            written.store(bytes, Ordering::Relaxed);
            self.monitor.check()
        })?;
        written.store(part.len(), Ordering::Relaxed);
        let batches = self.layout.batches(part.len());
        // One batch waits while one is written and one is made.
        let (to_writer, from_maker) = sync_channel(1);
        let made = thread::scope(|scope| {
            let writer = scope.spawn(|| append(&mut part, from_maker, written));
            let made = self.make(&batches, to_writer);
            let appended = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // A writer that failed is why the maker could not go on.
            appended.and(made)
        });
        made?;
        // What is complete is used the next time.
        self.monitor.check()?;
        let entries = self.layout.entries.len();
        part.finish(|size, sha256| {
            let made_from = MadeFrom::Weights(self.key.facts().clone());
            Record::new(made_from, self.key.digest(), entries, size, sha256)
        })
    }

    /// Makes the bytes of `batches`.
    fn make(&self, batches: &[Batch], out: SyncSender<Made>) -> Result<()> {
        let mut scales = Vec::new();
        for batch in batches {
            self.monitor.check()?;
            let entry = |index: usize| &self.layout.entries[index];
            let read = batch.slices.iter().filter(|slice| entry(slice.entry).content != Content::Scales);
            let wanted: Vec<_> = read
                .map(|slice| TensorSlice {
                    tensor: &entry(slice.entry).tensor,
                    elements: slice.elements.clone(),
                })
                .collect();
            let mut tensors = self.weights.read_slices(&wanted)?.into_iter();
            let mut bytes = Vec::new();
            for slice in &batch.slices {
                let entry = entry(slice.entry);
                if entry.content == Content::Scales {
                    push(&mut bytes, &std::mem::take(&mut scales), bf16::to_le_bytes);
                    continue;
                }
                let tensor = tensors.next().ok_or_else(|| internal("a slice was not read"))?;
                encode(entry, slice.elements.start, &tensor, &mut bytes, &mut scales)?;
            }
            if out.send(Made { bytes, ends_tensor: batch.ends_tensor }).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// A batch as it stands in the file.
struct Made {
    bytes: Vec<u8>,
    ends_tensor: bool,
}

/// Appends what comes until nothing comes any more.
fn append(part: &mut Part, batches: Receiver<Made>, written: &AtomicU64) -> Result<()> {
    for batch in batches {
        part.append(&batch.bytes)?;
        if batch.ends_tensor {
            part.commit()?;
        }
        written.store(part.len(), Ordering::Relaxed);
    }
    Ok(())
}

/// Appends the elements of `tensor`, those from `start` of the entry's, to `bytes`, and the scales of its rows to
/// `scales`.
fn encode(
    entry: &Entry,
    start: usize,
    tensor: &Tensor,
    bytes: &mut Vec<u8>,
    scales: &mut Vec<bf16>,
) -> Result<()> {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(internal("a slice is not on the CPU")) };
    match (entry.content, storage) {
        (Content::Codes, CpuStorage::BF16(values)) => {
            let width = entry.shape[1];
            let (codes, rows) = encode::fp8(values, width).map_err(|row| {
                let (name, row) = (&entry.tensor.name, start / width + row);
                let message = format!("tensor `{name}` has a value in row {row} that is not finite");
                Error::new(ErrorKind::ModelCorrupt, message)
            })?;
            bytes.extend(codes);
            scales.extend(rows);
        }
        (_, CpuStorage::BF16(values)) => push(bytes, values, bf16::to_le_bytes),
        (_, CpuStorage::F16(values)) => push(bytes, values, f16::to_le_bytes),
        (_, CpuStorage::F32(values)) => push(bytes, values, f32::to_le_bytes),
        _ => return Err(internal("a slice has a dtype that was not asked for")),
    }
    Ok(())
}

fn push<T: Copy, const N: usize>(bytes: &mut Vec<u8>, values: &[T], encode: impl Fn(T) -> [u8; N]) {
    let start = bytes.len();
    bytes.resize(start + values.len() * N, 0);
    for (bytes, value) in bytes[start..].as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = encode(*value);
    }
}

fn internal(what: &str) -> Error {
    Error::new(ErrorKind::Inference, format!("while weights were prepared, {what}"))
}

/// What the network asks for, in the dtypes in which it would be loaded.
fn plan(
    selection: &Selection,
    kind: NetworkKind,
    precision: Precision,
    weights: &Weights,
) -> Result<LoadPlan> {
    let (spec, dtype, device) = (selection.spec, precision.loaded_as(), &Device::Cpu);
    let unused = selection.network(kind).unused;
    match kind {
        NetworkKind::AudioEncoder => {
            weights.plan(dtype, device, unused, |vb| wav2vec2::Model::new(&spec.audio_encoder.config, vb))
        }
        NetworkKind::TextEncoder => {
            weights.plan(dtype, device, unused, |vb| umt5::Model::new(&spec.text_encoder.config, vb))
        }
        NetworkKind::ImageEncoder => {
            weights.plan(dtype, device, unused, |vb| clip_vision::Model::new(&spec.image_encoder.config, vb))
        }
        NetworkKind::Vae => weights.plan(dtype, device, unused, |vb| wan_vae::Vae::new(&spec.vae.config, vb)),
        NetworkKind::Dit => weights.plan(dtype, device, unused, |vb| wan::Model::new(&spec.dit.config, vb)),
    }
}
