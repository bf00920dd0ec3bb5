//! What the store knows without asking the database: how many jobs are where, who waits in which order, and
//! until when a running job's worker may be silent. It follows the database after each commit, and is counted
//! anew at each start.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::model::Queue;
use crate::job::JobStatus;
use crate::runpod::protocol::JobCounts;

/// A job, as far as counting needs it.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) seq: i64,
    pub(super) id: String,
    pub(super) endpoint: String,
    pub(super) queue: Queue,
    pub(super) low_priority: bool,
}

/// A transition that was written.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) job: Subject,
    pub(super) from: Option<JobStatus>,
    /// None: the job is no more.
    pub(super) to: Option<JobStatus>,
    /// Of a job that runs from now on.
    pub(super) held: Option<Held>,
}

/// A running job's worker, and when its time is up; on the clock that only runs while the machine is awake.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) worker: String,
    /// Whether an attempt came before.
    pub(super) again: bool,
    pub(super) lease_until: Duration,
    pub(super) deadline: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Memory {
    counts: HashMap<String, JobCounts>,
    queues: HashMap<Queue, Waiting>,
    running: HashMap<String, Held>,
}

/// Who waits, in order. Jobs leave at the front and come at the end, except for the few that are cancelled or
/// given back.
#[derive(Debug, Default)]
struct Waiting {
    seqs: VecDeque<i64>,
    low_priority: u64,
}

impl Memory {
    /// Follows transitions in the order in which they were written.
    pub(super) fn apply(&mut self, changes: &[Change]) {
        let mut rest = changes;
        while let Some(first) = rest.first() {
            // A purge takes out thousands at once, which one by one would move the queue thousands of times.
            let leaves = |change: &Change| {
                change.from == Some(JobStatus::InQueue) && change.job.queue == first.job.queue
            };
            let run = rest.iter().take_while(|change| leaves(change)).count();
            if run > 1 {
                self.leave(&rest[..run]);
            }
            for change in &rest[..run.max(1)] {
                self.follow(change, run > 1);
            }
            rest = &rest[run.max(1)..];
        }
    }

    fn leave(&mut self, changes: &[Change]) {
        let mut left: Vec<i64> = changes.iter().map(|change| change.job.seq).collect();
        left.sort_unstable();
        let waiting = self.queues.entry(changes[0].job.queue.clone()).or_default();
        waiting.seqs.retain(|seq| left.binary_search(seq).is_err());
    }

    fn follow(&mut self, change: &Change, has_left: bool) {
        let Change { job, from, to, held } = change;
        let counts = self.counts.entry(job.endpoint.clone()).or_default();
        match from {
            Some(JobStatus::InQueue) => {
                counts.in_queue -= 1;
                let waiting = self.queues.entry(job.queue.clone()).or_default();
                waiting.low_priority -= u64::from(job.low_priority);
                if let (false, Ok(place)) = (has_left, waiting.seqs.binary_search(&job.seq)) {
                    waiting.seqs.remove(place);
                }
            }
            Some(JobStatus::InProgress) => {
                counts.in_progress -= 1;
                self.running.remove(&job.id);
            }
            _ => {}
        }
        match to {
            Some(JobStatus::InQueue) => {
                counts.in_queue += 1;
                let waiting = self.queues.entry(job.queue.clone()).or_default();
                waiting.low_priority += u64::from(job.low_priority);
                if let Err(place) = waiting.seqs.binary_search(&job.seq) {
                    waiting.seqs.insert(place, job.seq);
                }
            }
            Some(JobStatus::InProgress) => {
                counts.in_progress += 1;
                if let Some(held) = held {
                    counts.retried += u64::from(held.again);
                    self.running.insert(job.id.clone(), held.clone());
                }
            }
            Some(JobStatus::Completed) => counts.completed += 1,
            Some(JobStatus::Failed | JobStatus::TimedOut) => counts.failed += 1,
            Some(JobStatus::Cancelled) | None => {}
        }
    }

    /// Adds a job that the database holds: its end, and its attempts after the first.
    pub(super) fn add_history(&mut self, endpoint: &str, status: JobStatus, retries: u32) {
        if !self.counts.contains_key(endpoint) {
            self.counts.insert(endpoint.to_string(), JobCounts::default());
        }
        let Some(counts) = self.counts.get_mut(endpoint) else { return };
        counts.retried += u64::from(retries);
        match status {
            JobStatus::Completed => counts.completed += 1,
            JobStatus::Failed | JobStatus::TimedOut => counts.failed += 1,
            JobStatus::InQueue | JobStatus::InProgress | JobStatus::Cancelled => {}
        }
    }

    pub(super) fn counts(&self, endpoint: &str) -> JobCounts {
        self.counts.get(endpoint).copied().unwrap_or_default()
    }

    /// All that wait in `queue`, and those of them that may start a worker.
    pub(super) fn waiting(&self, queue: &Queue) -> (u64, u64) {
        self.queues.get(queue).map_or((0, 0), |waiting| {
            let all = waiting.seqs.len() as u64;
            (all, all - waiting.low_priority)
        })
    }

    /// All that wait.
    pub(super) fn queued(&self) -> u64 {
        self.queues.values().map(|waiting| waiting.seqs.len() as u64).sum()
    }

    /// Whether no job waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.queued() == 0 && self.running.is_empty()
    }

    /// How many wait before the job with `seq`; None when it does not wait.
    pub(super) fn position(&self, queue: &Queue, seq: i64) -> Option<u64> {
        self.queues.get(queue)?.seqs.binary_search(&seq).ok().map(|place| place as u64)
    }

    /// Extends the leases of those of `jobs` that `worker` holds.
    pub(super) fn beat(&mut self, worker: &str, jobs: &[String], lease_until: Duration) {
        for job in jobs {
            if let Some(held) = self.running.get_mut(job).filter(|held| held.worker == worker) {
                held.lease_until = held.lease_until.max(lease_until);
            }
        }
    }

    /// The running jobs whose time, or whose worker's time, is up at `now`.
    pub(super) fn overdue(&self, now: Duration) -> Vec<(String, Held)> {
        let is_due = |held: &Held| held.deadline <= now || held.lease_until <= now;
        let due = self.running.iter().filter(|(_, held)| is_due(held));
        due.map(|(id, held)| (id.clone(), held.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(seq: i64, from: Option<JobStatus>, to: Option<JobStatus>) -> Change {
        let (id, endpoint) = (format!("j{seq}"), "e".to_string());
        let job = Subject { seq, id, endpoint, queue: Queue::Talkie, low_priority: seq % 2 == 0 };
        Change { job, from, to, held: None }
    }

    #[test]
    fn positions_follow_many_who_leave_at_once() {
        let mut memory = Memory::default();
        let queued = Some(JobStatus::InQueue);
        memory.apply(&(1..=10).map(|seq| change(seq, None, queued)).collect::<Vec<_>>());
        assert_eq!(memory.waiting(&Queue::Talkie), (10, 5));
        let cancelled = Some(JobStatus::Cancelled);
        memory.apply(&[1, 4, 3, 8].map(|seq| change(seq, queued, cancelled)));
        memory.apply(&[change(5, queued, cancelled), change(1, cancelled, queued)]);
        assert_eq!(memory.waiting(&Queue::Talkie), (6, 3));
        let positions = [1, 2, 6, 7, 9, 10].map(|seq| memory.position(&Queue::Talkie, seq));
        assert_eq!(positions, [0, 1, 2, 3, 4, 5].map(Some));
        assert_eq!(memory.position(&Queue::Talkie, 4), None);
        assert_eq!(memory.counts("e").in_queue, 6);
    }
}
