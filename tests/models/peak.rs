//! The most memory that a piece of work has in use: tests count the bytes of all allocations, in a process of their
//! own, since others allocate beside them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::{Command, Output};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, counted; it refuses what exceeds a limit, where one is set.
pub struct Counting;

/// Counts `bytes` more, unless they exceed the limit.
fn take(bytes: usize) -> bool {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    let granted = now <= LIMIT.load(Ordering::Relaxed);
    match granted {
        true => PEAK.fetch_max(now, Ordering::Relaxed),
        false => NOW.fetch_sub(bytes, Ordering::Relaxed),
    };
    granted
}

// SAFETY: every call goes to the system's allocator unchanged, or returns null, which means that there is no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match take(layout.size()) {
            // SAFETY: the caller keeps the rules of `alloc`.
            true => unsafe { System.alloc(layout) },
            false => ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match take(layout.size()) {
            // SAFETY: as above.
            true => unsafe { System.alloc_zeroed(layout) },
            false => ptr::null_mut(),
        }
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

/// The same, where more than `bytes` are not to be had meanwhile: a process that asks for more is aborted.
pub fn within<T>(bytes: u64, work: impl FnOnce() -> T) -> (T, u64) {
    LIMIT.store(NOW.load(Ordering::Relaxed) + bytes as usize, Ordering::Relaxed);
    let done = of(work);
    LIMIT.store(usize::MAX, Ordering::Relaxed);
    done
}

/// The variable that tells a process of its own what to do.
pub const CASE: &str = "TALKIE_TEST_CASE";

/// Runs the ignored test called `name` in a process of its own, with `case` in [`CASE`]; what it prints after
/// `result: `.
pub fn in_a_process(name: &str, case: &str) -> String {
    let run = run(name, case);
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{name} {case}: {out}{err}");
    let result = out.lines().find_map(|line| line.split_once("result: ")).map(|(_, result)| result);
    result.unwrap_or_else(|| panic!("{name} {case} has printed no result: {out}{err}")).to_owned()
}

/// Runs the ignored test called `name` in a process of its own, with `case` in [`CASE`].
pub fn run(name: &str, case: &str) -> Output {
    let exe = std::env::current_exe().expect("this binary");
    let args = [name, "--exact", "--ignored", "--nocapture", "--test-threads=1"];
    Command::new(exe).args(args).env(CASE, case).output().expect("it starts")
}
