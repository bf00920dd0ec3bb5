//! Many tensors at once: several threads take pieces of the files in order, read each with one call, and convert what
//! is in it straight into the tensors' memory.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};

use super::convert::Element;
use super::file::{Buffer, Tally, WeightFile};
use super::monitor::{LoadMonitor, LoadStats};
use super::recipe::Recipe;
use crate::{Error, ErrorKind, Result};

/// The most bytes of a file that are read at once.
const PIECE_BYTES: usize = 8 << 20;

/// Bytes that nothing needs which are read all the same when that saves a read.
const MAX_GAP_BYTES: u64 = 64 << 10;

/// Reads in flight. Disks and network volumes are faster with more than one; each holds a piece and what it becomes.
const READERS: usize = 8;

/// One tensor that is strewn over its file is read at a time: its bytes are in memory twice.
static STRIDED: Mutex<()> = Mutex::new(());

/// Makes the tensors of `recipes` on `device`.
pub(super) fn read(recipes: &[Recipe], device: &Device, monitor: &LoadMonitor) -> Result<Vec<Tensor>> {
    match device.is_cpu() {
        true => make(recipes, host_memory, monitor),
        false => make(recipes, |len, dtype| device_memory(len, dtype, device), monitor),
    }
}

fn make(
    recipes: &[Recipe],
    memory: impl Fn(usize, DType) -> Result<Box<dyn Memory>>,
    monitor: &LoadMonitor,
) -> Result<Vec<Tensor>> {
    let started = Instant::now();
    let mut targets =
        recipes.iter().map(|r| memory(r.elements.len(), r.dtype)).collect::<Result<Vec<_>>>()?;
    let pieces = pieces(recipes, &mut targets)?;
    let readers = READERS.min(pieces.len()).max(1);
    let queue = Queue { pieces: Mutex::new(Some(pieces.into_iter())), failure: Mutex::default() };
    let total = Mutex::new(Tally::default());
    let run = || {
        let mut tally = Tally::default();
        if let Err(error) = queue.work_off(&mut tally, monitor) {
            queue.fail(error);
        }
        let mut total = lock(&total);
        total.read += tally.read;
        total.convert += tally.convert;
        total.to_device += tally.to_device;
    };
    match readers {
        1 => run(),
        _ => std::thread::scope(|scope| (0..readers).for_each(|_| _ = scope.spawn(run))),
    }
    let (failure, total) = (lock(&queue.failure).take(), lock(&total));
    if let Some(error) = failure {
        return Err(error);
    }
    drop(queue);
    let share = readers as u32;
    monitor.add_times(LoadStats {
        bytes_read: 0,
        read: total.read / share,
        convert: total.convert / share,
        to_device: total.to_device / share,
        wall: started.elapsed(),
    });
    let tensor = |(recipe, target): (&Recipe, Box<dyn Memory>)| {
        // SAFETY: every part of every target was filled: a part that fails fails the whole queue, above.
        unsafe { target.into_tensor(&recipe.made_shape()) }
    };
    recipes.iter().zip(targets).map(tensor).collect()
}

/// Parts of tensors that one read of a file gives, or one part that needs none.
struct Piece<'m> {
    source: Option<(&'m Arc<WeightFile>, Range<u64>)>,
    parts: Vec<Part<'m>>,
}

struct Part<'m> {
    recipe: &'m Recipe<'m>,
    /// The first element.
    start: usize,
    source: Option<(&'m Arc<WeightFile>, Range<u64>)>,
    memory: Box<dyn PartMemory + 'm>,
}

