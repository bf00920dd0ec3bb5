//! Workers that call: what each is told, and what its words say about the jobs that it has.

use std::time::Instant;

use tokio::time::sleep_until;

use super::worker::{Phase, Worker};
use super::{Pool, remember};
use crate::faults::kill_point;
use crate::gateway::store::{Lease, Loss, Outcome, Queue, Taker};
use crate::job::{JobError, JobStatus};

/// A worker that calls; its key was found good.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// Its id.
    pub worker: String,
    /// The endpoint in its URLs.
    pub endpoint: String,
    /// Whether it is one of Talkie's own, wherever it runs.
    pub talkie: bool,
}

/// What a worker that waited is told.
#[derive(Debug)]
pub enum Turn<T> {
    /// This.
    Given(T),
    /// There is nothing; it may ask again.
    Nothing,
    /// It should ask later, and will hardly be given anything.
    Later,
}

/// A worker's request for jobs.
#[derive(Clone, Debug)]
struct Poll {
    worker: String,
    number: u64,
    queue: Queue,
    spawned: bool,
}

impl Pool {
    /// Jobs for `visitor`, at most `most`, as soon as there are any until `until`. `idle` says that it has none
    /// in hand, so that those which it was given before are over.
    pub async fn take(
        &self,
        visitor: &Visitor,
        most: usize,
        idle: bool,
        until: Instant,
    ) -> Result<Turn<Vec<Lease>>, JobError> {
        let Some(poll) = self.receive(visitor) else { return Ok(Turn::Later) };
        if idle {
            self.nothing_in_hand(&poll.worker).await;
        }
        loop {
            let woken = self.0.hub.workers_woken();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if !self.may_wait(&poll) {
                return Ok(Turn::Nothing);
            }
            if self.0.store.waiting(&poll.queue).0 > 0 {
                let jobs = self.take_now(&poll, most).await?;
                if !jobs.is_empty() {
                    return Ok(Turn::Given(jobs));
                }
            }
            tokio::select! {
                () = woken => {}
                () = sleep_until(until.into()) => return Ok(Turn::Nothing),
            }
        }
    }

    /// The jobs that `visitor` is to stop, as soon as there are any until `until`.
    pub async fn stops(&self, visitor: &Visitor, until: Instant) -> Turn<Vec<String>> {
        let ends = |worker: &Worker| matches!(worker.phase, Phase::Draining(_)) && worker.jobs.is_empty();
        if self.roster().closing || self.roster().workers.get(&visitor.worker).is_some_and(ends) {
            return Turn::Later;
        }
        loop {
            let woken = self.0.hub.workers_woken();
            tokio::pin!(woken);
            woken.as_mut().enable();
            {
                let (mut roster, now) = (self.roster(), Instant::now());
                // A worker may ask for stops before it asks for jobs.
                if let Some(worker) = roster.workers.get_mut(&visitor.worker) {
                    worker.seen = now;
                    let jobs = worker.stops(now);
                    if !jobs.is_empty() {
                        return Turn::Given(jobs);
                    }
                    if ends(worker) {
                        return Turn::Nothing;
                    }
                }
            }
            tokio::select! {
                () = woken => {}
                () = sleep_until(until.into()) => return Turn::Nothing,
            }
        }
    }

    /// `visitor` lives, and is busy with `jobs`.
    pub async fn pinged(&self, visitor: &Visitor, jobs: &[String]) {
        let worker = visitor.worker.as_str();
        self.0.store.beat(worker, jobs);
        let lost = {
            let (mut roster, now) = (self.roster(), Instant::now());
            if !jobs.is_empty() {
                self.attach(&mut roster, visitor, now);
            }
            let Some(known) = roster.workers.get_mut(worker) else { return };
            known.seen = now;
            known.pinged(jobs)
        };
        for job in lost {
            self.let_go(worker, &job);
            self.lose(worker, &job, no_result(worker)).await;
        }
        self.recognise(worker, jobs);
    }

    /// Jobs that `worker` names and that it was not given by this process are its own from before a restart, or
    /// somebody else's by now.
    fn recognise(&self, worker: &str, jobs: &[String]) {
        for job in jobs {
            if self.roster().workers.get(worker).is_none_or(|known| known.jobs.contains_key(job)) {
                continue;
            }
            let is_own = self.is_own(worker, job);
            let (mut roster, now) = (self.roster(), Instant::now());
            let until = now + roster.settings.stop_grace;
            let Some(known) = roster.workers.get_mut(worker) else { return };
            known.hold([job.clone()]);
            if !is_own {
                known.stop(job, until);
                drop(roster);
                self.0.hub.wake_workers();
            }
        }
    }

