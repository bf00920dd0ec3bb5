//! From nothing to a worker and back.

use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::tempdir;

use super::client::call;
use super::gateway::{Gateway, children, error_of, is_alive, job, job_with_policy, within};

#[test]
fn a_job_starts_a_worker_that_stays_warm_and_goes_when_idle() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("IDLE_TIMEOUT", "0.5")]);
    assert_eq!(gateway.children(), Vec::<u32>::new(), "nothing runs at rest");

    let first = gateway.success_of(&gateway.run(&job("instant")));
    let second = gateway.success_of(&gateway.run(&job("instant")));
    assert_eq!(first["workerId"], second["workerId"], "the worker stays warm");

    let url = first["output"]["video_url"].as_str().unwrap();
    let path = url.strip_prefix(&gateway.base).expect("the video is served here");
    let video = call(&gateway.base, ("GET", path), &[], b"").unwrap();
    assert_eq!((video.status, &video.body[4..8]), (200, &b"ftyp"[..]));

    gateway.until("no worker is left", || gateway.children().is_empty().then_some(()));
    assert_eq!(
        gateway.health()["workers"],
        json!({"idle": 0, "initializing": 0, "ready": 0, "running": 0, "throttled": 0, "unhealthy": 0})
    );
    let third = gateway.success_of(&gateway.run(&job("instant")));
    assert_ne!(first["workerId"], third["workerId"]);
    assert!(!gateway.log().contains("WARN"), "{}", gateway.log());
}

#[test]
fn as_many_workers_run_as_may_and_as_jobs_wait() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("MAX_WORKERS", "2"), ("IDLE_TIMEOUT", "0.5")]);
    let jobs: Vec<String> = (0..3).map(|_| gateway.run(&job("wait"))).collect();
    gateway.workers([0, 0, 2, 0]);
    assert_eq!(gateway.children().len(), 2);
    assert_eq!(gateway.status(&jobs[2])["status"], "IN_QUEUE");
    for job in &jobs {
        gateway.cancel(job);
    }
    gateway.until("no worker is left", || gateway.children().is_empty().then_some(()));
}

#[test]
fn one_worker_is_kept_warm_where_that_is_asked_for() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("MIN_WORKERS", "1"), ("IDLE_TIMEOUT", "0.1")]);
    gateway.workers([1, 0, 0, 0]);
    let warm = gateway.children();
    gateway.success_of(&gateway.run(&job("instant")));
    gateway.workers([1, 0, 0, 0]);
    assert_eq!(gateway.children(), warm, "the warm worker did the job and is still there");
    super::gateway::send_signal(warm[0], libc::SIGKILL);
    gateway.until("another is warm", || {
        let now = gateway.children();
        (now.len() == 1 && now != warm).then_some(())
    });
}

#[test]
fn a_job_of_low_priority_waits_for_a_worker_that_others_have_started() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("IDLE_TIMEOUT", "0.5")]);
    let patient = gateway.run(&job_with_policy("instant", json!({"lowPriority": true})));
    assert!(within(Duration::from_millis(500), || gateway.children().first().copied()).is_none());
    assert_eq!(gateway.status(&patient)["status"], "IN_QUEUE");
    gateway.success_of(&gateway.run(&job("instant")));
    gateway.success_of(&patient);
}

/// A worker that cannot start is not started over and over, and the gateway says why.
#[test]
fn workers_that_end_at_once_are_started_more_and_more_seldom() {
    let dir = tempdir().unwrap();
    // Where the worker keeps its results there is a file, so it ends at once.
    std::fs::write(dir.path().join("spool"), "").unwrap();
    let gateway = Gateway::start(dir.path(), &[("RESTART_PAUSE", "0.3")]);
    let waiting = gateway.run(&job("instant"));
    let began = Instant::now();
    let ends = || gateway.log().matches("ended with exit code").count();
    gateway.until("three workers have ended", || (ends() >= 3).then_some(()));
    // At once, then after 0.3 s.
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert!(gateway.log().contains("spool"), "what the worker printed is shown: {}", gateway.log());
    let view = gateway.status(&waiting);
    assert_eq!(view["status"], "IN_QUEUE", "{view}");
    assert!(view.get("error").is_none(), "clients take an error for the end: {view}");
    assert!(ends() <= 4, "it took three starts, not hundreds");
    // Whoever watches the gateway is told, and not only the sender.
    let ready = gateway.get("/readyz").json();
    let trouble = ready["trouble"].as_str().unwrap_or_else(|| panic!("{ready}"));
    assert!(ready["status"] == "ready" && trouble.contains("workers in a row") && trouble.contains("spool"));
    assert!(failures(&gateway) >= 3.0);
    // Once the reason is gone, the job runs.
    std::fs::remove_file(dir.path().join("spool")).unwrap();
    gateway.success_of(&waiting);
    assert_eq!(failures(&gateway), 0.0);
    assert_eq!(gateway.get("/readyz").json(), json!({"status": "ready"}));
}

/// The figure of workers that have ended in a row.
fn failures(gateway: &Gateway) -> f64 {
    let text = String::from_utf8(gateway.get("/metrics").body).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("talkie_worker_failures "));
    line.unwrap_or_else(|| panic!("no such figure:\n{text}")).parse().unwrap()
}

/// A job that kills its worker each time fails in the end, and the next one runs.
#[test]
fn fault_17_poison_job() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("MAX_ATTEMPTS", "3")]);
    let poison = gateway.run(&job("abort"));
    let view = gateway.end_of(&poison);
    assert_eq!((view["status"].as_str(), view["retries"].as_u64()), (Some("FAILED"), Some(2)), "{view}");
    let error = error_of(&view);
    assert_eq!(
        (error["code"].as_str(), error["retryable"].as_bool()),
        (Some("WORKER_LOST"), Some(true)),
        "{error}"
    );
    let said = error.to_string();
    assert!(said.contains("signal 6"), "how it died is said: {said}");
    assert!(said.contains("\\\"level\\\"") || said.contains("level"), "and what it printed: {said}");
    gateway.success_of(&gateway.run(&job("instant")));
}

/// A worker that asks to be replaced after its job is replaced.
#[test]
fn a_worker_that_asks_for_it_is_replaced() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("REFRESH_WORKER", "true")]);
    let first = gateway.success_of(&gateway.run(&job("instant")));
    let second = gateway.success_of(&gateway.run(&job("instant")));
    assert_ne!(first["workerId"], second["workerId"]);
}

#[test]
fn fault_31_gateway_killed() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    gateway.at_work(&gateway.run(&job("wait")));
    let workers = gateway.children();
    assert_eq!(workers.len(), 1);
    gateway.kill();
    let gone = within(Duration::from_secs(1), || (!is_alive(workers[0])).then_some(()));
    assert!(gone.is_some(), "the worker outlives its gateway");
    assert_eq!(children(workers[0]), Vec::<u32>::new());
}
