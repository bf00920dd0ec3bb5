//! Tensors in page-locked host memory, which a GPU reads by itself while it computes.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaStream, DeviceRepr, DriverError, PinnedHostSlice, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Error, Result, Shape, Storage, Tensor, WithDType};
use half::bf16;

pub(super) struct Pinned {
    tensors: HashMap<String, Locked>,
    device: CudaDevice,
    /// The stream of the copies.
    copies: Arc<CudaStream>,
}

struct Locked {
    shape: Shape,
    values: Values,
}

enum Values {
    Bf16(PinnedHostSlice<bf16>),
    F32(PinnedHostSlice<f32>),
}

impl Pinned {
    /// Moves tensors into page-locked memory. Beside it, those that are of another dtype or cannot be locked.
    pub fn take(
        tensors: HashMap<String, Tensor>,
        device: &CudaDevice,
    ) -> (Option<Self>, HashMap<String, Tensor>) {
        let context = device.cuda_stream().context().clone();
        let Ok(copies) = context.new_stream() else { return (None, tensors) };
        let (mut locked, mut others) = (HashMap::new(), HashMap::new());
        for (name, tensor) in tensors {
            match lock(&tensor, &context) {
                Some(values) => {
                    locked.insert(name, Locked { shape: tensor.shape().clone(), values });
                }
                None => {
                    others.insert(name, tensor);
                }
            }
        }
        (Some(Self { tensors: locked, device: device.clone(), copies }), others)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Begins to copy a tensor to the device, if it is here. It may be used after [`Pinned::wait`].
    pub fn copy(&self, name: &str) -> Option<Result<Tensor>> {
        let Locked { shape, values } = self.tensors.get(name)?;
        let storage = match values {
            Values::Bf16(values) => self.begin(values),
            Values::F32(values) => self.begin(values),
        };
        let tensor = |storage| Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
        Some(storage.map(tensor))
    }

    fn begin<T: CudaDType + DeviceRepr>(&self, values: &PinnedHostSlice<T>) -> Result<CudaStorage> {
        let computing = self.device.cuda_stream();
        // Memory comes from the computing stream, and goes back to it: it is free once the kernels are done that were
        // started before, which are those of the block before the one at work.
        // SAFETY: nothing reads it before the copy has written all of it, which the caller waits for.
        let mut copied = unsafe { self.device.alloc::<T>(values.len())? };
        self.copies.join(&computing).map_err(failed)?;
        self.copies.memcpy_htod(values, &mut copied).map_err(failed)?;
        Ok(CudaStorage::wrap_cuda_slice(copied, self.device.clone()))
    }

    /// Waits until all that was begun is on the device.
    pub fn wait(&self) -> Result<()> {
        self.copies.synchronize().map_err(failed)
    }
}

/// The values of a tensor of the CPU in page-locked memory; `None` where that cannot be.
fn lock(tensor: &Tensor, context: &Arc<CudaContext>) -> Option<Values> {
    match tensor.dtype() {
        DType::BF16 => values(tensor, context).map(Values::Bf16),
        DType::F32 => values(tensor, context).map(Values::F32),
        _ => None,
    }
}

fn values<T: WithDType + DeviceRepr + ValidAsZeroBits>(
    tensor: &Tensor,
    context: &Arc<CudaContext>,
) -> Option<PinnedHostSlice<T>> {
    let tensor = tensor.contiguous().ok()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return None };
    let (start, end) = layout.contiguous_offsets()?;
    let values = storage.as_slice::<T>().ok()?.get(start..end)?;
    // SAFETY: all of the memory is written before it is read.
    let mut locked = unsafe { context.alloc_pinned::<T>(values.len()) }.ok()?;
    locked.as_mut_slice().ok()?.copy_from_slice(values);
    Some(locked)
}

fn failed(e: DriverError) -> Error {
    Error::wrap(e)
}
