//! The one thread that writes. It takes the requests that are there, does them in one transaction, and answers
//! all of them after the one commit: a commit waits for the disk, and the next group gathers meanwhile.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};
use tokio::sync::{oneshot, watch};

use super::clock::Timeline;
use super::failure::{Failure, explain};
use super::memory::{Change, Memory};
use super::model::{OnChange, Options};
use super::write::Tx;
use crate::faults::kill_point;
use crate::job::JobError;

/// Requests of one transaction at most.
const GROUP: usize = 256;

/// How long a group waits for more. Only one that follows a group of several does: those who were answered
/// together tend to come again together, and a lone caller would wait in vain.
const GATHER: Duration = Duration::from_millis(2);

/// A request to the writer.
pub(super) trait Request: Send {
    /// Does it. May be called a second time, when its first transaction failed.
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), Failure>;
    /// Answers, once the transaction is on disk or has failed.
    fn answer(self: Box<Self>, result: Result<(), JobError>);
    /// The kill points before and after the commit.
    fn kill_points(&self) -> [&'static str; 2];
}

/// A request with what it yields and who waits for it.
pub(super) struct Pending<F, T> {
    pub(super) work: F,
    pub(super) value: Option<T>,
    pub(super) reply: oneshot::Sender<Result<T, JobError>>,
    /// Receives what nobody waits for any more.
    pub(super) unheard: Box<dyn FnOnce(T) + Send>,
    pub(super) kill_points: [&'static str; 2],
}

impl<F, T> Request for Pending<F, T>
where
    F: FnMut(&mut Tx<'_>) -> Result<T, Failure> + Send,
    T: Send,
{
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), Failure> {
        self.value = Some((self.work)(tx)?);
        Ok(())
    }

    fn answer(self: Box<Self>, result: Result<(), JobError>) {
        let value = self.value;
        let result = result.map(|()| value);
        let result = match result {
            Ok(Some(value)) => Ok(value),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        if let Err(Ok(value)) = self.reply.send(result) {
            (self.unheard)(value);
        }
    }

    fn kill_points(&self) -> [&'static str; 2] {
        self.kill_points
    }
}

/// What the writer shares with the store.
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) timeline: Timeline,
    pub(super) memory: Mutex<Memory>,
    /// Whether the last write went well.
    pub(super) healthy: AtomicBool,
}

/// What the thread owns.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) connection: Connection,
    pub(super) on_change: OnChange,
    /// Keeps other gateways out; freed after the connection is closed.
    pub(super) lock: File,
    /// Ends when all is closed.
    pub(super) ended: watch::Sender<()>,
}

impl Writer {
    /// Works until nobody can send any more, then closes the database.
    pub(super) fn run(mut self, requests: &Receiver<Box<dyn Request>>) {
        let mut gathers = false;
        while let Ok(first) = requests.recv() {
            let group = gather(first, requests, gathers);
            gathers = group.len() > 1;
            self.commit(group);
        }
        self.close();
    }

    fn commit(&mut self, mut group: Vec<Box<dyn Request>>) {
        match self.transact(&mut group) {
            Ok(refusals) => answer(group, refusals),
            // One request may be too large for the disk while the others fit. Who cannot begin cannot do so
            // alone either, and has waited long enough.
            Err(error) if group.len() > 1 && error.sqlite_error_code() != Some(ErrorCode::DatabaseBusy) => {
                for request in group {
                    self.commit(vec![request]);
                }
            }
            Err(error) => {
                let error = explain(&error, Some(&self.connection));
                tracing::error!(reason = ?error.details.get("reason"), "the job store was not written: {error}");
                self.shared.healthy.store(false, Ordering::Relaxed);
                for request in group {
                    request.answer(Err(error.clone()));
                }
            }
        }
    }

    /// Does the group in one transaction. With each request, why it was refused.
    fn transact(&mut self, group: &mut [Box<dyn Request>]) -> rusqlite::Result<Vec<Option<JobError>>> {
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let result = self.write(group);
        if result.is_err() && !self.connection.is_autocommit() {
            // What failed is reported; that this fails too adds nothing.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
        let (refusals, changes) = result?;
        self.shared.healthy.store(true, Ordering::Relaxed);
        for request in &*group {
            kill_point(request.kill_points()[1]);
        }
        self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner).apply(&changes);
        for change in &changes {
            if let Some(status) = change.to {
                (self.on_change)(&change.job.id, status);
            }
        }
        Ok(refusals)
    }

    fn write(
        &self,
        group: &mut [Box<dyn Request>],
    ) -> rusqlite::Result<(Vec<Option<JobError>>, Vec<Change>)> {
        let connection = &self.connection;
        let now = (self.shared.timeline.now_ms(), self.shared.timeline.awake());
        let mut tx = Tx::new(connection, &self.shared.memory, &self.shared.options, now);
        let mut refusals = Vec::with_capacity(group.len());
        for request in group.iter_mut() {
            let mark = tx.mark();
            connection.prepare_cached("SAVEPOINT request")?.execute([])?;
            let refusal = match request.run(&mut tx) {
                Ok(()) => None,
                Err(Failure::Refused(error)) => Some(*error),
                Err(Failure::Database(error)) if is_own_fault(&error) => {
                    Some(explain(&error, Some(connection)))
                }
                Err(Failure::Database(error)) => return Err(error),
            };
            if refusal.is_some() {
                connection.prepare_cached("ROLLBACK TO request")?.execute([])?;
                tx.rewind(mark);
            }
            connection.prepare_cached("RELEASE request")?.execute([])?;
            refusals.push(refusal);
        }
        for request in &*group {
            kill_point(request.kill_points()[0]);
        }
        connection.prepare_cached("COMMIT")?.execute([])?;
        Ok((refusals, tx.into_changes()))
    }

    fn close(self) {
        // Readers may still be open; then the last of them does not leave the log behind either.
        if let Err(e) = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::warn!("the job store's log was not folded into the database: {e}");
        }
        kill_point("K13");
        drop(self.connection);
        drop(self.lock);
        drop(self.ended);
    }
}

fn gather(
    first: Box<dyn Request>,
    requests: &Receiver<Box<dyn Request>>,
    waits: bool,
) -> Vec<Box<dyn Request>> {
    let mut group = vec![first];
    let until = Instant::now() + GATHER;
    while group.len() < GROUP {
        let patience = if waits { until.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
        match requests.recv_timeout(patience) {
            Ok(request) => group.push(request),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    group
}

fn answer(group: Vec<Box<dyn Request>>, refusals: Vec<Option<JobError>>) {
    for (request, refusal) in group.into_iter().zip(refusals) {
        request.answer(refusal.map_or(Ok(()), Err));
    }
}

/// Whether a request failed by what it holds, not by the state of the database.
fn is_own_fault(error: &rusqlite::Error) -> bool {
    match error.sqlite_error_code() {
        Some(code) => matches!(
            code,
            ErrorCode::ConstraintViolation | ErrorCode::TooBig | ErrorCode::TypeMismatch | ErrorCode::Unknown
        ),
        // A value that could not be read or written.
        None => true,
    }
}
