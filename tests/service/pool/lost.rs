//! Workers and gateways that die with jobs in hand.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use tempfile::tempdir;

use super::client::call;
use super::gateway::{Gateway, job, send_signal, within};

/// The gateway dies while it accepts a job. Its sender has no answer, and sends it again: there is one job.
#[test]
fn fault_01_gateway_killed_while_it_accepts_a_job() {
    for point in ["K1", "K2", "K3", "K4", "K5"] {
        let dir = tempdir().unwrap();
        let mut gateway = Gateway::start(dir.path(), &[("KILL_AT", point)]);
        let headers = [("Content-Type", "application/json"), ("Idempotency-Key", "one")];
        let body = job("instant").to_string();
        let send =
            |gateway: &Gateway| call(&gateway.base, ("POST", "/v2/talkie/run"), &headers, body.as_bytes());
        assert!(send(&gateway).is_err(), "{point}");
        assert_eq!(gateway.ended().signal(), Some(libc::SIGKILL), "{point}");
        let gateway = Gateway::start(dir.path(), &[]);
        let ids = [send(&gateway), send(&gateway)].map(|reply| reply.unwrap().json()["id"].clone());
        assert_eq!(ids[0], ids[1], "{point}");
        gateway.success_of(ids[0].as_str().unwrap());
        let jobs = gateway.health()["jobs"].clone();
        let all: u64 = jobs.as_object().unwrap().values().filter_map(serde_json::Value::as_u64).sum();
        assert_eq!((jobs["completed"].as_u64(), all), (Some(1), 1), "{point}: {jobs}");
    }
}

/// A worker's death is seen at once, and its job runs again.
#[test]
fn fault_02_worker_killed_in_the_middle_of_a_job() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    let id = gateway.run(&job("steps 20"));
    let first = gateway.at_work(&id)["workerId"].clone();
    let killed = Instant::now();
    send_signal(gateway.children()[0], libc::SIGKILL);
    gateway.until("the job has left the dead worker", || {
        let view = gateway.status(&id);
        (view["status"] == "IN_QUEUE" || view["workerId"] != first).then_some(())
    });
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    let view = gateway.success_of(&id);
    assert_ne!(view["workerId"], first);
    assert_eq!(view["retries"], 1, "{view}");
}

/// A machine that is taken away tells its worker to end, in the middle of a job. The job is handed back at once and runs
/// elsewhere, and it is not counted: it has done nothing wrong.
#[test]
fn fault_63_a_job_of_a_preempted_worker_runs_elsewhere_and_counts_once() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("STOP_GRACE_SECONDS", "0.3"), ("MAX_ATTEMPTS", "1")]);
    let id = gateway.run(&job("wait"));
    let first = gateway.at_work(&id)["workerId"].clone();
    send_signal(gateway.children()[0], libc::SIGTERM);
    gateway.until("another worker is at work on it", || {
        let view = gateway.status(&id);
        let moved = view["workerId"].is_string() && view["workerId"] != first;
        (moved && view["output"]["stage"] == "denoise").then_some(())
    });
    let view = gateway.status(&id);
    assert!(view["status"] == "IN_PROGRESS" && view.get("retries").is_none(), "{view}");
    assert_eq!(gateway.cancel(&id)["status"], "CANCELLED");
}

/// The gateway dies with a job running. The next one runs it again, and it ends once.
#[test]
fn a_job_survives_the_gateway() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    let running = gateway.run(&job("steps 40"));
    gateway.at_work(&running);
    let queued = gateway.run(&job("instant"));
    gateway.kill();
    let gateway = Gateway::start(dir.path(), &[]);
    assert_eq!(gateway.success_of(&running)["retries"], 1);
    let view = gateway.success_of(&queued);
    assert!(view.get("retries").is_none(), "{view}");
}

/// The gateway dies while it writes a result, and its worker with it. The result lies in the worker's spool: the
/// next worker delivers it, and nothing is computed again.
#[test]
fn fault_02_gateway_killed_while_it_writes_a_result() {
    for point in ["K8", "K9"] {
        let dir = tempdir().unwrap();
        let mut gateway = Gateway::start(dir.path(), &[("KILL_AT", point)]);
        let id = gateway.run(&job("instant"));
        assert_eq!(gateway.ended().signal(), Some(libc::SIGKILL), "{point}");
        let gateway = Gateway::start(dir.path(), &[]);
        let view = gateway.success_of(&id);
        assert!(view.get("retries").is_none(), "{point}: {view}");
        assert!(view["output"]["video_url"].is_string(), "{point}: {view}");
    }
}

/// The gateway dies after it has leased a job, before the worker has it.
#[test]
fn fault_02_gateway_killed_between_lease_and_worker() {
    let dir = tempdir().unwrap();
    let mut gateway = Gateway::start(dir.path(), &[("KILL_AT", "K6")]);
    let id = gateway.run(&job("instant"));
    assert_eq!(gateway.ended().signal(), Some(libc::SIGKILL));
    let gateway = Gateway::start(dir.path(), &[]);
    assert_eq!(gateway.success_of(&id)["retries"], 1);
}

/// Wherever a worker dies, its job ends, and not twice. Each worker dies at the same point, so a job that has to
/// pass it again has had its last attempt with the second one.
#[test]
fn a_worker_may_die_at_any_point() {
    for (point, what, status, retries) in [
        ("K14", "instant", "FAILED", Some(1)),
        ("K16", "steps 3", "FAILED", Some(1)),
        // The video was kept: it is uploaded, and not made again.
        ("K19", "instant", "COMPLETED", Some(1)),
        ("K21", "instant", "FAILED", Some(1)),
        // The result was kept: it is delivered, and the job is not even taken again.
        ("K22", "instant", "COMPLETED", None),
        ("K23", "instant", "COMPLETED", None),
    ] {
        let dir = tempdir().unwrap();
        let gateway = Gateway::start(dir.path(), &[("KILL_AT", point), ("MAX_ATTEMPTS", "2")]);
        let id = gateway.run(&job(what));
        gateway.until("the worker has died", || gateway.log().contains("signal 9").then_some(()));
        let view = gateway.end_of(&id);
        assert_eq!(
            (view["status"].as_str(), view["retries"].as_u64()),
            (Some(status), retries),
            "{point}: {view}"
        );
    }
}

/// Only one gateway has a folder.
#[test]
fn fault_09_two_gateways_on_one_store() {
    let dir = tempdir().unwrap();
    let first = Gateway::start(dir.path(), &[]);
    let refused = match Gateway::try_start(dir.path(), &[]) {
        Ok(_) => panic!("a second gateway has the same store"),
        Err(log) => log,
    };
    let last = refused.lines().last().unwrap();
    let error: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {refused}"));
    assert!(error["message"].as_str().unwrap().contains("another gateway"), "{error}");
    first.success_of(&first.run(&job("instant")));
    first.kill();
    let second = within(Duration::from_secs(5), || Gateway::try_start(dir.path(), &[]).ok());
    assert!(second.is_some(), "the folder is free again");
}