/// The pieces of all tensors: those of files in the order of the files, then the others.
fn pieces<'m>(recipes: &'m [Recipe<'m>], targets: &'m mut [Box<dyn Memory>]) -> Result<Vec<Piece<'m>>> {
    let mut parts = Vec::new();
    for (recipe, target) in recipes.iter().zip(targets) {
        let (elements, part_len) = (&recipe.elements, recipe.part_len(PIECE_BYTES)?);
        let memories = target.split(part_len);
        recipe.parts_left.store(memories.len(), Ordering::Relaxed);
        for (i, memory) in memories.into_iter().enumerate() {
            let start = elements.start + i * part_len;
            let source = recipe.range(start..(start + part_len).min(elements.end))?;
            parts.push(Part { recipe, start, source, memory });
        }
    }
    parts.sort_by_key(|part| match &part.source {
        Some((file, range)) => (0, Some(file.path()), range.start),
        None => (1, None, 0),
    });
    let mut pieces: Vec<Piece> = Vec::new();
    for part in parts {
        let last = pieces.last_mut();
        match last.and_then(|piece| Some((piece.joined(&part)?, piece))) {
            Some((source, piece)) => {
                piece.source = Some(source);
                piece.parts.push(part);
            }
            None => pieces.push(Piece { source: part.source.clone(), parts: vec![part] }),
        }
    }
    Ok(pieces)
}

impl<'m> Piece<'m> {
    /// What is read for this piece and for `part`, whose bytes do not start before its, if that is one read.
    fn joined(&self, part: &Part<'m>) -> Option<(&'m Arc<WeightFile>, Range<u64>)> {
        let ((file, range), (part_file, part_range)) = (self.source.as_ref()?, part.source.as_ref()?);
        let joined = range.start..range.end.max(part_range.end);
        let is_one_read = Arc::ptr_eq(file, part_file)
            && part_range.start <= range.end + MAX_GAP_BYTES
            && joined.end - joined.start <= PIECE_BYTES as u64;
        is_one_read.then_some((*file, joined))
    }
}

/// What the threads share; `pieces` is `None` once one of them has failed.
struct Queue<'m> {
    pieces: Mutex<Option<std::vec::IntoIter<Piece<'m>>>>,
    failure: Mutex<Option<Error>>,
}

impl<'m> Queue<'m> {
    fn next(&self) -> Option<Piece<'m>> {
        lock(&self.pieces).as_mut()?.next()
    }

    fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        *lock(&self.pieces) = None;
    }

    fn work_off(&self, tally: &mut Tally, monitor: &LoadMonitor) -> Result<()> {
        let mut buffer = Buffer::default();
        while let Some(piece) = self.next() {
            monitor.check()?;
            piece.make(&mut buffer, tally)?;
            monitor.add_bytes(std::mem::take(&mut tally.bytes));
        }
        Ok(())
    }
}

impl Piece<'_> {
    fn make(self, buffer: &mut Buffer, tally: &mut Tally) -> Result<()> {
        let (bytes, piece_start) = match &self.source {
            Some((file, range)) => {
                let started = Instant::now();
                let bytes = file.read_piece(range.clone(), buffer).map_err(|e| unreadable(&self.parts, e))?;
                tally.read += started.elapsed();
                tally.bytes += bytes.len() as u64;
                (bytes, range.start)
            }
            None => (&[][..], 0),
        };
        for mut part in self.parts {
            let bytes = match &part.source {
                Some((_, range)) => {
                    &bytes[(range.start - piece_start) as usize..(range.end - piece_start) as usize]
                }
                None => &[],
            };
            let is_strided = part.recipe.file_tensor().is_some_and(|tensor| tensor.strides.is_some());
            let _alone = is_strided.then(|| lock(&STRIDED));
            let (started, elsewhere) = (Instant::now(), tally.read + tally.to_device);
            part.memory.fill(part.recipe, part.start, bytes, tally)?;
            let elsewhere = tally.read + tally.to_device - elsewhere;
            tally.convert += started.elapsed().saturating_sub(elsewhere);
            part.recipe.part_is_made();
        }
        Ok(())
    }
}

