//! The job loop: take a job as soon as a slot is free, run it, deliver its end, and answer for everything that
//! was ever handed over.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use serde_json::value::RawValue;
use talkie::pipeline::Cancel;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::delivery::{Delivery, adopt, keep_up, on_disk};
use super::heartbeat::Heartbeat;
use super::held::{Held, Phase};
use super::outcome::Writer;
use super::platform::Platform;
use super::protocol::{Job, Post};
use super::sender::Sender;
use super::spool::{Record, Spool};
use super::take::{Handed, Polling, watch_stops};
use crate::faults::kill_point;
use crate::generate::DEVICE_BROKEN;
use crate::job::{Code, JobError, JobOutput};
use crate::runner::{Runner, Task};

/// A job that the platform is handing over at the moment of the signal is still on its way for this long.
const LAST_ANSWER: Duration = Duration::from_millis(250);
/// What earlier processes left is delivered before the first take, but a platform that refuses it may still have
/// jobs.
const REPLAY_WINDOW: Duration = Duration::from_secs(5);
/// A job whose executor breaks has this long to tell what happened itself.
const OWN_REPORT: Duration = Duration::from_millis(500);
/// A process that is broken has this long to deliver its last results; the whole end takes 10 s at most.
const LAST_DELIVERY: Duration = Duration::from_secs(6);
/// The same after the grace time, which is over by then.
const AFTER_GRACE: Duration = Duration::from_millis(1500);
/// Units between two looks at a bucket that is gone.
const BUCKET_PAUSE: u32 = 10;
/// How often the executor is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Ends that are remembered, for a job that is handed over twice, and the bytes of the longest of them.
const REMEMBERED: (usize, usize) = (64, 65_536);

/// The device is broken for this process.
pub const EXIT_DEVICE: u8 = 70;
/// Two jobs in a row ran out of memory: it is not their size.
pub const EXIT_MEMORY: u8 = 71;
/// A generation hangs.
pub const EXIT_HANGING: u8 = 75;

/// Runs jobs, whatever they are.
pub trait JobRunner: Clone + Send + Sync + 'static {
    /// Runs a job to its end.
    fn run(&self, task: Task) -> impl Future<Output = Result<JobOutput, JobError>> + Send;
    /// Why no further job can be run, if that is so: a generation hangs, or the device is broken. A job that broke
    /// it ends after this says so.
    fn defect(&self) -> Option<String>;
    /// Whether there is somewhere for a further result to go. While there is not, no job is taken.
    fn can_deliver(&self) -> impl Future<Output = Result<(), JobError>> + Send;
}

impl JobRunner for Runner {
    async fn run(&self, task: Task) -> Result<JobOutput, JobError> {
        Runner::run(self, task).await
    }

    fn defect(&self) -> Option<String> {
        Runner::defect(self)
    }

    async fn can_deliver(&self) -> Result<(), JobError> {
        Runner::can_deliver(self).await
    }
}

/// Settings of the loop.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Jobs that are run at once.
    pub slots: usize,
    /// Ask to be replaced after each job, and end.
    pub refresh: bool,
    /// How long running jobs may take after the signal to end.
    pub grace: Duration,
    /// How old an undelivered result may become.
    pub result_ttl: Duration,
    /// Bytes of the largest result.
    pub max_result_bytes: usize,
    /// The unit of all pauses after failures.
    pub unit: Duration,
    /// How often progress is sent at most.
    pub progress_interval: Duration,
    /// How often it says in its spool that it lives, and looks for what dead workers left.
    pub spool_interval: Duration,
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As it was asked to.
    Stopped,
    /// It can run no further job; the exit code says why.
    Broken(u8),
}

/// A job that runs.
struct Active {
    cancel: Cancel,
    sender: Sender,
    /// The platform does not want to hear of it any more.
    stopped: bool,
}

type Ended = (String, Result<JobOutput, JobError>);
type Take = Pin<Box<dyn Future<Output = Vec<Handed>> + Send>>;

/// A worker.
pub struct Worker<R> {
    runner: R,
    platform: Platform,
    spool: Arc<Spool>,
    settings: Settings,
    held: Held,
    waiting: VecDeque<Job>,
    active: HashMap<String, Active>,
    running: JoinSet<Ended>,
    deliveries: JoinSet<String>,
    /// Jobs that were completed here, and how.
    completed: VecDeque<(String, Box<RawValue>)>,
    /// How many jobs in a row ran out of memory.
    out_of_memory: u32,
    /// A job has ended because of its device.
    device_broken: bool,
    /// Cancelled when no further job is wanted.
    draining: CancellationToken,
}

