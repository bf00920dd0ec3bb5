//! `kill -9` at the store's kill points, in a child process: this test's own binary.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use handler::gateway::store::{Accepted, Idempotency, Queue, Store};
use handler::job::{Code, JobStatus};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;

use super::{completed, folder, job, open, options, silent, taker};
use crate::support::is_long;

/// What the child does, and in which folder.
const TASK: &str = "STORE_CHILD_TASK";
const DIR: &str = "STORE_CHILD_DIR";

/// Not a test of its own: what a child of the tests below runs.
#[tokio::test]
async fn child() {
    let (Ok(task), Ok(dir)) = (std::env::var(TASK), std::env::var(DIR)) else { return };
    let dir = Path::new(&dir);
    match task.as_str() {
        "accept" => _ = open(dir).accept(keyed("a")).await.unwrap(),
        "take" => _ = open(dir).take(taker("w"), Queue::Talkie, 1).await.unwrap(),
        "beat" => open(dir).beat("w", &["a".to_string()]),
        "finish" => _ = open(dir).finish("a", "w", completed()).await.unwrap(),
        "sweep" => {
            let mut options = options();
            options.retention = Duration::ZERO;
            _ = Store::open(dir, options, silent()).unwrap().sweep().await.unwrap();
        }
        "open" => drop(open(dir)),
        "close" => open(dir).close().await,
        "small files" => small_files(dir).await,
        "work" => work(dir).await,
        "hold" => hold(dir).await,
        other => panic!("no task {other}"),
    }
}

fn command(task: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "store::kills::child", "--nocapture"]).env(TASK, task).env(DIR, dir);
    command
}

/// Runs a child; whether it was killed.
fn run(task: &str, dir: &Path, kill_at: &str) -> bool {
    use std::os::unix::process::ExitStatusExt;

    let status = command(task, dir).env("KILL_AT", kill_at).output().unwrap().status;
    assert!(status.success() || status.signal() == Some(libc::SIGKILL), "{task} {kill_at}: {status}");
    !status.success()
}

fn keyed(id: &str) -> handler::gateway::store::NewJob {
    let mut job = job(id);
    job.webhook = Some("https://example.com/hook".to_string());
    job.idempotency = Some(Idempotency { key: "client/1".to_string(), body_hash: [1; 32] });
    job
}

#[tokio::test]
async fn fault_01_kill_before_the_commit_keeps_nothing_and_after_it_everything() {
    for (point, is_kept) in [("K3", false), ("K4", true)] {
        let dir = folder();
        assert!(run("accept", dir.path(), point), "{point}");
        let store = open(dir.path());
        assert_eq!(store.job("a").unwrap().is_some(), is_kept, "{point}");
        // The sender, who has no answer, sends it again.
        let again = store.accept(keyed("b")).await.unwrap();
        assert_eq!(again, if is_kept { Accepted::Same("a".to_string()) } else { Accepted::New });
        assert_eq!(store.waiting(&Queue::Talkie).0, 1, "{point}: one execution");
    }
}

#[tokio::test]
async fn fault_02_kill_around_the_end_of_a_job_never_ends_it_twice() {
    for (point, status) in [("K8", JobStatus::InProgress), ("K9", JobStatus::Completed)] {
        let dir = folder();
        let store = open(dir.path());
        store.accept(keyed("a")).await.unwrap();
        store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
        drop(store);
        assert!(run("beat", dir.path(), "K7"));
        assert!(run("finish", dir.path(), point), "{point}");
        let store = open(dir.path());
        assert_eq!(store.job("a").unwrap().unwrap().status, status, "{point}");
        // The worker, who has no answer, posts it again.
        assert_eq!(store.finish("a", "w", completed()).await.unwrap(), point == "K8");
        assert_eq!(store.job("a").unwrap().unwrap().status, JobStatus::Completed);
        assert_eq!(store.due_deliveries(9).unwrap().len(), 1, "{point}: and its webhook is due once");
    }
}