/// Names the tensor in which a piece ends that cannot be read.
fn unreadable(parts: &[Part], (offset, e): (u64, std::io::Error)) -> Error {
    let holds = |part: &&Part| part.source.as_ref().is_some_and(|(_, range)| range.end > offset);
    let tensor = parts.iter().find(holds).or(parts.last()).and_then(|part| part.recipe.file_tensor());
    match tensor {
        Some(tensor) => tensor.unreadable((offset, e)),
        None => Error::new(ErrorKind::ModelCorrupt, e.to_string()).with_source(e),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What a tensor is made in.
trait Memory {
    /// Parts of `part_len` elements, the last of what is left.
    fn split(&mut self, part_len: usize) -> Vec<Box<dyn PartMemory + '_>>;

    /// The tensor.
    ///
    /// # Safety
    /// All parts must have been filled.
    unsafe fn into_tensor(self: Box<Self>, shape: &Shape) -> Result<Tensor>;
}

/// Where a part of a tensor goes.
trait PartMemory: Send {
    /// Makes the part, from element `start` of `recipe`, of which the file has `bytes`.
    fn fill(&mut self, recipe: &Recipe, start: usize, bytes: &[u8], tally: &mut Tally) -> Result<()>;
}

fn host_memory(len: usize, dtype: DType) -> Result<Box<dyn Memory>> {
    Ok(match dtype {
        DType::F32 => Box::new(OnHost::<f32>::new(len)),
        DType::BF16 => Box::new(OnHost::<bf16>::new(len)),
        DType::F16 => Box::new(OnHost::<f16>::new(len)),
        other => return Err(not_loadable(other)),
    })
}

fn device_memory(len: usize, dtype: DType, device: &Device) -> Result<Box<dyn Memory>> {
    let tensor = Tensor::zeros(len, dtype, device)?;
    Ok(match dtype {
        DType::F32 => Box::new(OnDevice::<f32>(tensor, PhantomData)),
        DType::BF16 => Box::new(OnDevice::<bf16>(tensor, PhantomData)),
        DType::F16 => Box::new(OnDevice::<f16>(tensor, PhantomData)),
        other => return Err(not_loadable(other)),
    })
}

/// An error about a dtype that no weights can be loaded as.
pub(super) fn not_loadable(dtype: DType) -> Error {
    let message = format!("weights cannot be loaded as {}, expected f32, bf16 or f16", dtype.as_str());
    Error::new(ErrorKind::Inference, message)
}

/// The tensor's own memory, not written before its values are: that would be one more pass over it.
struct OnHost<T> {
    values: Vec<T>,
    len: usize,
}

impl<T> OnHost<T> {
    fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len }
    }
}

impl<T: Element> Memory for OnHost<T> {
    fn split(&mut self, part_len: usize) -> Vec<Box<dyn PartMemory + '_>> {
        let parts = self.values.spare_capacity_mut()[..self.len].chunks_mut(part_len);
        parts.map(|part| Box::new(part) as Box<dyn PartMemory>).collect()
    }

    unsafe fn into_tensor(mut self: Box<Self>, shape: &Shape) -> Result<Tensor> {
        // SAFETY: the parts are the first `len` elements and were filled, as the caller promises.
        unsafe { self.values.set_len(self.len) };
        Ok(Tensor::from_vec(self.values, shape, &Device::Cpu)?)
    }
}

impl<T: Element> PartMemory for &mut [MaybeUninit<T>] {
    fn fill(&mut self, recipe: &Recipe, start: usize, bytes: &[u8], tally: &mut Tally) -> Result<()> {
        recipe.fill(start, bytes, self, tally)
    }
}

/// One dimension on a device that the host cannot write to.
struct OnDevice<T>(Tensor, PhantomData<fn() -> T>);

/// Elements from a place on of [`OnDevice`].
struct OnDevicePart<'a, T> {
    tensor: &'a Tensor,
    len: usize,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Element> Memory for OnDevice<T> {
    fn split(&mut self, part_len: usize) -> Vec<Box<dyn PartMemory + '_>> {
        let len = self.0.elem_count();
        (0..len)
            .step_by(part_len)
            .map(|start| {
                let len = part_len.min(len - start);
                Box::new(OnDevicePart::<T> { tensor: &self.0, len, dtype: PhantomData })
                    as Box<dyn PartMemory>
            })
            .collect()
    }

    unsafe fn into_tensor(self: Box<Self>, shape: &Shape) -> Result<Tensor> {
        Ok(self.0.reshape(shape)?)
    }
}

