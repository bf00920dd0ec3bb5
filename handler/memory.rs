//! How much memory this process has used, and how it keeps it.

/// The most resident memory of this process so far, in bytes; `None` where the system does not tell.
pub fn peak_host_bytes() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The resident memory of this process now, in bytes; `None` where the system does not tell.
pub fn host_bytes() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// One line of Linux' `/proc/<pid>/status`, which is in KiB.
fn parse(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
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

/// Takes [`keep_freed`] back, for a process that computes nothing and is to be small at rest: large blocks are
/// given back when they are freed, and threads share two heaps.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn give_back_freed() {
    const PIECE: libc::c_int = 128 * 1024;
    // SAFETY: as above.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 65_536);
        libc::mallopt(libc::M_MMAP_THRESHOLD, PIECE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, PIECE);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back_freed() {}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        let status = "VmPeak:\t  9 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(parse(status, "VmHWM:"), Some(1234 * 1024));
        assert_eq!(parse(status, "VmRSS:"), Some(1024));
        assert_eq!(parse("Name:\tx\n", "VmHWM:"), None);
    }
}
