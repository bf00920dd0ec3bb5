//! What is written to the database: each step of a job, within the transaction of a group.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::clock::millis;
use super::database;
use super::failure::Failure;
use super::memory::{Change, Held, Memory, Subject};
use super::model::{Accepted, JobRecord, Lease, Loss, NewJob, Options, Outcome, Queue, Swept, Taker};
use super::read::{self, Current, current_columns, queue_name};
use crate::job::{Code, JobError, JobStatus};
use crate::runpod::protocol::{Reporter, error_text};

/// A transaction, and the transitions that it has written so far.
pub(super) struct Tx<'a> {
    pub(super) connection: &'a Connection,
    pub(super) memory: &'a Mutex<Memory>,
    pub(super) options: &'a Options,
    pub(super) now_ms: i64,
    /// Now, on the clock of leases.
    pub(super) awake: Duration,
    changes: Vec<Change>,
    /// Jobs that wait, with these changes.
    queued: i64,
}

impl<'a> Tx<'a> {
    pub(super) fn new(
        connection: &'a Connection,
        memory: &'a Mutex<Memory>,
        options: &'a Options,
        (now_ms, awake): (i64, Duration),
    ) -> Self {
        let queued = memory.lock().unwrap_or_else(PoisonError::into_inner).queued() as i64;
        Self { connection, memory, options, now_ms, awake, changes: Vec::new(), queued }
    }

    /// Where [`rewind`](Self::rewind) returns to.
    pub(super) fn mark(&self) -> usize {
        self.changes.len()
    }

    /// Forgets the transitions after `mark`, which were rolled back.
    pub(super) fn rewind(&mut self, mark: usize) {
        for change in self.changes.split_off(mark) {
            self.queued -= queued_by(&change);
        }
    }

    pub(super) fn into_changes(self) -> Vec<Change> {
        self.changes
    }

    fn record(&mut self, change: Change) {
        self.queued += queued_by(&change);
        self.changes.push(change);
    }

