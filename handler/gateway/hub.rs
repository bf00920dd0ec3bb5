//! Who waits for what: clients for a job to change, workers for a job to take. Nothing here is kept over a
//! restart; the store is the truth, and a waiter looks there after every wake-up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::{Notify, watch};

/// Wakes those who wait, and holds the last progress of running jobs.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// A job is here while somebody watches it.
    watched: Mutex<HashMap<String, watch::Sender<u64>>>,
    progress: Mutex<HashMap<String, Value>>,
    queue: Notify,
}

impl Hub {
    /// Tells those who watch `job` that its status, progress or chunks have changed.
    pub fn job_changed(&self, job: &str) {
        if let Some(sender) = lock(&self.0.watched).get(job) {
            sender.send_modify(|version| *version += 1);
        }
    }

    /// Records how far `job` is and tells those who watch it.
    pub fn set_progress(&self, job: &str, progress: Value) {
        lock(&self.0.progress).insert(job.to_string(), progress);
        self.job_changed(job);
    }

    /// The last progress of `job`.
    pub fn progress(&self, job: &str) -> Option<Value> {
        lock(&self.0.progress).get(job).cloned()
    }

    /// Forgets the progress of a job that does not run any more.
    pub fn clear_progress(&self, job: &str) {
        lock(&self.0.progress).remove(job);
    }

    /// Watches `job` from now on. Look at the store after this call and after every change, so that none is
    /// missed.
    pub fn watch(&self, job: &str) -> Watch {
        let receiver =
            lock(&self.0.watched).entry(job.to_string()).or_insert_with(|| watch::channel(0).0).subscribe();
        Watch { hub: self.clone(), job: job.to_string(), receiver }
    }

    /// Tells every worker that waits that a job may be there for it, or that it should look at its own state.
    pub fn wake_workers(&self) {
        self.0.queue.notify_waiters();
    }

    /// What a worker waits on. Call `enable` on it before looking at the queue, so that no job is missed.
    pub fn workers_woken(&self) -> tokio::sync::futures::Notified<'_> {
        self.0.queue.notified()
    }
}

/// One who watches a job; dropping it ends that.
#[derive(Debug)]
pub struct Watch {
    hub: Hub,
    job: String,
    receiver: watch::Receiver<u64>,
}

impl Watch {
    /// Waits until the job has changed since the last call.
    pub async fn changed(&mut self) {
        // The sender lives as long as somebody watches.
        let _ = self.receiver.changed().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = lock(&self.hub.0.watched);
        // This receiver is still one of them.
        if watched.get(&self.job).is_some_and(|sender| sender.receiver_count() <= 1) {
            watched.remove(&self.job);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watcher_hears_of_changes_after_it_began() {
        let hub = Hub::default();
        hub.job_changed("a");
        let (mut first, mut second) = (hub.watch("a"), hub.watch("a"));
        hub.set_progress("a", Value::from(3));
        first.changed().await;
        second.changed().await;
        assert_eq!(hub.progress("a"), Some(Value::from(3)));
        hub.clear_progress("a");
        assert_eq!(hub.progress("a"), None);
    }

    #[tokio::test]
    async fn nobody_is_remembered_after_the_last_watcher_left() {
        let hub = Hub::default();
        let (first, mut second) = (hub.watch("a"), hub.watch("a"));
        drop(first);
        hub.job_changed("a");
        second.changed().await;
        drop(second);
        assert!(lock(&hub.0.watched).is_empty());
    }
}
