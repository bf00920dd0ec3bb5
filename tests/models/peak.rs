//! The most memory that a piece of work has in use: tests count the bytes of all allocations, in a process of their
//! own, since others allocate beside them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What `work` returns, and the most bytes that were in use meanwhile beside those that were before.
pub fn of<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let done = work();
    (done, PEAK.load(Ordering::Relaxed).saturating_sub(before) as u64)
}

/// The variable that tells a process of its own what to do.
pub const CASE: &str = "TALKIE_TEST_CASE";

/// Runs the ignored test called `name` in a process of its own, with `case` in [`CASE`]; what it prints after
/// `result: `.
pub fn in_a_process(name: &str, case: &str) -> String {
    let exe = std::env::current_exe().expect("this binary");
    let args = [name, "--exact", "--ignored", "--nocapture", "--test-threads=1"];
    let run = Command::new(exe).args(args).env(CASE, case).output().expect("it starts");
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{name} {case}: {out}{err}");
    let result = out.lines().find_map(|line| line.split_once("result: ")).map(|(_, result)| result);
    result.unwrap_or_else(|| panic!("{name} {case} has printed no result: {out}{err}")).to_owned()
}
