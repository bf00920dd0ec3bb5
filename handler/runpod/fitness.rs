//! What is checked before the first job is taken: a worker that cannot finish one must not take it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use talkie::device;

use crate::generate::DeviceChoice;

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Which one.
    pub check: &'static str,
    /// What was found and what was expected.
    pub reason: String,
}

/// Looks for somewhere to keep results, and for the device.
///
/// # Errors
/// The first check that fails.
pub fn check(spool: &Path, min_free_bytes: u64, device: DeviceChoice) -> Result<(), Unfit> {
    let unfit = |check, reason| Err(Unfit { check, reason });
    if let Err(e) = try_to_write(spool) {
        return unfit("spool", format!("{} cannot be written to: {e}", spool.display()));
    }
    match free_bytes(spool) {
        Ok(free) if free < min_free_bytes => {
            let reason =
                format!("{} has {free} bytes free, expected at least {min_free_bytes}", spool.display());
            return unfit("disk", reason);
        }
        Ok(_) => {}
        Err(e) => return unfit("disk", format!("the free space of {} is unknown: {e}", spool.display())),
    }
    // Where the choice is free there is always a device; asking for it would cost the time to open it.
    if device == DeviceChoice::Cuda
        && let Err(e) = device::select(device.into())
    {
        return unfit("device", e.to_string());
    }
    Ok(())
}

fn try_to_write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    tempfile::tempfile_in(folder)?.set_len(1)
}

/// Bytes that this user may still write below `folder`.
pub fn free_bytes(folder: &Path) -> io::Result<u64> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: all-zero is a value of this struct of integers.
    let mut stats: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero byte and both pointers live until the call returns.
    if unsafe { libc::statvfs(path.as_ptr(), &mut stats) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
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
