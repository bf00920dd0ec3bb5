//! Power cuts: what a disk can hold afterwards is rebuilt from a record of what was written and synchronised,
//! and each such state is opened by the real store.
//!
//! After a cut, what was synchronised is there. Of what was written since, any part may be: a file's unsynchronised
//! writes are kept wholly, in part by sectors of 512 bytes, or not at all. Files come and go in order.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use handler::gateway::store::{Queue, Store, World};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::{Connection, OpenFlags};

use super::disk::{Disk, Event};
use super::{completed, folder, job, open, options, silent, taker};
use crate::support::is_long;

/// What the disk may hold at one moment.
#[derive(Default)]
struct Rebuilt {
    files: BTreeMap<String, File>,
    promises: BTreeMap<String, &'static str>,
}

#[derive(Clone, Default)]
struct File {
    synced: Vec<u8>,
    written: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

impl Rebuilt {
    fn follow(&mut self, event: &Event) {
        match event {
            // The store makes an empty database before SQLite opens it.
            Event::Create(name) => _ = self.files.entry(name.clone()).or_default(),
            Event::Delete(name) => _ = self.files.remove(name),
            Event::Write(name, offset, bytes) => {
                self.file(name).written.push(Change::Write(*offset, bytes.clone()));
            }
            Event::Truncate(name, len) => self.file(name).written.push(Change::Truncate(*len)),
            Event::Sync(name) => {
                let File { synced, written } = self.file(name);
                written.drain(..).for_each(|change| apply(synced, &change));
            }
            Event::Promise(job, status) => _ = self.promises.insert(job.clone(), status),
        }
    }

    fn file(&mut self, name: &str) -> &mut File {
        self.files.entry(name.to_string()).or_default()
    }

