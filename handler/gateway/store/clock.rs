//! Time, as the store needs it: stamps that make sense to people and to the next start of the gateway, and
//! lengths that no jump of the machine's clock can change.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where time comes from.
pub trait Clock: Send + Sync {
    /// Milliseconds since 1970, as the machine believes now. It may jump.
    fn wall_ms(&self) -> i64;
    /// Time since some moment. It never jumps, and goes on while the machine sleeps.
    fn elapsed(&self) -> Duration;
    /// Time since some moment that the machine was awake. A worker that slept with it is not late.
    fn awake(&self) -> Duration;
}

/// The machine's own clocks.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall_ms(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        millis(since)
    }

    fn elapsed(&self) -> Duration {
        #[cfg(target_os = "linux")]
        return read(libc::CLOCK_BOOTTIME);
        #[cfg(not(target_os = "linux"))]
        return read(libc::CLOCK_MONOTONIC);
    }

    fn awake(&self) -> Duration {
        read(libc::CLOCK_MONOTONIC)
    }
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the write, and both clocks exist since Linux 2.6.39; a failure leaves zero.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// A clock with one reading of the wall: stamps are that reading and the time since, so that a jump of the
/// wall clock neither ends nor keeps anything while the gateway runs.
#[derive(Clone)]
pub(super) struct Timeline {
    clock: Arc<dyn Clock>,
    origin_ms: i64,
    origin: Duration,
}

impl Timeline {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        let (origin_ms, origin) = (clock.wall_ms(), clock.elapsed());
        Self { clock, origin_ms, origin }
    }

    /// Milliseconds since 1970.
    pub(super) fn now_ms(&self) -> i64 {
        self.origin_ms.saturating_add(millis(self.clock.elapsed().saturating_sub(self.origin)))
    }

    /// For leases and timeouts.
    pub(super) fn awake(&self) -> Duration {
        self.clock.awake()
    }
}

/// A length in the store's unit.
pub(super) fn millis(length: Duration) -> i64 {
    i64::try_from(length.as_millis()).unwrap_or(i64::MAX)
}
