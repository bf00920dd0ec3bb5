//! The first GPU, or why there is none.

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};

use super::unavailable;
use crate::Result;

/// The version of CUDA whose compiler made the kernels; an older driver refuses them.
const CUDA_VERSION: i32 = 13_000;
/// The oldest cards that multiply bf16: compute capability 8.0.
const OLDEST: (i32, i32) = (8, 0);

/// The first CUDA device, with a stream of its own and a memory pool that keeps what is freed.
pub(super) fn first() -> Result<Device> {
    let mut version = 0;
    // SAFETY: the driver writes one integer. Where there is no driver, the call fails.
    let driver = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    if driver.is_err() {
        let hint = "install NVIDIA's driver, or start the container with `--gpus all`";
        return Err(unavailable("there is no NVIDIA driver: libcuda.so.1 was not found", hint));
    }
    if version < CUDA_VERSION {
        let message = format!(
            "the NVIDIA driver is too old: it knows CUDA {}, expected {} or newer",
            dotted(version),
            dotted(CUDA_VERSION)
        );
        let hint = "install driver 580 or newer, or the package cuda-compat-13-0";
        return Err(unavailable(message, hint));
    }
    let failed = |what: &str, e: DriverError| {
        let hint = "`nvidia-smi` shows which GPUs the driver sees; CUDA_VISIBLE_DEVICES may hide them";
        unavailable(format!("{what}: {e}"), hint).with_source(e.to_string())
    };
    result::init().map_err(|e| failed("the NVIDIA driver finds no GPU", e))?;
    let first = result::device::get(0).map_err(|e| failed("the NVIDIA driver has no first GPU", e))?;
    let attribute = |attribute| {
        // SAFETY: the device was given out by the driver.
        unsafe { result::device::get_attribute(first, attribute) }
            .map_err(|e| failed("the GPU cannot be asked what it is", e))
    };
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let capability = (attribute(MAJOR)?, attribute(MINOR)?);
    if capability < OLDEST {
        let name = result::device::get_name(first).unwrap_or_else(|_| "a GPU".to_string());
        let message = format!(
            "{name} has compute capability {}.{}, expected {}.{} or newer",
            capability.0, capability.1, OLDEST.0, OLDEST.1
        );
        return Err(unavailable(message, "take a card of the Ampere generation or newer"));
    }
    // A stream of its own, because the default one is another for each thread.
    let device = Device::new_cuda_with_stream(0).map_err(|e| {
        unavailable(format!("the GPU cannot be used: {e}"), "`nvidia-smi` may show who holds it")
            .with_source(e)
    })?;
    keep_freed(first).map_err(|e| failed("the GPU's memory pool cannot be set up", e))?;
    Ok(device)
}

/// Keeps freed memory in the pool of `device`, which would give it back to the system at every wait for the device
/// and have to ask for it again.
fn keep_freed(device: sys::CUdevice) -> Result<(), DriverError> {
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is the driver's, and the attribute is an unsigned integer of 64 bits.
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    }
}

/// CUDA 13.0 is 13000 to the driver.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
