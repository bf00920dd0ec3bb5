//! What RunPod's Python worker was seen to do, and what ours does in its place: the same, or better where
//! `docs/RUNPOD-WORKER.md` says so. Each test is named after its scenario there.

use std::time::Duration;

use handler::runpod::worker::Ending;
use serde_json::json;

use super::platform::{Answer, job};
use super::rig::Rig;

fn is_take(request: &super::platform::Request) -> bool {
    request.route().starts_with("job-take")
}

#[test]
fn basic() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.take(Answer::json(&json!({
        "id": "job-1-u1", "input": {"prompt": "fault: instant"}, "webhook": "https://example.com/hook",
        "policy": {"executionTimeout": 5000}, "batchId": "batch-7", "extra": {"k": [1]},
    })));
    let end = rig.platform.wait_for_end("job-1-u1");
    assert_eq!(end.target, "/v2/ep1/job-done/pod1/job-1-u1?gpu=NVIDIA+A40&isStream=false");
    assert_eq!(end.json()["output"]["video_url"], "https://videos/job-1-u1");
    for (name, value) in [
        ("authorization", "worker-key-123"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("charset", "utf-8"),
        ("x-request-id", "job-1-u1"),
        ("user-agent", concat!("talkie/", env!("CARGO_PKG_VERSION"))),
    ] {
        assert_eq!(end.header(name), Some(value), "{name}");
    }
    let takes = rig.platform.wait_for(2, is_take);
    assert_eq!(takes[0].target, "/v2/ep1/job-take/pod1?gpu=NVIDIA+A40&job_in_progress=0");
    assert_eq!(takes[0].header("content-type"), Some("application/json"));
    assert_eq!(takes[1].header("x-request-id"), None, "the Python worker's takes carry the last job's");
    let stop = rig.platform.wait_for(1, |request| request.route() == "job-stop").remove(0);
    assert_eq!(stop.target, "/v2/ep1/job-stop/pod1?gpu=NVIDIA+A40");
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!(rig.spooled("results"), 0);
}

