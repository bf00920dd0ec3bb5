//! Local files → tensors, strictly: a tensor that a network asks for and does not find, or finds in another shape,
//! is an error, and so is one that no network asked for.
//!
//! [`Weights`] is where a network's tensors come from: safetensors files (shards and adapters together), a seed, or
//! tensors in memory. It gives out a [`VarBuilder`], which reads, dequantises, merges LoRAs and rounds to the
//! network's dtype tensor by tensor, so that nothing is held twice.
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
mod patterns;
pub mod quant;
mod random;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

pub use lora::{Lora, merge_reference};

use crate::{Error, ErrorKind, Result};
use convert::Scratch;
use file::FileTensor;
use quant::Quantized;

/// How many names an error about tensors lists before it only counts.
const LISTED_TENSORS: usize = 10;

/// How many keys an error about a LoRA lists. More, because each may have its own reason.
const LISTED_KEYS: usize = 100;

/// Where the tensors of one network come from, and which of them it has asked for.
pub struct Weights(Arc<Shared>);

struct Shared {
    source: Source,
    loras: Vec<(Lora, f64)>,
    state: Mutex<State>,
}

/// What happened while a network was being built.
#[derive(Default)]
struct State {
    requested: BTreeSet<String>,
    /// The first failure with its kind, which candle's error would lose.
    failure: Option<Error>,
}

enum Source {
    Tensors(HashMap<String, Stored>),
    Random(u64),
}

/// One tensor as stored.
#[derive(Clone)]
enum Stored {
    File(FileTensor),
    Memory(Tensor),
}

impl Stored {
    fn shape(&self) -> Shape {
        match self {
            Self::File(tensor) => tensor.shape.clone().into(),
            Self::Memory(tensor) => tensor.shape().clone(),
        }
    }

    /// Reads elements `start..start + out.len()` as f32.
    fn read(&self, start: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        match self {
            Self::File(tensor) => tensor.read(start, out, scratch),
            Self::Memory(tensor) => {
                let part = tensor.flatten_all()?.narrow(0, start, out.len())?.to_dtype(DType::F32)?;
                out.copy_from_slice(&part.to_vec1::<f32>()?);
                Ok(())
            }
        }
    }

    /// Reads all elements as f32.
    fn read_all(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.shape().elem_count()];
        self.read(0, &mut out, &mut Scratch::default())?;
        Ok(out)
    }
}