#[tokio::test]
async fn fault_02_kill_during_sweep_migration_and_checkpoint_leaves_a_sound_store() {
    let dir = folder();
    assert!(run("open", dir.path(), "K12"));
    let store = open(dir.path());
    for n in 0..1200 {
        let id = format!("j{n}");
        let mut job = job(&id);
        job.request = format!(r#"{{"input":"{}"}}"#, "x".repeat(8000));
        store.accept(job).await.unwrap();
        store.cancel(&id).await.unwrap();
    }
    drop(store);
    assert!(run("sweep", dir.path(), "K11:2"), "within the second batch");
    assert_eq!(count(dir.path()), 700);
    assert!(run("sweep", dir.path(), "K13"), "while space is given back");
    assert_eq!(count(dir.path()), 700, "the batch is undone with it");
    assert!(!run("sweep", dir.path(), "none"));
    assert_eq!(count(dir.path()), 0);
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    drop(store);
    assert!(run("close", dir.path(), "K13"));
    assert!(open(dir.path()).job("a").unwrap().is_some());
}

fn count(dir: &Path) -> i64 {
    let database = Connection::open(dir.join("jobs.db")).unwrap();
    let integrity: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(integrity, "ok");
    database.query_row("SELECT count(*) FROM jobs", [], |row| row.get(0)).unwrap()
}

#[test]
fn fault_04_store_disk_full_as_the_system_says_it() {
    let dir = folder();
    assert!(!run("small files", dir.path(), "none"));
    assert!(count(dir.path()) > 0);
}

/// The system refuses to let any file grow, as a quota does.
async fn small_files(dir: &Path) {
    let store = open(dir);
    let limit = libc::rlimit { rlim_cur: 256 * 1024, rlim_max: 256 * 1024 };
    // SAFETY: the limit is valid for the read; the signal is ignored, so that writes fail instead.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    let mut kept = 0;
    let error = loop {
        match store.accept(job(&format!("j{kept}"))).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
    };
    assert!(kept > 0);
    assert_eq!(error.code, Code::StoreFull, "{error}");
    assert!(store.job("j0").unwrap().is_some());
}

/// Accepts, starts and ends jobs until it is killed, and says so of each when it is promised.
async fn work(dir: &Path) {
    use std::io::Write;

    let store = open(dir);
    let run = std::process::id();
    let say =
        |what: &str, id: &str| std::io::stdout().write_all(format!("{what} {id}\n").as_bytes()).unwrap();
    for n in 0.. {
        let ids: Vec<String> = (0..4).map(|client| format!("{run}-{n}-{client}")).collect();
        futures::future::join_all(ids.iter().map(|id| async {
            store.accept(job(id)).await.unwrap();
            say("accepted", id);
        }))
        .await;
        let worker = format!("w{run}");
        for lease in store.take(taker(&worker), Queue::Talkie, 2).await.unwrap() {
            assert!(store.finish(&lease.id, &worker, completed()).await.unwrap());
            say("completed", &lease.id);
        }
    }
}

/// Kills working children at random moments, 25 times on each of several stores. What they had said must hold
/// after each kill.
#[test]
fn fault_01_kill_at_random_moments_loses_nothing_that_was_promised() {
    let stores = if is_long() { 40 } else { 1 };
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..stores {
        let dir = folder();
        let (mut accepted, mut completed) = (BTreeSet::new(), BTreeSet::new());
        for round in 0..25 {
            listen(dir.path(), rng.random_range(1..60), &mut accepted, &mut completed);
            let store = open(dir.path());
            let status = |id: &String| store.job(id).unwrap().map(|job| job.status);
            for id in &accepted {
                assert!(status(id).is_some(), "round {round}: {id} is lost");
            }
            for id in &completed {
                assert_eq!(status(id), Some(JobStatus::Completed), "round {round}: {id}");
            }
        }
        assert!(accepted.len() > 25 && completed.len() > 25, "{} {}", accepted.len(), completed.len());
        assert!(count(dir.path()) as usize >= accepted.len());
    }
}

/// Hears a working child's promises and kills it after so many.
fn listen(dir: &Path, mut left: u32, accepted: &mut BTreeSet<String>, completed: &mut BTreeSet<String>) {
    let mut child = command("work", dir).stdout(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stdout.take().unwrap());
    for line in said.lines().map(Result::unwrap) {
        match line.split_once(' ') {
            Some(("accepted", id)) => _ = accepted.insert(id.to_string()),
            Some(("completed", id)) => assert!(completed.insert(id.to_string()), "{id} ended twice"),
            // The test harness speaks too.
            _ => continue,
        }
        // What was said before the signal arrives is still read.
        left = left.saturating_sub(1);
        if left == 0 {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
}

/// Many jobs that wait cost the process little memory, since they are on the disk.
#[test]
fn fault_11_held_jobs_are_not_held_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let output = command("hold", dir.path()).output().unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn hold(dir: &Path) {
    let jobs = if is_long() { 100_000 } else { 10_000 };
    let store = open(dir);
    let before = resident_kib();
    let clients = (0..200).map(|client| {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 0..jobs / 200 {
                let mut job = job(&format!("{n}-{client}"));
                job.request = format!(r#"{{"input":{{"prompt":"{}"}}}}"#, "x".repeat(1000));
                store.accept(job).await.unwrap();
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let grown = resident_kib() - before;
    let opened = std::time::Instant::now();
    drop(store);
    let store = open(dir);
    println!("{jobs} jobs: {grown} KiB more, opened again in {:?}", opened.elapsed());
    assert_eq!(store.waiting(&Queue::Talkie).0, jobs);
    assert!(grown < 48 * 1024, "{grown} KiB for {jobs} jobs");
}

fn resident_kib() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