impl<T: Element> PartMemory for OnDevicePart<'_, T> {
    fn fill(&mut self, recipe: &Recipe, start: usize, bytes: &[u8], tally: &mut Tally) -> Result<()> {
        let mut host = Vec::<T>::with_capacity(self.len);
        recipe.fill(start, bytes, &mut host.spare_capacity_mut()[..self.len], tally)?;
        // SAFETY: `fill` writes every element of what it is given.
        unsafe { host.set_len(self.len) };
        let started = Instant::now();
        let part = Tensor::from_vec(host, self.len, self.tensor.device())?;
        self.tensor.slice_set(&part, 0, start)?;
        tally.to_device += started.elapsed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::Weights;
    use super::*;

    fn values(len: usize, step: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * step) % 997) as f32 * 0.25 - 100.0).collect()
    }

    /// A file of small tensors around one of several pieces.
    fn file(dtype: DType) -> (tempfile::NamedTempFile, HashMap<String, Tensor>) {
        let lens =
            [("a", 3), ("b", 3 * PIECE_BYTES / 4 + 12_345), ("c", 1), ("d", 0), ("e", 70_000), ("f", 5)];
        let tensors = lens.iter().enumerate().map(|(i, (name, len))| {
            let tensor = Tensor::from_vec(values(*len, i + 1), *len, &Device::Cpu).unwrap();
            (name.to_string(), tensor.to_dtype(dtype).unwrap())
        });
        let tensors: HashMap<_, _> = tensors.collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        candle_core::safetensors::save(&tensors, file.path()).unwrap();
        (file, tensors)
    }

    #[test]
    fn pieces_are_put_where_they_belong_on_the_host_and_on_a_device() {
        type MakeMemory = fn(usize, DType) -> Result<Box<dyn Memory>>;
        let on_device: MakeMemory = |len, dtype| device_memory(len, dtype, &Device::Cpu);
        for stored in [DType::F32, DType::BF16] {
            let (file, tensors) = file(stored);
            let weights = Weights::open(&[file.path()]).unwrap();
            let names: Vec<_> = tensors.keys().collect();
            for (dtype, memory) in [
                (DType::F32, host_memory as MakeMemory),
                (DType::BF16, host_memory),
                (DType::F16, on_device),
                (DType::F32, on_device),
                (stored, on_device),
            ] {
                let recipes = names.iter().map(|name| weights.0.recipe(name, None, dtype));
                let recipes = recipes.collect::<Result<Vec<_>>>().unwrap();
                let monitor = LoadMonitor::default();
                let made = make(&recipes, memory, &monitor).unwrap();
                let bytes: usize = tensors.values().map(|t| t.elem_count() * stored.size_in_bytes()).sum();
                assert_eq!(monitor.bytes_read(), bytes as u64);
                for (name, made) in names.iter().zip(made) {
                    let expected = tensors[*name].to_dtype(dtype).unwrap();
                    let values = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                    assert!(values(&made) == values(&expected), "{name}: {stored:?} as {dtype:?}");
                    assert_eq!(made.dtype(), dtype);
                }
            }
        }
    }

    #[test]
    fn small_tensors_share_a_read_and_large_ones_have_several() {
        let (file, _) = file(DType::F32);
        let weights = Weights::open(&[file.path()]).unwrap();
        let recipes: Vec<_> =
            weights.names().iter().map(|name| weights.0.recipe(name, None, DType::F32).unwrap()).collect();
        let mut targets: Vec<_> =
            recipes.iter().map(|r| host_memory(r.shape.elem_count(), r.dtype).unwrap()).collect();
        let pieces = pieces(&recipes, &mut targets).unwrap();
        let ranges: Vec<_> = pieces.iter().map(|piece| piece.source.as_ref().unwrap().1.clone()).collect();
        assert!(ranges.iter().all(|range| range.end - range.start <= PIECE_BYTES as u64), "{ranges:?}");
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
        assert!(pieces.len() < 6, "{ranges:?}");
    }
}
