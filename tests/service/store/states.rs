//! Random steps on the store and on a model of it that fits on a page; both must agree after each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use handler::gateway::store::{Accepted, Idempotency, Loss, NewJob, Options, Outcome, Queue, Store, Taker};
use handler::job::{Code, JobStatus};
use handler::runpod::protocol::JobCounts;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{HandClock, folder, silent};
use crate::support::is_long;

const WORKERS: [&str; 4] = ["w0", "w1", "spawned-0", "spawned-1"];
const LEASE: u64 = 30;
const TIMEOUT: u64 = 100;
const TTL: u64 = 1000;
const RETENTION: u64 = 300;

#[derive(Clone, Debug)]
struct ModelJob {
    endpoint: &'static str,
    queue: Queue,
    place: u64,
    status: JobStatus,
    attempt: u32,
    worker: Option<String>,
    lease_until: u64,
    deadline: u64,
    expires: u64,
    finished: Option<u64>,
    output: Option<String>,
    hooked: bool,
    due: bool,
    chunks: Vec<String>,
}

/// What the store should be.
#[derive(Default)]
struct Model {
    now: u64,
    next: u64,
    jobs: BTreeMap<String, ModelJob>,
    keys: BTreeMap<String, (u8, String)>,
    counts: BTreeMap<&'static str, JobCounts>,
    /// The ends that were reached; none is ever another.
    ends: BTreeMap<(String, u64), JobStatus>,
}

impl Model {
    fn queued(&self) -> usize {
        self.jobs.values().filter(|job| job.status == JobStatus::InQueue).count()
    }

    fn waiting(&self, queue: &Queue) -> Vec<String> {
        let waits = |job: &ModelJob| job.status == JobStatus::InQueue && job.queue == *queue;
        let mut waiting: Vec<_> =
            self.jobs.iter().filter(|(_, job)| waits(job)).map(|(id, job)| (job.place, id.clone())).collect();
        waiting.sort();
        waiting.into_iter().map(|(_, id)| id).collect()
    }

    fn end(&mut self, id: &str, status: JobStatus, output: Option<String>) {
        let now = self.now;
        let job = self.jobs.get_mut(id).unwrap();
        assert!(!job.status.is_terminal());
        (job.status, job.finished, job.output, job.due) = (status, Some(now), output, job.hooked);
        let counts = self.counts.entry(job.endpoint).or_default();
        counts.completed += u64::from(status == JobStatus::Completed);
        counts.failed += u64::from(matches!(status, JobStatus::Failed | JobStatus::TimedOut));
        assert_eq!(self.ends.insert((id.to_string(), job.place), status), None, "{id} ended twice");
    }

    fn holds(&self, id: &str, worker: &str) -> bool {
        self.jobs
            .get(id)
            .is_some_and(|job| job.status == JobStatus::InProgress && job.worker.as_deref() == Some(worker))
    }

    fn lose(&mut self, id: &str, worker: &str, counts: bool) -> Option<JobStatus> {
        if !self.holds(id, worker) {
            return None;
        }
        let job = self.jobs.get_mut(id).unwrap();
        job.chunks.clear();
        if !counts {
            (job.attempt, job.worker) = (job.attempt - 1, None);
        } else if job.attempt == 3 {
            self.end(id, JobStatus::Failed, None);
            return Some(JobStatus::Failed);
        }
        self.jobs.get_mut(id).unwrap().status = JobStatus::InQueue;
        Some(JobStatus::InQueue)
    }

    fn sweep(&mut self) -> [BTreeSet<String>; 3] {
        let mut swept: [BTreeSet<String>; 3] = Default::default();
        for (id, job) in self.jobs.clone() {
            if job.status == JobStatus::InProgress && job.deadline <= self.now {
                self.end(&id, JobStatus::TimedOut, None);
                swept[0].insert(id);
            } else if job.status == JobStatus::InProgress && job.lease_until <= self.now {
                self.lose(&id, job.worker.as_deref().unwrap(), true);
                swept[1].insert(id);
            }
        }
        let now = self.now;
        let is_old =
            |job: &ModelJob| job.expires <= now || job.finished.is_some_and(|end| end + RETENTION <= now);
        swept[2] = self.jobs.iter().filter(|(_, job)| is_old(job)).map(|(id, _)| id.clone()).collect();
        self.jobs.retain(|_, job| !is_old(job));
        swept
    }
}

struct Run {
    model: Model,
    store: Store,
    clock: Arc<HandClock>,
    dir: tempfile::TempDir,
    rng: StdRng,
}

