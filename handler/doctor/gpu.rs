//! The GPU, as NVIDIA's management library sees it. The library comes with the driver and is looked for when it is
//! asked, so that a build without CUDA can tell of a GPU, too.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde_json::{Value, json};

use super::{Check, Status, gb};
use crate::generate::DeviceChoice;

const NAME: &str = "gpu";

/// What is known of the first GPU.
pub(super) struct Gpu {
    name: String,
    driver: String,
    /// Bytes of memory.
    pub(super) total: u64,
    free: u64,
}

impl Gpu {
    /// Asks the library. No context is made on the GPU, which would take memory from the worker beside us.
    pub(super) fn look() -> Result<Self, NvmlError> {
        let nvml = Nvml::init()?;
        let device = nvml.device_by_index(0)?;
        let memory = device.memory_info()?;
        Ok(Self {
            name: device.name()?,
            driver: nvml.sys_driver_version()?,
            total: memory.total,
            free: memory.free,
        })
    }
}

/// Whether there is a GPU where one is wanted, and whether this build can use it.
pub(super) fn check(choice: DeviceChoice, looked: &Result<Gpu, NvmlError>) -> Check {
    if choice == DeviceChoice::Cpu {
        return Check::new(NAME, Status::Ok, "not wanted: the device is the CPU");
    }
    // What is wanted decides whether its absence is a failure.
    let absent = if choice == DeviceChoice::Cuda { Status::Fail } else { Status::Warn };
    match looked {
        Ok(gpu) => {
            let facts = facts(gpu);
            let message = format!(
                "{}, driver {}, {:.1} of {:.1} GB free",
                gpu.name,
                gpu.driver,
                gb(gpu.free),
                gb(gpu.total)
            );
            if candle_core::utils::cuda_is_available() {
                return Check::new(NAME, Status::Ok, message).with_facts(facts);
            }
            Check::new(NAME, absent, format!("{message}, which this build cannot use"))
                .with_remedy("use the build with CUDA")
                .with_facts(facts)
        }
        Err(e) => Check::new(NAME, absent, format!("there is none: {e}"))
            .with_remedy("start the container with its GPU and the driver's `utility` capability, or set TALKIE_DEVICE=cpu"),
    }
}

fn facts(gpu: &Gpu) -> Value {
    json!({"name": gpu.name, "driver": gpu.driver, "total_bytes": gpu.total, "free_bytes": gpu.free})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_wanted_and_absent_fails_and_one_that_may_be_absent_does_not() {
        let looked = Err(NvmlError::DriverNotLoaded);
        assert_eq!(check(DeviceChoice::Cpu, &looked).status, Status::Ok);
        let checks = [DeviceChoice::Auto, DeviceChoice::Cuda].map(|choice| check(choice, &looked));
        assert_eq!(checks.each_ref().map(|check| check.status), [Status::Warn, Status::Fail]);
        assert!(checks[1].remedy.is_some() && checks[1].message.starts_with("there is none: "));
        let gpu = Gpu { name: "L40S".into(), driver: "580.1".into(), total: 48 << 30, free: 47 << 30 };
        let there = check(DeviceChoice::Cuda, &Ok(gpu));
        assert_eq!(there.facts["total_bytes"], 48u64 << 30);
        assert_eq!(there.status == Status::Ok, candle_core::utils::cuda_is_available());
    }
}