    /// Whether `job` runs under `worker`. What cannot be looked up does.
    fn is_own(&self, worker: &str, job: &str) -> bool {
        self.0.store.job(job).map_or(true, |record| {
            record.is_some_and(|record| {
                record.status == JobStatus::InProgress && record.worker.as_deref() == Some(worker)
            })
        })
    }

    /// `visitor` has found that it cannot work.
    pub fn unhealthy(&self, visitor: &Visitor, reason: &str) {
        tracing::warn!(worker = visitor.worker, "worker {} cannot work: {reason}", visitor.worker);
        let (mut roster, now) = (self.roster(), Instant::now());
        let until = now + roster.settings.drain_grace;
        if let Some(worker) = roster.workers.get_mut(&visitor.worker) {
            worker.phase = Phase::Unhealthy(until);
        }
        drop(roster);
        self.wake();
    }

    /// Whether progress of `job` by `worker` still counts; `show` is called if so, before any later end of the job
    /// can be seen.
    pub fn progressed(&self, worker: &str, job: &str, show: impl FnOnce()) {
        let roster = self.roster();
        if roster.workers.get(worker).is_some_and(|known| known.works_on(job)) {
            show();
        }
    }

    /// `worker` has ended `job`; with `stop` it asks to be replaced. Whether the outcome counts.
    pub async fn finish(
        &self,
        worker: &str,
        job: &str,
        outcome: Outcome,
        stop: bool,
    ) -> Result<bool, JobError> {
        self.mark_finished(worker, job, true);
        let counts = match self.0.store.finish(job, worker, outcome).await {
            Ok(counts) => counts,
            Err(e) => {
                // It will be sent again.
                self.mark_finished(worker, job, false);
                return Err(e);
            }
        };
        let (mut roster, now) = (self.roster(), Instant::now());
        let settings = roster.settings.clone();
        if let Some(known) = roster.workers.get_mut(worker) {
            known.let_go(job, now);
            known.seen = now;
            if stop {
                known.drain(&settings, now);
            }
            if counts && known.is_spawned() {
                roster.breaker.success();
            }
        }
        drop(roster);
        self.0.hub.clear_progress(job);
        self.wake();
        Ok(counts)
    }

    /// `worker` gives `job` back, which was not at fault.
    pub async fn give_back(&self, worker: &str, job: &str, loss: Loss) -> Result<(), JobError> {
        self.try_lose(worker, job, loss).await?;
        self.let_go(worker, job);
        Ok(())
    }

    fn mark_finished(&self, worker: &str, job: &str, finished: bool) {
        if let Some(held) = self.roster().workers.get_mut(worker).and_then(|known| known.jobs.get_mut(job)) {
            held.finished = finished;
        }
    }

    /// Notes that `visitor` asks for jobs. None when it had better ask later.
    fn receive(&self, visitor: &Visitor) -> Option<Poll> {
        let (mut roster, now) = (self.roster(), Instant::now());
        if roster.closing {
            return None;
        }
        self.attach(&mut roster, visitor, now);
        let worker = roster.workers.get_mut(&visitor.worker)?;
        if matches!(worker.phase, Phase::Draining(_) | Phase::Unhealthy(_)) {
            return None;
        }
        if worker.phase == Phase::Initializing {
            worker.phase = Phase::Ready;
            worker.since = now;
        }
        worker.seen = now;
        worker.poll += 1;
        let poll = Poll {
            worker: visitor.worker.clone(),
            number: worker.poll,
            queue: worker.queue.clone(),
            spawned: worker.is_spawned(),
        };
        drop(roster);
        // An older poll of the same worker ends; and an idle worker has a time to be looked at again.
        self.0.hub.wake_workers();
        self.wake();
        Some(poll)
    }

    /// Puts a worker that came by itself on the roster.
    fn attach(&self, roster: &mut super::Roster, visitor: &Visitor, now: Instant) {
        if roster.workers.contains_key(&visitor.worker) {
            return;
        }
        let queue = match visitor.talkie {
            true => Queue::Talkie,
            false => Queue::Endpoint(visitor.endpoint.clone()),
        };
        if !visitor.talkie && roster.foreign.insert(visitor.endpoint.clone()) {
            tracing::info!("the jobs of endpoint {} are for workers of another kind", visitor.endpoint);
            if let Err(e) = remember(&self.0.foreign_endpoints, &visitor.endpoint) {
                tracing::warn!("{} cannot be written: {e}", self.0.foreign_endpoints.display());
            }
        }
        tracing::info!(worker = visitor.worker, "worker {} has attached itself", visitor.worker);
        roster.workers.insert(visitor.worker.clone(), Worker::attached(queue, now));
    }