fn model_options() -> Options {
    Options {
        max_queued: 12,
        max_attempts: 3,
        lease: Duration::from_secs(LEASE),
        retention: Duration::from_secs(RETENTION),
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let (clock, dir) = (HandClock::new(), folder());
        let store = Store::open_in(&clock.world(), dir.path(), model_options(), silent()).unwrap();
        Self { model: Model::default(), store, clock, dir, rng: StdRng::seed_from_u64(seed) }
    }

    /// A job, mostly one that exists.
    fn any_job(&mut self) -> String {
        let ids: Vec<&String> = self.model.jobs.keys().collect();
        if ids.is_empty() || self.rng.random_bool(0.05) {
            return "none".to_string();
        }
        ids[self.rng.random_range(0..ids.len())].clone()
    }

    /// A worker; of a running job mostly its own.
    fn any_worker(&mut self, id: &str) -> String {
        let own = self.model.jobs.get(id).and_then(|job| job.worker.clone());
        own.filter(|_| self.rng.random_bool(0.8))
            .unwrap_or_else(|| WORKERS[self.rng.random_range(0..WORKERS.len())].to_string())
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..25 => self.accept().await,
            25..45 => self.take().await,
            45..55 => self.finish().await,
            55..63 => self.lose().await,
            63..68 => self.cancel().await,
            68..74 => self.retry().await,
            74..75 => self.purge().await,
            75..82 => self.chunks().await,
            82..86 => self.deliver().await,
            86..96 => self.pass_time().await,
            96..98 => self.set_ttl().await,
            _ => self.restart(),
        }
    }

    async fn accept(&mut self) {
        let n = self.model.next;
        self.model.next += 1;
        let id = format!("j{n}");
        let (endpoint, queue) = match self.rng.random_range(0..3) {
            0 => ("e", Queue::Talkie),
            1 => ("f", Queue::Talkie),
            _ => ("sdk", Queue::Endpoint("sdk".to_string())),
        };
        let key = self
            .rng
            .random_bool(0.3)
            .then(|| (format!("k{}", self.rng.random_range(0..20)), self.rng.random_range(0..2)));
        let hooked = self.rng.random_bool(0.4);
        let job = NewJob {
            id: id.clone(),
            endpoint: endpoint.to_string(),
            queue: queue.clone(),
            request: r#"{"input":1}"#.to_string(),
            webhook: hooked.then(|| "https://example.com".to_string()),
            execution_timeout: Duration::from_secs(TIMEOUT),
            ttl: Duration::from_secs(TTL),
            low_priority: n.is_multiple_of(3),
            idempotency: key
                .as_ref()
                .map(|(key, body)| Idempotency { key: key.clone(), body_hash: [*body; 32] }),
        };
        let expected = match key.as_ref().and_then(|(key, body)| Some((self.model.keys.get(key)?, body))) {
            Some(((known, id), body)) if known == body => Ok(Accepted::Same(id.clone())),
            Some(_) => Err(Code::IdempotencyConflict),
            None if self.model.queued() >= 12 => Err(Code::QueueFull),
            None => Ok(Accepted::New),
        };
        assert_eq!(self.store.accept(job).await.map_err(|error| error.code), expected);
        if expected == Ok(Accepted::New) {
            if let Some((key, body)) = key {
                self.model.keys.insert(key, (body, id.clone()));
            }
            let job = ModelJob {
                endpoint,
                queue,
                place: n,
                status: JobStatus::InQueue,
                attempt: 0,
                worker: None,
                lease_until: 0,
                deadline: 0,
                expires: self.model.now + TTL,
                finished: None,
                output: None,
                hooked,
                due: false,
                chunks: Vec::new(),
            };
            self.model.jobs.insert(id, job);
        }
    }

    async fn take(&mut self) {
        let worker = self.any_worker("none");
        let queue =
            if self.rng.random_bool(0.7) { Queue::Talkie } else { Queue::Endpoint("sdk".to_string()) };
        let most = self.rng.random_range(1..4);
        let taker = Taker { worker: worker.clone(), spawned: worker.starts_with("spawned") };
        let leases = self.store.take(taker, queue.clone(), most).await.unwrap();
        let now = self.model.now;
        let mut expected = Vec::new();
        for id in self.model.waiting(&queue) {
            let job = self.model.jobs.get_mut(&id).unwrap();
            if job.expires > now && expected.len() < most {
                (job.status, job.worker, job.attempt) =
                    (JobStatus::InProgress, Some(worker.clone()), job.attempt + 1);
                (job.lease_until, job.deadline) = (now + LEASE, now + TIMEOUT);
                self.model.counts.entry(job.endpoint).or_default().retried += u64::from(job.attempt > 1);
                expected.push((id, job.attempt));
            }
        }
        let taken: Vec<_> = leases.into_iter().map(|lease| (lease.id, lease.attempt)).collect();
        assert_eq!(taken, expected);
    }

    async fn finish(&mut self) {
        let id = self.any_job();
        let worker = self.any_worker(&id);
        let is_kept_result =
            self.model.jobs.get(&id).is_some_and(|job| job.status == JobStatus::InQueue && job.attempt > 0);
        let expected = self.model.holds(&id, &worker) || is_kept_result;
        let completes = self.rng.random_bool(0.5);
        let text = format!("\"{id} by {worker}\"");
        let outcome =
            if completes { Outcome::Completed(text.clone()) } else { Outcome::Failed(text.clone()) };
        assert_eq!(self.store.finish(&id, &worker, outcome).await.unwrap(), expected, "{id} {worker}");
        if expected {
            let status = if completes { JobStatus::Completed } else { JobStatus::Failed };
            self.model.end(&id, status, completes.then_some(text));
            self.model.jobs.get_mut(&id).unwrap().worker = Some(worker);
        }
    }

    async fn lose(&mut self) {
        let id = self.any_job();
        let (worker, counts) = (self.any_worker(&id), self.rng.random_bool(0.7));
        let loss = Loss { reason: "gone".to_string(), log_tail: String::new(), counts };
        let expected = self.model.lose(&id, &worker, counts);
        assert_eq!(self.store.lose(&id, &worker, loss).await.unwrap(), expected);
    }

    async fn cancel(&mut self) {
        let id = self.any_job();
        let status = self.store.cancel(&id).await.unwrap().map(|job| job.status);
        if self.model.jobs.get(&id).is_some_and(|job| !job.status.is_terminal()) {
            self.model.end(&id, JobStatus::Cancelled, None);
        }
        assert_eq!(status, self.model.jobs.get(&id).map(|job| job.status));
    }

    async fn retry(&mut self) {
        let id = self.any_job();
        let expected = match self.model.jobs.get(&id).map(|job| job.status) {
            None => Ok(None),
            Some(JobStatus::Failed | JobStatus::TimedOut) if self.model.queued() >= 12 => {
                Err(Code::QueueFull)
            }
            Some(JobStatus::Failed | JobStatus::TimedOut) => Ok(Some(JobStatus::InQueue)),
            Some(_) => Err(Code::InvalidInput),
        };
        let found = self.store.retry(&id).await.map(|job| job.map(|job| job.status)).map_err(|e| e.code);
        assert_eq!(found, expected, "{id}");
        if let Ok(Some(status)) = expected {
            let place = self.model.next;
            self.model.next += 1;
            let job = self.model.jobs.get_mut(&id).unwrap();
            (job.status, job.place, job.attempt, job.worker) = (status, place, 0, None);
            (job.finished, job.output, job.due) = (None, None, false);
            job.chunks.clear();
        }
    }

    async fn purge(&mut self) {
        let waits = |job: &ModelJob| job.endpoint == "e" && job.status == JobStatus::InQueue;
        let ids: Vec<String> =
            self.model.jobs.iter().filter(|(_, job)| waits(job)).map(|(id, _)| id.clone()).collect();
        assert_eq!(self.store.purge("e").await.unwrap(), ids.len() as u64);
        ids.iter().for_each(|id| self.model.end(id, JobStatus::Cancelled, None));
    }

    async fn chunks(&mut self) {
        let id = self.any_job();
        if self.rng.random_bool(0.3) {
            let expected = self.model.jobs.get_mut(&id).map(|job| std::mem::take(&mut job.chunks));
            assert_eq!(self.store.drain_chunks(&id).await.unwrap(), expected.unwrap_or_default());
            return;
        }
        let (worker, chunk) = (self.any_worker(&id), self.model.next.to_string());
        let expected = self.model.holds(&id, &worker);
        assert_eq!(self.store.push_chunk(&id, &worker, chunk.clone()).await.unwrap(), expected);
        if expected {
            self.model.jobs.get_mut(&id).unwrap().chunks.push(chunk);
        }
    }

    async fn deliver(&mut self) {
        let id = self.any_job();
        self.store.record_delivery(&id, None).await.unwrap();
        if let Some(job) = self.model.jobs.get_mut(&id) {
            job.due = false;
        }
    }

    async fn pass_time(&mut self) {
        let seconds = self.rng.random_range(1..40);
        self.clock.jump(self.rng.random_range(-3_600_000..3_600_000));
        self.clock.advance(Duration::from_secs(seconds));
        self.model.now += seconds;
        for worker in WORKERS.into_iter().filter(|_| self.rng.random_bool(0.7)) {
            let held = self.store.held_by(worker).unwrap();
            self.store.beat(worker, &held);
            for id in held {
                self.model.jobs.get_mut(&id).unwrap().lease_until = self.model.now + LEASE;
            }
        }
        let swept = self.store.sweep().await.unwrap();
        let ids = |pairs: Vec<(String, String)>| pairs.into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>();
        let forgotten: BTreeSet<String> = swept.forgotten.into_iter().map(|(id, _)| id).collect();
        assert_eq!([ids(swept.timed_out), ids(swept.lost), forgotten], self.model.sweep());
    }

    async fn set_ttl(&mut self) {
        let (id, ttl) = (self.any_job(), self.rng.random_range(100..2000));
        self.store.set_ttl(&id, Duration::from_secs(ttl)).await.unwrap();
        if let Some(job) = self.model.jobs.get_mut(&id) {
            job.expires = self.model.now + ttl;
        }
    }

    fn restart(&mut self) {
        let now = self.model.now;
        for (id, job) in self.model.jobs.clone() {
            let Some(worker) = job.worker.filter(|_| job.status == JobStatus::InProgress) else { continue };
            if worker.starts_with("spawned") {
                self.model.lose(&id, &worker, true);
            } else {
                let job = self.model.jobs.get_mut(&id).unwrap();
                (job.lease_until, job.deadline) = (now + LEASE, job.deadline.max(now + LEASE));
            }
        }
        // What is counted is what the database holds.
        self.model.counts.clear();
        for job in self.model.jobs.values() {
            let counts = self.model.counts.entry(job.endpoint).or_default();
            counts.completed += u64::from(job.status == JobStatus::Completed);
            counts.failed += u64::from(matches!(job.status, JobStatus::Failed | JobStatus::TimedOut));
            counts.retried += u64::from(job.attempt.saturating_sub(1));
        }
        // Stamps go on where they were, as with a wall clock that was right at both starts.
        let elapsed = self.clock.elapsed_ms.load(std::sync::atomic::Ordering::SeqCst);
        self.clock
            .wall_ms
            .store(1_700_000_000_000 - 5_000_000 + elapsed, std::sync::atomic::Ordering::SeqCst);
        let world = self.clock.world();
        replace_with(&mut self.store, || {
            Store::open_in(&world, self.dir.path(), model_options(), silent()).unwrap()
        });
    }

    fn compare(&self) {
        for (id, expected) in &self.model.jobs {
            let job = self.store.job(id).unwrap().unwrap_or_else(|| panic!("{id} is gone: {expected:?}"));
            assert_eq!(
                (job.status, job.worker, job.retries, job.output),
                (
                    expected.status,
                    expected.worker.clone(),
                    expected.attempt.saturating_sub(1),
                    expected.output.clone()
                ),
                "{id}"
            );
        }
        for queue in [Queue::Talkie, Queue::Endpoint("sdk".to_string())] {
            let waiting = self.model.waiting(&queue);
            assert_eq!(self.store.waiting(&queue).0, waiting.len() as u64);
            for (place, id) in waiting.iter().enumerate() {
                assert_eq!(self.store.position(id).unwrap(), Some(place as u64), "{id}");
            }
        }
        for endpoint in ["e", "f", "sdk"] {
            let jobs: Vec<&ModelJob> =
                self.model.jobs.values().filter(|job| job.endpoint == endpoint).collect();
            let many = |status| jobs.iter().filter(|job| job.status == status).count() as u64;
            let mut counts = self.model.counts.get(endpoint).copied().unwrap_or_default();
            (counts.in_queue, counts.in_progress) = (many(JobStatus::InQueue), many(JobStatus::InProgress));
            assert_eq!(self.store.counts(endpoint), counts, "{endpoint}");
            assert_eq!(self.store.recent(endpoint, 999).unwrap().len(), jobs.len());
        }
        let due: BTreeSet<String> =
            self.store.due_deliveries(999).unwrap().into_iter().map(|due| due.job.id).collect();
        let expected = self.model.jobs.iter().filter(|(_, job)| job.due).map(|(id, _)| id.clone());
        assert_eq!(due, expected.collect());
    }
}

/// Closes the old store before the folder is opened again.
fn replace_with(store: &mut Store, make: impl FnOnce() -> Store) {
    let placeholder = folder();
    let other = Store::open(placeholder.path(), model_options(), silent()).unwrap();
    drop(std::mem::replace(store, other));
    *store = make();
}

#[tokio::test]
async fn random_steps_agree_with_the_model_and_no_end_ever_changes() {
    let seeds = if is_long() { 0..400 } else { 0..25 };
    let mut ends = BTreeSet::new();
    for seed in seeds {
        let mut run = Run::new(seed);
        for _ in 0..400 {
            run.step().await;
            run.compare();
        }
        ends.extend(run.model.ends.into_values().map(JobStatus::as_str));
    }
    assert_eq!(ends.len(), 4, "every end was reached: {ends:?}");
}
