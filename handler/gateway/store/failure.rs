//! What the database says, in the words of the contract.

use rusqlite::{Connection, ErrorCode, ffi};

use crate::job::{Code, JobError};

/// Why a request to the store was not done.
#[derive(Debug)]
pub(super) enum Failure {
    /// The request itself is at fault; its neighbours are not.
    Refused(Box<JobError>),
    /// The database is.
    Database(rusqlite::Error),
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        Self::Refused(Box::new(error))
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// `error` for the sender. `connection` is the one that it happened on and says what the system's reason was.
pub(super) fn explain(error: &rusqlite::Error, connection: Option<&Connection>) -> JobError {
    let Some(code) = error.sqlite_error_code() else {
        return internal(format!("the job store failed: {error}"), "STORE_FAILED");
    };
    match code {
        ErrorCode::DiskFull => full(),
        ErrorCode::SystemIoFailure if connection.is_some_and(is_out_of_space) => full(),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => busy(),
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => corrupt(&error.to_string()),
        ErrorCode::ReadOnly
        | ErrorCode::SystemIoFailure
        | ErrorCode::CannotOpen
        | ErrorCode::PermissionDenied => {
            internal(format!("the job store cannot be read or written: {error}"), "STORE_IO")
                .with_hint("check the disk that holds the data folder")
                .with_retryable(true)
        }
        _ => internal(format!("the job store failed: {error}"), "STORE_FAILED"),
    }
}

/// Whether a write failed since the file may not grow: the disk, the quota or the process' limit.
fn is_out_of_space(connection: &Connection) -> bool {
    // SAFETY: the handle is that of a live connection, which no other thread uses meanwhile.
    let errno = unsafe { ffi::sqlite3_system_errno(connection.handle()) };
    matches!(errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
}

fn full() -> JobError {
    JobError::new(Code::StoreFull, "the disk of the job store is full").with_hint("try again later")
}

/// Another process holds the database for longer than a writer waits.
fn busy() -> JobError {
    internal("the job store is locked by another process".to_string(), "STORE_BUSY")
        .with_hint("try again in a few seconds")
        .with_retryable(true)
}

/// The file is damaged. `what` was found.
pub(super) fn corrupt(what: &str) -> JobError {
    internal(format!("the job store is damaged: {what}"), "STORE_CORRUPT").with_hint(
        "move jobs.db, jobs.db-wal and jobs.db-shm out of the data folder, or restore them from a backup; \
         nothing was changed or deleted",
    )
}

/// An error that is ours, with a finer word.
pub(super) fn internal(message: String, reason: &str) -> JobError {
    JobError::new(Code::Internal, message).with_reason(reason)
}

/// What those hear who ask after the end.
pub(super) fn closed() -> JobError {
    internal("the job store is closed".to_string(), "STORE_CLOSED").with_retryable(true)
}
