//! Jobs that are ended from outside: cancelled, or out of time.

use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::tempdir;

use super::gateway::{Gateway, error_of, job, job_with_policy};

#[test]
fn a_cancel_ends_jobs_wherever_they_are_and_leaves_the_worker_warm() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    let running = gateway.run(&job("wait"));
    let worker = gateway.at_work(&running)["workerId"].clone();
    let queued = gateway.run(&job("instant"));
    for _ in 0..3 {
        assert_eq!(gateway.cancel(&queued), json!({"id": queued, "status": "CANCELLED"}));
    }
    for _ in 0..3 {
        assert_eq!(gateway.cancel(&running), json!({"id": running, "status": "CANCELLED"}));
    }
    let next = gateway.success_of(&gateway.run(&job("instant")));
    assert_eq!(next["workerId"], worker, "the worker that was freed takes the next job");
    for job in [&running, &queued] {
        let view = gateway.status(job);
        assert_eq!(view["status"], "CANCELLED", "{view}");
        assert!(view.get("output").is_none(), "{view}");
    }
}

#[test]
fn a_worker_that_does_not_stop_a_cancelled_job_is_replaced() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("CANCEL_GRACE_SECONDS", "0.5")]);
    let hung = gateway.run(&job("hang"));
    let worker = gateway.at_work(&hung)["workerId"].clone();
    let next = gateway.run(&job("instant"));
    assert_eq!(gateway.cancel(&hung)["status"], "CANCELLED");
    assert_ne!(gateway.success_of(&next)["workerId"], worker);
    assert!(gateway.log().contains("did not let go"), "{}", gateway.log());
    assert_eq!(gateway.status(&hung)["status"], "CANCELLED");
}

/// Row 59 of the matrix, and promise P6: the time holds although the job obeys nothing, and the next job runs.
#[test]
fn fault_59_hung_job_runs_out_of_time() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("CANCEL_GRACE_SECONDS", "0.5")]);
    let hung = gateway.run(&job_with_policy("hang", json!({"executionTimeout": 5000})));
    gateway.at_work(&hung);
    let next = gateway.run(&job("instant"));
    let began = Instant::now();
    let view = gateway.end_of(&hung);
    assert_eq!(view["status"], "TIMED_OUT", "{view}");
    assert!(began.elapsed() < Duration::from_secs(10), "5 s and 5 s more");
    assert_eq!(error_of(&view)["code"], "TIMEOUT");
    gateway.success_of(&next);
}
