//! Opening the database: where it may lie, what it must look like, and the settings of every connection.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::clock::{Clock, SystemClock};
use super::failure::{corrupt, explain, internal};
use crate::faults::kill_point;
use crate::job::JobError;

const DATABASE: &str = "jobs.db";
const LOCK: &str = "jobs.lock";

/// Marks the file as ours: `TLKE`.
const APPLICATION_ID: i64 = 0x544c_4b45;

/// From each schema version to the next; a database has as many behind it as its `user_version` says.
const MIGRATIONS: [&str; 1] = [include_str!("schema.sql")];

/// What every connection is set to, and what it then must say. A commit is on disk when it returns
/// (`synchronous`), a damaged page is an error and not a surprise, and the log does not grow without bound.
/// What was erased, such as keys to a sender's storage, is not left in free space (`secure_delete`).
const PRAGMAS: [(&str, &str, &str); 10] = [
    ("journal_mode", "WAL", "wal"),
    ("synchronous", "FULL", "2"),
    ("foreign_keys", "ON", "1"),
    ("busy_timeout", "5000", "5000"),
    ("wal_autocheckpoint", "1000", "1000"),
    ("journal_size_limit", "67108864", "67108864"),
    ("cell_size_check", "ON", "1"),
    ("trusted_schema", "OFF", "0"),
    ("temp_store", "MEMORY", "2"),
    ("secure_delete", "ON", "1"),
];

/// Kept statements of a connection; there are fewer.
const STATEMENTS: usize = 64;

/// Free pages that are kept for the next rows: 4 MiB.
const SPARE_PAGES: i64 = 1024;

/// What the store needs of the machine.
#[derive(Clone)]
pub struct World {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The kind of filesystem that a folder lies on, as Linux numbers them.
    pub filesystem: fn(&Path) -> io::Result<i64>,
    /// The name of SQLite's own layer over files, where it is not the default.
    pub vfs: Option<String>,
}

impl Default for World {
    fn default() -> Self {
        Self { clock: Arc::new(SystemClock), filesystem, vfs: None }
    }
}

/// Makes the data folder and holds it for one gateway, as long as the file lives.
pub(super) fn lock(dir: &Path, world: &World) -> Result<File, JobError> {
    let refuse = |what: &str, e: io::Error| {
        internal(format!("the data folder {} cannot be {what}: {e}", dir.display()), "STORE_IO")
    };
    create(dir).map_err(|e| refuse("made", e))?;
    let kind = (world.filesystem)(dir).map_err(|e| refuse("examined", e))?;
    if let Some(name) = network_filesystem(kind) {
        let message = format!(
            "the data folder {} lies on a network filesystem ({name}), on which a power cut or a second machine \
             can damage the job store",
            dir.display()
        );
        return Err(internal(message, "STORE_ON_NETWORK")
            .with_hint("choose a folder on a local disk with --data-dir"));
    }
    let lock = private().open(dir.join(LOCK)).map_err(|e| refuse("locked", e))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(internal(
            format!("the data folder {} is in use by another gateway", dir.display()),
            "STORE_IN_USE",
        )
        .with_hint("stop it first, or choose another folder with --data-dir")),
        Err(TryLockError::Error(e)) => Err(refuse("locked", e)),
    }
}

/// Opens the database for writing; makes it where there is none, and brings its schema up to date.
pub(super) fn open(dir: &Path, world: &World) -> Result<Connection, JobError> {
    let path = dir.join(DATABASE);
    private().open(&path).map_err(|e| internal(format!("{}: {e}", path.display()), "STORE_IO"))?;
    let mut connection = connect(&path, world)?;
    prepare(&mut connection)
        .map_err(|error| JobError { message: format!("{}: {}", path.display(), error.message), ..error })?;
    sync_folder(dir).map_err(|e| internal(format!("{}: {e}", dir.display()), "STORE_IO"))?;
    Ok(connection)
}

/// Opens the database, which [`open`] has made, beside the gateway that holds it.
pub(super) fn open_beside(dir: &Path, world: &World) -> Result<Connection, JobError> {
    let connection = connect(&dir.join(DATABASE), world)?;
    configure(&connection)?;
    Ok(connection)
}

