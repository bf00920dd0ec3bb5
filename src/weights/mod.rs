//! Local files → tensors, strictly: a tensor that a network asks for and does not find, or finds in another shape,
//! is an error, and so is one that no network asked for.
//!
//! [`Weights`] is where a network's tensors come from: files (safetensors and torch archives, shards and adapters
//! together), a seed, or tensors in memory. [`Weights::load`] makes a network of them in three steps:
//!
//! 1. **Plan.** The network is built from blank tensors, which notes what it asks for ([`LoadPlan`]). What is missing,
//!    misshapen or left over is found here, before anything is read.
//! 2. **Read.** Several threads read the files in order, dequantise, merge LoRAs, and round to the network's dtype
//!    straight into the tensors' memory. Beside that memory a few pieces of at most 8 MiB are held, whatever the size
//!    of the tensors.
//! 3. **Build.** The network is built from the tensors and takes them, so that nothing is held twice.
//!
//! ```no_run
//! # use talkie::weights::{Lora, Weights};
//! # use candle_core::{DType, Device};
//! # fn main() -> talkie::Result<()> {
//! let weights = Weights::open(&["wan.safetensors", "infinitetalk.safetensors"])?
//!     .with_lora(Lora::open("lightx2v.safetensors", &["*.diff_m"])?, 1.0)?;
//! let layer = weights.load(DType::BF16, &Device::Cpu, &["*.num_batches_tracked"], |vb| {
//!     candle_nn::linear(4096, 5120, vb.pp("text_embedding.0"))
//! })?;
//! # Ok(())
//! # }
//! ```

mod convert;
mod file;
mod lora;
mod monitor;
mod patterns;
mod plan;
pub mod quant;
mod random;
mod read;
mod recipe;
mod safetensors;
mod torch;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

pub use lora::{Lora, merge_reference};
pub use monitor::{LoadMonitor, LoadStats};
pub use plan::{LoadPlan, PlannedTensor};

use crate::{Error, ErrorKind, Result};
use file::{FileTensor, WeightFile};
use lora::Changes;
use quant::Quantized;
use recipe::{Base, Recipe, Stored};

/// Tensors that one file may list. Published ones list up to two thousand; a million in a header of 77 MB would take
/// a gigabyte.
const MAX_TENSORS: usize = 1 << 16;

/// Dimensions of a tensor in a file.
const MAX_RANK: usize = 8;

/// The longest name of a tensor in a file.
const MAX_NAME_BYTES: usize = 1024;

/// How many names an error about tensors lists before it only counts.
const LISTED_TENSORS: usize = 10;

/// How many keys an error about a LoRA lists. More, because each may have its own reason.
const LISTED_KEYS: usize = 100;

/// Where the tensors of one network come from, and which of them it has asked for.
pub struct Weights(Arc<Shared>);

struct Shared {
    source: Arc<Source>,
    loras: Vec<(Lora, f64)>,
    monitor: Arc<LoadMonitor>,
    state: Mutex<State>,
}

/// What happened while a network was being built.
#[derive(Default)]
struct State {
    requested: Requested,
    /// Tensors that were read ahead, with how often the plan has them: the last time they are taken, they are given up.
    ready: HashMap<(String, DType), (Tensor, usize)>,
    /// The first failure with its kind, which candle's error would lose.
    failure: Option<Error>,
}

/// The stored names of what a network asked for.
#[derive(Default)]
struct Requested(BTreeSet<String>);

impl Requested {
    fn add(&mut self, name: &str) {
        self.0.extend([name.to_owned(), format!("{name}{}", quant::DATA), format!("{name}{}", quant::SCALE)]);
    }
}

/// Some elements of a planned tensor.
pub(crate) struct TensorSlice<'a> {
    /// The tensor.
    pub(crate) tensor: &'a PlannedTensor,
    /// In the order of its memory.
    pub(crate) elements: Range<usize>,
}

enum Source {
    Tensors(HashMap<String, Stored>),
    Random(u64),
}

