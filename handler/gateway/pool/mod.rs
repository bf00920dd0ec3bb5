//! The workers: those that this gateway starts and stops, and those that attach themselves.
//!
//! Nothing runs at rest. A job that waits starts a worker, up to the most that may run; a worker that was idle
//! for long enough is told to end. The end of a process is known from the system, and its jobs are given to the
//! next worker in the same moment.

mod breaker;
mod process;
mod roster;
mod visits;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;
use tokio::sync::{Notify, mpsc};

use self::process::{Launcher, Log, describe};
use self::roster::Roster;
use self::worker::{Origin, Phase, Worker};
use super::hub::Hub;
use super::store::{Loss, Queue, Store};
use crate::job::{Code, JobError};
use crate::runpod::protocol::WorkerCounts;

pub use self::process::Launch;
pub use self::visits::{Turn, Visitor};

/// Of a dead worker's log, so much is shown to the sender of its job.
const SHOWN_LOG_BYTES: usize = 4096;
/// Of the last line of a dead worker's log, so much is part of the reason that no worker starts.
const SHOWN_LINE_CHARS: usize = 300;
/// The file of the endpoints that are served by other workers than Talkie's, one on a line.
const FOREIGN_ENDPOINTS: &str = "foreign-endpoints";

/// How workers are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long an idle worker is kept.
    pub idle_timeout: Duration,
    /// Workers that are kept without work.
    pub min_workers: usize,
    /// Workers at most.
    pub max_workers: usize,
    /// How long a worker may take from its start to its first request.
    pub start_timeout: Duration,
    /// How long a worker may keep a job that it was told to stop.
    pub stop_grace: Duration,
    /// How long a worker may take to end when it is told to.
    pub drain_grace: Duration,
    /// The pause after two workers in a row have ended without finishing a job; it doubles from there.
    pub restart_pause: Duration,
    /// Between two signs of life of a worker that this gateway starts.
    pub ping_interval: Duration,
    /// How long an attached worker is remembered without a word from it.
    pub silence: Duration,
}

/// The workers; clones share them.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    store: Store,
    hub: Hub,
    launch: Launch,
    launcher: Launcher,
    roster: Mutex<Roster>,
    /// There is something to look at.
    bell: Arc<Notify>,
    /// A process has ended.
    gone: Notify,
    foreign_endpoints: PathBuf,
}

/// What a pool works with.
pub struct World {
    /// Where the jobs are.
    pub store: Store,
    /// Who waits for them.
    pub hub: Hub,
    /// Rung when a job may need a worker.
    pub bell: Arc<Notify>,
    /// The folder of everything that outlives the gateway.
    pub data_dir: PathBuf,
}

impl Pool {
    /// A pool that begins its work at once, on the runtime that this is called in.
    ///
    /// # Errors
    /// [`Code::Internal`] when the system allows no further thread, or the folder of the logs cannot be made.
    pub fn start(world: World, launch: Launch, settings: Settings) -> Result<Self, JobError> {
        let World { store, hub, bell, data_dir } = world;
        let internal = |e| JobError::new(Code::Internal, format!("workers cannot be started: {e}"));
        std::fs::create_dir_all(&launch.logs).map_err(internal)?;
        let launcher = Launcher::start(tokio::runtime::Handle::current()).map_err(internal)?;
        let foreign_endpoints = data_dir.join(FOREIGN_ENDPOINTS);
        let mut roster = Roster::new(settings);
        // There is no such file before the first of them.
        let known = std::fs::read_to_string(&foreign_endpoints).unwrap_or_default();
        roster.foreign = known.lines().map(str::to_string).collect();
        let (roster, gone) = (Mutex::new(roster), Notify::new());
        let inner = Inner { store, hub, launch, launcher, roster, bell, gone, foreign_endpoints };
        let pool = Self(Arc::new(inner));
        tokio::spawn(pool.clone().run());
        Ok(pool)
    }

