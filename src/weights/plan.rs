//! What a network will ask for, found out before anything is read: the network is built once from blank tensors, each
//! of one zero that is seen at the tensor's shape.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use super::{Requested, Shared};
use crate::{Error, Result};

/// What a network takes of its weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadPlan {
    /// The tensors in the order in which the network asks for them; one that it asks for twice is there twice.
    pub tensors: Vec<PlannedTensor>,
    /// Bytes that they take in the dtypes that the network asks for.
    pub bytes_resident: u64,
    /// Bytes of weight files that are read for them, those of LoRAs and scales included.
    pub bytes_to_read: u64,
}

/// One tensor as a network asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// The checkpoint's name, of a quantised tensor that of the original.
    pub name: String,
    /// Its shape.
    pub shape: Shape,
    /// The dtype that the network wants it in.
    pub dtype: DType,
}

/// Builds a network from blank tensors and notes what it asks for.
pub(super) fn record<T>(
    shared: &Arc<Shared>,
    dtype: DType,
    device: &Device,
    build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
) -> Result<(LoadPlan, Requested)> {
    let recorder = Arc::new(Recorder { shared: Arc::clone(shared), state: Mutex::default() });
    let blank = Box::new(Blank(Arc::clone(&recorder)));
    let built = build(VarBuilder::from_backend(blank, dtype, device.clone()));
    let mut state = recorder.state();
    if let Err(e) = built {
        return Err(state.failure.take().unwrap_or_else(|| e.into()));
    }
    Ok((std::mem::take(&mut state.plan), std::mem::take(&mut state.requested)))
}

struct Recorder {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plan: LoadPlan,
    requested: Requested,
    /// The names whose bytes are counted.
    counted: BTreeSet<String>,
    /// The first failure with its kind, which candle's error would lose.
    failure: Option<Error>,
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn request(
        &self,
        name: &str,
        shape: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut state = self.state();
        let recipe = self.shared.recipe(name, shape, dtype);
        let (recipe, bytes_to_read) = match recipe.and_then(|r| r.bytes_to_read().map(|bytes| (r, bytes))) {
            Ok(recipe) => recipe,
            Err(error) => {
                let message = error.to_string();
                state.failure.get_or_insert(error);
                return Err(candle_core::Error::Msg(message));
            }
        };
        let shape = recipe.shape;
        if state.counted.insert(name.to_owned()) {
            state.plan.bytes_resident += (shape.elem_count() * dtype.size_in_bytes()) as u64;
            state.plan.bytes_to_read += bytes_to_read;
        }
        state.plan.tensors.push(PlannedTensor { name: name.to_owned(), shape: shape.clone(), dtype });
        state.requested.add(name);
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }
}

/// A [`Recorder`] as candle sees it.
struct Blank(Arc<Recorder>);

impl SimpleBackend for Blank {
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
        self.0.shared.contains(name)
    }
}
