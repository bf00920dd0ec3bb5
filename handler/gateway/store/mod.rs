//! The jobs that were accepted: an embedded SQLite database that survives `kill -9` and power cuts.
//!
//! One thread writes and commits in groups (`writer`); readers have connections of their own. A job's media
//! are not in here but in files, which are on disk before the job is. What is asked often and must be quick,
//! such as counts and positions, is in memory and follows the database after each commit (`memory`).
//!
//! Methods that read are not `async`: a read by key takes some microseconds, in which the page comes from
//! memory, and sending it to another thread and back would take longer than that. Whatever waits for the disk is
//! `async`. A write goes on when its caller is dropped.

mod clock;
mod database;
mod failure;
mod keys;
mod memory;
mod model;
mod read;
mod readers;
mod recover;
mod write;
mod writer;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use self::clock::Timeline;
use self::failure::{Failure, closed, internal};
use self::memory::Memory;
use self::readers::Readers;
use self::write::Tx;
use self::writer::{Pending, Request, Shared, Writer};
use crate::faults::kill_point;
use crate::job::{JobError, JobStatus};
use crate::runpod::protocol::JobCounts;

pub use self::clock::{Clock, SystemClock};
pub use self::database::World;
pub use self::keys::KeyStore;
pub use self::model::{
    Accepted, Delivery, Idempotency, JobRecord, KeyRecord, KeyRole, Lease, Loss, NewJob, OnChange, Options,
    Outcome, Queue, Swept, Taker,
};

/// Jobs that one transaction of a sweep or purge ends at most, so that nobody waits long behind it.
const BATCH: i64 = 500;

/// How long an idempotency key holds at least.
const KEEP_KEYS: Duration = Duration::from_secs(24 * 60 * 60);

/// No kill points.
const PLAIN: [&str; 2] = ["", ""];