    /// Writes one state that a cut now could leave behind. Of unsynchronised sectors, `kept` survive.
    fn write(&self, dir: &Path, kept: f64, rng: &mut StdRng) {
        for (name, file) in &self.files {
            let mut bytes = file.synced.clone();
            for change in &file.written {
                match change {
                    Change::Truncate(_) if rng.random_bool(kept) => apply(&mut bytes, change),
                    Change::Truncate(_) => {}
                    Change::Write(offset, data) => {
                        for (sector, part) in data.chunks(512).enumerate() {
                            if rng.random_bool(kept) {
                                apply(&mut bytes, &Change::Write(offset + sector * 512, part.to_vec()));
                            }
                        }
                    }
                }
            }
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Truncate(len) => bytes.resize(*len, 0),
        Change::Write(offset, data) => {
            bytes.resize(bytes.len().max(offset + data.len()), 0);
            bytes[*offset..offset + data.len()].copy_from_slice(data);
        }
    }
}

/// What became of the promises over all states.
#[derive(Debug, Default)]
struct Verdict {
    promises: usize,
    /// Of jobs that are gone, or that are where they were before their promise.
    broken: usize,
    damaged: usize,
}

/// Cuts the power at `states` random moments.
fn cut(events: &[Event], states: usize, seed: u64) -> Verdict {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut moments: Vec<usize> = (0..states).map(|_| rng.random_range(1..=events.len())).collect();
    moments.sort_unstable();
    let (mut rebuilt, mut verdict, mut at) = (Rebuilt::default(), Verdict::default(), 0);
    for moment in moments {
        events[at..moment].iter().for_each(|event| rebuilt.follow(event));
        at = moment;
        let dir = folder();
        let kept = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
        rebuilt.write(dir.path(), kept, &mut rng);
        check(dir.path(), &rebuilt.promises, &mut verdict);
    }
    verdict
}

fn check(dir: &Path, promises: &BTreeMap<String, &'static str>, verdict: &mut Verdict) {
    verdict.promises += promises.len();
    let store = match Store::open(dir, options(), silent()) {
        Ok(store) => store,
        Err(error) => {
            verdict.damaged += 1;
            return eprintln!("{error}");
        }
    };
    let database = Connection::open(dir.join("jobs.db")).unwrap();
    let integrity: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    verdict.damaged += usize::from(integrity != "ok");
    for (id, promised) in promises {
        let stage = |status: &str| ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"].iter().position(|s| *s == status);
        let found = store.job(id).unwrap().and_then(|job| stage(job.status.as_str()));
        verdict.broken += usize::from(found < stage(promised));
    }
}

/// Clients that send jobs and a worker that makes some of them, each promise recorded as it is given.
async fn work(disk: &Arc<Disk>, store: &Store, jobs: usize) {
    let clients = (0..4).map(|client| {
        let (disk, store) = (disk.clone(), store.clone());
        tokio::spawn(async move {
            for n in 0..jobs / 4 {
                let id = format!("{client}-{n}");
                store.accept(job(&id)).await.unwrap();
                disk.promise(&id, "IN_QUEUE");
            }
        })
    });
    let worker = {
        let (disk, store) = (disk.clone(), store.clone());
        tokio::spawn(async move {
            let mut made = 0;
            while made < jobs / 2 {
                for lease in store.take(taker("w"), Queue::Talkie, 2).await.unwrap() {
                    disk.promise(&lease.id, "IN_PROGRESS");
                    assert!(store.finish(&lease.id, "w", completed()).await.unwrap());
                    disk.promise(&lease.id, "COMPLETED");
                    made += 1;
                }
                tokio::task::yield_now().await;
            }
        })
    };
    for task in clients.chain([worker]) {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_03_power_cut_loses_nothing_that_was_promised() {
    let (disk, dir) = (Disk::new(), folder());
    let world = World { vfs: Some(disk.name.clone()), ..World::default() };
    let store = Store::open_in(&world, dir.path(), options(), silent()).unwrap();
    work(&disk, &store, 400).await;
    store.close().await;
    let events = disk.events();
    let checkpoints =
        events.iter().filter(|event| matches!(event, Event::Sync(name) if name == "jobs.db")).count();
    assert!(checkpoints > 3, "the log is folded into the database while jobs come: {checkpoints}");
    let states = if is_long() { 5000 } else { 1000 };
    let verdict = tokio::task::spawn_blocking(move || cut(&events, states, 3)).await.unwrap();
    println!("{states} states: {verdict:?}");
    assert!(verdict.promises > 100 * states, "{verdict:?}");
    assert_eq!((verdict.broken, verdict.damaged), (0, 0), "{verdict:?}");
}

/// The same cuts find the losses of a database whose commits do not wait for the disk, so they can find ours.
#[test]
fn fault_03_power_cut_finds_losses_where_commits_do_not_wait() {
    let (disk, dir) = (Disk::new(), folder());
    drop(open(dir.path()));
    let made = std::fs::read(dir.path().join("jobs.db")).unwrap();
    let database = Connection::open_with_flags_and_vfs(
        dir.path().join("jobs.db"),
        OpenFlags::default(),
        disk.name.as_str(),
    )
    .unwrap();
    database.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL").unwrap();
    for n in 0..400 {
        let sql = "INSERT INTO jobs (id, endpoint, queue, status, low_priority, created_ms, expires_ms, \
                   execution_timeout_ms, request) VALUES (?1, 'e', 'talkie', 'IN_QUEUE', 0, 0, 1 << 60, 1000, '{}')";
        database.execute(sql, [format!("j{n}")]).unwrap();
        disk.promise(&format!("j{n}"), "IN_QUEUE");
    }
    let start = [
        Event::Create("jobs.db".to_string()),
        Event::Write("jobs.db".to_string(), 0, made),
        Event::Sync("jobs.db".to_string()),
    ];
    let verdict = cut(&[&start[..], &disk.events()].concat(), 100, 3);
    println!("{verdict:?}");
    assert!(verdict.broken > 0, "{verdict:?}");
    assert_eq!(verdict.damaged, 0, "without waiting there are losses, but no damage: {verdict:?}");
}