impl<R: JobRunner> Worker<R> {
    /// A worker that takes its jobs from `platform`.
    pub fn new(runner: R, platform: Platform, spool: Spool, settings: Settings) -> Self {
        Self {
            runner,
            platform,
            spool: Arc::new(spool),
            settings,
            held: Held::default(),
            waiting: VecDeque::new(),
            active: HashMap::new(),
            running: JoinSet::new(),
            deliveries: JoinSet::new(),
            completed: VecDeque::new(),
            out_of_memory: 0,
            device_broken: false,
            draining: CancellationToken::new(),
        }
    }

    /// Works until `shutdown`, or until the runner is broken.
    pub async fn run(mut self, shutdown: CancellationToken) -> Ending {
        let runner = self.runner.clone();
        let heartbeat =
            Heartbeat::start(self.platform.endpoints(), self.held.clone(), move || runner.defect());
        if let Err(e) = &heartbeat {
            tracing::error!(%e, "no heartbeat is sent");
        }
        let ending = self.work(&shutdown).await;
        let spool = self.spool.clone();
        let _ = on_disk(move || {
            spool.close();
            Ok(())
        })
        .await;
        ending
    }

    async fn work(&mut self, shutdown: &CancellationToken) -> Ending {
        self.replay(adopt(self.spool.clone()).await);
        let (found, mut stops) = mpsc::channel(16);
        let stops_watch = watch_stops(self.platform.clone(), self.settings.unit, found);
        let stops_watch = AbortOnDropHandle::new(tokio::spawn(stops_watch));
        let (left_behind, mut legacies) = mpsc::channel(1);
        let upkeep = keep_up(self.spool.clone(), self.settings.spool_interval, left_behind);
        let _upkeep = AbortOnDropHandle::new(tokio::spawn(upkeep));
        let mut looks = interval(LOOK_EVERY);
        let mut replay_over = pin!(tokio::time::sleep(REPLAY_WINDOW));
        let mut replaying = true;
        let mut take: Option<Take> = None;
        loop {
            self.start_waiting();
            replaying &= !self.deliveries.is_empty();
            if self.draining.is_cancelled() && self.active.is_empty() {
                return self.drain(take).await;
            }
            if take.is_none() && !replaying && !self.draining.is_cancelled() && self.has_free_slot() {
                take = Some(self.take());
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    drop(stops_watch);
                    return self.drain(take).await;
                }
                Some(ended) = self.running.join_next() => {
                    self.finish(ended);
                    if self.out_of_memory > 1 {
                        let reason = "two jobs in a row ran out of memory";
                        return self.give_up(EXIT_MEMORY, reason, take).await;
                    }
                    if let Some(reason) = self.runner.defect() {
                        return self.give_up(self.defect_code(), &reason, take).await;
                    }
                }
                Some(id) = stops.recv() => self.stop(&id),
                Some(delivered) = self.deliveries.join_next() => self.delivered(delivered),
                _ = looks.tick() => if let Some(reason) = self.runner.defect() {
                    return self.give_up(self.defect_code(), &reason, take).await;
                },
                handed = answer(&mut take), if take.is_some() => {
                    take = None;
                    handed.into_iter().for_each(|handed| self.accept(handed));
                }
                Some(records) = legacies.recv() => self.replay(records),
                () = &mut replay_over, if replaying => replaying = false,
            }
        }
    }

    fn has_free_slot(&self) -> bool {
        self.held.busy() < self.settings.slots
    }

    fn take(&self) -> Take {
        let polling = Polling {
            platform: self.platform.clone(),
            held: self.held.clone(),
            slots: self.settings.slots,
            unit: self.settings.unit,
        };
        let (runner, draining) = (self.runner.clone(), self.draining.clone());
        let pause = BUCKET_PAUSE * self.settings.unit;
        Box::pin(async move {
            while let Err(e) = runner.can_deliver().await {
                tracing::error!(?pause, "no job is taken, for its video would be lost: {}", e.message);
                tokio::select! {
                    biased;
                    () = draining.cancelled() => return Vec::new(),
                    () = tokio::time::sleep(pause) => {}
                }
            }
            polling.take(draining).await
        })
    }

    fn delivery(&self) -> Delivery {
        Delivery {
            platform: self.platform.clone(),
            spool: self.spool.clone(),
            unit: self.settings.unit,
            ttl: self.settings.result_ttl,
        }
    }

    /// Delivers what dead workers left.
    fn replay(&mut self, records: Vec<Record>) {
        for record in records {
            if self.held.contains(&record.job) {
                continue;
            }
            tracing::warn!(
                job = record.job,
                worker = record.worker,
                "delivering a result that was left behind"
            );
            let done =
                matches!(Post::parse(record.body.get().as_bytes()), Post::Finished { error: None, .. });
            if done {
                self.remember(&record.job, &record.body);
            }
            self.held.set(&record.job, Phase::Undelivered);
            let (delivery, job) = (self.delivery(), record.job.clone());
            self.deliveries.spawn(async move {
                delivery.deliver(Arc::new(record)).await;
                job
            });
        }
    }

    /// Everything that was handed over is run or answered, whatever it is and whenever it comes.
    fn accept(&mut self, handed: Handed) {
        kill_point("K14");
        let job = match handed {
            Handed::Job(job) => *job,
            Handed::Malformed { id, why } => {
                if !self.held.contains(&id) {
                    tracing::error!(job = id, why, "the platform handed over something that is no job");
                    let error = JobError::new(Code::InvalidInput, why).with_reason("MALFORMED_JOB");
                    self.end(id, Err(error), None);
                }
                return;
            }
        };
        if self.held.contains(&job.id) {
            tracing::warn!(job = job.id, "handed over again; its end answers both");
            return;
        }
        if let Some((_, body)) = self.completed.iter().find(|(id, _)| *id == job.id) {
            tracing::warn!(job = job.id, "handed over again; answered from the record");
            return self.deliver(job.id, body.clone(), None);
        }
        self.held.set(&job.id, Phase::Busy);
        self.waiting.push_back(job);
    }

    fn start_waiting(&mut self) {
        while self.active.len() < self.settings.slots {
            let Some(job) = self.waiting.pop_front() else { return };
            self.start(job);
        }
    }

    fn start(&mut self, job: Job) {
        let Job { id, input, mut rest } = job;
        let (sender, reports) =
            Sender::start(self.platform.clone(), id.clone(), self.settings.progress_interval);
        let cancel = Cancel::default();
        let task = Task {
            id: id.clone(),
            input,
            s3_config: rest.remove("s3Config").filter(|config| !config.is_null()),
            cancel: cancel.clone(),
            progress: Arc::new(move |update| drop(reports.send_replace(Some(update)))),
        };
        self.active.insert(id.clone(), Active { cancel, sender, stopped: false });
        let span = tracing::info_span!("job", job = id);
        let runner = self.runner.clone();
        let run = async move {
            tracing::info!("Started.");
            let outcome = AssertUnwindSafe(runner.run(task)).catch_unwind().await.unwrap_or_else(|_| {
                Err(JobError::new(Code::Internal, "the job failed in a way that was not foreseen"))
            });
            match &outcome {
                Ok(_) => tracing::info!("Finished."),
                Err(error) => tracing::warn!(code = error.code.as_str(), "Failed: {}", error.message),
            }
            (id, outcome)
        };
        self.running.spawn(run.instrument(span));
    }

    fn stop(&mut self, id: &str) {
        if let Some(active) = self.active.get_mut(id) {
            tracing::info!(job = id, "stopped by the platform");
            active.stopped = true;
            active.cancel.cancel();
        } else if let Some(at) = self.waiting.iter().position(|job| job.id == id) {
            self.waiting.remove(at);
            self.held.remove(id);
        }
    }

    /// A job has come to an end by itself.
    fn finish(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let (id, outcome) = match ended {
            Ok(ended) => ended,
            Err(e) => return tracing::error!(%e, "a job's task failed"),
        };
        // Its end may have been told already, while it did not come back.
        let Some(active) = self.active.remove(&id) else { return };
        self.device_broken |= matches!(&outcome, Err(error)
            if error.details.get("reason").is_some_and(|reason| reason == DEVICE_BROKEN));
        let out_of_memory = matches!(&outcome, Err(error) if error.code == Code::GpuOutOfMemory);
        self.out_of_memory = if out_of_memory { self.out_of_memory + 1 } else { 0 };
        if self.settings.refresh {
            self.draining.cancel();
        }
        if active.stopped {
            return self.held.remove(&id);
        }
        self.end(id, outcome, Some(active.sender));
    }

    fn defect_code(&self) -> u8 {
        if self.device_broken { EXIT_DEVICE } else { EXIT_HANGING }
    }

    fn end(&mut self, id: String, outcome: Result<JobOutput, JobError>, sender: Option<Sender>) {
        let writer = Writer {
            reporter: self.platform.endpoints().reporter.clone(),
            max_bytes: self.settings.max_result_bytes,
            stop_pod: self.settings.refresh,
        };
        let body = writer.body(outcome.as_ref());
        if outcome.is_ok() {
            self.remember(&id, &body);
        }
        self.deliver(id, body, sender);
    }

    fn deliver(&mut self, id: String, body: Box<RawValue>, sender: Option<Sender>) {
        self.held.set(&id, Phase::Undelivered);
        let record = Record::new(&self.platform.endpoints().worker_id, &id, body);
        let delivery = self.delivery();
        self.deliveries.spawn(async move {
            delivery.deliver_new(record, sender).await;
            id
        });
    }

    fn delivered(&self, delivered: Result<String, tokio::task::JoinError>) {
        match delivered {
            Ok(id) => self.held.remove(&id),
            Err(e) => tracing::error!(%e, "a delivery failed; its result stays in the spool"),
        }
    }

    /// Only what was completed is remembered: a failed job that comes again is meant to be tried again.
    fn remember(&mut self, id: &str, body: &RawValue) {
        let (most, bytes) = REMEMBERED;
        if body.get().len() > bytes {
            return;
        }
        if self.completed.len() == most {
            self.completed.pop_front();
        }
        self.completed.push_back((id.to_string(), body.to_owned()));
    }

    /// Ends as it was asked to: takes nothing more, and lets what it has end within the grace time.
    async fn drain(&mut self, take: Option<Take>) -> Ending {
        let deadline = tokio::time::Instant::now() + self.settings.grace;
        self.last_answer(take).await;
        loop {
            self.start_waiting();
            if self.active.is_empty() && self.deliveries.is_empty() {
                return Ending::Stopped;
            }
            tokio::select! {
                biased;
                Some(ended) = self.running.join_next() => self.finish(ended),
                Some(delivered) = self.deliveries.join_next() => self.delivered(delivered),
                () = sleep_until(deadline) => break,
            }
        }
        let error = JobError::new(Code::WorkerLost, "the worker was told to end before the job was done")
            .with_hint("send the request again")
            .with_reason("PREEMPTED");
        self.fail_rest(&error);
        self.flush(AFTER_GRACE).await;
        Ending::Stopped
    }

    /// Ends because no further job can be run: tells so of those that it has, and leaves the rest to others.
    async fn give_up(&mut self, exit_code: u8, reason: &str, take: Option<Take>) -> Ending {
        tracing::error!(reason, exit_code, "this worker takes no further job");
        self.draining.cancel();
        let _ = timeout(OWN_REPORT, async {
            while let Some(ended) = self.running.join_next().await {
                self.finish(ended);
            }
        })
        .await;
        self.last_answer(take).await;
        let error = JobError::new(Code::WorkerLost, format!("the worker cannot go on: {reason}"))
            .with_hint("send the request again; another worker will take it")
            .with_reason("WORKER_BROKEN");
        self.fail_rest(&error);
        self.flush(LAST_DELIVERY).await;
        Ending::Broken(exit_code)
    }

    /// Lets the open poll be answered if the answer is on its way, then hangs up.
    async fn last_answer(&mut self, take: Option<Take>) {
        self.draining.cancel();
        let Some(take) = take else { return };
        let handed = timeout(LAST_ANSWER, take).await.unwrap_or_default();
        handed.into_iter().for_each(|handed| self.accept(handed));
    }

    /// Ends every job that is left with `error`.
    fn fail_rest(&mut self, error: &JobError) {
        let active: Vec<_> = self.active.drain().collect();
        for (id, active) in active {
            active.cancel.cancel();
            match active.stopped {
                true => self.held.remove(&id),
                false => self.end(id, Err(error.clone()), Some(active.sender)),
            }
        }
        while let Some(job) = self.waiting.pop_front() {
            self.end(job.id, Err(error.clone()), None);
        }
    }

    async fn flush(&mut self, at_most: Duration) {
        let delivered = timeout(at_most, async {
            while let Some(delivered) = self.deliveries.join_next().await {
                self.delivered(delivered);
            }
        });
        if delivered.await.is_err() {
            tracing::warn!(
                jobs = self.held.ids().join(","),
                spool = %self.spool.folder().display(),
                "results are left for the next worker"
            );
        }
    }
}

/// What the open poll brings.
async fn answer(take: &mut Option<Take>) -> Vec<Handed> {
    match take {
        Some(take) => take.await,
        None => std::future::pending().await,
    }
}