/// Opens the database, which [`open`] has made, for reading.
pub(super) fn open_reader(dir: &Path, world: &World) -> Result<Connection, JobError> {
    let connection = open_beside(dir, world)?;
    let query_only = connection.execute_batch("PRAGMA query_only = ON");
    query_only.map_err(|e| explain(&e, Some(&connection)))?;
    Ok(connection)
}

/// Whether the schema of the database in `dir` is this version's.
pub(super) fn is_current(connection: &Connection) -> Result<bool, JobError> {
    let version = pragma::<i64>(connection, "user_version").map_err(|e| explain(&e, Some(connection)))?;
    Ok(version == MIGRATIONS.len() as i64)
}

/// Writes something that changes nothing, to see whether writing works.
pub(super) fn probe(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!("PRAGMA user_version = {}", MIGRATIONS.len()))
}

/// Gives some of the space of deleted rows back to the disk, within a transaction.
pub(super) fn give_back(connection: &Connection) -> rusqlite::Result<()> {
    if pragma::<i64>(connection, "freelist_count")? > SPARE_PAGES {
        let mut vacuum = connection.prepare_cached("PRAGMA incremental_vacuum(1000)")?;
        let mut steps = vacuum.query([])?;
        while steps.next()?.is_some() {}
        kill_point("K13");
    }
    Ok(())
}

fn connect(path: &Path, world: &World) -> Result<Connection, JobError> {
    // Each connection is used by one thread at a time.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = match &world.vfs {
        Some(vfs) => Connection::open_with_flags_and_vfs(path, flags, vfs.as_str()),
        None => Connection::open_with_flags(path, flags),
    }
    .map_err(|e| explain(&e, None))?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(connection)
}

/// Checks that the file is ours and sound before anything is written to it, then makes it current.
fn prepare(connection: &mut Connection) -> Result<(), JobError> {
    let is_new = identify(connection).map_err(|e| explain(&e, Some(connection)))??;
    if is_new {
        // Takes effect only while the file is empty.
        let vacuum = connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL");
        vacuum.map_err(|e| explain(&e, Some(connection)))?;
    }
    configure(connection)?;
    let check = pragma::<String>(connection, "quick_check(1)").map_err(|e| explain(&e, Some(connection)))?;
    if check != "ok" {
        return Err(corrupt(&check.replace('\n', " ")));
    }
    migrate(connection).map_err(|e| explain(&e, Some(connection)))
}

/// Whether the database is empty; an error where it is not one that this version can use.
fn identify(connection: &Connection) -> rusqlite::Result<Result<bool, JobError>> {
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let (application, version) =
        (pragma::<i64>(connection, "application_id")?, pragma::<i64>(connection, "user_version")?);
    let known = MIGRATIONS.len() as i64;
    Ok(match (application, version, tables) {
        (0, 0, 0) => Ok(true),
        (APPLICATION_ID, 1.., _) if version <= known => Ok(false),
        (APPLICATION_ID, 1.., _) => Err(internal(
            format!(
                "the job store has schema version {version}, and this version of handler knows up to {known}"
            ),
            "STORE_SCHEMA",
        )
        .with_hint("use the newer handler that wrote it, or another folder with --data-dir")),
        _ => Err(corrupt("it does not bear the mark of a job store of Talkie")),
    })
}