#[test]
fn batch_malformed_element() {
    let rig = Rig::new();
    let working = rig.work();
    let input = job("good", "instant")["input"].clone();
    rig.platform.take(Answer::json(&json!([{"input": input}, 7, {"id": "empty"}, job("good", "instant")])));
    rig.platform.wait_for_end("good");
    let error = rig.platform.wait_for_end("empty").error();
    assert_eq!(
        (error["code"].as_str(), error["message"].as_str()),
        (Some("INVALID_INPUT"), Some("the job has no `input`"))
    );
    assert_eq!(rig.ran(), ["good"]);
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn big_output_25mb() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("big", "big");
    let end = rig.platform.wait_for_end("big");
    assert!(end.body.len() < 10_000, "{}", end.body.len());
    assert_eq!(end.error()["details"]["reason"], "RESULT_TOO_LARGE");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn concurrency() {
    let mut rig = Rig::new();
    rig.settings.slots = 4;
    let working = rig.work();
    rig.platform.take(Answer::json(&json!([job("c0", "hold"), job("c1", "hold"), job("c2", "hold")])));
    let held = rig.platform.wait_for(1, |request| request.target.contains("job_id=c0%2Cc1%2Cc2"));
    assert_eq!(held[0].route(), "ping");
    let takes = rig.platform.wait_for(2, is_take);
    assert_eq!(takes[0].target, "/v2/ep1/job-take-batch/pod1?gpu=NVIDIA+A40&batch_size=4&job_in_progress=0");
    assert_eq!(takes[1].target, "/v2/ep1/job-take/pod1?gpu=NVIDIA+A40&job_in_progress=1");
    for ended in 1..=3 {
        rig.script.release();
        rig.platform.wait_for(ended, |request| request.is_end());
    }
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn done_failures() {
    let rig = Rig::new();
    let working = rig.work();
    let failures = [
        vec![Answer::status(500); 2],
        vec![Answer::status(500); 9],
        vec![Answer::Reply(429, "Retry-After: 0".into(), String::new())],
        vec![Answer::HangUp; 3],
        vec![Answer::status(408)],
        vec![Answer::status(302)],
        vec![Answer::status(204)],
    ];
    for (i, failures) in failures.into_iter().enumerate() {
        let id = format!("j{i}");
        let attempts = failures.len() + usize::from(!matches!(failures[0], Answer::Reply(204, ..)));
        failures.into_iter().for_each(|failure| rig.platform.end(failure));
        rig.platform.job(&id, "instant");
        let ends = rig.platform.wait_for(attempts, |request| request.is_end() && request.id() == id);
        assert!(ends.iter().all(|end| end.body == ends[0].body), "{ends:?}");
    }
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!((rig.spooled("results"), rig.spooled("rejected"), rig.ran().len()), (0, 0, 7));
}

#[test]
fn duplicate_job_id() {
    let mut rig = Rig::new();
    rig.settings.slots = 3;
    let working = rig.work();
    rig.platform.take(Answer::json(&json!([job("same", "hold"), job("same", "hold")])));
    rig.platform.wait_for(1, |request| request.target.contains("job_id=same&"));
    rig.script.release();
    rig.platform.wait_for_end("same");
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!(rig.ran(), ["same"]);
    assert_eq!(rig.platform.seen(|request| request.is_end()).len(), 1);
}

#[test]
fn handler_exception() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("bad", "bad");
    let end = rig.platform.wait_for_end("bad");
    let error = end.error();
    for (field, value) in [
        ("code", json!("EMPTY_AUDIO")),
        ("message", json!("`audio` is empty")),
        ("retryable", json!(false)),
        ("error_type", json!("EMPTY_AUDIO")),
        ("error_message", json!("`audio` is empty")),
        ("hostname", json!("host1")),
        ("worker_id", json!("pod1")),
        ("error_traceback", json!("")),
    ] {
        assert_eq!(error[field], value, "{field}");
    }
    assert!(error["runpod_version"].is_string() && end.json().get("output").is_none());
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn handler_sys_exit() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("panics", "panic");
    let error = rig.platform.wait_for_end("panics").error();
    assert_eq!(error["code"], "INTERNAL");
    rig.platform.job("next", "instant");
    rig.platform.wait_for_end("next");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn no_pod_id() {
    let mut rig = Rig::new();
    rig.variables.remove("RUNPOD_POD_ID");
    let working = rig.work();
    rig.platform.job("a", "instant");
    let end = rig.platform.wait_for_end("a");
    let worker = end.target.split('/').nth(4).unwrap().to_string();
    assert!(worker.starts_with("w-"), "{worker}");
    assert!(rig.platform.seen(is_take)[0].target.contains(&worker));
    let ping = rig.platform.wait_for(1, |request| request.route() == "ping").remove(0);
    assert_eq!(ping.id(), worker, "the Python worker sends no heartbeat without a pod id");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn ping_503() {
    let rig = Rig::new();
    rig.platform.pings(Answer::status(503));
    let working = rig.work();
    rig.platform.job("a", "hold");
    let pings = rig.platform.wait_for(3, |request| request.target.contains("job_id=a&"));
    assert!(pings[0].target.starts_with("/v2/ep1/ping/pod1?gpu=NVIDIA+A40&job_id=a&runpod_version=talkie-"));
    assert_eq!(pings[0].header("authorization"), Some("worker-key-123"));
    rig.script.release();
    rig.platform.wait_for_end("a");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn progress() {
    let mut rig = Rig::new();
    // No report waits: whatever comes after the first is replaced before it can be sent.
    rig.settings.progress_interval = Duration::from_secs(3600);
    let working = rig.work();
    for id in ["r0", "r1", "r2", "r3"] {
        rig.platform.job(id, "steps");
        rig.platform.wait_for_end(id);
        let posts = rig.platform.seen(|request| request.route() == "job-done" && request.id() == id);
        assert!(posts.len() <= 2, "five reports at once become one at most: {posts:?}");
        assert!(posts[posts.len() - 1].is_end());
    }
    rig.platform.job("h", "hold");
    let is_report = |request: &super::platform::Request| request.route() == "job-done" && !request.is_end();
    let reports = rig.platform.wait_for(1, |request| is_report(request) && request.id() == "h");
    assert_eq!(reports[0].target, "/v2/ep1/job-done/pod1/h?gpu=NVIDIA+A40&isStream=false");
    let report = reports[0].json();
    assert_eq!((&report["status"], &report["output"]["stage"]), (&json!("IN_PROGRESS"), &json!("denoise")));
    rig.script.release();
    rig.platform.wait_for_end("h");
    assert_eq!(working.end(), Ending::Stopped);
    // Nothing came after an end.
    let posts = rig.platform.seen(|request| request.route() == "job-done");
    for (i, end) in posts.iter().enumerate().filter(|(_, post)| post.is_end()) {
        assert!(posts[i + 1..].iter().all(|later| later.id() != end.id()), "{posts:?}");
    }
}

#[test]
fn progress_that_is_on_its_way_arrives_before_the_end() {
    let rig = Rig::new();
    rig.platform.reports_wait(true);
    let working = rig.work();
    rig.platform.job("a", "hold");
    rig.platform.wait_for(1, |request| request.route() == "job-done");
    rig.script.release();
    // The job has ended when a further take is open; two heartbeats later its end would have come.
    rig.platform.wait_for(2, is_take);
    let pings = |request: &super::platform::Request| request.route() == "ping";
    rig.platform.wait_for(rig.platform.seen(pings).len() + 2, pings);
    let answered = std::time::Instant::now();
    rig.platform.reports_wait(false);
    assert!(rig.platform.wait_for_end("a").at > answered);
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn refresh_worker_config() {
    let mut rig = Rig::new();
    rig.settings.refresh = true;
    let working = rig.work();
    rig.platform.job("a", "instant");
    rig.platform.job("b", "instant");
    assert_eq!(rig.platform.wait_for_end("a").json()["stopPod"], true);
    assert_eq!(working.ending(), Ending::Stopped);
    assert_eq!((rig.ran(), rig.platform.takes_left()), (vec!["a".to_string()], 1));
}

#[test]
fn sigterm_busy_async() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("a", "hold");
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a&"));
    working.ask_to_end();
    rig.platform.wait_for_hang_up("job-stop");
    rig.script.release();
    assert_eq!(rig.platform.wait_for_end("a").json()["output"]["video_url"], "https://videos/a");
    assert_eq!(working.ending(), Ending::Stopped);
}

#[test]
fn sigterm_then_job_handed() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.wait_for(1, is_take);
    working.ask_to_end();
    // It is on its way while the worker hangs up; whatever it takes, it answers.
    rig.platform.job("late", "instant");
    assert_eq!(working.ending(), Ending::Stopped);
    match rig.platform.takes_left() {
        0 => assert!(rig.platform.wait_for_end("late").json()["output"].is_object()),
        _ => assert!(rig.ran().is_empty()),
    }
}

#[test]
fn stop_async_handler() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("a", "wait");
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a&"));
    rig.platform.stops(Answer::json(&json!({"jobsToStop": ["a", "unknown", 7]})));
    rig.platform.job("b", "instant");
    rig.platform.wait_for_end("b");
    assert_eq!(working.end(), Ending::Stopped);
    let ends = rig.platform.seen(|request| request.is_end());
    assert_eq!(ends.len(), 1, "nothing is posted for a job that was stopped: {ends:?}");
}

#[test]
fn stop_replies() {
    let rig = Rig::new();
    for odd in [
        Answer::status(204),
        Answer::status(500),
        Answer::status(429),
        Answer::status(404),
        Answer::json(&json!({"jobsToStop": []})),
        Answer::json(&json!({"jobsToStop": "a"})),
        Answer::json(&json!([1])),
        Answer::Reply(200, String::new(), "<html>".into()),
        Answer::HangUp,
    ] {
        rig.platform.stops(odd);
    }
    let working = rig.work();
    rig.platform.job("a", "wait");
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a&"));
    rig.platform.stops(Answer::json(&json!({"jobsToStop": ["a"]})));
    rig.platform.job("b", "instant");
    rig.platform.wait_for_end("b");
    assert_eq!(working.end(), Ending::Stopped);
}

/// How far apart the first polls are when every one gets this answer at once.
fn pauses_after(answer: Answer) -> Vec<Duration> {
    let mut rig = Rig::new();
    rig.settings.unit = Duration::from_millis(200);
    rig.platform.otherwise(Some(answer));
    let working = rig.work();
    let takes = rig.platform.wait_for(6, is_take);
    assert_eq!(working.end(), Ending::Stopped);
    takes.windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

#[test]
fn take_204_immediate() {
    let pauses = pauses_after(Answer::status(204));
    assert!(pauses[0] >= Duration::from_millis(5) && pauses[4] >= Duration::from_millis(80), "{pauses:?}");
}

#[test]
fn take_400_immediate() {
    let pauses = pauses_after(Answer::status(400));
    assert!(pauses[0] >= Duration::from_millis(5) && pauses[4] >= Duration::from_millis(80), "{pauses:?}");
}

#[test]
fn take_500_immediate() {
    let pauses = pauses_after(Answer::status(500));
    assert!(pauses[0] >= Duration::from_millis(100) && pauses[2] >= Duration::from_millis(400), "{pauses:?}");
}

#[test]
fn take_statuses() {
    let rig = Rig::new();
    let odd: Vec<Answer> = [204, 400, 401, 404, 429, 500, 502, 302]
        .into_iter()
        .map(Answer::status)
        .chain(
            [json!(null), json!([]), json!({}), json!({"input": 1}), json!("a"), json!(7)]
                .iter()
                .map(Answer::json),
        )
        .chain(
            ["", "not json", "{\"id\":", "<html></html>"]
                .map(|body| Answer::Reply(200, String::new(), body.into())),
        )
        .chain([Answer::HangUp, Answer::Reply(200, "Content-Encoding: gzip".into(), "x".into())])
        .collect();
    odd.into_iter().for_each(|answer| rig.platform.take(answer));
    rig.platform.take(Answer::json(&json!({"id": "no-input"})));
    rig.platform.take(Answer::json(&json!({"id": "null-input", "input": null})));
    rig.platform.take(Answer::json(&json!([job("l1", "instant"), job("l2", "instant")])));
    let working = rig.work();
    rig.platform.wait_for_end("l2");
    assert_eq!(rig.platform.wait_for_end("no-input").error()["details"]["reason"], "MALFORMED_JOB");
    assert_eq!(rig.ran(), ["null-input", "l1", "l2"]);
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn templates_without_query() {
    let mut rig = Rig::new();
    for value in rig.variables.values_mut() {
        *value = value.replace("?gpu=NVIDIA+A40", "");
    }
    let working = rig.work();
    rig.platform.job("a", "instant");
    assert_eq!(rig.platform.wait_for_end("a").target, "/v2/ep1/job-done/pod1/a?isStream=false");
    assert_eq!(rig.platform.seen(is_take)[0].target, "/v2/ep1/job-take/pod1?job_in_progress=0");
    assert_eq!(working.end(), Ending::Stopped);
}

/// Twelve instant jobs take the Python worker 12 s. The figure proper is measured by `scripts/bench-worker.py`.
#[test]
fn throughput_short_jobs() {
    let rig = Rig::new();
    let ids: Vec<String> = (0..12).map(|i| format!("t{i}")).collect();
    ids.iter().for_each(|id| rig.platform.job(id, "instant"));
    let working = rig.work();
    let ends = rig.platform.wait_for(12, |request| request.is_end());
    assert!(ends[11].at - ends[0].at < Duration::from_secs(5));
    assert_eq!(rig.ran(), ids);
    assert_eq!(working.end(), Ending::Stopped);
    // A take that says `job_in_progress=0` says that no result is on its way any more. Every job before it must
    // have ended by then, or the platform would take its result for lost.
    let (mut handed, mut ended) = (0, 0);
    for request in rig.platform.seen(|request| is_take(request) || request.is_end()) {
        if request.is_end() {
            ended += 1;
            continue;
        }
        assert!(ended >= handed || request.target.contains("job_in_progress=1"), "{}", request.target);
        handed += 1;
    }
}