impl Weights {
    /// The tensors of several safetensors `files` together, such as the shards of a checkpoint and an adapter. Reads
    /// the headers only.
    ///
    /// # Errors
    /// `ModelNotFound` naming a file that is not there; `ModelCorrupt` naming the file, and the tensor where there is
    /// one, if a header is malformed, does not fit its file, or repeats a name.
    pub fn open<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let mut tensors: HashMap<String, Stored> = HashMap::new();
        for path in files {
            for (name, tensor) in file::open(path.as_ref())? {
                if let Some(Stored::File(first)) = tensors.get(&name) {
                    let (first, second) = (first.path().display(), path.as_ref().display());
                    return Err(corrupt(format!("tensor `{name}` is in {first} and again in {second}")));
                }
                tensors.insert(name, Stored::File(tensor));
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
        Self(Arc::new(Shared { source, loras: Vec::new(), state: Mutex::default() }))
    }

    /// Adds `scale` times the changes of `lora` to the tensors given out from now on; LoRAs stack.
    ///
    /// # Errors
    /// `ModelCorrupt` naming every key of the LoRA that cannot be applied: its form is unknown, it lacks its
    /// counterpart, or no tensor of its target's name and shape is here. With random weights, which have no list of
    /// names, targets are checked when they are asked for and in [`Weights::finish`].
    pub fn with_lora(self, lora: Lora, scale: f64) -> Result<Self> {
        let strays = match &self.0.source {
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
        let tensors = match &self.0.source {
            Source::Tensors(tensors) => Source::Tensors(tensors.clone()),
            Source::Random(seed) => Source::Random(*seed),
        };
        let loras = self.0.loras.iter().cloned().chain([(lora, scale)]).collect();
        Ok(Self(Arc::new(Shared { source: tensors, loras, state: Mutex::default() })))
    }

    /// Gives out tensors as `dtype` (f32, bf16 or f16) on `device` by the names of the checkpoint; a quantised
    /// tensor goes by the name of the original. Use [`Weights::load`] to build a network from it.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Backend(Arc::clone(&self.0))), dtype, device.clone())
    }

    /// Builds a network from the tensors and checks that it asked for all of them, besides those that fit a pattern
    /// of `unused`.
    ///
    /// # Errors
    /// Those of [`Weights::finish`]; `ModelCorrupt` naming a tensor that is missing or has another shape; `Inference`
    /// with `build`'s error if it failed for another reason.
    pub fn load<T>(
        &self,
        dtype: DType,
        device: &Device,
        unused: &[impl AsRef<str>],
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<T> {
        let network = build(self.var_builder(dtype, device));
        let failure = self.0.state().failure.take();
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
        let state = self.0.state();
        let is_loose = |name: &str| !state.requested.contains(name) && !patterns::matches_any(unused, name);
        let mut loose: Vec<_> = match &self.0.source {
            Source::Tensors(tensors) => tensors
                .keys()
                .filter(|name| {
                    is_loose(name) && !quant::is_activation_scale(name, |name| tensors.contains_key(name))
                })
                .cloned()
                .collect(),
            Source::Random(_) => self
                .0
                .loras
                .iter()
                .flat_map(|(lora, _)| lora.targets())
                .filter(|name| is_loose(name))
                .collect(),
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

    /// The names of the tensors, sorted, quantised ones by the name of the original; none for random weights.
    pub fn names(&self) -> Vec<String> {
        let Source::Tensors(tensors) = &self.0.source else { return Vec::new() };
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
        let found: BTreeSet<String> = match &self.0.source {
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

    /// The shape of tensor `name`, plain or quantised; `None` if it is not there or is drawn at any shape.
    fn shape(&self, name: &str) -> Option<Shape> {
        let Source::Tensors(tensors) = &self.source else { return None };
        tensors.get(name).or_else(|| tensors.get(&format!("{name}{}", quant::DATA))).map(Stored::shape)
    }

    /// Tensor `name`, which must have `shape` if one is given.
    fn get(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let found = match (&self.source, shape) {
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
        let delta = lora::delta(&self.loras, name, &found)?;
        let merge = |start: usize, out: &mut [f32]| {
            if let Some(delta) = &delta {
                out.iter_mut().zip(&delta[start..]).for_each(|(value, delta)| *value += delta);
            }
        };
        match &self.source {
            Source::Random(seed) => {
                let generator = random::Generator::new(*seed, name, found.dims());
                convert::materialize(&found, dtype, device, |start, out, _| {
                    generator.fill(start, out);
                    merge(start, out);
                    Ok(())
                })
            }
            Source::Tensors(tensors) => match tensors.get(name) {
                Some(Stored::Memory(tensor)) if tensor.dtype() == dtype && delta.is_none() => {
                    Ok(tensor.to_device(device)?)
                }
                Some(stored) => convert::materialize(&found, dtype, device, |start, out, scratch| {
                    stored.read(start, out, scratch)?;
                    merge(start, out);
                    Ok(())
                }),
                None => {
                    let quantized = Quantized::new(name, tensors)?;
                    convert::materialize(&found, dtype, device, |start, out, scratch| {
                        quantized.read(start, out, scratch)?;
                        merge(start, out);
                        Ok(())
                    })
                }
            },
        }
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
                let names =
                    [name.to_owned(), format!("{name}{}", quant::DATA), format!("{name}{}", quant::SCALE)];
                state.requested.extend(names);
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
        match &self.0.source {
            Source::Tensors(_) => self.0.shape(name).is_some(),
            Source::Random(_) => random::contains(name),
        }
    }
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