/// Sets a connection up and checks that it took every setting.
fn configure(connection: &Connection) -> Result<(), JobError> {
    let fail = |e: rusqlite::Error| explain(&e, Some(connection));
    for (name, value, _) in PRAGMAS {
        connection.execute_batch(&format!("PRAGMA {name} = {value}")).map_err(fail)?;
    }
    for (name, _, expected) in PRAGMAS {
        let value: rusqlite::types::Value = pragma(connection, name).map_err(fail)?;
        let found = match value {
            rusqlite::types::Value::Integer(number) => number.to_string(),
            rusqlite::types::Value::Text(text) => text,
            other => format!("{other:?}"),
        };
        if found != expected {
            let message = format!("the job store's setting `{name}` is {found}, expected {expected}");
            return Err(internal(message, "STORE_FAILED"));
        }
    }
    Ok(())
}

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    loop {
        let step = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Read within the transaction: another process may have been quicker.
        let version = pragma::<i64>(&step, "user_version")?;
        let Some(sql) = usize::try_from(version).ok().and_then(|version| MIGRATIONS.get(version)) else {
            return Ok(());
        };
        step.execute_batch(sql)?;
        kill_point("K12");
        step.execute_batch(&format!(
            "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {}",
            version + 1
        ))?;
        step.commit()?;
    }
}

fn pragma<T: rusqlite::types::FromSql>(connection: &Connection, name: &str) -> rusqlite::Result<T> {
    connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
}

/// Opens or makes a file that only its owner can read: jobs hold prompts and keys.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Makes a folder that only its owner can enter, and those above it, so that they are there after a power cut.
fn create(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|above| !above.exists()).collect();
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)?;
    missing.into_iter().filter_map(Path::parent).try_for_each(sync_folder)
}

fn sync_folder(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

#[cfg(target_os = "linux")]
fn filesystem(dir: &Path) -> io::Result<i64> {
    use std::os::unix::ffi::OsStrExt;

    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    let mut facts = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `path` ends with a zero byte, and `facts` is valid for the write.
    if unsafe { libc::statfs(path.as_ptr(), facts.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled `facts`.
    Ok(unsafe { facts.assume_init() }.f_type)
}

/// Elsewhere kinds of filesystems have no numbers.
#[cfg(not(target_os = "linux"))]
fn filesystem(_: &Path) -> io::Result<i64> {
    Ok(0)
}

/// The name of a filesystem on which locks or shared memory do not hold between machines, from Linux' `magic.h`
/// and the projects' own headers.
fn network_filesystem(kind: i64) -> Option<&'static str> {
    Some(match kind {
        0x6969 => "NFS",
        0x517b => "SMB",
        0xff53_4d42 => "CIFS",
        0xfe53_4d42 => "SMB2",
        0x6573_5546 => "FUSE",
        0x0102_1997 => "9P",
        0x00c3_6400 => "Ceph",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x564c => "NCP",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_connection_waits_for_the_disk_and_checks_what_it_reads() {
        let (dir, world) = (tempfile::tempdir().unwrap(), World::default());
        let writer = open(dir.path(), &world).unwrap();
        let reader = open_reader(dir.path(), &world).unwrap();
        let beside = open_beside(dir.path(), &world).unwrap();
        for connection in [&writer, &reader, &beside] {
            let number = |name: &str| pragma::<i64>(connection, name).unwrap();
            assert_eq!((number("synchronous"), number("foreign_keys"), number("busy_timeout")), (2, 1, 5000));
            assert_eq!((number("cell_size_check"), number("trusted_schema")), (1, 0));
            assert_eq!(pragma::<String>(connection, "journal_mode").unwrap(), "wal");
            assert_eq!((number("application_id"), number("auto_vacuum")), (APPLICATION_ID, 2));
        }
        assert!(reader.execute_batch("DELETE FROM jobs").is_err(), "readers cannot write");
        // A connection that does not take a setting is not used.
        let memory = Connection::open_in_memory().unwrap();
        let error = configure(&memory).unwrap_err();
        assert!(error.message.contains("`journal_mode` is memory, expected wal"), "{error}");
    }

    #[test]
    fn the_filesystem_of_this_folder_is_known_and_only_network_filesystems_are_refused() {
        assert_ne!(filesystem(Path::new(".")).unwrap(), 0);
        assert_eq!(network_filesystem(0x6969), Some("NFS"));
        for (local, name) in
            [(0xef53, "ext4"), (0x5846_5342, "XFS"), (0x0102_1994, "tmpfs"), (0x794c_7630, "overlay")]
        {
            assert_eq!(network_filesystem(local), None, "{name}");
        }
    }
}