    /// Whether `key` is the one that the spawned `worker` was given.
    pub fn knows(&self, worker: &str, key: &str) -> bool {
        match self.roster().workers.get(worker).map(|w| &w.origin) {
            Some(Origin::Spawned { key: own, .. }) => own.as_bytes().ct_eq(key.as_bytes()).into(),
            _ => false,
        }
    }

    /// Looks at the queue again: a job may need a worker.
    pub fn wake(&self) {
        self.0.bell.notify_one();
    }

    /// `job` ended under `worker` (by a cancel): tells it to stop, and replaces it if it does not.
    pub fn stop_job(&self, worker: &str, job: &str) {
        self.stop(worker, job, false);
    }

    /// `job` has run for too long under `worker`: as [`Self::stop_job`], and the worker ends with it.
    pub fn time_out(&self, worker: &str, job: &str) {
        self.stop(worker, job, true);
    }

    fn stop(&self, worker: &str, job: &str, and_end: bool) {
        let (mut roster, now) = (self.roster(), Instant::now());
        let settings = roster.settings.clone();
        if let Some(worker) = roster.workers.get_mut(worker) {
            worker.stop(job, now + settings.stop_grace);
            if and_end {
                worker.drain(&settings, now);
            }
        }
        drop(roster);
        self.0.hub.clear_progress(job);
        self.0.hub.wake_workers();
        self.wake();
    }

    /// `worker` was silent for so long that its jobs were given to others.
    pub fn silent(&self, worker: &str) {
        let mut roster = self.roster();
        if let Some(known) = roster.workers.get_mut(worker) {
            if known.is_spawned() {
                known.kill("it gave no sign of life".to_string());
            } else {
                roster.workers.remove(worker);
            }
        }
    }

    /// Workers by what they do.
    pub fn counts(&self, queue: &Queue) -> WorkerCounts {
        self.roster().counts(queue)
    }

    /// Whose workers take the jobs of `endpoint`.
    pub fn queue_of(&self, endpoint: &str) -> Queue {
        match self.roster().foreign.contains(endpoint) {
            true => Queue::Endpoint(endpoint.to_string()),
            false => Queue::Talkie,
        }
    }

    /// Why a waiting job waits, where that is not plain: `3 workers in a row have ended …; next start in 40 s`.
    pub fn trouble(&self) -> Option<String> {
        self.roster().breaker.trouble(Instant::now())
    }

    /// How many workers in a row have ended without finishing a job.
    pub fn failures(&self) -> u32 {
        self.roster().breaker.failures()
    }

    /// Drains and stops every worker that this gateway started. None is started afterwards.
    pub async fn shutdown(&self) {
        let now = Instant::now();
        {
            let mut roster = self.roster();
            roster.closing = true;
            let settings = roster.settings.clone();
            for worker in roster.workers.values_mut() {
                worker.drain(&settings, now);
            }
        }
        self.0.hub.wake_workers();
        self.wake();
        loop {
            let gone = self.0.gone.notified();
            tokio::pin!(gone);
            gone.as_mut().enable();
            if !self.roster().workers.values().any(Worker::is_spawned) {
                return;
            }
            gone.await;
        }
    }

