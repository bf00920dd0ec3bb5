//! Disks that are full, broken or elsewhere; files that are damaged, newer or in use; clocks that jump.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use handler::gateway::store::{Accepted, KeyRole, KeyStore, Outcome, Queue, Store, World};
use handler::job::{Code, JobError, JobStatus};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;

use super::disk::Disk;
use super::{HOUR, HandClock, completed, folder, job, loss, open, options, silent, taker};

fn open_on(disk: &Disk, dir: &Path) -> Store {
    let world = World { vfs: Some(disk.name.clone()), ..World::default() };
    Store::open_in(&world, dir, options(), silent()).unwrap()
}

fn reason(error: &JobError) -> &str {
    error.details.get("reason").and_then(|reason| reason.as_str()).unwrap_or_default()
}

fn integrity(dir: &Path) -> String {
    let database = Connection::open(dir.join("jobs.db")).unwrap();
    database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn fault_04_store_disk_full_refuses_reads_on_and_recovers() {
    let (disk, dir) = (Disk::new(), folder());
    let store = open_on(&disk, dir.path());
    disk.set_capacity(disk.used() + 512 * 1024);
    let mut kept = 0;
    let error = loop {
        match store.accept(job(&format!("j{kept}"))).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((error.code, error.retryable), (Code::StoreFull, true), "{error}");
    assert!(kept > 3, "{kept}");
    assert!(!store.healthy());
    for n in 0..kept {
        assert!(store.job(&format!("j{n}")).unwrap().is_some(), "reads go on");
    }
    assert_eq!(store.job(&format!("j{kept}")).unwrap().map(|job| job.id), None, "nothing half kept");
    assert_eq!(store.waiting(&Queue::Talkie).0, kept);
    disk.set_capacity(i64::MAX);
    store.sweep().await.unwrap();
    assert!(store.healthy());
    store.accept(job("after")).await.unwrap();
    drop(store);
    assert_eq!(integrity(dir.path()), "ok");
    assert_eq!(open(dir.path()).waiting(&Queue::Talkie).0, kept + 1);
}

#[tokio::test]
async fn fault_04_store_disk_full_for_a_large_job_is_not_so_for_its_neighbours() {
    let (disk, dir) = (Disk::new(), folder());
    let store = open_on(&disk, dir.path());
    disk.set_capacity(disk.used() + 512 * 1024);
    let mut large = job("large");
    large.request = format!(r#"{{"input":"{}"}}"#, "x".repeat(1 << 20));
    let (first, large, last) =
        tokio::join!(store.accept(job("first")), store.accept(large), store.accept(job("last")));
    assert_eq!((first.unwrap(), last.unwrap()), (Accepted::New, Accepted::New));
    assert_eq!(large.unwrap_err().code, Code::StoreFull);
    assert_eq!(store.waiting(&Queue::Talkie).0, 2);
}

#[tokio::test]
async fn fault_05_store_write_error_makes_the_store_unhealthy_until_a_write_works() {
    let (disk, dir) = (Disk::new(), folder());
    let store = open_on(&disk, dir.path());
    store.accept(job("a")).await.unwrap();
    store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
    assert!(store.healthy());
    disk.set_broken(true);
    let error = store.accept(job("b")).await.unwrap_err();
    assert_eq!((error.code, reason(&error), error.retryable), (Code::Internal, "STORE_IO", true));
    assert_eq!(reason(&store.finish("a", "w", completed()).await.unwrap_err()), "STORE_IO");
    assert!(!store.healthy());
    assert_eq!(store.job("a").unwrap().unwrap().status, JobStatus::InProgress, "reads go on");
    assert_eq!(store.counts("e").in_progress, 1, "and nothing is counted that was not written");
    assert_eq!(reason(&store.sweep().await.unwrap_err()), "STORE_IO");
    disk.set_broken(false);
    store.sweep().await.unwrap();
    assert!(store.healthy());
    assert!(store.finish("a", "w", completed()).await.unwrap(), "the result that was spooled comes again");
    drop(store);
    assert_eq!(integrity(dir.path()), "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_06_busy_store_is_refused_after_five_seconds_and_nothing_is_kept() {
    let dir = folder();
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    let other = Connection::open(dir.path().join("jobs.db")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let begun = Instant::now();
    let (b, c) = tokio::join!(store.accept(job("b")), store.accept(job("c")));
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(5) && waited < Duration::from_secs(20), "{waited:?}");
    for error in [b.unwrap_err(), c.unwrap_err()] {
        assert_eq!((error.code, reason(&error), error.retryable), (Code::Internal, "STORE_BUSY", true));
    }
    assert!(store.job("a").unwrap().is_some(), "reads go on");
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!((store.job("b").unwrap().is_some(), store.waiting(&Queue::Talkie).0), (false, 1));
    assert_eq!(store.accept(job("b")).await.unwrap(), Accepted::New);
}

#[test]
fn fault_07_network_filesystem_is_refused_before_anything_is_written() {
    for (kind, name) in [(0x6969, "NFS"), (0x6573_5546, "FUSE")] {
        let dir = folder();
        let nfs: fn(&Path) -> std::io::Result<i64> =
            if kind == 0x6969 { |_| Ok(0x6969) } else { |_| Ok(0x6573_5546) };
        let world = World { filesystem: nfs, ..World::default() };
        let error = Store::open_in(&world, dir.path(), options(), silent()).err().unwrap();
        assert_eq!(reason(&error), "STORE_ON_NETWORK");
        assert!(error.message.contains(name), "{error}");
        assert!(error.hint.unwrap().contains("--data-dir"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// A folder with a closed store of 300 jobs.
async fn filled() -> tempfile::TempDir {
    let dir = folder();
    let store = open(dir.path());
    for n in 0..300 {
        store.accept(job(&format!("j{n}"))).await.unwrap();
    }
    store.close().await;
    dir
}

#[tokio::test]
async fn fault_08_corrupt_store_is_refused_and_left_as_it_is() {
    let dir = filled().await;
    let path = dir.path().join("jobs.db");
    let sound = std::fs::read(&path).unwrap();
    let mut rng = StdRng::seed_from_u64(8);
    let mut refused = 0;
    for round in 0..120 {
        let mut bytes = sound.clone();
        match round {
            0 => bytes[..100].fill(0x5a),
            1 => bytes.truncate(sound.len() / 2),
            2 => bytes[4096..8192].fill(0),
            3 => bytes = b"not a database, whatever its name says".repeat(100),
            _ => {
                for _ in 0..1 << rng.random_range(0..8) {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                }
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        match Store::open(dir.path(), options(), silent()) {
            // A flip within a text changes nothing that can be checked; the store must work all the same.
            Ok(store) => {
                assert!(round > 3, "round {round}");
                let _ = store.accept(job("new")).await;
                let _ = store.recent("e", 1000);
            }
            Err(error) => {
                refused += 1;
                assert!(
                    ["STORE_CORRUPT", "STORE_SCHEMA"].contains(&reason(&error)),
                    "round {round}: {error:?}"
                );
                assert!(error.message.contains("jobs.db"), "{error}");
                assert!(error.hint.is_some());
                assert_eq!(std::fs::read(&path).unwrap(), bytes, "round {round}: the file is as it was");
            }
        }
        for beside in ["jobs.db-wal", "jobs.db-shm"] {
            let _ = std::fs::remove_file(dir.path().join(beside));
        }
    }
    assert!(refused > 40, "{refused}");
    std::fs::write(&path, &sound).unwrap();
    assert_eq!(open(dir.path()).waiting(&Queue::Talkie).0, 300);
}

#[tokio::test]
async fn fault_09_two_gateways_cannot_share_a_folder_but_keys_can_be_managed_beside_one() {
    let dir = folder();
    let keys = KeyStore::open(dir.path()).unwrap();
    let client = keys.create("k1", "laptop", KeyRole::Client, [1; 32]).unwrap();
    let store = open(dir.path());
    let error = Store::open(dir.path(), options(), silent()).err().unwrap();
    assert_eq!(reason(&error), "STORE_IN_USE");
    assert_eq!(store.key_by_hash(&[1; 32]).unwrap(), Some(client.clone()));
    let beside = KeyStore::open(dir.path()).unwrap();
    let worker = beside.create("k2", "gpu", KeyRole::Worker, [2; 32]).unwrap();
    assert_eq!(beside.create("k2", "again", KeyRole::Client, [3; 32]).unwrap_err().code, Code::InvalidInput);
    assert_eq!(store.key_by_hash(&[2; 32]).unwrap(), Some(worker), "no restart is needed");
    assert!(store.has_client_keys().unwrap());
    assert!(beside.revoke("k1").unwrap());
    assert!(!beside.revoke("k1").unwrap());
    assert!(!store.has_client_keys().unwrap());
    assert!(store.key_by_hash(&[1; 32]).unwrap().unwrap().revoked_ms.is_some());
    assert_eq!(store.key_by_hash(&[9; 32]).unwrap(), None);
    let names: Vec<String> = beside.list().unwrap().into_iter().map(|key| key.id).collect();
    assert_eq!(names, ["k1", "k2"]);
    store.accept(job("a")).await.unwrap();
    drop(store);
    assert!(open(dir.path()).job("a").unwrap().is_some(), "the folder is free again");
}

#[tokio::test]
async fn fault_10_newer_schema_is_refused_with_both_versions() {
    let dir = filled().await;
    let path = dir.path().join("jobs.db");
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
    let before = std::fs::read(&path).unwrap();
    for error in [
        Store::open(dir.path(), options(), silent()).err().unwrap(),
        KeyStore::open(dir.path()).err().unwrap(),
    ] {
        assert_eq!(reason(&error), "STORE_SCHEMA");
        assert!(error.message.contains("version 99") && error.message.contains("up to 1"), "{error}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// Databases of every schema version that was ever released are opened; each fixture stays for ever.
#[tokio::test]
async fn fault_10_every_older_schema_is_brought_up_to_date() {
    for fixture in [include_str!("../../golden/store/schema-1.sql")] {
        let dir = folder();
        let path = dir.path().join("jobs.db");
        Connection::open(&path).unwrap().execute_batch(fixture).unwrap();
        let store = open(dir.path());
        let done = store.job("done").unwrap().unwrap();
        assert_eq!(
            (done.status, done.output.as_deref()),
            (JobStatus::Completed, Some(r#"{"video_url":"u"}"#))
        );
        assert_eq!(store.counts("e").in_queue, 1);
        assert_eq!(store.due_deliveries(9).unwrap()[0].job.id, "done");
        assert_eq!(store.drain_chunks("running").await.unwrap(), ["1"]);
        assert_eq!(store.held_by("w").unwrap(), ["running"]);
        assert_eq!(store.key_by_hash(&[7; 32]).unwrap().unwrap().role, KeyRole::Worker);
        let leases = store.take(taker("w2"), Queue::Talkie, 9).await.unwrap();
        assert_eq!((leases.len(), leases[0].id.as_str()), (1, "waiting"));
    }
}

#[tokio::test]
async fn fault_14_clock_jumps_end_and_keep_nothing() {
    let (clock, dir) = (HandClock::new(), folder());
    let store = Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    for n in 0..20 {
        let mut job = job(&format!("j{n}"));
        (job.ttl, job.execution_timeout) = (Duration::from_secs(1800), 2 * HOUR);
        store.accept(job).await.unwrap();
    }
    assert_eq!(store.take(taker("w"), Queue::Talkie, 10).await.unwrap().len(), 10);
    for hours in [1, -2, 1, 24 * 365] {
        clock.jump(hours * HOUR.as_millis() as i64);
        let swept = store.sweep().await.unwrap();
        assert_eq!((swept.timed_out.len(), swept.lost.len(), swept.forgotten.len()), (0, 0, 0), "{hours}");
        assert_eq!(store.waiting(&Queue::Talkie).0, 10);
    }
    clock.jump(-24 * 365 * HOUR.as_millis() as i64);
    // Over a restart with the clock a quarter of an hour ahead: no attached worker's job is taken away at once.
    drop(store);
    clock.jump(HOUR.as_millis() as i64 / 4);
    let store = Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.timed_out.len(), swept.lost.len(), swept.forgotten.len()), (0, 0, 0));
    // What truly passes does count.
    clock.advance(Duration::from_secs(31));
    assert_eq!(store.sweep().await.unwrap().lost.len(), 10);
    clock.advance(Duration::from_secs(1800));
    assert_eq!(store.sweep().await.unwrap().forgotten.len(), 20);
}

#[tokio::test]
async fn fault_15_slow_worker_is_kept_by_beats_and_fenced_after_its_lease() {
    let (clock, dir) = (HandClock::new(), folder());
    let store = Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    store.accept(job("a")).await.unwrap();
    store.take(taker("slow"), Queue::Talkie, 1).await.unwrap();
    for _ in 0..10 {
        clock.advance(Duration::from_secs(25));
        store.beat("slow", &["a".to_string()]);
        assert!(store.sweep().await.unwrap().lost.is_empty());
    }
    clock.advance(Duration::from_secs(31));
    // Others cannot extend it.
    store.beat("other", &["a".to_string()]);
    let swept = store.sweep().await.unwrap();
    assert_eq!(swept.lost, [("a".to_string(), "slow".to_string())]);
    store.beat("slow", &["a".to_string()]);
    let lease = store.take(taker("next"), Queue::Talkie, 1).await.unwrap();
    assert_eq!((lease[0].id.as_str(), lease[0].attempt), ("a", 2));
    assert!(!store.finish("a", "slow", completed()).await.unwrap(), "the old fence is refused");
    assert!(!store.push_chunk("a", "slow", "1".to_string()).await.unwrap());
    assert_eq!(store.lose("a", "slow", loss("late")).await.unwrap(), None);
    assert!(store.finish("a", "next", completed()).await.unwrap());
    assert_eq!(store.job("a").unwrap().unwrap().worker.as_deref(), Some("next"));
}

/// One job, and everybody who can end it at once: its worker, its sender, its supervisor, the sweep.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_16_race_of_finish_cancel_loss_and_timeout_has_one_winner() {
    let (clock, dir) = (HandClock::new(), folder());
    let ends = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = ends.clone();
    let on_change = Box::new(move |id: &str, status: JobStatus| {
        if status.is_terminal() {
            log.lock().unwrap().push((id.to_string(), status));
        }
    });
    let mut options = options();
    options.max_attempts = 1;
    let store = Store::open_in(&clock.world(), dir.path(), options, on_change).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..200 {
        let id = format!("j{round}");
        store.accept(job(&id)).await.unwrap();
        store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
        clock.advance(Duration::from_secs(601));
        let racers = (0..4).map(|racer| {
            let (store, id) = (store.clone(), id.clone());
            tokio::spawn(async move {
                match (racer + round) % 4 {
                    0 => _ = store.finish(&id, "w", completed()).await.unwrap(),
                    1 => _ = store.cancel(&id).await.unwrap(),
                    2 => _ = store.lose(&id, "w", loss("gone")).await.unwrap(),
                    _ => _ = store.sweep().await.unwrap(),
                }
            })
        });
        for racer in racers.collect::<Vec<_>>() {
            racer.await.unwrap();
        }
        let status = store.job(&id).unwrap().unwrap().status;
        seen.insert(status.as_str());
        assert_eq!(std::mem::take(&mut *ends.lock().unwrap()), [(id.clone(), status)], "one end");
        assert!(!store.finish(&id, "w", Outcome::Failed("late".to_string())).await.unwrap());
        assert_eq!(store.cancel(&id).await.unwrap().unwrap().status, status, "which never changes");
    }
    assert_eq!(seen.len(), 4, "every racer has won sometimes: {seen:?}");
    let counts = store.counts("e");
    assert_eq!((counts.in_queue, counts.in_progress), (0, 0));
}
