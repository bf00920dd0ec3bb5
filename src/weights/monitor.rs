//! What a cold start shows and is stopped by: bytes while they are read, times when they have been.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::Result;

/// Watches loads: [`super::Weights::watched_by`]. One monitor may watch several networks, also at the same time.
pub struct LoadMonitor {
    check: Box<dyn Fn() -> Result<()> + Send + Sync>,
    bytes_read: AtomicU64,
    times: Mutex<LoadStats>,
}

/// What loads took so far. `read`, `convert` and `to_device` are the readers' time divided by their number, so that
/// they add up to `wall` as long as no reader waits for another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadStats {
    /// Bytes of weight files.
    pub bytes_read: u64,
    /// Waiting for the file system.
    pub read: Duration,
    /// Decoding, dequantising, merging LoRAs, drawing random weights, rounding.
    pub convert: Duration,
    /// Copying to a device that is not the CPU.
    pub to_device: Duration,
    /// From the first read to the last tensor, summed over the networks.
    pub wall: Duration,
}

impl LoadMonitor {
    /// A monitor whose `check` is called between any two pieces of a few megabytes: an error ends the load.
    pub fn new(check: impl Fn() -> Result<()> + Send + Sync + 'static) -> Self {
        Self { check: Box::new(check), bytes_read: AtomicU64::new(0), times: Mutex::default() }
    }

    /// Bytes of weight files read so far; to be compared with [`super::LoadPlan::bytes_to_read`].
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// What the loads that have ended took.
    pub fn stats(&self) -> LoadStats {
        LoadStats { bytes_read: self.bytes_read(), ..*self.times() }
    }

    pub(crate) fn check(&self) -> Result<()> {
        (self.check)()
    }

    pub(super) fn add_bytes(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the times of one load.
    pub(super) fn add_times(&self, load: LoadStats) {
        let mut times = self.times();
        times.read += load.read;
        times.convert += load.convert;
        times.to_device += load.to_device;
        times.wall += load.wall;
    }

    fn times(&self) -> MutexGuard<'_, LoadStats> {
        self.times.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Default for LoadMonitor {
    /// A monitor that ends no load.
    fn default() -> Self {
        Self::new(|| Ok(()))
    }
}