    pub(super) fn accept(&mut self, job: &NewJob) -> Result<Accepted, Failure> {
        if let Some(idempotency) = &job.idempotency {
            let sql = "SELECT body_hash, job FROM idempotency WHERE key = ?1";
            let known: Option<([u8; 32], String)> = self
                .connection
                .prepare_cached(sql)?
                .query_row([&idempotency.key], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            match known {
                Some((hash, id)) if hash == idempotency.body_hash => return Ok(Accepted::Same(id)),
                Some(_) => return Err(idempotency_conflict().into()),
                None => {}
            }
        }
        self.check_room()?;
        if let Some(idempotency) = &job.idempotency {
            let sql = "INSERT INTO idempotency (key, body_hash, job, created_ms) VALUES (?1, ?2, ?3, ?4)";
            let values = (&idempotency.key, &idempotency.body_hash, &job.id, self.now_ms);
            self.connection.prepare_cached(sql)?.execute(values)?;
        }
        let sql = "INSERT INTO jobs (id, endpoint, queue, status, low_priority, created_ms, expires_ms, \
                   execution_timeout_ms, webhook, request) VALUES (?1, ?2, ?3, 'IN_QUEUE', ?4, ?5, ?6, ?7, ?8, ?9)";
        self.connection.prepare_cached(sql)?.execute((
            &job.id,
            &job.endpoint,
            queue_name(&job.queue),
            job.low_priority,
            self.now_ms,
            self.now_ms.saturating_add(millis(job.ttl)),
            millis(job.execution_timeout),
            &job.webhook,
            &job.request,
        ))?;
        let subject = Subject {
            seq: self.connection.last_insert_rowid(),
            id: job.id.clone(),
            endpoint: job.endpoint.clone(),
            queue: job.queue.clone(),
            low_priority: job.low_priority,
        };
        self.record(Change { job: subject, from: None, to: Some(JobStatus::InQueue), held: None });
        Ok(Accepted::New)
    }

    fn check_room(&self) -> Result<(), JobError> {
        if self.queued.unsigned_abs() < self.options.max_queued {
            return Ok(());
        }
        let message = format!("{} jobs wait, expected less than {}", self.queued, self.options.max_queued);
        Err(JobError::new(Code::QueueFull, message).with_hint("try again later"))
    }

    pub(super) fn take(&mut self, taker: &Taker, queue: &Queue, most: i64) -> Result<Vec<Lease>, Failure> {
        let sql = concat!(
            "SELECT ",
            current_columns!(),
            ", execution_timeout_ms, request FROM jobs \
             WHERE status = 'IN_QUEUE' AND queue = ?1 AND expires_ms > ?2 ORDER BY seq LIMIT ?3"
        );
        let mut select = self.connection.prepare_cached(sql)?;
        let jobs: Vec<(Current, i64, String)> = select
            .query_map((queue_name(queue), self.now_ms, most), |row| {
                Ok((Current::read(row)?, row.get(10)?, row.get(11)?))
            })?
            .collect::<Result<_, _>>()?;
        let mut leases = Vec::with_capacity(jobs.len());
        for (job, timeout_ms, request) in jobs {
            let sql = "UPDATE jobs SET status = 'IN_PROGRESS', attempt = attempt + 1, worker = ?2, spawned = ?3, \
                       started_ms = max(?4, created_ms) WHERE seq = ?1";
            let values = (job.subject.seq, &taker.worker, taker.spawned, self.now_ms);
            self.connection.prepare_cached(sql)?.execute(values)?;
            let held = Held {
                worker: taker.worker.clone(),
                again: job.attempt > 0,
                lease_until: self.awake + self.options.lease,
                deadline: self.awake + Duration::from_millis(timeout_ms.unsigned_abs()),
            };
            leases.push(Lease { id: job.subject.id.clone(), request, attempt: job.attempt + 1 });
            self.record(Change {
                job: job.subject,
                from: Some(JobStatus::InQueue),
                to: Some(JobStatus::InProgress),
                held: Some(held),
            });
        }
        Ok(leases)
    }

    pub(super) fn finish(&mut self, id: &str, worker: &str, outcome: &Outcome) -> Result<bool, Failure> {
        let Some(job) = read::current(self.connection, id)? else { return Ok(false) };
        // A worker died after it had kept its result; another one has found that, and the job waits since then.
        let is_kept_result = job.status == JobStatus::InQueue && job.attempt > 0;
        if !job.is_held_by(worker) && !is_kept_result {
            return Ok(false);
        }
        let sql = "UPDATE jobs SET worker = ?2, started_ms = coalesce(started_ms, max(?3, created_ms)) WHERE seq = ?1";
        self.connection.prepare_cached(sql)?.execute((job.subject.seq, worker, self.now_ms))?;
        match outcome {
            Outcome::Completed(output) => self.end(job, JobStatus::Completed, Some(output), None)?,
            Outcome::Failed(error) => self.end(job, JobStatus::Failed, None, Some(error))?,
        }
        Ok(true)
    }

    /// Ends the attempt of `id` by `worker`, where it is that one's.
    pub(super) fn lose(&mut self, id: &str, worker: &str, loss: &Loss) -> Result<Option<JobStatus>, Failure> {
        match read::current(self.connection, id)? {
            Some(job) if job.is_held_by(worker) => self.give_up(job, worker, loss).map(Some),
            _ => Ok(None),
        }
    }

    fn give_up(&mut self, job: Current, worker: &str, loss: &Loss) -> Result<JobStatus, Failure> {
        self.forget_chunks(job.subject.seq)?;
        if !loss.counts {
            let sql = "UPDATE jobs SET status = 'IN_QUEUE', attempt = attempt - 1, worker = NULL, spawned = 0, \
                       started_ms = NULL WHERE seq = ?1";
            self.connection.prepare_cached(sql)?.execute([job.subject.seq])?;
            return Ok(self.queue_again(job));
        }
        let mut losses: Vec<Value> =
            job.losses.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        losses.push(json!({"worker": worker, "at": rfc3339(self.now_ms), "reason": loss.reason}));
        let text = Value::from(losses.clone()).to_string();
        let sql = "UPDATE jobs SET losses = ?2 WHERE seq = ?1";
        self.connection.prepare_cached(sql)?.execute((job.subject.seq, text))?;
        if job.attempt < self.options.max_attempts {
            let sql = "UPDATE jobs SET status = 'IN_QUEUE' WHERE seq = ?1";
            self.connection.prepare_cached(sql)?.execute([job.subject.seq])?;
            return Ok(self.queue_again(job));
        }
        let message =
            format!("the job lost its worker {} times; the last time: {}", losses.len(), loss.reason);
        let error = JobError::new(Code::WorkerLost, message)
            .with_detail("attempts", losses)
            .with_detail("log_tail", loss.log_tail.as_str());
        let error = error_text(&error, &reporter(worker));
        self.end(job, JobStatus::Failed, None, Some(&error))?;
        Ok(JobStatus::Failed)
    }

    fn queue_again(&mut self, job: Current) -> JobStatus {
        let to = JobStatus::InQueue;
        self.record(Change { job: job.subject, from: Some(job.status), to: Some(to), held: None });
        to
    }

    /// The running job `id` of `worker` has had its time.
    fn time_out(&mut self, id: &str, worker: &str) -> Result<bool, Failure> {
        let Some(job) = read::current(self.connection, id)?.filter(|job| job.is_held_by(worker)) else {
            return Ok(false);
        };
        let sql = "SELECT execution_timeout_ms FROM jobs WHERE seq = ?1";
        let timeout_ms: i64 =
            self.connection.prepare_cached(sql)?.query_row([job.subject.seq], |row| row.get(0))?;
        let message =
            format!("the job ran longer than its execution timeout of {} s", timeout_ms as f64 / 1e3);
        let error = JobError::new(Code::Timeout, message)
            .with_hint("allow more time with `policy.executionTimeout`, in milliseconds");
        let error = error_text(&error, &reporter(worker));
        self.end(job, JobStatus::TimedOut, None, Some(&error))?;
        Ok(true)
    }

    pub(super) fn cancel(&mut self, id: &str) -> Result<Option<JobRecord>, Failure> {
        if let Some(job) = read::current(self.connection, id)?
            && !job.status.is_terminal()
        {
            self.end(job, JobStatus::Cancelled, None, None)?;
        }
        Ok(read::job(self.connection, id)?)
    }

    /// Cancels up to `most` of those who wait under `endpoint` and have numbers above `after` and up to `last`.
    /// How many, and the number of the last.
    pub(super) fn purge(
        &mut self,
        endpoint: &str,
        (after, last): (i64, i64),
        most: i64,
    ) -> Result<(u64, i64), Failure> {
        let sql = concat!(
            "SELECT ",
            current_columns!(),
            " FROM jobs WHERE endpoint = ?1 AND status = 'IN_QUEUE' AND seq > ?2 AND seq <= ?3 \
             ORDER BY seq LIMIT ?4"
        );
        let mut select = self.connection.prepare_cached(sql)?;
        let jobs: Vec<Current> =
            select.query_map((endpoint, after, last, most), Current::read)?.collect::<Result<_, _>>()?;
        let (removed, end) = (jobs.len() as u64, jobs.last().map_or(last, |job| job.subject.seq));
        for job in jobs {
            self.end(job, JobStatus::Cancelled, None, None)?;
        }
        Ok((removed, end))
    }

    /// The number of the job that was accepted last.
    pub(super) fn last_seq(&self) -> Result<i64, Failure> {
        let sql = "SELECT coalesce(max(seq), 0) FROM jobs";
        Ok(self.connection.prepare_cached(sql)?.query_row([], |row| row.get(0))?)
    }

    /// Writes a final status, and that its webhook is due. Keys to the sender's own storage have served.
    fn end(
        &mut self,
        job: Current,
        status: JobStatus,
        output: Option<&String>,
        error: Option<&String>,
    ) -> Result<(), Failure> {
        let sql = "UPDATE jobs SET status = ?2, finished_ms = max(?3, created_ms, coalesce(started_ms, 0)), \
                   output = ?4, error = ?5, request = CASE \
                     WHEN instr(request, '\"s3Config\"') = 0 THEN request \
                     WHEN NOT json_valid(request) THEN request \
                     WHEN json_type(request, '$.s3Config') IS NULL THEN request \
                     ELSE json_replace(request, '$.s3Config', ?6) END WHERE seq = ?1";
        let seq = job.subject.seq;
        let values = (seq, status.as_str(), self.now_ms, output, error, ERASED);
        self.connection.prepare_cached(sql)?.execute(values)?;
        if job.has_webhook {
            let sql = "INSERT INTO deliveries (job, due_ms) VALUES (?1, ?2)";
            self.connection.prepare_cached(sql)?.execute((seq, self.now_ms))?;
        }
        self.record(Change { job: job.subject, from: Some(job.status), to: Some(status), held: None });
        Ok(())
    }

    pub(super) fn retry(&mut self, id: &str) -> Result<Option<JobRecord>, Failure> {
        let Some(mut job) = read::current(self.connection, id)? else { return Ok(None) };
        if !matches!(job.status, JobStatus::Failed | JobStatus::TimedOut) {
            let message = format!("job {id} is {}, expected FAILED or TIMED_OUT", job.status.as_str());
            return Err(JobError::new(Code::InvalidInput, message).with_reason("NOT_RETRYABLE").into());
        }
        let sql = "SELECT CASE WHEN json_valid(request) THEN json_extract(request, '$.s3Config') IS ?2 \
                   ELSE 0 END FROM jobs WHERE seq = ?1";
        let mut is_erased = self.connection.prepare_cached(sql)?;
        if is_erased.query_row((job.subject.seq, ERASED), |row| row.get(0))? {
            let message = format!("job {id} had an `s3Config`, which was erased when the job ended");
            return Err(JobError::new(Code::InvalidInput, message)
                .with_reason("NOT_RETRYABLE")
                .with_hint("send the job anew")
                .into());
        }
        self.check_room()?;
        self.forget_chunks(job.subject.seq)?;
        self.connection
            .prepare_cached("DELETE FROM deliveries WHERE job = ?1")?
            .execute([job.subject.seq])?;
        let last = self.last_seq()?;
        let sql = "UPDATE jobs SET seq = ?2, status = 'IN_QUEUE', attempt = 0, worker = NULL, spawned = 0, \
                   started_ms = NULL, finished_ms = NULL, losses = NULL, output = NULL, error = NULL WHERE seq = ?1";
        self.connection.prepare_cached(sql)?.execute((job.subject.seq, last + 1))?;
        job.subject.seq = last + 1;
        self.queue_again(job);
        Ok(read::job(self.connection, id)?)
    }

    pub(super) fn set_ttl(&mut self, id: &str, ttl: Duration) -> Result<(), Failure> {
        let sql = "UPDATE jobs SET expires_ms = ?2 WHERE id = ?1";
        self.connection.prepare_cached(sql)?.execute((id, self.now_ms.saturating_add(millis(ttl))))?;
        Ok(())
    }

    /// Ends what is overdue and forgets up to `most` of what is old, keys that are older than `keep` too.
    pub(super) fn sweep(&mut self, most: i64, keep: Duration, probes: bool) -> Result<Swept, Failure> {
        if probes {
            database::probe(self.connection)?;
        }
        let mut swept = Swept::default();
        let overdue = self.memory.lock().unwrap_or_else(PoisonError::into_inner).overdue(self.awake);
        for (id, held) in overdue {
            if held.deadline <= self.awake {
                if self.time_out(&id, &held.worker)? {
                    swept.timed_out.push((id, held.worker));
                }
                continue;
            }
            let loss = Loss {
                reason: format!("the worker was silent for {} s", self.options.lease.as_secs_f64()),
                log_tail: String::new(),
                counts: true,
            };
            if self.lose(&id, &held.worker, &loss)?.is_some() {
                swept.lost.push((id, held.worker));
            }
        }
        swept.forgotten = self.forget(most)?;
        self.forget_keys(keep)?;
        database::give_back(self.connection)?;
        Ok(swept)
    }

    /// Deletes up to `most` jobs whose time is over. With each, its worker if it ran.
    fn forget(&mut self, most: i64) -> Result<Vec<(String, Option<String>)>, Failure> {
        let sql = concat!(
            "DELETE FROM jobs WHERE seq IN (\
               SELECT seq FROM jobs WHERE expires_ms <= ?1 \
               UNION SELECT seq FROM jobs WHERE finished_ms <= ?2 LIMIT ?3) RETURNING ",
            current_columns!()
        );
        let oldest_end = self.now_ms.saturating_sub(millis(self.options.retention));
        let mut delete = self.connection.prepare_cached(sql)?;
        let jobs: Vec<Current> =
            delete.query_map((self.now_ms, oldest_end, most), Current::read)?.collect::<Result<_, _>>()?;
        let mut forgotten = Vec::with_capacity(jobs.len());
        for job in jobs {
            let worker = job.worker.filter(|_| job.status == JobStatus::InProgress);
            forgotten.push((job.subject.id.clone(), worker));
            self.record(Change { job: job.subject, from: Some(job.status), to: None, held: None });
        }
        Ok(forgotten)
    }

    /// Deletes old idempotency keys whose jobs are no more.
    fn forget_keys(&mut self, keep: Duration) -> Result<(), Failure> {
        let sql = "DELETE FROM idempotency WHERE created_ms <= ?1 \
                   AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = idempotency.job)";
        self.connection.prepare_cached(sql)?.execute([self.now_ms.saturating_sub(millis(keep))])?;
        Ok(())
    }

    pub(super) fn push_chunk(&mut self, id: &str, worker: &str, output: &str) -> Result<bool, Failure> {
        let Some(job) = read::current(self.connection, id)?.filter(|job| job.is_held_by(worker)) else {
            return Ok(false);
        };
        let sql = "INSERT INTO chunks (job, output) VALUES (?1, ?2)";
        self.connection.prepare_cached(sql)?.execute((job.subject.seq, output))?;
        Ok(true)
    }

    pub(super) fn drain_chunks(&mut self, id: &str) -> Result<Vec<String>, Failure> {
        let Some(job) = read::current(self.connection, id)? else { return Ok(Vec::new()) };
        let sql = "SELECT output FROM chunks WHERE job = ?1 ORDER BY seq";
        let mut select = self.connection.prepare_cached(sql)?;
        let chunks = select.query_map([job.subject.seq], |row| row.get(0))?.collect::<Result<_, _>>()?;
        self.forget_chunks(job.subject.seq)?;
        Ok(chunks)
    }

    fn forget_chunks(&self, seq: i64) -> Result<(), Failure> {
        self.connection.prepare_cached("DELETE FROM chunks WHERE job = ?1")?.execute([seq])?;
        Ok(())
    }

    pub(super) fn record_delivery(&mut self, id: &str, next_try: Option<Duration>) -> Result<(), Failure> {
        match next_try {
            Some(wait) => {
                let sql = "UPDATE deliveries SET tries = tries + 1, due_ms = ?2 \
                           WHERE job = (SELECT seq FROM jobs WHERE id = ?1)";
                let due_ms = self.now_ms.saturating_add(millis(wait));
                self.connection.prepare_cached(sql)?.execute((id, due_ms))?;
            }
            None => {
                let sql = "DELETE FROM deliveries WHERE job = (SELECT seq FROM jobs WHERE id = ?1)";
                self.connection.prepare_cached(sql)?.execute([id])?;
            }
        }
        Ok(())
    }
}

/// Stands where the keys to the sender's own storage were.
const ERASED: &str = "[erased]";

/// By how much a transition lengthens the queue.
fn queued_by(change: &Change) -> i64 {
    let is_queued = |status: Option<JobStatus>| i64::from(status == Some(JobStatus::InQueue));
    is_queued(change.to) - is_queued(change.from)
}

fn idempotency_conflict() -> JobError {
    JobError::new(Code::IdempotencyConflict, "the idempotency key was used before with another body")
        .with_hint("use a new key for a new job")
}

fn reporter(worker: &str) -> Reporter {
    Reporter { hostname: String::new(), worker_id: worker.to_string() }
}

fn rfc3339(ms: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| ms.to_string())
}
