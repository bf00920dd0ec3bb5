//! One worker: what it is, and which jobs it has in hand.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::Settings;
use crate::gateway::store::Queue;

/// How long the news that a job is to be stopped stays with a worker that was told, before it is told again.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// Pings in a row that leave out a job before that job counts as let go: the first may have crossed the job.
const MISSED_PINGS: u32 = 2;

/// What a process is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// SIGTERM: finish and end.
    End,
    /// SIGKILL, to the whole process group.
    Kill,
}

/// Where a worker comes from.
#[derive(Debug)]
pub(super) enum Origin {
    /// This gateway started it.
    Spawned {
        /// Opens the worker routes, for this worker alone.
        key: String,
        /// Which of the machine's GPUs it has, counted from 0.
        slot: usize,
        /// To the task that watches the process.
        signals: UnboundedSender<Signal>,
    },
    /// It came by itself.
    Attached,
}

/// Where a worker is in its life. Whether it is idle or running is seen by its jobs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Started, and not heard of yet.
    Initializing,
    /// Takes jobs.
    Ready,
    /// Takes no further job; a spawned one is to end by then.
    Draining(Instant),
    /// Has reported that it cannot work; a spawned one is to end by then.
    Unhealthy(Instant),
}

/// A job that a worker has in hand.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Its result is being written to the store, so that progress comes too late.
    pub(super) finished: bool,
    /// It was cancelled or has timed out.
    stop: Option<Stop>,
    pinged: bool,
    missed_pings: u32,
}

#[derive(Debug)]
struct Stop {
    /// When a worker that still has the job is killed.
    until: Instant,
    told: Option<Instant>,
}

/// A worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) origin: Origin,
    pub(super) queue: Queue,
    pub(super) phase: Phase,
    pub(super) jobs: HashMap<String, Held>,
    /// A job is being looked for on its behalf right now.
    pub(super) taking: bool,
    /// The newest of its open polls; the older ones are void.
    pub(super) poll: u64,
    /// When it was started, or had nothing in hand any more.
    pub(super) since: Instant,
    /// When it was last heard.
    pub(super) seen: Instant,
    /// Why it was killed.
    pub(super) killed: Option<String>,
}

impl Worker {
    pub(super) fn spawned(origin: Origin, now: Instant) -> Self {
        Self::new(origin, Queue::Talkie, Phase::Initializing, now)
    }

    pub(super) fn attached(queue: Queue, now: Instant) -> Self {
        Self::new(Origin::Attached, queue, Phase::Ready, now)
    }

    fn new(origin: Origin, queue: Queue, phase: Phase, now: Instant) -> Self {
        Self {
            origin,
            queue,
            phase,
            jobs: HashMap::new(),
            taking: false,
            poll: 0,
            since: now,
            seen: now,
            killed: None,
        }
    }

    pub(super) fn is_spawned(&self) -> bool {
        matches!(self.origin, Origin::Spawned { .. })
    }

    /// Whether it has nothing in hand.
    pub(super) fn is_free(&self) -> bool {
        self.jobs.is_empty() && !self.taking
    }

    /// Whether a job that waits can count on it.
    pub(super) fn will_take(&self) -> bool {
        matches!(self.phase, Phase::Initializing | Phase::Ready) && self.jobs.is_empty()
    }

    /// Gives it `jobs`.
    pub(super) fn hold(&mut self, jobs: impl IntoIterator<Item = String>) {
        for job in jobs {
            self.jobs.entry(job).or_default();
        }
    }

    /// It has `job` no more.
    pub(super) fn let_go(&mut self, job: &str, now: Instant) {
        if self.jobs.remove(job).is_some() && self.jobs.is_empty() {
            self.since = now;
        }
    }

    /// `job` has ended without it.
    pub(super) fn stop(&mut self, job: &str, until: Instant) {
        if let Some(held) = self.jobs.get_mut(job) {
            held.stop.get_or_insert(Stop { until, told: None });
        }
    }

    /// Whether progress of `job` still counts.
    pub(super) fn works_on(&self, job: &str) -> bool {
        self.jobs.get(job).is_some_and(|held| !held.finished && held.stop.is_none())
    }

    /// The jobs that it has to be told to stop, which counts as told.
    pub(super) fn stops(&mut self, now: Instant) -> Vec<String> {
        let due = |stop: &Stop| stop.told.is_none_or(|told| now >= told + TELL_AGAIN);
        let mut jobs: Vec<String> = Vec::new();
        for (job, held) in &mut self.jobs {
            if let Some(stop) = held.stop.as_mut().filter(|stop| due(stop)) {
                stop.told = Some(now);
                jobs.push(job.clone());
            }
        }
        jobs.sort_unstable();
        jobs
    }

    /// It says that it is busy with `jobs`. Those that it has had, and leaves out for the second time, are
    /// returned: it has lost them.
    pub(super) fn pinged(&mut self, jobs: &[String]) -> Vec<String> {
        let mut lost = Vec::new();
        for (job, held) in &mut self.jobs {
            if jobs.contains(job) {
                (held.pinged, held.missed_pings) = (true, 0);
            } else if held.pinged && !held.finished {
                held.missed_pings += 1;
                if held.missed_pings >= MISSED_PINGS {
                    lost.push(job.clone());
                }
            }
        }
        lost
    }

    /// It was told to stop a job and kept it for too long.
    pub(super) fn overdue_stop(&self, now: Instant) -> Option<&str> {
        let late = |held: &Held| held.stop.as_ref().is_some_and(|stop| stop.until <= now);
        self.jobs.iter().find(|(_, held)| late(held)).map(|(job, _)| job.as_str())
    }

    /// Tells its process, where it is ours.
    pub(super) fn signal(&self, signal: Signal) {
        if let Origin::Spawned { signals, .. } = &self.origin {
            // Nobody listens once the process has ended.
            let _ = signals.send(signal);
        }
    }

    /// It takes no further job, and ends.
    pub(super) fn drain(&mut self, settings: &Settings, now: Instant) {
        if matches!(self.phase, Phase::Initializing | Phase::Ready) {
            self.phase = Phase::Draining(now + settings.drain_grace);
            self.signal(Signal::End);
        }
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self, reason: String) {
        if self.killed.is_none() {
            self.killed = Some(reason);
            self.signal(Signal::Kill);
        }
    }

    /// When it is killed or forgotten unless something happens before.
    pub(super) fn deadline(&self, settings: &Settings) -> Option<Instant> {
        if !self.is_spawned() {
            return Some(self.seen + settings.silence);
        }
        let phase = match self.phase {
            Phase::Initializing => Some(self.since + settings.start_timeout),
            Phase::Draining(until) | Phase::Unhealthy(until) => Some(until),
            Phase::Ready => None,
        };
        let stops = self.jobs.values().filter_map(|held| held.stop.as_ref()).map(|stop| stop.until);
        stops.chain(phase).min().filter(|_| self.killed.is_none())
    }
}