    /// A worker that asks for jobs and has none in hand has lost those that are still its own.
    async fn nothing_in_hand(&self, worker: &str) {
        let let_go: Vec<String> = {
            let roster = self.roster();
            let Some(known) = roster.workers.get(worker) else { return };
            // A result that is being written is not lost.
            known.jobs.iter().filter(|(_, held)| !held.finished).map(|(job, _)| job.clone()).collect()
        };
        for job in &let_go {
            self.let_go(worker, job);
        }
        let Ok(held) = self.0.store.held_by(worker) else { return };
        for job in held {
            let being_written = self.roster().workers.get(worker).is_some_and(|w| w.jobs.contains_key(&job));
            if !being_written {
                self.lose(worker, &job, no_result(worker)).await;
            }
        }
    }

    fn let_go(&self, worker: &str, job: &str) {
        if let Some(known) = self.roster().workers.get_mut(worker) {
            known.let_go(job, Instant::now());
        }
        self.0.hub.clear_progress(job);
        self.wake();
    }

    /// Whether `poll` is still the one that counts, and its worker may have jobs.
    fn may_wait(&self, poll: &Poll) -> bool {
        let mut roster = self.roster();
        let closing = roster.closing;
        let Some(worker) = roster.workers.get_mut(&poll.worker) else { return false };
        worker.seen = Instant::now();
        worker.phase == Phase::Ready && worker.poll == poll.number && !closing
    }

    /// Jobs for `poll` that wait now. Those that the store finds when nobody waits for them any more go back by
    /// themselves.
    async fn take_now(&self, poll: &Poll, most: usize) -> Result<Vec<Lease>, JobError> {
        let Some(taking) = Taking::begin(self, poll) else { return Ok(Vec::new()) };
        let taker = Taker { worker: poll.worker.clone(), spawned: poll.spawned };
        let leases = self.0.store.take(taker, poll.queue.clone(), most).await?;
        if leases.is_empty() {
            return Ok(leases);
        }
        kill_point("K6");
        if taking.end(&leases) {
            // A job that ended after it was taken, and before it was known that this worker has it, could not be
            // stopped here.
            let (still, over) = leases.into_iter().partition(|lease| self.is_own(&poll.worker, &lease.id));
            let over: Vec<Lease> = over;
            over.iter().for_each(|lease| self.let_go(&poll.worker, &lease.id));
            return Ok(still);
        }
        // The worker was told to end in between, and would drop what it is given.
        for lease in leases {
            self.let_go(&poll.worker, &lease.id);
            let reason = format!("worker {} left before it was given the job", poll.worker);
            let loss = Loss { reason, log_tail: String::new(), counts: false };
            self.lose(&poll.worker, &lease.id, loss).await;
        }
        Ok(Vec::new())
    }
}

/// A worker that jobs are looked for: it is not idle, and it is not drained meanwhile.
struct Taking<'a> {
    pool: &'a Pool,
    poll: &'a Poll,
}

impl<'a> Taking<'a> {
    fn begin(pool: &'a Pool, poll: &'a Poll) -> Option<Self> {
        let mut roster = pool.roster();
        let worker = roster.workers.get_mut(&poll.worker)?;
        if worker.phase != Phase::Ready || worker.poll != poll.number || worker.taking {
            return None;
        }
        worker.taking = true;
        Some(Self { pool, poll })
    }

    /// Gives the worker what was found. Whether it is still there for that.
    fn end(self, leases: &[Lease]) -> bool {
        let mut roster = self.pool.roster();
        let Some(worker) = roster.workers.get_mut(&self.poll.worker) else { return false };
        worker.hold(leases.iter().map(|lease| lease.id.clone()));
        worker.phase == Phase::Ready && worker.poll == self.poll.number
    }
}

impl Drop for Taking<'_> {
    /// The worker may also have hung up in the middle.
    fn drop(&mut self) {
        if let Some(worker) = self.pool.roster().workers.get_mut(&self.poll.worker) {
            worker.taking = false;
        }
    }
}

/// Why a job is over whose worker has nothing to say about it.
fn no_result(worker: &str) -> Loss {
    let reason = format!("worker {worker} has dropped the job without a result");
    Loss { reason, log_tail: String::new(), counts: true }
}
