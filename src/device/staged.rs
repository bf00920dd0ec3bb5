//! Weights in host memory that go to a GPU again and again, while it computes.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

#[cfg(feature = "cuda")]
use super::pinned::Pinned;

/// Tensors in host memory; clones share them. In a build with CUDA they are page-locked and copied on a stream of their
/// own, beside the kernels of the computing one. What the system does not let us lock is copied between those.
#[derive(Clone)]
pub(crate) struct Staged(Arc<Shared>);

struct Shared {
    device: Device,
    tensors: HashMap<String, Tensor>,
    #[cfg(feature = "cuda")]
    pinned: Option<Pinned>,
}

impl Staged {
    /// Holds `tensors` for `device`. Each is handed out in the dtype that it has here.
    pub fn new(tensors: HashMap<String, Tensor>, device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        let (pinned, tensors) = match device.as_cuda_device() {
            Ok(cuda) => Pinned::take(tensors, cuda),
            Err(_) => (None, tensors),
        };
        Self(Arc::new(Shared {
            device: device.clone(),
            tensors,
            #[cfg(feature = "cuda")]
            pinned,
        }))
    }

    /// Builds something of them on the device, where they are when this returns.
    ///
    /// # Errors
    /// A tensor that is not here or has another shape or dtype, what `build` returns, and failures of the device.
    pub fn build<T>(&self, dtype: DType, build: impl FnOnce(VarBuilder<'static>) -> Result<T>) -> Result<T> {
        let built = build(VarBuilder::from_backend(Box::new(self.clone()), dtype, self.0.device.clone()));
        #[cfg(feature = "cuda")]
        if let Some(pinned) = &self.0.pinned {
            pinned.wait()?;
        }
        built
    }

    fn copy(&self, name: &str) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(copy) = self.0.pinned.as_ref().and_then(|pinned| pinned.copy(name)) {
            return copy;
        }
        match self.0.tensors.get(name) {
            Some(tensor) => tensor.to_device(&self.0.device),
            None => bail!("host memory has no tensor `{name}`"),
        }
    }
}

impl SimpleBackend for Staged {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            bail!("tensor `{name}` has shape {:?}, expected {shape:?}", tensor.shape())
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        let tensor = self.copy(name)?;
        // A conversion would wait for the copy in the middle of what the device computes.
        if tensor.dtype() != dtype {
            bail!("tensor `{name}` is kept in {:?}, expected {dtype:?}", tensor.dtype())
        }
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        #[cfg(feature = "cuda")]
        if self.0.pinned.as_ref().is_some_and(|pinned| pinned.contains(name)) {
            return true;
        }
        self.0.tensors.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_handed_out_as_they_were_given() {
        let weight = Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap();
        let staged = Staged::new(HashMap::from([("a.weight".to_owned(), weight)]), &Device::Cpu);
        let get = |shape: (usize, usize), name: &'static str, dtype| {
            staged.build(dtype, |vb| vb.pp("a").get(shape, name)?.to_vec2::<f32>())
        };
        assert_eq!(get((1, 2), "weight", DType::F32).unwrap(), [[1.0, 2.0]]);
        let why = |shape, name, dtype| get(shape, name, dtype).unwrap_err().to_string();
        assert!(why((2, 1), "weight", DType::F32).contains("shape"));
        assert!(why((1, 2), "weight", DType::BF16).contains("BF16"));
        assert!(why((1, 2), "bias", DType::F32).contains("a.bias"));
    }
}
