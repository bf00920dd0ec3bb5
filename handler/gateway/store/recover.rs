//! The start: what the database holds is counted, and what died with the last gateway is given to others.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use super::clock::Timeline;
use super::failure::{Failure, explain};
use super::memory::{Change, Held, Memory};
use super::model::{Loss, Options};
use super::read::{self, Current, current_columns};
use super::write::Tx;
use crate::job::{JobError, JobStatus};

/// What the store knows at its start. Jobs of workers that died with the last gateway are queued again;
/// those of attached workers have a new lease, in which their workers can say that they are alive.
pub(super) fn recover(
    connection: &mut Connection,
    options: &Options,
    timeline: &Timeline,
) -> Result<Memory, JobError> {
    let memory = Mutex::new(Memory::default());
    let mut run = || -> Result<(), Failure> {
        count(connection, &mut lock(&memory))?;
        hold(connection, options, timeline, &mut lock(&memory))?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let now = (timeline.now_ms(), timeline.awake());
        let mut tx = Tx::new(&transaction, &memory, options, now);
        for (job, worker) in orphans(&transaction)? {
            let loss = Loss {
                reason: "the gateway ended, and the worker with it".to_string(),
                log_tail: String::new(),
                counts: true,
            };
            tx.lose(&job, &worker, &loss)?;
        }
        let changes = tx.into_changes();
        transaction.commit()?;
        lock(&memory).apply(&changes);
        Ok(())
    };
    match run() {
        Ok(()) => Ok(memory.into_inner().unwrap_or_else(PoisonError::into_inner)),
        Err(Failure::Refused(error)) => Err(*error),
        Err(Failure::Database(error)) => Err(explain(&error, Some(connection))),
    }
}

fn lock(memory: &Mutex<Memory>) -> std::sync::MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts finished jobs and attempts after the first, and puts those who wait in order.
fn count(connection: &Connection, memory: &mut Memory) -> rusqlite::Result<()> {
    // In the order of the table: each page is read once, and without the texts at the end of its rows.
    let sql = "SELECT endpoint, status, attempt FROM jobs NOT INDEXED";
    let mut select = connection.prepare(sql)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (status, attempt) = (read::status(row, 1)?, row.get::<_, u32>(2)?);
        memory.add_history(row.get_ref(0)?.as_str()?, status, attempt.saturating_sub(1));
    }
    let sql = concat!("SELECT ", current_columns!(), " FROM jobs WHERE status = 'IN_QUEUE' ORDER BY seq");
    let mut select = connection.prepare(sql)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let job = Current::read(row)?.subject;
        memory.apply(&[Change { job, from: None, to: Some(JobStatus::InQueue), held: None }]);
    }
    Ok(())
}

/// Gives every running job a new lease and what is left of its time, but a lease's length at least: stamps
/// of a clock that may have jumped must not end it at once.
fn hold(
    connection: &Connection,
    options: &Options,
    timeline: &Timeline,
    memory: &mut Memory,
) -> rusqlite::Result<()> {
    let sql = concat!(
        "SELECT ",
        current_columns!(),
        ", execution_timeout_ms, started_ms FROM jobs WHERE status = 'IN_PROGRESS'"
    );
    let mut select = connection.prepare(sql)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let Current { subject, worker, .. } = Current::read(row)?;
        let (timeout_ms, started_ms): (i64, Option<i64>) = (row.get(10)?, row.get(11)?);
        let timeout = Duration::from_millis(timeout_ms.unsigned_abs());
        let ran_ms = timeline.now_ms().saturating_sub(started_ms.unwrap_or(i64::MAX)).max(0);
        let left = timeout.saturating_sub(Duration::from_millis(ran_ms.unsigned_abs()));
        let awake = timeline.awake();
        let held = Held {
            worker: worker.unwrap_or_default(),
            again: false,
            lease_until: awake + options.lease,
            deadline: awake + left.max(options.lease.min(timeout)),
        };
        let to = Some(JobStatus::InProgress);
        memory.apply(&[Change { job: subject, from: None, to, held: Some(held) }]);
    }
    Ok(())
}

/// The running jobs of workers that the last gateway had started.
fn orphans(connection: &Connection) -> rusqlite::Result<Vec<(String, String)>> {
    let sql = "SELECT id, worker FROM jobs WHERE status = 'IN_PROGRESS' AND spawned = 1 ORDER BY seq";
    connection.prepare(sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}
