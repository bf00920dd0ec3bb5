//! Networks as they arrive: a thread reads them in the order in which the generation needs them, while the generation
//! already works with those that are there.
//!
//! Memory is shared by a [`Ledger`]: the thread waits until what it is about to load fits beside what is in use, which
//! it does once encoders that have been heard have left.
//!
//! On a GPU the loading thread only allocates and copies. That is safe beside the thread that computes: every call of
//! cudarc binds the device's context to the calling thread first (`CudaContext::bind_to_thread`), context and stream
//! are `Sync`, and candle gives a device one stream, on which copies and kernels run in the order in which they were
//! submitted. A network is handed over by a channel after its last copy was submitted, so no kernel reads it before.
//! Handles that keep state between calls (cuBLAS, cuRAND) are used by the computing thread alone. The price of the one
//! stream is that a copy does not overlap with kernels that were submitted before it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::infinitetalk::Control;
use super::progress::{LoadProgress, Progress, Stage};
use super::shelf::{Form, Kept, Network};
use crate::prepared::NetworkKind;
use crate::weights::{LoadMonitor, Weights};
use crate::{Error, ErrorKind, Result};

/// How often whoever waits for a network tells how far it is, and looks whether it was cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bytes of the device that networks may still take.
pub(super) struct Ledger {
    free: Mutex<u64>,
    changed: Condvar,
    stopped: Arc<AtomicBool>,
}

impl Ledger {
    pub fn new(free: u64) -> Self {
        Self { free: Mutex::new(free), changed: Condvar::new(), stopped: Arc::default() }
    }

    /// Waits until `bytes` are free, and takes them.
    ///
    /// # Errors
    /// `Cancelled` after [`Ledger::stop`].
    pub fn acquire(&self, bytes: u64) -> Result<()> {
        let mut free = self.free();
        while *free < bytes {
            if self.stopped.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Cancelled, "the networks are not needed any more"));
            }
            free = self.changed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Ok(())
    }

    /// Gives `bytes` back.
    pub fn release(&self, bytes: u64) {
        *self.free() += bytes;
        self.changed.notify_all();
    }

    /// Ends all waiting.
    pub fn stop(&self) {
        let _free = self.free(); // so that nobody looks at the switch and only then begins to wait
        self.stopped.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Set once nobody needs the networks any more.
    pub fn stopped(&self) -> Arc<AtomicBool> {
        self.stopped.clone()
    }

    fn free(&self) -> MutexGuard<'_, u64> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which network is being read, for whoever tells people.
pub(super) struct Reading {
    pub monitor: Arc<LoadMonitor>,
    pub bytes_to_read: u64,
    current: AtomicUsize,
}

impl Reading {
    pub fn new(monitor: Arc<LoadMonitor>, bytes_to_read: u64) -> Self {
        Self { monitor, bytes_to_read, current: AtomicUsize::new(0) }
    }

    /// The network `kind` is read from now on.
    pub fn begin(&self, kind: NetworkKind) {
        let index = NetworkKind::ALL.iter().position(|other| *other == kind).unwrap_or(0);
        self.current.store(index, Ordering::Relaxed);
    }

    fn progress(&self) -> LoadProgress {
        LoadProgress {
            network: NetworkKind::ALL[self.current.load(Ordering::Relaxed)],
            bytes_read: self.monitor.bytes_read().min(self.bytes_to_read),
            bytes_to_read: self.bytes_to_read,
        }
    }
}

/// A network that has been loaded.
pub(super) struct Arrival {
    pub kept: Kept,
    /// Its tensors in host memory, where they stay there.
    pub host: Option<Arc<Weights>>,
}

/// Hands the generation its networks.
pub(super) struct Supply<'a> {
    /// Those that are there.
    pub ready: BTreeMap<NetworkKind, Kept>,
    /// Those that are being read; ends with the first failure.
    pub arriving: Receiver<Result<Arrival>>,
    /// Encoders that have left the device, in host memory.
    pub left: Vec<Kept>,
    pub reading: &'a Reading,
    pub ledger: &'a Ledger,
    /// Whether encoders leave the device once they have been heard.
    pub encoders_leave: bool,
    pub began: Instant,
    /// When the last network arrived.
    pub complete: Option<Duration>,
}

impl Supply<'_> {
    /// Whether there is nothing to wait for.
    pub fn is_complete(&self) -> bool {
        self.ready.contains_key(&NetworkKind::Dit)
    }

    /// The network `kind`, as soon as it is there.
    ///
    /// # Errors
    /// Why it, or one before it, could not be loaded; `Cancelled`.
    pub fn take<T: Send + Sync + 'static>(
        &mut self,
        kind: NetworkKind,
        control: &mut Control,
    ) -> Result<Arc<T>> {
        loop {
            control.cancel.check()?;
            if let Some(Form::Loaded { network, .. }) = self.ready.get(&kind).map(|kept| &kept.form) {
                return downcast(network.clone(), kind);
            }
            match self.arriving.recv_timeout(LOOK_EVERY) {
                Ok(arrival) => {
                    self.receive(arrival?);
                    self.complete = Some(self.began.elapsed());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(missing(kind)),
            }
            let loading = Some(self.reading.progress());
            (control.progress)(Progress { loading, ..Progress::at(Stage::Load) });
        }
    }

    fn receive(&mut self, Arrival { kept, host }: Arrival) {
        if let Some(weights) = host {
            self.left.push(Kept { form: Form::OnHost(weights), ..kept.clone() });
        }
        self.ready.insert(kept.key.kind(), kept);
    }

    /// What is left for the next video, once the thread has ended: also what arrived after this one was given up.
    pub fn keep(mut self) -> impl Iterator<Item = Kept> {
        while let Ok(Ok(arrival)) = self.arriving.try_recv() {
            self.receive(arrival);
        }
        self.left.into_iter().chain(self.ready.into_values())
    }

    /// An encoder has been heard: where memory asks for it, it leaves the device, unless somebody still holds it.
    pub fn done(&mut self, kind: NetworkKind) {
        if !self.encoders_leave {
            return;
        }
        if let Some(Form::Loaded { device_bytes, network, .. }) =
            self.ready.remove(&kind).map(|kept| kept.form)
        {
            drop(network);
            self.ledger.release(device_bytes);
        }
    }
}

fn downcast<T: Send + Sync + 'static>(network: Network, kind: NetworkKind) -> Result<Arc<T>> {
    network.downcast().map_err(|_| missing(kind))
}

fn missing(kind: NetworkKind) -> Error {
    let message = format!("the thread that loads networks has ended without the {}", kind.as_str());
    Error::new(ErrorKind::Inference, message)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn what_does_not_fit_waits_for_what_leaves() {
        let ledger = Ledger::new(10);
        ledger.acquire(8).unwrap();
        let (told, heard) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                ledger.acquire(5).unwrap();
                told.send("loaded").unwrap();
            });
            told.send("left").unwrap();
            ledger.release(3);
        });
        assert_eq!(heard.iter().take(2).collect::<Vec<_>>(), ["left", "loaded"]);
        assert_eq!(*ledger.free(), 0);
    }

    #[test]
    fn waiting_ends_when_nobody_needs_the_networks() {
        let ledger = Ledger::new(0);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| ledger.acquire(1));
            ledger.stop();
            assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        });
    }
}
