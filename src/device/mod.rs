//! Chooses the device and the dtype that networks compute in, and says how much memory there is; weights in host memory
//! on their way to a GPU.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod pinned;
mod staged;

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};

#[cfg(feature = "cuda")]
use cuda::first as cuda;
pub(crate) use staged::Staged;

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

/// The device for `preference`. Where [`Preference::Auto`] falls back to the CPU, `fell_back` is told why.
///
/// # Errors
/// `DeviceUnavailable` if [`Preference::Cuda`] finds no CUDA device that can be used; the message names why.
pub fn select(preference: Preference, fell_back: impl FnOnce(&Error)) -> Result<Device> {
    match preference {
        Preference::Cpu => Ok(Device::Cpu),
        Preference::Cuda => cuda(),
        Preference::Auto => Ok(cuda().unwrap_or_else(|e| {
            fell_back(&e);
            Device::Cpu
        })),
    }
}

/// What computes: what is known of a device before there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    /// The CPU, which has no arithmetic of less than f32.
    Cpu,
    /// A GPU.
    Gpu,
}

impl Processor {
    /// What computes on `device`.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Cpu } else { Self::Gpu }
    }

    /// The dtype that a network computes in which is stored in this one.
    pub fn dtype(self, stored: DType) -> DType {
        match self {
            Self::Cpu => DType::F32,
            Self::Gpu => stored,
        }
    }
}

/// The dtype that networks compute in on `device`, where the model registry does not ask for more: f32 on the CPU,
/// which has no arithmetic of less, bf16 elsewhere, as in the reference.
pub fn compute_dtype(device: &Device) -> DType {
    Processor::of(device).dtype(DType::BF16)
}

/// Of the host's memory, left to buffers, decoded inputs and the program itself.
const HOST_RESERVE: u64 = 512 << 20;

/// Of a GPU's memory, left to its libraries' workspaces and to gaps between tensors.
pub const GPU_RESERVE: u64 = 1 << 30;

/// Bytes that this process may fill with weights and activations, those that it holds included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Of the device.
    pub device: u64,
    /// Of the host, where that is another memory.
    pub host: Option<u64>,
}

/// What `device` and the host have. On a GPU, what this process holds already does not count, so that it is to be
/// asked before anything is loaded.
///
/// # Errors
/// `DeviceUnavailable` when the system or the driver does not tell.
pub fn capacity(device: &Device) -> Result<Capacity> {
    let host = host_capacity(Path::new("/"))?;
    match device.is_cpu() {
        true => Ok(Capacity { device: host, host: None }),
        false => Ok(Capacity { device: free_bytes(device)?.saturating_sub(GPU_RESERVE), host: Some(host) }),
    }
}

/// Free bytes of a GPU.
#[cfg(feature = "cuda")]
fn free_bytes(device: &Device) -> Result<u64> {
    let free = device.as_cuda_device()?.cuda_stream().context().mem_get_info();
    let (free, _) = free.map_err(|e| untold("the GPU", &e.to_string()))?;
    Ok(free as u64)
}

/// A build without CUDA has no such device.
#[cfg(not(feature = "cuda"))]
fn free_bytes(_: &Device) -> Result<u64> {
    Err(untold("the GPU", "this build has no support for it"))
}

fn untold(memory: &str, why: &str) -> Error {
    let message = format!("how much memory {memory} has free is unknown: {why}");
    Error::new(ErrorKind::DeviceUnavailable, message)
}

/// What the system has to give to this process and has given: no more than its control group may have. `root` is `/`
/// but in tests.
fn host_capacity(root: &Path) -> Result<u64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let available = read("proc/meminfo").and_then(|text| kib_of(&text, "MemAvailable:"));
    let available = available.ok_or_else(|| untold("the host", "/proc/meminfo does not tell"))?;
    let free_in_group = || {
        let number = |text: String| text.trim().parse::<u64>().ok();
        // The current group looks like the root of its own hierarchy from inside a container.
        let most = read("sys/fs/cgroup/memory.max").and_then(number)?;
        let used = read("sys/fs/cgroup/memory.current").and_then(number)?;
        let stat = read("sys/fs/cgroup/memory.stat").unwrap_or_default();
        // Files that were read are dropped where memory is needed.
        let droppable = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let droppable = droppable.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0);
        Some(most.saturating_sub(used.saturating_sub(droppable)))
    };
    let free = free_in_group().map_or(available, |free| free.min(available));
    let own = read("proc/self/status").and_then(|text| kib_of(&text, "VmRSS:")).unwrap_or(0);
    Ok((free + own).saturating_sub(HOST_RESERVE))
}

/// A line of /proc in KiB, as bytes.
fn kib_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn unavailable(message: impl Into<String>, hint: &str) -> Error {
    Error::new(ErrorKind::DeviceUnavailable, message).with_hint(hint)
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Device> {
    let hint = "take a build with the feature `cuda`: scripts/build-cuda.sh makes one";
    Err(unavailable("this build computes on the CPU only", hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_what_its_control_group_may_have() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert!(host_capacity(root.path()).unwrap_err().to_string().contains("meminfo"));
        write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   8388608 kB\n");
        write("proc/self/status", "VmRSS:\t 1048576 kB\n");
        let gib = 1u64 << 30;
        let capacity = || host_capacity(root.path()).unwrap() + HOST_RESERVE;
        assert_eq!(capacity(), 9 * gib, "what is free and what is held");
        write("sys/fs/cgroup/memory.max", "max\n");
        write("sys/fs/cgroup/memory.current", "5368709120\n");
        assert_eq!(capacity(), 9 * gib);
        write("sys/fs/cgroup/memory.max", "6442450944\n");
        write("sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 2147483648\n");
        assert_eq!(capacity(), 4 * gib, "6 of it, 5 in use, 2 of which are files, 1 held");
    }

    #[test]
    fn this_machine_tells_what_it_has() {
        let Capacity { device, host } = capacity(&Device::Cpu).unwrap();
        assert!(device > 0 && host.is_none());
    }

    #[test]
    fn each_preference_gives_its_device_or_says_why_not() {
        let silent = |_: &Error| panic!("only `auto` falls back");
        assert!(select(Preference::Cpu, silent).unwrap().is_cpu());
        let mut why = None;
        let auto = select(Preference::Auto, |e| why = Some(e.to_string())).unwrap();
        match select(Preference::Cuda, silent) {
            Ok(device) => assert!(device.is_cuda() && auto.is_cuda() && why.is_none()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::DeviceUnavailable);
                assert!(auto.is_cpu() && error.hint().is_some());
                assert_eq!(why, Some(error.to_string()), "the fallback is told the same");
            }
        }
    }

    #[test]
    fn the_cpu_computes_in_f32() {
        assert_eq!(compute_dtype(&Device::Cpu), DType::F32);
    }
}
