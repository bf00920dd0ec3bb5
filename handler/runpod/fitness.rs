//! What is checked before the first job is taken: a worker that cannot finish one must not take it.

use std::fs;
use std::io;
use std::path::Path;

use crate::disk::free_bytes;
use crate::generate::{DeviceChoice, open_device};
use crate::job::Code;

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Which one.
    pub check: &'static str,
    /// What it means for those who start the worker.
    pub code: Code,
    /// What was found and what was expected.
    pub reason: String,
}

/// Looks for somewhere to keep results, and for the device.
///
/// # Errors
/// The first check that fails.
pub fn check(spool: &Path, min_free_bytes: u64, device: DeviceChoice) -> Result<(), Unfit> {
    let unfit = |check, code, reason| Err(Unfit { check, code, reason });
    if let Err(e) = try_to_write(spool) {
        return unfit(
            "spool",
            Code::InsufficientDisk,
            format!("{} cannot be written to: {e}", spool.display()),
        );
    }
    match free_bytes(spool) {
        Ok(free) if free < min_free_bytes => {
            let reason =
                format!("{} has {free} bytes free, expected at least {min_free_bytes}", spool.display());
            return unfit("disk", Code::InsufficientDisk, reason);
        }
        Ok(_) => {}
        Err(e) => {
            let reason = format!("the free space of {} is unknown: {e}", spool.display());
            return unfit("disk", Code::InsufficientDisk, reason);
        }
    }
    // Where the choice is free there is always a device; asking for it would cost the time to open it.
    if device == DeviceChoice::Cuda
        && let Err(e) = open_device(device, |_| ())
    {
        return unfit("device", Code::GpuUnavailable, e.to_string());
    }
    Ok(())
}

/// Whether `folder` can be made, and files in it.
///
/// # Errors
/// What stands in the way.
pub fn try_to_write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    tempfile::tempfile_in(folder)?.set_len(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_without_room_for_results_is_unfit() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join("spool");
        assert_eq!(check(&spool, 1, DeviceChoice::Cpu), Ok(()));
        let full = check(&spool, u64::MAX, DeviceChoice::Cpu).unwrap_err();
        assert_eq!(full.check, "disk");
        assert!(full.reason.contains("expected at least 18446744073709551615"), "{}", full.reason);
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(check(&dir.path().join("file"), 1, DeviceChoice::Cpu).unwrap_err().check, "spool");
    }
}