impl Weights {
    /// The tensors of several `files` together, such as the shards of a checkpoint and an adapter: safetensors, or zip
    /// archives of `torch.save`. Reads the headers only.
    ///
    /// # Errors
    /// `ModelNotFound` naming a file that is not there; `ModelCorrupt` naming the file, and the tensor where there is
    /// one, if a header is malformed, does not fit its file, or repeats a name.
    pub fn open<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let mut tensors: HashMap<String, Stored> = HashMap::new();
        for path in files {
            for tensor in index(path.as_ref())? {
                if let Some(Stored::File(first)) = tensors.get(&tensor.name) {
                    let (name, first, second) =
                        (tensor.name, first.file.path().display(), path.as_ref().display());
                    return Err(corrupt(format!("tensor `{name}` is in {first} and again in {second}")));
                }
                tensors.insert(tensor.name.clone(), Stored::File(tensor));
            }
        }
        Ok(Self::new(Source::Tensors(tensors)))
    }

    /// Any tensor that is asked for, drawn from `seed` and its name: the same values in any order of requests and on
    /// every machine, scaled so that deep networks stay finite. Of the spellings of a name that a network looks for,
    /// one exists: wav2vec2's is `weight_g` / `weight_v` without the prefix `wav2vec2.`.
    pub fn random(seed: u64) -> Self {
        Self::new(Source::Random(seed))
    }

    /// Tensors in memory. One that needs no conversion is shared, not copied.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Self {
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, Stored::Memory(tensor))).collect();
        Self::new(Source::Tensors(tensors))
    }

    fn new(source: Source) -> Self {
        let monitor = Arc::new(LoadMonitor::default());
        Self(Arc::new(Shared {
            source: Arc::new(source),
            loras: Vec::new(),
            monitor,
            state: Mutex::default(),
        }))
    }

    /// Has `monitor` see and end what is read from now on.
    pub fn watched_by(self, monitor: Arc<LoadMonitor>) -> Self {
        let (source, loras) = (Arc::clone(&self.0.source), self.0.loras.clone());
        Self(Arc::new(Shared { source, loras, monitor, state: Mutex::default() }))
    }

    /// Adds `scale` times the changes of `lora` to the tensors given out from now on; LoRAs stack.
    ///
    /// # Errors
    /// `ModelCorrupt` naming every key of the LoRA that cannot be applied: its form is unknown, it lacks its
    /// counterpart, or no tensor of its target's name and shape is here. With random weights, which have no list of
    /// names, targets are checked when they are asked for and in [`Weights::finish`].
    pub fn with_lora(self, lora: Lora, scale: f64) -> Result<Self> {
        let strays = match &*self.0.source {
            Source::Tensors(_) => lora.strays(|target| Some(self.0.shape(target))),
            Source::Random(_) => lora.strays(|_| None),
        };
        if !strays.is_empty() {
            let (count, list) = (strays.len(), list(&strays, LISTED_KEYS));
            return Err(corrupt(format!(
                "LoRA {}: {count} keys fit nothing in the network: {list}",
                lora.name()
            )));
        }
        let (source, monitor) = (Arc::clone(&self.0.source), Arc::clone(&self.0.monitor));
        let loras = self.0.loras.iter().cloned().chain([(lora, scale)]).collect();
        Ok(Self(Arc::new(Shared { source, loras, monitor, state: Mutex::default() })))
    }

    /// Gives out tensors as `dtype` (f32, bf16 or f16) on `device` by the names of the checkpoint, reading each when it
    /// is asked for; a quantised tensor goes by the name of the original. [`Weights::load`] builds a network faster.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Backend(Arc::clone(&self.0))), dtype, device.clone())
    }

    /// What the network that `build` makes takes, without reading it or holding its memory: `build` is given tensors of
    /// zeros that share one element each.
    ///
    /// # Errors
    /// Those of [`Weights::load`], apart from those of reading.
    pub fn plan<T>(
        &self,
        dtype: DType,
        device: &Device,
        unused: &[impl AsRef<str>],
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<LoadPlan> {
        let (plan, requested) = plan::record(&self.0, dtype, device, build)?;
        self.0.check_unused(&requested, unused)?;
        Ok(plan)
    }

    /// Parts of tensors, each on the CPU, flat unless it is all, and in the dtype of its tensor: the values that
    /// [`Weights::load`] gives.
    ///
    /// # Errors
    /// Those of [`Weights::load`].
    pub(crate) fn read_slices(&self, slices: &[TensorSlice]) -> Result<Vec<Tensor>> {
        let recipe = |slice: &TensorSlice| {
            let PlannedTensor { name, shape, dtype } = slice.tensor;
            let recipe = self.0.recipe(name, Some(shape), *dtype)?;
            Ok(Recipe { elements: slice.elements.clone(), ..recipe })
        };
        let recipes = slices.iter().map(recipe).collect::<Result<Vec<_>>>()?;
        read::read(&recipes, &Device::Cpu, &self.0.monitor)
    }

    /// Builds a network from the tensors and checks that it asks for all of them, besides those that fit a pattern of
    /// `unused`. `build` is called twice: for [`Weights::plan`], and when the tensors have been read.
    ///
    /// # Errors
    /// Those of [`Weights::finish`]; `ModelCorrupt` naming a tensor that is missing, has another shape or cannot be
    /// read; those of the check of [`LoadMonitor::new`]; `Inference` with `build`'s error if it failed for another
    /// reason.
    pub fn load<T>(
        &self,
        dtype: DType,
        device: &Device,
        unused: &[impl AsRef<str>],
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<T> {
        let plan = self.plan(dtype, device, unused, &build)?;
        self.0.read_ahead(&plan, device)?;
        let network = build(self.var_builder(dtype, device));
        let mut state = self.0.state();
        state.ready.clear();
        let failure = state.failure.take();
        drop(state);
        let network = network.map_err(|e| failure.unwrap_or_else(|| e.into()))?;
        self.finish(unused)?;
        Ok(network)
    }

    /// Checks that every tensor and every target of a LoRA was asked for, besides tensors whose name fits a pattern of
    /// `unused`, where `*` stands for any characters.
    ///
    /// # Errors
    /// `ModelCorrupt` naming the tensors that nothing asked for.
    pub fn finish(&self, unused: &[impl AsRef<str>]) -> Result<()> {
        self.0.check_unused(&self.0.state().requested, unused)
    }

    /// The names of the tensors, sorted, quantised ones by the name of the original; none for random weights.
    pub fn names(&self) -> Vec<String> {
        let Source::Tensors(tensors) = &*self.0.source else { return Vec::new() };
        let original = |name: &String| name.strip_suffix(quant::DATA).unwrap_or(name).to_owned();
        let mut names: Vec<_> =
            tensors.keys().filter(|name| !name.ends_with(quant::SCALE)).map(original).collect();
        names.sort();
        names
    }

    /// Whether exactly the modules of `map` are quantised.
    ///
    /// # Errors
    /// `ModelCorrupt` naming the modules that are in one of them only.
    pub fn check_quantized(&self, map: &quant::Map) -> Result<()> {
        let found: BTreeSet<String> = match &*self.0.source {
            Source::Tensors(tensors) => tensors.keys().filter_map(|name| quant::module(name)).collect(),
            Source::Random(_) => BTreeSet::new(),
        };
        let expected = map.modules();
        let differing: Vec<_> = found.symmetric_difference(&expected).cloned().collect();
        if differing.is_empty() {
            return Ok(());
        }
        Err(corrupt(format!(
            "the quantisation map and the tensors differ in the modules {}",
            list(&differing, LISTED_TENSORS)
        )))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// [`Weights::finish`] for the tensors `requested`.
    fn check_unused(&self, requested: &Requested, unused: &[impl AsRef<str>]) -> Result<()> {
        let is_loose = |name: &str| !requested.0.contains(name) && !patterns::matches_any(unused, name);
        let mut loose: Vec<_> = match &*self.source {
            Source::Tensors(tensors) => {
                let is_scale =
                    |name: &str| quant::is_activation_scale(name, |name| tensors.contains_key(name));
                tensors.keys().filter(|name| is_loose(name) && !is_scale(name)).cloned().collect()
            }
            Source::Random(_) => {
                let targets = self.loras.iter().flat_map(|(lora, _)| lora.targets());
                targets.filter(|name| is_loose(name)).collect()
            }
        };
        if loose.is_empty() {
            return Ok(());
        }
        loose.sort();
        Err(corrupt(format!(
            "{} tensors are not part of the network: {}",
            loose.len(),
            list(&loose, LISTED_TENSORS)
        )))
    }

    /// The shape of tensor `name`, plain or quantised; `None` if it is not there or is drawn at any shape.
    fn shape(&self, name: &str) -> Option<Shape> {
        let Source::Tensors(tensors) = &*self.source else { return None };
        let stored = tensors.get(name).or_else(|| tensors.get(&format!("{name}{}", quant::DATA)))?;
        Some(stored.dims().into())
    }

    /// Whether a network that looks for a tensor under several names finds it under `name`.
    fn contains(&self, name: &str) -> bool {
        match &*self.source {
            Source::Tensors(_) => self.shape(name).is_some(),
            Source::Random(_) => random::contains(name),
        }
    }

    /// How tensor `name`, which must have `shape` if one is given, is made as `dtype`.
    fn recipe(&self, name: &str, shape: Option<&Shape>, dtype: DType) -> Result<Recipe<'_>> {
        let found = match (&*self.source, shape) {
            (Source::Random(_), Some(shape)) => shape.clone(),
            (Source::Random(_), None) => {
                return Err(corrupt(format!(
                    "tensor `{name}` is asked for without a shape, so it cannot be drawn"
                )));
            }
            (Source::Tensors(_), _) => self
                .shape(name)
                .ok_or_else(|| corrupt(format!("tensor `{name}` is missing from the weights")))?,
        };
        if let Some(expected) = shape.filter(|expected| **expected != found) {
            let (found, expected) = (found.dims(), expected.dims());
            return Err(corrupt(format!("tensor `{name}` has the shape {found:?}, expected {expected:?}")));
        }
        let base = match &*self.source {
            Source::Random(seed) => Base::Random(random::Generator::new(*seed, name, found.dims())),
            Source::Tensors(tensors) => match tensors.get(name) {
                Some(stored) => Base::Stored(stored),
                None => Base::Quantized(Quantized::new(name, tensors)?),
            },
        };
        let changes = Changes::of(&self.loras, name, &found)?;
        let elements = 0..found.elem_count();
        let recipe = Recipe { shape: found, elements, dtype, base, changes, parts_left: AtomicUsize::new(0) };
        if recipe.ready().is_none() && !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(read::not_loadable(dtype));
        }
        Ok(recipe)
    }

    /// Reads the tensors of `plan` on `device`, so that they are there when they are asked for.
    fn read_ahead(&self, plan: &LoadPlan, device: &Device) -> Result<()> {
        let mut times = HashMap::<(String, DType), usize>::new();
        let (mut keys, mut recipes) = (Vec::new(), Vec::new());
        for PlannedTensor { name, shape, dtype } in &plan.tensors {
            let key = (name.clone(), *dtype);
            let count = times.entry(key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                let recipe = self.recipe(name, Some(shape), *dtype)?;
                if recipe.ready().is_none() {
                    keys.push(key);
                    recipes.push(recipe);
                }
            }
        }
        let tensors = read::read(&recipes, device, &self.monitor)?;
        let ready = keys.into_iter().zip(tensors).map(|(key, tensor)| {
            let times = times.remove(&key).unwrap_or(1);
            (key, (tensor, times))
        });
        self.state().ready = ready.collect();
        Ok(())
    }

    /// Tensor `name`, which must have `shape` if one is given.
    fn get(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some(tensor) = self.take_ready(name, shape, dtype, device) {
            return Ok(tensor);
        }
        let recipe = self.recipe(name, shape, dtype)?;
        if let Some(tensor) = recipe.ready() {
            return Ok(tensor.to_device(device)?);
        }
        let mut tensors = read::read(&[recipe], device, &self.monitor)?;
        tensors.pop().ok_or_else(|| corrupt(format!("tensor `{name}` was not read")))
    }

    /// Tensor `name` if it was read ahead and is asked for as planned.
    fn take_ready(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Option<Tensor> {
        let mut state = self.state();
        let key = (name.to_owned(), dtype);
        let (tensor, times) = state.ready.get_mut(&key)?;
        let is_planned =
            tensor.device().same_device(device) && shape.is_none_or(|shape| shape == tensor.shape());
        if !is_planned {
            return None;
        }
        let tensor = tensor.clone();
        *times -= 1;
        if *times == 0 {
            state.ready.remove(&key);
        }
        Some(tensor)
    }

    /// [`Shared::get`], remembering the request and the first failure.
    fn request(
        &self,
        name: &str,
        shape: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.get(name, shape, dtype, device);
        let mut state = self.state();
        match tensor {
            Ok(tensor) => {
                state.requested.add(name);
                Ok(tensor)
            }
            Err(error) => {
                let message = error.to_string();
                state.failure.get_or_insert(error);
                Err(candle_core::Error::Msg(message))
            }
        }
    }
}

/// [`Weights`] as candle sees them.
struct Backend(Arc<Shared>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.0.request(name, Some(&shape), dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.0.request(name, None, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// The tensors of one file.
fn index(path: &Path) -> Result<Vec<FileTensor>> {
    let file = WeightFile::open(path)?;
    let mut magic = [0; 4];
    let is_zip = file.read_exact(0, &mut magic).is_ok() && magic == *b"PK\x03\x04";
    if is_zip { torch::index(&file) } else { safetensors::index(&file) }
}

/// The first `limit` of `names`, and how many more there are.
fn list(names: &[String], limit: usize) -> String {
    let shown = names.iter().take(limit).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(limit) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::ModelCorrupt, message)
}

#[cfg(test)]
mod tests;
