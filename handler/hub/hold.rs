//! The lock of the volume for work that is no download: who prepares files keeps out whoever fetches some, and others
//! who prepare.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use talkie::pipeline::Cancel;

use super::lock::{Attempt, VolumeLock, Waiter};
use super::{BEAT_INTERVAL, Hub, LOCK_POLL, Phase, Progress, volume_error};
use crate::job::JobError;

/// The lock, while it is ours. A thread gives signs of life; the lock is given back when this is dropped.
#[derive(Debug)]
pub struct Hold {
    shared: Arc<Shared>,
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    lost: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Hub {
    /// Waits for the lock of the volume; `report` is told how far its owner is.
    ///
    /// # Errors
    /// [`crate::job::Code::ModelDownloadFailed`] or [`crate::job::Code::InsufficientDisk`] when the volume cannot be
    /// written to; [`crate::job::Code::Cancelled`] soon after `cancel` was called.
    pub fn hold(&self, cancel: &Cancel, report: &mut dyn FnMut(Progress)) -> Result<Hold, JobError> {
        let folder = self.work_folder();
        let failed = |e| volume_error(&folder, &e);
        let mut waiter = Waiter::new(&folder, self.settings.stale).map_err(failed)?;
        loop {
            match waiter.attempt().map_err(failed)? {
                Attempt::Taken(lock) => return Ok(Hold::of(lock)),
                Attempt::Busy(record) => {
                    let (done, total) = record.map_or((0, 0), |record| (record.done, record.total));
                    report(Progress { phase: Phase::Wait, done, total });
                }
            }
            cancel.check()?;
            thread::sleep(LOCK_POLL);
        }
    }
}

impl Hold {
    fn of(lock: VolumeLock) -> Self {
        let shared = Arc::<Shared>::default();
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn({
            let shared = shared.clone();
            move || beat(&lock, &shared, &ended)
        });
        Self { shared, end: Some(end), thread: Some(thread) }
    }

    /// Whether another process has taken the lock over, because this one was silent for too long.
    pub fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Says how far the work is, for whoever waits.
    pub fn tell(&self, done: u64, total: u64) {
        self.shared.done.store(done, Ordering::Relaxed);
        self.shared.total.store(total, Ordering::Relaxed);
    }
}

/// Gives signs of life until the other end of `ended` is gone.
fn beat(lock: &VolumeLock, shared: &Shared, ended: &mpsc::Receiver<()>) {
    while ended.recv_timeout(BEAT_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
        let (done, total) = (shared.done.load(Ordering::Relaxed), shared.total.load(Ordering::Relaxed));
        // A volume that does not answer for a moment has not given the lock to anybody else.
        if let Ok(false) = lock.beat(done, total) {
            shared.lost.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It has no way to panic.
            let _ = thread.join();
        }
    }
}
