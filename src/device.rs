//! Chooses the device and the dtype that networks compute in: the only place that asks whether CUDA is there.

use candle_core::{DType, Device};

use crate::{Error, ErrorKind, Result};

/// Which device the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The first CUDA device where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first CUDA device, or an error.
    Cuda,
}

/// The device for `preference`.
///
/// # Errors
/// `DeviceUnavailable` if [`Preference::Cuda`] finds no CUDA device, or this build has no support for them.
pub fn select(preference: Preference) -> Result<Device> {
    match preference {
        Preference::Cpu => Ok(Device::Cpu),
        Preference::Auto => Ok(Device::new_cuda(0).unwrap_or(Device::Cpu)),
        Preference::Cuda => Device::new_cuda(0).map_err(|e| {
            let message = format!("CUDA device 0 is not available: {e}");
            Error::new(ErrorKind::DeviceUnavailable, message).with_source(e)
        }),
    }
}

/// The dtype that networks compute in on `device`, where the model registry does not ask for more: f32 on the CPU,
/// which has no arithmetic of less, bf16 elsewhere, as in the reference.
pub fn compute_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_preference_gives_its_device_or_says_why_not() {
        assert!(select(Preference::Cpu).unwrap().is_cpu());
        match (select(Preference::Cuda), select(Preference::Auto).unwrap()) {
            (Ok(device), auto) => assert!(device.is_cuda() && auto.is_cuda()),
            (Err(error), auto) => {
                assert_eq!(error.kind(), ErrorKind::DeviceUnavailable);
                assert!(auto.is_cpu());
            }
        }
    }

    #[test]
    fn the_cpu_computes_in_f32() {
        assert_eq!(compute_dtype(&Device::Cpu), DType::F32);
    }
}