    /// Looks at workers and queue whenever something has happened or is due.
    async fn run(self) {
        loop {
            let (_, starting) = self.0.store.waiting(&Queue::Talkie);
            let plan = self.roster().plan(usize::try_from(starting).unwrap_or(usize::MAX), Instant::now());
            // A worker that was told to end is waiting for a job that it will not get.
            self.0.hub.wake_workers();
            for _ in 0..plan.start {
                self.start_worker();
            }
            let due = async {
                match plan.next {
                    Some(next) => tokio::time::sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.0.bell.notified() => {}
                () = due => {}
            }
        }
    }

    /// Puts a worker on the roster, so that it is counted and known, and starts its process.
    fn start_worker(&self) {
        let (id, key) = (format!("w-{}", hex::encode(rand::random::<[u8; 6]>())), random_key());
        let (sender, signals) = mpsc::unbounded_channel();
        let command = {
            let mut roster = self.roster();
            let slot = roster.free_slot();
            let command = self.0.launch.command(&id, &key, slot, roster.settings.ping_interval);
            let origin = Origin::Spawned { key, slot, signals: sender };
            roster.workers.insert(id.clone(), Worker::spawned(origin, Instant::now()));
            command
        };
        let log = Log::new(&self.0.launch.logs, &id);
        let pool = self.clone();
        tokio::spawn(async move {
            let how = match pool.0.launcher.spawn(command, log.clone()).await {
                Ok(process) => {
                    tracing::info!(worker = id, "the worker was started");
                    describe(&process.ended(signals).await)
                }
                Err(e) => format!("could not be started: {e}"),
            };
            pool.ended(&id, &how, &log).await;
        });
    }

    /// The process of `worker` is no more: so is what it was doing.
    async fn ended(&self, worker: &str, how: &str, log: &Log) {
        // First of all it gets no further job; one that it is being given right now goes back.
        let Some(known) = self.roster().workers.remove(worker) else { return };
        let draining = matches!(known.phase, Phase::Draining(_));
        let reason = match &known.killed {
            Some(why) => format!("worker {worker} was killed: {why}"),
            None => format!("worker {worker} {how}"),
        };
        // A worker that was told to end, or was killed for a job that it did not let go, says nothing about the next.
        let was_told = draining || (known.killed.is_some() && known.phase == Phase::Ready);
        let tail = log.tail(SHOWN_LOG_BYTES);
        if draining && known.killed.is_none() {
            tracing::info!(worker, "the {reason}");
        } else {
            tracing::warn!(worker, "the {reason}; it had printed: {tail}");
        }
        if !was_told {
            let line: String = last_line(&tail).chars().take(SHOWN_LINE_CHARS).collect();
            let said = if line.is_empty() { reason.clone() } else { format!("{reason}: {line}") };
            self.roster().breaker.failure(said, Instant::now());
        }
        for job in known.jobs.keys() {
            self.0.hub.clear_progress(job);
        }
        // A worker that was told to end and could not finish in time has done nothing wrong.
        let counts = !draining || known.killed.is_some();
        self.lose_all(worker, &Loss { reason: format!("the {reason}"), log_tail: tail, counts }).await;
        self.0.gone.notify_waiters();
        self.wake();
    }

    /// Every job that the store has under `worker` is over there.
    async fn lose_all(&self, worker: &str, loss: &Loss) {
        let held = match self.0.store.held_by(worker) {
            Ok(held) => held,
            Err(e) => {
                tracing::error!(worker, "its jobs wait for the end of their leases: {e}");
                return;
            }
        };
        for job in held {
            self.lose(worker, &job, loss.clone()).await;
        }
    }

    /// `worker` does not have `job` any more, and there is no result. What cannot be written now is found by the
    /// end of the lease.
    async fn lose(&self, worker: &str, job: &str, loss: Loss) {
        if let Err(e) = self.try_lose(worker, job, loss).await {
            tracing::error!(worker, job, "job {job} waits for the end of its lease: {e}");
        }
    }

    async fn try_lose(&self, worker: &str, job: &str, loss: Loss) -> Result<(), JobError> {
        let reason = loss.reason.clone();
        if let Some(status) = self.0.store.lose(job, worker, loss).await? {
            self.0.hub.clear_progress(job);
            tracing::warn!(worker, job, "job {job} is {}: {reason}", status.as_str());
        }
        Ok(())
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.0.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn random_key() -> String {
    hex::encode(rand::random::<[u8; 24]>())
}

fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim()
}

/// Adds `endpoint` to the file at `path`.
fn remember(path: &Path, endpoint: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::options().create(true).append(true).open(path)?;
    writeln!(file, "{endpoint}")
}