/// The store; clones share it. The last one closes it.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    readers: Readers,
    /// None: closed.
    requests: Mutex<Option<Sender<Box<dyn Request>>>>,
    ended: watch::Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the store in the data folder `dir`, or makes it. `on_change` is told of every change after it is
    /// on disk, but not of what opening itself changes: jobs whose workers died with the last gateway wait again.
    ///
    /// # Errors
    /// When another gateway uses the folder, or it lies on a network filesystem, or the database is damaged, of a
    /// newer version, or cannot be written. `details.reason` says which.
    pub fn open(dir: &Path, options: Options, on_change: OnChange) -> Result<Self, JobError> {
        Self::open_in(&World::default(), dir, options, on_change)
    }

    /// [`open`](Self::open) with another clock or other files.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(
        world: &World,
        dir: &Path,
        options: Options,
        on_change: OnChange,
    ) -> Result<Self, JobError> {
        let lock = database::lock(dir, world)?;
        let mut connection = database::open(dir, world)?;
        let timeline = Timeline::new(world.clock.clone());
        let memory = Mutex::new(recover::recover(&mut connection, &options, &timeline)?);
        let shared = Arc::new(Shared { options, timeline, memory, healthy: AtomicBool::new(true) });
        let (requests, receiver) = mpsc::channel();
        let (ended_sender, ended) = watch::channel(());
        let writer = Writer { shared: shared.clone(), connection, on_change, lock, ended: ended_sender };
        let thread = thread::Builder::new()
            .name("store".to_string())
            .spawn(move || writer.run(&receiver))
            .map_err(|e| internal(format!("no thread for the job store: {e}"), "STORE_FAILED"))?;
        Ok(Self(Arc::new(Inner {
            shared,
            readers: Readers::new(dir.to_path_buf(), world.clone()),
            requests: Mutex::new(Some(requests)),
            ended,
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// Whether the last write went well. [`sweep`](Self::sweep) tries again where it did not.
    pub fn healthy(&self) -> bool {
        self.0.shared.healthy.load(Ordering::Relaxed)
    }

    /// Keeps a job; it is on disk when this returns. A key that was used before with the same body yields the
    /// earlier job, which may be forgotten by now.
    ///
    /// # Errors
    /// `QUEUE_FULL`, `STORE_FULL`, `IDEMPOTENCY_CONFLICT`; nothing is kept then.
    pub async fn accept(&self, job: NewJob) -> Result<Accepted, JobError> {
        self.write(["K3", "K4"], move |tx| tx.accept(&job)).await
    }

    /// The job `id`.
    ///
    /// # Errors
    /// When the database cannot be read, as for every method that reads.
    pub fn job(&self, id: &str) -> Result<Option<JobRecord>, JobError> {
        self.0.readers.read(|connection| read::job(connection, id))
    }

    /// The request of the job `id`, without its large texts.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn request(&self, id: &str) -> Result<Option<String>, JobError> {
        self.0.readers.read(|connection| read::request(connection, id))
    }

    /// The jobs of `endpoint` that were accepted, or retried by their senders, last; the newest first.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn recent(&self, endpoint: &str, most: usize) -> Result<Vec<JobRecord>, JobError> {
        self.0.readers.read(|connection| read::recent(connection, endpoint, limit(most)))
    }

    /// Jobs before it in its queue; None when it does not wait.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn position(&self, id: &str) -> Result<Option<u64>, JobError> {
        let place = self.0.readers.read(|connection| read::place(connection, id))?;
        Ok(place.and_then(|(queue, seq)| self.memory().position(&queue, seq)))
    }

    /// How long the first job of `queue` has waited; None when none waits.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn longest_wait(&self, queue: &Queue) -> Result<Option<Duration>, JobError> {
        let since = self.0.readers.read(|connection| read::first_waiting(connection, queue))?;
        let now = self.0.shared.timeline.now_ms();
        Ok(since.map(|since| Duration::from_millis(u64::try_from(now - since).unwrap_or(0))))
    }

    /// Hands out the jobs that have waited longest in `queue`; none when none waits. What nobody waits for any
    /// more when it was taken is given back at once.
    ///
    /// # Errors
    /// When the database cannot be written, as for every method that writes.
    pub async fn take(&self, taker: Taker, queue: Queue, most: usize) -> Result<Vec<Lease>, JobError> {
        if self.waiting(&queue).0 == 0 {
            return Ok(Vec::new());
        }
        let (worker, sender) = (taker.worker.clone(), self.requests().clone());
        let give_back = move |leases: Vec<Lease>| {
            for lease in leases {
                let worker = worker.clone();
                let loss = Loss {
                    reason: "the worker did not wait for it".to_string(),
                    log_tail: String::new(),
                    counts: false,
                };
                let work = move |tx: &mut Tx<'_>| tx.lose(&lease.id, &worker, &loss);
                let (request, _) = pending(PLAIN, work, |_| ());
                // A closed channel means that the gateway ends; then the next start does it.
                let _ = sender.as_ref().map(|sender| sender.send(request));
            }
        };
        let work = move |tx: &mut Tx<'_>| tx.take(&taker, &queue, limit(most));
        let (request, reply) = pending(PLAIN, work, give_back);
        self.send(request, reply).await
    }

    /// In memory only: `worker` is alive and busy with these jobs.
    pub fn beat(&self, worker: &str, jobs: &[String]) {
        let lease_until = self.0.shared.timeline.awake() + self.0.shared.options.lease;
        self.memory().beat(worker, jobs, lease_until);
        kill_point("K7");
    }

    /// Ends the job with an outcome. It counts where `worker` runs the job, or where the job waits after the
    /// loss of a worker, which left this outcome behind. False: refused, since the job is another's, final or
    /// unknown.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn finish(&self, id: &str, worker: &str, outcome: Outcome) -> Result<bool, JobError> {
        let (id, worker) = (id.to_string(), worker.to_string());
        self.write(["K8", "K9"], move |tx| tx.finish(&id, &worker, &outcome)).await
    }

    /// Keeps a part of the output until it is asked for. False: refused, since `worker` does not run the job.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn push_chunk(&self, id: &str, worker: &str, output: String) -> Result<bool, JobError> {
        let (id, worker) = (id.to_string(), worker.to_string());
        self.write(PLAIN, move |tx| tx.push_chunk(&id, &worker, &output)).await
    }

    /// The parts that came since the last call, which are forgotten by it.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn drain_chunks(&self, id: &str) -> Result<Vec<String>, JobError> {
        if !self.0.readers.read(|connection| read::has_chunks(connection, id))? {
            return Ok(Vec::new());
        }
        let id = id.to_string();
        self.write(PLAIN, move |tx| tx.drain_chunks(&id)).await
    }

    /// The attempt of `id` by `worker` is over. The job waits again at its old place, or has `FAILED` with
    /// `WORKER_LOST` after its last attempt: the new status, or None when it was not that worker's.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn lose(&self, id: &str, worker: &str, loss: Loss) -> Result<Option<JobStatus>, JobError> {
        let (id, worker) = (id.to_string(), worker.to_string());
        self.write(PLAIN, move |tx| tx.lose(&id, &worker, &loss)).await
    }

    /// Every job that `worker` runs.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn held_by(&self, worker: &str) -> Result<Vec<String>, JobError> {
        self.0.readers.read(|connection| read::held_by(connection, worker))
    }

    /// `CANCELLED` at once where it was not final. The record after; None when unknown.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn cancel(&self, id: &str) -> Result<Option<JobRecord>, JobError> {
        let id = id.to_string();
        self.write(PLAIN, move |tx| tx.cancel(&id)).await
    }

    /// A job that `FAILED` or `TIMED_OUT` waits again, behind all others: the same id and input, without its old
    /// output and webhook delivery, its attempts counted anew. None when unknown.
    ///
    /// # Errors
    /// `INVALID_INPUT` (`NOT_RETRYABLE`) where its status is another, or where it had keys of its sender's storage,
    /// which are erased; `QUEUE_FULL`.
    pub async fn retry(&self, id: &str) -> Result<Option<JobRecord>, JobError> {
        let id = id.to_string();
        self.write(PLAIN, move |tx| tx.retry(&id)).await
    }

    /// Cancels what waits under `endpoint` now; how many.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn purge(&self, endpoint: &str) -> Result<u64, JobError> {
        let last = self.write(PLAIN, |tx| tx.last_seq()).await?;
        let (mut all, mut after) = (0, 0);
        while after < last {
            let endpoint = endpoint.to_string();
            let (removed, end) =
                self.write(PLAIN, move |tx| tx.purge(&endpoint, (after, last), BATCH)).await?;
            (all, after) = (all + removed, end);
        }
        Ok(all)
    }

    /// The job `id` is forgotten after `ttl` from now.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn set_ttl(&self, id: &str, ttl: Duration) -> Result<(), JobError> {
        let id = id.to_string();
        self.write(PLAIN, move |tx| tx.set_ttl(&id, ttl)).await
    }

    /// Ends what has run too long, gives up workers that were silent too long, forgets what is old.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn sweep(&self) -> Result<Swept, JobError> {
        let mut swept = Swept::default();
        loop {
            let probes = !self.healthy();
            let part = self.write(["K11", ""], move |tx| tx.sweep(BATCH, KEEP_KEYS, probes)).await?;
            let is_full = part.forgotten.len() as i64 == BATCH;
            swept.timed_out.extend(part.timed_out);
            swept.lost.extend(part.lost);
            swept.forgotten.extend(part.forgotten);
            if !is_full {
                return Ok(swept);
            }
        }
    }

    /// The jobs of `endpoint` by where they are. What is finished is counted since the start, and what the
    /// database held then.
    pub fn counts(&self, endpoint: &str) -> JobCounts {
        self.memory().counts(endpoint)
    }

    /// Jobs that wait in `queue`: all, and those that may start a worker.
    pub fn waiting(&self, queue: &Queue) -> (u64, u64) {
        self.memory().waiting(queue)
    }

    /// Whether nothing but the end of a retention is to be expected: no job waits or runs, and the last write went
    /// well.
    pub fn at_rest(&self) -> bool {
        self.healthy() && self.memory().is_idle()
    }

    /// Webhooks that are due. Each is one as long as no try of it is recorded.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn due_deliveries(&self, most: usize) -> Result<Vec<Delivery>, JobError> {
        let now_ms = self.0.shared.timeline.now_ms();
        self.0.readers.read(|connection| read::due_deliveries(connection, now_ms, limit(most)))
    }

    /// The webhook of `id` was tried and is due again after `next_try`; None: delivered or given up.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn record_delivery(&self, id: &str, next_try: Option<Duration>) -> Result<(), JobError> {
        let id = id.to_string();
        self.write(PLAIN, move |tx| tx.record_delivery(&id, next_try)).await
    }

    /// The key of this hash, revoked or not.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn key_by_hash(&self, hash: &[u8; 32]) -> Result<Option<KeyRecord>, JobError> {
        self.0.readers.read(|connection| keys::by_hash(connection, hash))
    }

    /// Whether any client key exists that is not revoked.
    ///
    /// # Errors
    /// As [`job`](Self::job).
    pub fn has_client_keys(&self) -> Result<bool, JobError> {
        self.0.readers.read(keys::any_client_key)
    }

    /// Waits until everything asked for is on disk, then closes; what is asked later fails.
    pub async fn close(&self) {
        self.requests().take();
        self.0.readers.close();
        let mut ended = self.0.ended.clone();
        // Nothing is ever sent; the writer's end is the end of this channel.
        let _ = ended.changed().await;
    }

    async fn write<T: Send + 'static>(
        &self,
        kill_points: [&'static str; 2],
        work: impl FnMut(&mut Tx<'_>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, JobError> {
        let (request, reply) = pending(kill_points, work, |_| ());
        self.send(request, reply).await
    }

    async fn send<T>(
        &self,
        request: Box<dyn Request>,
        reply: oneshot::Receiver<Result<T, JobError>>,
    ) -> Result<T, JobError> {
        let sent = self.requests().as_ref().map(|sender| sender.send(request));
        let answer = if matches!(sent, Some(Ok(()))) { reply.await.ok() } else { None };
        answer.unwrap_or_else(|| {
            self.0.shared.healthy.store(false, Ordering::Relaxed);
            Err(closed())
        })
    }

    fn requests(&self) -> MutexGuard<'_, Option<Sender<Box<dyn Request>>>> {
        self.0.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.shared.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    /// Closes the database before the folder can be opened again.
    fn drop(&mut self) {
        self.requests.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.readers.close();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
            // A writer that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

fn pending<T: Send + 'static>(
    kill_points: [&'static str; 2],
    work: impl FnMut(&mut Tx<'_>) -> Result<T, Failure> + Send + 'static,
    unheard: impl FnOnce(T) + Send + 'static,
) -> (Box<dyn Request>, oneshot::Receiver<Result<T, JobError>>) {
    let (reply, receiver) = oneshot::channel();
    (Box::new(Pending { work, value: None, reply, unheard: Box::new(unheard), kill_points }), receiver)
}

/// A count as SQLite takes it.
fn limit(most: usize) -> i64 {
    i64::try_from(most).unwrap_or(i64::MAX)
}
