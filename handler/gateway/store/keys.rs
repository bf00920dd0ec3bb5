//! API keys, which `handler keys` manages while the gateway runs.

use std::path::Path;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Result as Read, Row};

use super::clock::Timeline;
use super::database::{self, World};
use super::failure::{explain, internal};
use super::model::{KeyRecord, KeyRole};
use crate::job::{Code, JobError};

/// The keys alone. It shares the database with a gateway that runs, in this process or another, and sees and
/// makes changes at once.
pub struct KeyStore {
    connection: Connection,
    timeline: Timeline,
}

impl KeyStore {
    /// Opens the keys of the data folder `dir`; makes the store where there is none.
    ///
    /// # Errors
    /// When the database cannot be opened, or is of another version than the gateway that runs on it.
    pub fn open(dir: &Path) -> Result<Self, JobError> {
        let world = World::default();
        let timeline = Timeline::new(world.clock.clone());
        // Without a gateway this process may bring the schema up to date; beside one it must find it so.
        let lock = database::lock(dir, &world);
        let connection = match &lock {
            Ok(_) => database::open(dir, &world)?,
            Err(error) if error.details.get("reason").is_some_and(|reason| reason == "STORE_IN_USE") => {
                let connection = database::open_beside(dir, &world)?;
                if !database::is_current(&connection)? {
                    let message =
                        "the gateway that runs on this data folder is of another version of handler";
                    return Err(internal(message.to_string(), "STORE_SCHEMA").with_hint("stop it first"));
                }
                connection
            }
            Err(error) => return Err(error.clone()),
        };
        Ok(Self { connection, timeline })
    }

    /// Adds a key made now. `hash` is the SHA-256 of its secret.
    ///
    /// # Errors
    /// When a key of this id or secret exists, or the database cannot be written.
    pub fn create(&self, id: &str, name: &str, role: KeyRole, hash: [u8; 32]) -> Result<KeyRecord, JobError> {
        let created_ms = self.timeline.now_ms();
        let sql = "INSERT INTO keys (id, name, role, hash, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)";
        let added = self.connection.execute(sql, (id, name, role_name(role), hash, created_ms));
        added.map_err(|e| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => {
                JobError::new(Code::InvalidInput, format!("there is a key `{id}` already"))
            }
            _ => explain(&e, Some(&self.connection)),
        })?;
        Ok(KeyRecord { id: id.to_string(), name: name.to_string(), role, hash, created_ms, revoked_ms: None })
    }

    /// Every key, the oldest first; revoked ones too.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn list(&self) -> Result<Vec<KeyRecord>, JobError> {
        let sql = "SELECT id, name, role, hash, created_ms, revoked_ms FROM keys ORDER BY created_ms, rowid";
        let list = || self.connection.prepare(sql)?.query_map([], record)?.collect::<Read<_>>();
        list().map_err(|e| explain(&e, Some(&self.connection)))
    }

    /// Ends a key. False: there is no such key, or it has ended before.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn revoke(&self, id: &str) -> Result<bool, JobError> {
        let sql = "UPDATE keys SET revoked_ms = ?2 WHERE id = ?1 AND revoked_ms IS NULL";
        let changed = self.connection.execute(sql, (id, self.timeline.now_ms()));
        Ok(changed.map_err(|e| explain(&e, Some(&self.connection)))? > 0)
    }
}

pub(super) fn by_hash(connection: &Connection, hash: &[u8; 32]) -> Read<Option<KeyRecord>> {
    let sql = "SELECT id, name, role, hash, created_ms, revoked_ms FROM keys WHERE hash = ?1";
    connection.prepare_cached(sql)?.query_row([hash], record).optional()
}

pub(super) fn any_client_key(connection: &Connection) -> Read<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM keys WHERE role = 'client' AND revoked_ms IS NULL)";
    connection.prepare_cached(sql)?.query_row([], |row| row.get(0))
}

fn role_name(role: KeyRole) -> &'static str {
    match role {
        KeyRole::Client => "client",
        KeyRole::Worker => "worker",
    }
}

fn record(row: &Row<'_>) -> Read<KeyRecord> {
    let role: String = row.get(2)?;
    let role = match role.as_str() {
        "client" => KeyRole::Client,
        "worker" => KeyRole::Worker,
        other => {
            let message = format!("no role of a key: {other}").into();
            return Err(rusqlite::Error::FromSqlConversionFailure(2, Type::Text, message));
        }
    };
    Ok(KeyRecord {
        id: row.get(0)?,
        name: row.get(1)?,
        role,
        hash: row.get(3)?,
        created_ms: row.get(4)?,
        revoked_ms: row.get(5)?,
    })
}
