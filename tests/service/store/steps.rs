//! The steps of a job, one by one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use handler::gateway::store::{Accepted, Idempotency, Loss, Outcome, Queue, Store, Taker};
use handler::job::{Code, JobStatus};
use serde_json::Value;

use super::{HOUR, HandClock, completed, folder, job, loss, open, options, silent, taker};

#[tokio::test]
async fn a_job_passes_from_acceptance_to_its_end_and_every_change_is_told_after_it_is_kept() {
    let dir = folder();
    let told = Arc::new(Mutex::new(Vec::new()));
    let log = told.clone();
    let on_change = Box::new(move |id: &str, status| log.lock().unwrap().push((id.to_string(), status)));
    let store = Store::open(dir.path(), options(), on_change).unwrap();
    assert_eq!(store.accept(job("a")).await.unwrap(), Accepted::New);
    store.accept(job("b")).await.unwrap();
    assert_eq!((store.position("a").unwrap(), store.position("b").unwrap()), (Some(0), Some(1)));
    assert!(store.request("a").unwrap().unwrap().contains("prompt"));
    let leases = store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
    assert_eq!((leases.len(), leases[0].id.as_str(), leases[0].attempt), (1, "a", 1));
    assert_eq!((store.position("a").unwrap(), store.position("b").unwrap()), (None, Some(0)));
    assert_eq!(store.held_by("w").unwrap(), ["a"]);
    for chunk in ["1", "2"] {
        assert!(store.push_chunk("a", "w", chunk.to_string()).await.unwrap());
        assert!(!store.push_chunk("a", "other", chunk.to_string()).await.unwrap());
    }
    assert_eq!(store.drain_chunks("a").await.unwrap(), ["1", "2"]);
    assert!(store.drain_chunks("a").await.unwrap().is_empty());
    assert!(!store.finish("a", "other", completed()).await.unwrap());
    assert!(store.finish("a", "w", completed()).await.unwrap());
    let done = store.job("a").unwrap().unwrap();
    assert_eq!((done.status, done.retries, done.worker.as_deref()), (JobStatus::Completed, 0, Some("w")));
    assert!(done.created_ms <= done.started_ms.unwrap() && done.started_ms <= done.finished_ms);
    assert_eq!(store.cancel("b").await.unwrap().unwrap().status, JobStatus::Cancelled);
    let recent = store.recent("e", 9).unwrap();
    assert_eq!(recent.iter().map(|job| job.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert!(store.recent("other", 9).unwrap().is_empty());
    assert!(store.job("c").unwrap().is_none() && store.cancel("c").await.unwrap().is_none());
    let expected = [
        ("a", JobStatus::InQueue),
        ("b", JobStatus::InQueue),
        ("a", JobStatus::InProgress),
        ("a", JobStatus::Completed),
        ("b", JobStatus::Cancelled),
    ];
    assert_eq!(*told.lock().unwrap(), expected.map(|(id, status)| (id.to_string(), status)));
}

#[tokio::test]
async fn the_same_key_with_the_same_body_is_the_same_job_for_a_day() {
    let (clock, dir) = (HandClock::new(), folder());
    let store = Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    let keyed = |id: &str, key: &str, body: u8| {
        let mut job = job(id);
        job.ttl = HOUR;
        job.idempotency = Some(Idempotency { key: key.to_string(), body_hash: [body; 32] });
        job
    };
    assert_eq!(store.accept(keyed("a", "k/1", 1)).await.unwrap(), Accepted::New);
    assert_eq!(store.accept(keyed("b", "k/1", 1)).await.unwrap(), Accepted::Same("a".to_string()));
    let conflict = store.accept(keyed("c", "k/1", 2)).await.unwrap_err();
    assert_eq!((conflict.code, conflict.code.http_status()), (Code::IdempotencyConflict, 409));
    assert_eq!(store.accept(keyed("d", "l/1", 2)).await.unwrap(), Accepted::New, "another API key's");
    // At once, in one group too.
    let (e, f) = tokio::join!(store.accept(keyed("e", "k/2", 1)), store.accept(keyed("f", "k/2", 1)));
    assert_eq!((e.unwrap(), f.unwrap()), (Accepted::New, Accepted::Same("e".to_string())));
    assert_eq!(store.waiting(&Queue::Talkie).0, 3);
    clock.advance(2 * HOUR);
    assert_eq!(store.sweep().await.unwrap().forgotten.len(), 3);
    assert_eq!(store.accept(keyed("g", "k/1", 1)).await.unwrap(), Accepted::Same("a".to_string()));
    clock.advance(23 * HOUR);
    store.sweep().await.unwrap();
    assert_eq!(store.accept(keyed("h", "k/1", 2)).await.unwrap(), Accepted::New);
}

#[tokio::test]
async fn above_the_limit_jobs_are_refused_and_not_kept() {
    let dir = folder();
    let mut few = options();
    few.max_queued = 2;
    let store = Store::open(dir.path(), few, silent()).unwrap();
    let (a, b, c) = tokio::join!(store.accept(job("a")), store.accept(job("b")), store.accept(job("c")));
    assert_eq!((a.unwrap(), b.unwrap()), (Accepted::New, Accepted::New));
    let error = c.unwrap_err();
    assert_eq!((error.code, error.code.http_status(), error.retryable), (Code::QueueFull, 503, true));
    assert!(store.job("c").unwrap().is_none());
    store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
    assert_eq!(store.accept(job("c")).await.unwrap(), Accepted::New);
}

#[tokio::test]
async fn an_id_that_is_taken_is_refused_alone() {
    let dir = folder();
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    let keyed = |id: &str| {
        let mut job = job(id);
        job.idempotency = Some(Idempotency { key: "k/1".to_string(), body_hash: [1; 32] });
        job
    };
    let (b, again, c) =
        tokio::join!(store.accept(job("b")), store.accept(keyed("a")), store.accept(job("c")));
    assert_eq!((b.unwrap(), c.unwrap()), (Accepted::New, Accepted::New));
    assert_eq!(again.unwrap_err().code, Code::Internal);
    assert_eq!(store.waiting(&Queue::Talkie).0, 3);
    assert_eq!(
        store.accept(keyed("d")).await.unwrap(),
        Accepted::New,
        "nothing of it is left, its key neither"
    );
}

#[tokio::test]
async fn a_job_that_loses_every_worker_fails_with_all_of_them_and_the_last_log() {
    let dir = folder();
    let store = open(dir.path());
    let mut poison = job("a");
    poison.webhook = Some("https://example.com".to_string());
    store.accept(poison).await.unwrap();
    store.accept(job("b")).await.unwrap();
    for attempt in 1..=3 {
        let worker = format!("w{attempt}");
        let lease = &store.take(taker(&worker), Queue::Talkie, 1).await.unwrap()[0];
        assert_eq!((lease.id.as_str(), lease.attempt), ("a", attempt), "it keeps its place");
        assert!(store.push_chunk("a", &worker, "half".to_string()).await.unwrap());
        let status = store.lose("a", &worker, loss(&format!("signal {attempt}"))).await.unwrap();
        assert_eq!(status, Some(if attempt < 3 { JobStatus::InQueue } else { JobStatus::Failed }));
        assert!(store.drain_chunks("a").await.unwrap().is_empty(), "a new attempt begins anew");
    }
    let failed = store.job("a").unwrap().unwrap();
    assert_eq!(failed.retries, 2);
    let error: Value = serde_json::from_str(&failed.error.unwrap()).unwrap();
    assert_eq!((error["code"].as_str(), error["worker_id"].as_str()), (Some("WORKER_LOST"), Some("w3")));
    let attempts = error["details"]["attempts"].as_array().unwrap();
    let of = |field: &str| attempts.iter().map(|a| a[field].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(
        (of("worker"), of("reason")),
        (vec!["w1", "w2", "w3"], vec!["signal 1", "signal 2", "signal 3"])
    );
    assert!(of("at").iter().all(|at| at.starts_with("20") && at.ends_with('Z')), "{attempts:?}");
    assert_eq!(error["details"]["log_tail"], "log of signal 3");
    assert_eq!(store.due_deliveries(9).unwrap().len(), 1);
    assert_eq!((store.counts("e").failed, store.counts("e").retried), (1, 2));
}

#[tokio::test]
async fn a_job_that_is_given_back_has_lost_no_attempt() {
    let dir = folder();
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    for round in 0..9 {
        let lease = &store.take(taker(&format!("w{round}")), Queue::Talkie, 1).await.unwrap()[0];
        assert_eq!(lease.attempt, 1);
        let back = Loss { counts: false, ..loss("preempted") };
        let status = store.lose("a", &format!("w{round}"), back).await.unwrap();
        assert_eq!(status, Some(JobStatus::InQueue));
        assert!(!store.finish("a", &format!("w{round}"), completed()).await.unwrap(), "it was not begun");
    }
    assert_eq!(store.job("a").unwrap().unwrap().started_ms, None);
}

#[tokio::test]
async fn a_result_that_a_lost_worker_left_behind_counts_while_the_job_waits() {
    let dir = folder();
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    store.accept(job("b")).await.unwrap();
    for lease in store.take(taker("w1"), Queue::Talkie, 2).await.unwrap() {
        store.lose(&lease.id, "w1", loss("killed")).await.unwrap();
    }
    assert!(store.finish("a", "w2", completed()).await.unwrap());
    assert_eq!(store.job("a").unwrap().unwrap().status, JobStatus::Completed);
    assert_eq!(store.take(taker("w3"), Queue::Talkie, 9).await.unwrap()[0].id, "b");
    assert!(!store.finish("b", "w2", completed()).await.unwrap(), "it runs again, elsewhere");
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_given_back() {
    let dir = folder();
    let store = open(dir.path());
    store.accept(job("a")).await.unwrap();
    loop {
        let mut take = Box::pin(store.take(taker("gone"), Queue::Talkie, 1));
        if futures::poll!(&mut take).is_pending() {
            break;
        }
        // The store was quicker than this thread: once more.
        store.lose("a", "gone", Loss { counts: false, ..loss("too quick") }).await.unwrap();
    }
    // Both are behind the first take and what follows from it.
    store.sweep().await.unwrap();
    store.sweep().await.unwrap();
    assert_eq!(store.take(taker("w"), Queue::Talkie, 1).await.unwrap()[0].attempt, 1);
}

#[tokio::test]
async fn a_retry_by_the_sender_begins_anew_at_the_end_of_the_queue() {
    let dir = folder();
    let store = open(dir.path());
    let mut first = job("a");
    first.webhook = Some("https://example.com".to_string());
    store.accept(first).await.unwrap();
    store.accept(job("b")).await.unwrap();
    let error = store.retry("a").await.unwrap_err();
    assert_eq!((error.code, error.details["reason"].as_str()), (Code::InvalidInput, Some("NOT_RETRYABLE")));
    store.take(taker("w"), Queue::Talkie, 1).await.unwrap();
    assert!(store.push_chunk("a", "w", "half".to_string()).await.unwrap());
    store.finish("a", "w", Outcome::Failed("no".to_string())).await.unwrap();
    assert_eq!(store.due_deliveries(9).unwrap().len(), 1);
    let again = store.retry("a").await.unwrap().unwrap();
    assert_eq!((again.status, again.error, again.worker, again.retries), (JobStatus::InQueue, None, None, 0));
    assert!(store.due_deliveries(9).unwrap().is_empty());
    assert!(store.drain_chunks("a").await.unwrap().is_empty());
    let leases = store.take(taker("w"), Queue::Talkie, 9).await.unwrap();
    assert_eq!(leases.iter().map(|l| l.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert!(store.finish("a", "w", completed()).await.unwrap());
    assert_eq!(store.due_deliveries(9).unwrap().len(), 1, "its new end is told");
    assert!(store.retry("none").await.unwrap().is_none());
}

#[tokio::test]
async fn keys_to_the_senders_storage_are_gone_when_the_job_has_ended() {
    let dir = folder();
    let store = open(dir.path());
    let ends = ["finish", "fail", "cancel", "purge"];
    for id in ends {
        let mut job = job(id);
        job.request = r#"{"input":{"x":"\"s3Config\""},"s3Config":{"accessSecret":"canary-4711"},"n":1.50}"#
            .to_string();
        store.accept(job).await.unwrap();
    }
    let leases = store.take(taker("w"), Queue::Talkie, 2).await.unwrap();
    assert!(leases[0].request.contains("canary-4711"), "the worker needs them");
    store.finish("finish", "w", completed()).await.unwrap();
    store.finish("fail", "w", Outcome::Failed("no".to_string())).await.unwrap();
    store.cancel("cancel").await.unwrap();
    assert_eq!(store.purge("e").await.unwrap(), 1);
    for id in ends {
        let request = store.request(id).unwrap().unwrap();
        assert_eq!(request, r#"{"input":{"x":"\"s3Config\""},"s3Config":"[erased]","n":1.50}"#);
    }
    let error = store.retry("fail").await.unwrap_err();
    assert!(error.message.contains("s3Config"), "{error}");
    store.close().await;
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(11).any(|part| part == b"canary-4711"), "nowhere on the disk");
    }
}

#[tokio::test]
async fn queues_are_apart_and_endpoints_are_counted_apart() {
    let dir = folder();
    let store = open(dir.path());
    let foreign = Queue::Endpoint("sdk".to_string());
    for (id, endpoint, queue, low_priority) in [
        ("a", "e", Queue::Talkie, false),
        ("b", "f", Queue::Talkie, true),
        ("c", "sdk", foreign.clone(), false),
    ] {
        let mut job = job(id);
        (job.endpoint, job.queue, job.low_priority) = (endpoint.to_string(), queue, low_priority);
        store.accept(job).await.unwrap();
    }
    assert_eq!((store.waiting(&Queue::Talkie), store.waiting(&foreign)), ((2, 1), (1, 1)));
    assert_eq!(store.take(taker("sdk"), foreign.clone(), 9).await.unwrap().len(), 1);
    assert!(store.take(taker("sdk"), foreign, 9).await.unwrap().is_empty());
    let taken = store.take(taker("w"), Queue::Talkie, 9).await.unwrap();
    assert_eq!(
        taken.iter().map(|l| l.id.as_str()).collect::<Vec<_>>(),
        ["a", "b"],
        "first come, first served"
    );
    assert_eq!((store.counts("e").in_progress, store.counts("sdk").in_progress), (1, 1));
    assert_eq!(store.counts("none"), Default::default());
}

#[tokio::test]
async fn a_purge_ends_what_waits_under_its_endpoint_and_nothing_else() {
    let dir = folder();
    let store = open(dir.path());
    for n in 0..1300 {
        let mut job = job(&format!("j{n}"));
        job.endpoint = if n % 2 == 0 { "e" } else { "f" }.to_string();
        store.accept(job).await.unwrap();
    }
    store.take(taker("w"), Queue::Talkie, 2).await.unwrap();
    assert_eq!(store.purge("e").await.unwrap(), 649);
    assert_eq!(store.purge("e").await.unwrap(), 0);
    assert_eq!((store.counts("e").in_progress, store.counts("f").in_queue), (1, 649));
    assert_eq!(store.position("j5").unwrap(), Some(1));
    assert_eq!(store.job("j2").unwrap().unwrap().status, JobStatus::Cancelled);
}

#[tokio::test]
async fn time_ends_jobs_that_run_too_long_and_forgets_old_ones() {
    let (clock, dir) = (HandClock::new(), folder());
    let store = Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    for (id, timeout, ttl) in
        [("slow", 60, 7200), ("stuck", 7200, 3600), ("waits", 60, 3600), ("kept", 60, 3600)]
    {
        let mut job = job(id);
        (job.execution_timeout, job.ttl) = (Duration::from_secs(timeout), Duration::from_secs(ttl));
        store.accept(job).await.unwrap();
    }
    store.take(taker("w"), Queue::Talkie, 2).await.unwrap();
    store.set_ttl("kept", 9 * HOUR).await.unwrap();
    store.set_ttl("none", HOUR).await.unwrap();
    let beat = |seconds| {
        clock.advance(Duration::from_secs(seconds));
        store.beat("w", &["slow".to_string(), "stuck".to_string()]);
    };
    (0..3).for_each(|_| beat(20));
    let swept = store.sweep().await.unwrap();
    assert_eq!(swept.timed_out, [("slow".to_string(), "w".to_string())]);
    assert!(swept.lost.is_empty() && swept.forgotten.is_empty());
    let slow = store.job("slow").unwrap().unwrap();
    assert_eq!(slow.status, JobStatus::TimedOut);
    assert!(slow.error.unwrap().contains("execution timeout of 60 s"));
    (0..(3540 / 20)).for_each(|_| beat(20));
    let mut forgotten = store.sweep().await.unwrap().forgotten;
    forgotten.sort();
    let worker = Some("w".to_string());
    assert_eq!(forgotten, [("stuck".to_string(), worker), ("waits".to_string(), None)]);
    assert!(store.job("stuck").unwrap().is_none() && !store.finish("stuck", "w", completed()).await.unwrap());
    assert_eq!((store.counts("e").in_queue, store.counts("e").in_progress), (1, 0));
    clock.advance(HOUR);
    assert_eq!(store.sweep().await.unwrap().forgotten, [("slow".to_string(), None)], "its ttl, final or not");
    // A finished job is kept for the retention, where its ttl is longer.
    store.set_ttl("kept", 999 * HOUR).await.unwrap();
    store.cancel("kept").await.unwrap();
    clock.advance(23 * HOUR);
    assert!(store.sweep().await.unwrap().forgotten.is_empty());
    clock.advance(HOUR);
    assert_eq!(store.sweep().await.unwrap().forgotten, [("kept".to_string(), None)]);
    assert_eq!(store.counts("e").failed, 1, "what was counted stays counted");
}

#[tokio::test]
async fn a_webhook_is_due_until_it_is_delivered_over_a_restart_too() {
    let (clock, dir) = (HandClock::new(), folder());
    let open = || Store::open_in(&clock.world(), dir.path(), options(), silent()).unwrap();
    let store = open();
    let mut hooked = job("a");
    hooked.webhook = Some("https://example.com/hook".to_string());
    store.accept(hooked).await.unwrap();
    assert!(store.due_deliveries(9).unwrap().is_empty());
    store.cancel("a").await.unwrap();
    drop(store);
    let store = open();
    let due = &store.due_deliveries(9).unwrap()[0];
    assert_eq!((due.job.id.as_str(), due.tries, due.job.status), ("a", 0, JobStatus::Cancelled));
    assert_eq!(due.job.webhook.as_deref(), Some("https://example.com/hook"));
    assert!(due.request.contains("prompt"));
    store.record_delivery("a", Some(Duration::from_secs(10))).await.unwrap();
    assert!(store.due_deliveries(9).unwrap().is_empty());
    clock.advance(Duration::from_secs(10));
    assert_eq!(store.due_deliveries(9).unwrap()[0].tries, 1);
    store.record_delivery("a", None).await.unwrap();
    assert!(store.due_deliveries(9).unwrap().is_empty());
}

#[tokio::test]
async fn a_restart_keeps_everything_and_gives_the_jobs_of_dead_workers_to_others() {
    let dir = folder();
    let store = open(dir.path());
    for id in ["ours", "theirs", "waits", "done"] {
        store.accept(job(id)).await.unwrap();
    }
    let ours = Taker { worker: "spawned".to_string(), spawned: true };
    store.take(ours, Queue::Talkie, 1).await.unwrap();
    store.take(taker("attached"), Queue::Talkie, 1).await.unwrap();
    store.push_chunk("theirs", "attached", "1".to_string()).await.unwrap();
    store.cancel("done").await.unwrap();
    store.close().await;
    let error = store.accept(job("late")).await.unwrap_err();
    assert_eq!(error.details["reason"], "STORE_CLOSED");
    assert!(store.job("ours").is_err());
    drop(store);
    let store = open(dir.path());
    let counts = store.counts("e");
    assert_eq!((counts.in_queue, counts.in_progress), (2, 1));
    assert_eq!(store.job("ours").unwrap().unwrap().status, JobStatus::InQueue);
    assert_eq!((store.position("ours").unwrap(), store.position("waits").unwrap()), (Some(0), Some(1)));
    assert_eq!(store.drain_chunks("theirs").await.unwrap(), ["1"]);
    assert!(store.finish("theirs", "attached", completed()).await.unwrap(), "its worker lives");
    assert_eq!(store.take(taker("w"), Queue::Talkie, 1).await.unwrap()[0].attempt, 2);
    drop(store);
    let counts = open(dir.path()).counts("e");
    assert_eq!((counts.completed, counts.retried, counts.in_progress), (1, 1, 1));
}

#[tokio::test]
async fn a_job_that_takes_the_gateway_with_it_is_not_started_for_ever() {
    let dir = folder();
    open(dir.path()).accept(job("a")).await.unwrap();
    for attempt in 1..=3 {
        let store = open(dir.path());
        let spawned = Taker { worker: format!("w{attempt}"), spawned: true };
        assert_eq!(store.take(spawned, Queue::Talkie, 1).await.unwrap()[0].attempt, attempt);
    }
    let store = open(dir.path());
    assert_eq!(store.job("a").unwrap().unwrap().status, JobStatus::Failed);
    assert_eq!(store.counts("e").failed, 1);
}
