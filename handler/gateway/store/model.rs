//! What goes into the store and what comes out of it.

use std::time::Duration;

use crate::job::JobStatus;

/// Whose jobs: those that Talkie's own workers make, or those of an endpoint that foreign workers serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Queue {
    /// Talkie's own.
    Talkie,
    /// Those of the endpoint of this name, whose workers are not Talkie's.
    Endpoint(String),
}

/// How the store behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Jobs that may wait; more are refused.
    pub max_queued: u64,
    /// Times that a job is started before it fails as `WORKER_LOST`.
    pub max_attempts: u32,
    /// How long a worker may be silent before its jobs are given to another.
    pub lease: Duration,
    /// How long a finished job is kept.
    pub retention: Duration,
}

/// Told of every change after it is on disk: the job, and its new status. Called on the writer's thread.
pub type OnChange = Box<dyn Fn(&str, JobStatus) + Send>;

/// A job to accept.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id, which is ours and new.
    pub id: String,
    /// The endpoint in the path, under which alone it can be seen.
    pub endpoint: String,
    /// Who may take it.
    pub queue: Queue,
    /// The request's JSON, without its large texts.
    pub request: String,
    /// Where the end is told.
    pub webhook: Option<String>,
    /// How long an attempt may run.
    pub execution_timeout: Duration,
    /// When the job is forgotten whatever its status.
    pub ttl: Duration,
    /// Waits without starting a worker.
    pub low_priority: bool,
    /// Makes a second request with the same key and the same body the same job.
    pub idempotency: Option<Idempotency>,
}

/// A key that the sender gave, within the API key that it came with.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// `<API key id>/<Idempotency-Key>`.
    pub key: String,
    /// SHA-256 of the body.
    pub body_hash: [u8; 32],
}

/// What became of a job to accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is in the store.
    New,
    /// The sender has sent it before, under this id.
    Same(String),
}

/// A job as it stands in the store.
#[derive(Clone, Debug)]
pub struct JobRecord {
    /// The job.
    pub id: String,
    /// Under which it was sent.
    pub endpoint: String,
    /// Where it is.
    pub status: JobStatus,
    /// The worker of the last attempt.
    pub worker: Option<String>,
    /// Milliseconds since 1970 of the acceptance.
    pub created_ms: i64,
    /// Of the start of the last attempt.
    pub started_ms: Option<i64>,
    /// Of the end.
    pub finished_ms: Option<i64>,
    /// Attempts after the first.
    pub retries: u32,
    /// The result's JSON.
    pub output: Option<String>,
    /// Why there is none.
    pub error: Option<String>,
    /// Where the end is told.
    pub webhook: Option<String>,
    /// Waits without starting a worker.
    pub low_priority: bool,
}

/// Who takes jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taker {
    /// The worker's id, as in its URLs.
    pub worker: String,
    /// Whether this gateway started it, so that it ends with the gateway.
    pub spawned: bool,
}

/// A job that was taken.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The job.
    pub id: String,
    /// The request's JSON, without its large texts.
    pub request: String,
    /// Which attempt this is, from 1.
    pub attempt: u32,
}

/// How an attempt ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// With a result's JSON.
    Completed(String),
    /// With an error.
    Failed(String),
}

/// Why an attempt is over without an outcome.
#[derive(Clone, Debug)]
pub struct Loss {
    /// In words, for the sender.
    pub reason: String,
    /// The end of the worker's log.
    pub log_tail: String,
    /// Whether it counts against the job's attempts. A worker that gives a job back unstarted does not.
    pub counts: bool,
}

/// What a sweep has ended.
#[derive(Clone, Debug, Default)]
pub struct Swept {
    /// Jobs that ran too long, with their workers. They are `TIMED_OUT`.
    pub timed_out: Vec<(String, String)>,
    /// Jobs whose workers were silent too long, with those workers. They are queued again, or `FAILED`.
    pub lost: Vec<(String, String)>,
    /// Jobs that are no more, with the workers of those that ran. Their files can go.
    pub forgotten: Vec<(String, Option<String>)>,
}

/// A webhook that is due.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The finished job.
    pub job: JobRecord,
    /// The request's JSON, without its large texts.
    pub request: String,
    /// Tries so far.
    pub tries: u32,
}

/// What a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyRole {
    /// The endpoint API.
    Client,
    /// The worker's side.
    Worker,
}

/// A key; of its secret there is only the SHA-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// Names the key to its owner.
    pub id: String,
    /// What it was made for, in the owner's words.
    pub name: String,
    /// What it opens.
    pub role: KeyRole,
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// Milliseconds since 1970.
    pub created_ms: i64,
    /// When it ceased to open anything.
    pub revoked_ms: Option<i64>,
}
