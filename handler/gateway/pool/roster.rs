//! Who works here, what each worker does, and what is to be done about it. Bookkeeping alone: no process, no
//! store, and the time is given.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use super::Settings;
use super::breaker::Breaker;
use super::worker::{Origin, Phase, Worker};
use crate::gateway::store::Queue;
use crate::runpod::protocol::WorkerCounts;

/// What the next look at the workers comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Workers to start now.
    pub(super) start: usize,
    /// When to look again if nothing happens before.
    pub(super) next: Option<Instant>,
}

/// All workers.
#[derive(Debug)]
pub(super) struct Roster {
    pub(super) settings: Settings,
    pub(super) workers: HashMap<String, Worker>,
    /// Endpoints whose jobs are for workers that are not Talkie's.
    pub(super) foreign: HashSet<String>,
    pub(super) breaker: Breaker,
    /// The gateway is about to end: nothing is started any more.
    pub(super) closing: bool,
}

impl Roster {
    pub(super) fn new(settings: Settings) -> Self {
        let breaker = Breaker::new(settings.restart_pause);
        Self { settings, workers: HashMap::new(), foreign: HashSet::new(), breaker, closing: false }
    }

    /// Ends what is overdue, drains what is idle, and says how many workers to start for `waiting` jobs.
    pub(super) fn plan(&mut self, waiting: usize, now: Instant) -> Plan {
        self.end_overdue(now);
        let mut next = self.drain_idle(waiting, now);
        let mut start = self.missing(waiting);
        if let Some(until) = self.breaker.closed_until(now).filter(|_| start > 0) {
            start = 0;
            next = earlier(next, Some(until));
        }
        let deadlines = self.workers.values().filter_map(|worker| worker.deadline(&self.settings));
        Plan { start, next: earlier(next, deadlines.min()) }
    }

    fn end_overdue(&mut self, now: Instant) {
        let settings = &self.settings;
        self.workers
            .retain(|_, worker| worker.is_spawned() || now < worker.seen + settings.silence || worker.taking);
        for worker in self.workers.values_mut().filter(|worker| worker.is_spawned()) {
            if let Some(job) = worker.overdue_stop(now) {
                let reason = format!("it did not let go of job {job} when told to");
                worker.kill(reason);
                continue;
            }
            match worker.phase {
                Phase::Initializing if now >= worker.since + settings.start_timeout => {
                    let seconds = settings.start_timeout.as_secs();
                    worker.kill(format!("it did not ask for a job in {seconds} s"));
                }
                Phase::Draining(until) if now >= until => {
                    worker.kill("it did not end when told to".to_string());
                }
                Phase::Unhealthy(until) if now >= until => {
                    worker.kill("it has reported that it cannot work".to_string());
                }
                _ => {}
            }
        }
    }

    /// Drains workers that were idle for long enough, down to those that are always kept. When the next is
    /// due.
    fn drain_idle(&mut self, waiting: usize, now: Instant) -> Option<Instant> {
        let free = self.workers.values().filter(|w| w.is_spawned() && w.will_take()).count();
        let spare = self.lasting().saturating_sub(self.settings.min_workers);
        let spare = spare.min(free.saturating_sub(waiting));
        let is_idle = |w: &&mut Worker| w.is_spawned() && w.phase == Phase::Ready && w.is_free();
        let mut idle: Vec<_> = self.workers.values_mut().filter(is_idle).collect();
        idle.sort_by_key(|worker| worker.since);
        let mut next = None;
        for worker in idle.into_iter().take(spare) {
            let due = worker.since + self.settings.idle_timeout;
            if due <= now {
                worker.drain(&self.settings, now);
            } else {
                next = earlier(next, Some(due));
            }
        }
        next
    }

    /// Workers to start: one for each waiting job that no free worker is there for, and as many as are always
    /// kept; but never more processes than may be, those that are about to end included.
    fn missing(&self, waiting: usize) -> usize {
        if self.closing {
            return 0;
        }
        let talkie = |worker: &&Worker| worker.queue == Queue::Talkie;
        let free = self.workers.values().filter(talkie).filter(|worker| worker.will_take()).count();
        let spawned = self.workers.values().filter(|worker| worker.is_spawned()).count();
        let wanted =
            waiting.saturating_sub(free).max(self.settings.min_workers.saturating_sub(self.lasting()));
        wanted.min(self.settings.max_workers.saturating_sub(spawned))
    }

    /// Workers of ours that are not about to end.
    fn lasting(&self) -> usize {
        let lasts = |w: &&Worker| w.is_spawned() && matches!(w.phase, Phase::Initializing | Phase::Ready);
        self.workers.values().filter(lasts).count()
    }

    /// The least GPU that no worker has.
    pub(super) fn free_slot(&self) -> usize {
        let taken: HashSet<usize> = self
            .workers
            .values()
            .filter_map(|worker| match worker.origin {
                Origin::Spawned { slot, .. } => Some(slot),
                Origin::Attached => None,
            })
            .collect();
        (0..).find(|slot| !taken.contains(slot)).unwrap_or_default()
    }

    pub(super) fn counts(&self, queue: &Queue) -> WorkerCounts {
        let mut counts = WorkerCounts::default();
        for worker in self.workers.values().filter(|worker| worker.queue == *queue) {
            match worker.phase {
                Phase::Unhealthy(_) => counts.unhealthy += 1,
                _ if !worker.jobs.is_empty() => counts.running += 1,
                Phase::Initializing => counts.initializing += 1,
                Phase::Ready => {
                    counts.idle += 1;
                    counts.ready += 1;
                }
                Phase::Draining(_) => {}
            }
        }
        counts
    }
}

fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    [a, b].into_iter().flatten().min()
}

#[cfg(test)]
#[path = "roster_tests.rs"]
mod tests;
