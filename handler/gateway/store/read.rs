//! What is asked of the database.

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Result, Row};

use super::memory::Subject;
use super::model::{Delivery, JobRecord, Queue};
use crate::job::JobStatus;

/// The columns of a [`JobRecord`].
macro_rules! record_columns {
    () => {
        "jobs.id, endpoint, status, worker, created_ms, started_ms, finished_ms, attempt, output, error, \
         webhook, low_priority"
    };
}

/// The columns of a [`Held`](super::memory::Held) job or one that waits.
macro_rules! current_columns {
    () => {
        "seq, id, endpoint, queue, low_priority, status, attempt, worker, webhook IS NOT NULL, losses"
    };
}
pub(super) use current_columns;

/// A job as its transitions need it.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) subject: Subject,
    pub(super) status: JobStatus,
    pub(super) attempt: u32,
    pub(super) worker: Option<String>,
    pub(super) has_webhook: bool,
    pub(super) losses: Option<String>,
}

impl Current {
    /// Reads [`current_columns`].
    pub(super) fn read(row: &Row<'_>) -> Result<Self> {
        let subject = Subject {
            seq: row.get(0)?,
            id: row.get(1)?,
            endpoint: row.get(2)?,
            queue: queue_named(&row.get::<_, String>(3)?),
            low_priority: row.get(4)?,
        };
        Ok(Self {
            subject,
            status: status(row, 5)?,
            attempt: row.get(6)?,
            worker: row.get(7)?,
            has_webhook: row.get(8)?,
            losses: row.get(9)?,
        })
    }

    /// Whether `worker` runs it.
    pub(super) fn is_held_by(&self, worker: &str) -> bool {
        self.status == JobStatus::InProgress && self.worker.as_deref() == Some(worker)
    }
}

/// How a queue is written in the database.
pub(super) fn queue_name(queue: &Queue) -> String {
    match queue {
        Queue::Talkie => "talkie".to_string(),
        Queue::Endpoint(name) => format!("endpoint:{name}"),
    }
}

fn queue_named(name: &str) -> Queue {
    name.strip_prefix("endpoint:").map_or(Queue::Talkie, |endpoint| Queue::Endpoint(endpoint.to_string()))
}

pub(super) fn current(connection: &Connection, id: &str) -> Result<Option<Current>> {
    let sql = concat!("SELECT ", current_columns!(), " FROM jobs WHERE id = ?1");
    connection.prepare_cached(sql)?.query_row([id], Current::read).optional()
}

pub(super) fn job(connection: &Connection, id: &str) -> Result<Option<JobRecord>> {
    let sql = concat!("SELECT ", record_columns!(), " FROM jobs WHERE id = ?1");
    connection.prepare_cached(sql)?.query_row([id], record).optional()
}

pub(super) fn request(connection: &Connection, id: &str) -> Result<Option<String>> {
    let sql = "SELECT request FROM jobs WHERE id = ?1";
    connection.prepare_cached(sql)?.query_row([id], |row| row.get(0)).optional()
}

pub(super) fn recent(connection: &Connection, endpoint: &str, most: i64) -> Result<Vec<JobRecord>> {
    let sql =
        concat!("SELECT ", record_columns!(), " FROM jobs WHERE endpoint = ?1 ORDER BY seq DESC LIMIT ?2");
    connection.prepare_cached(sql)?.query_map((endpoint, most), record)?.collect()
}

/// The queue in which a job waits, and its number there.
pub(super) fn place(connection: &Connection, id: &str) -> Result<Option<(Queue, i64)>> {
    let sql = "SELECT queue, seq FROM jobs WHERE id = ?1 AND status = 'IN_QUEUE'";
    let read = |row: &Row<'_>| Ok((queue_named(&row.get::<_, String>(0)?), row.get(1)?));
    connection.prepare_cached(sql)?.query_row([id], read).optional()
}

/// When the first job that waits in `queue` was accepted.
pub(super) fn first_waiting(connection: &Connection, queue: &Queue) -> Result<Option<i64>> {
    let sql = "SELECT created_ms FROM jobs WHERE queue = ?1 AND status = 'IN_QUEUE' ORDER BY seq LIMIT 1";
    connection.prepare_cached(sql)?.query_row([queue_name(queue)], |row| row.get(0)).optional()
}

pub(super) fn held_by(connection: &Connection, worker: &str) -> Result<Vec<String>> {
    let sql = "SELECT id FROM jobs WHERE worker = ?1 AND status = 'IN_PROGRESS' ORDER BY seq";
    connection.prepare_cached(sql)?.query_map([worker], |row| row.get(0))?.collect()
}

pub(super) fn has_chunks(connection: &Connection, id: &str) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM chunks JOIN jobs ON jobs.seq = chunks.job WHERE jobs.id = ?1)";
    connection.prepare_cached(sql)?.query_row([id], |row| row.get(0))
}

pub(super) fn due_deliveries(connection: &Connection, now_ms: i64, most: i64) -> Result<Vec<Delivery>> {
    let sql = concat!(
        "SELECT ",
        record_columns!(),
        ", request, tries FROM deliveries JOIN jobs ON jobs.seq = deliveries.job \
         WHERE due_ms <= ?1 ORDER BY due_ms LIMIT ?2"
    );
    let read = |row: &Row<'_>| Ok(Delivery { job: record(row)?, request: row.get(12)?, tries: row.get(13)? });
    connection.prepare_cached(sql)?.query_map((now_ms, most), read)?.collect()
}

/// Reads [`record_columns`].
fn record(row: &Row<'_>) -> Result<JobRecord> {
    let attempt: u32 = row.get(7)?;
    Ok(JobRecord {
        id: row.get(0)?,
        endpoint: row.get(1)?,
        status: status(row, 2)?,
        worker: row.get(3)?,
        created_ms: row.get(4)?,
        started_ms: row.get(5)?,
        finished_ms: row.get(6)?,
        retries: attempt.saturating_sub(1),
        output: row.get(8)?,
        error: row.get(9)?,
        webhook: row.get(10)?,
        low_priority: row.get(11)?,
    })
}

pub(super) fn status(row: &Row<'_>, column: usize) -> Result<JobStatus> {
    let name: String = row.get(column)?;
    JobStatus::from_name(&name).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, format!("no job status: {name}").into())
    })
}
