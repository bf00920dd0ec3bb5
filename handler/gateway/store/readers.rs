//! Connections that read. In WAL mode they neither wait for the writer nor hold it up.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use rusqlite::Connection;

use super::database::{self, World};
use super::failure::{closed, explain};
use crate::job::JobError;

/// Idle connections; a reader takes one or opens one more, and as many as the machine has cores are kept.
pub(super) struct Readers {
    dir: PathBuf,
    world: World,
    /// None: closed.
    idle: Mutex<Option<Vec<Connection>>>,
    kept: usize,
}

impl Readers {
    pub(super) fn new(dir: PathBuf, world: World) -> Self {
        let kept = available_parallelism().map_or(1, usize::from);
        Self { dir, world, idle: Mutex::new(Some(Vec::new())), kept }
    }

    /// Reads on the calling thread.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, JobError> {
        let idle = self.idle().as_mut().ok_or_else(closed)?.pop();
        let connection = match idle {
            Some(connection) => connection,
            None => database::open_reader(&self.dir, &self.world)?,
        };
        let result = read(&connection).map_err(|e| explain(&e, Some(&connection)));
        if let Some(idle) = self.idle().as_mut().filter(|idle| idle.len() < self.kept) {
            idle.push(connection);
        }
        result
    }

    /// Closes all, and opens no more.
    pub(super) fn close(&self) {
        *self.idle() = None;
    }

    fn idle(&self) -> MutexGuard<'_, Option<Vec<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
