//! How much memory this process has used, and how it keeps it.

/// The most resident memory of this process so far, in bytes; `None` where the system does not tell.
pub fn peak_host_bytes() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// `VmHWM` of Linux' `/proc/<pid>/status`, which is in KiB.
fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Has glibc take large blocks from its heap and keep them when they are freed. By default each tensor is mapped
/// afresh and its pages fault in one by one, which costs elementwise operations up to ten times their own time.
/// For the start of a program: memory that is in use already stays where it is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed() {
    // SAFETY: `mallopt` takes two integers and sets them under the lock of the heap. It has no safe equivalent; a
    // refusal (0) leaves the defaults, which are slower and as correct.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        assert_eq!(parse("VmPeak:\t  9 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n"), Some(1234 * 1024));
        assert_eq!(parse("Name:\tx\n"), None);
    }
}
