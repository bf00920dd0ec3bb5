//! Rows 18 to 33 of the fault matrix, as far as they are about the loop. Those about its process are in
//! `process.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use handler::job::{Code, JobError};
use handler::runpod::heartbeat::Heartbeat;
use handler::runpod::held::{Held, Phase};
use handler::runpod::platform::Endpoints;
use handler::runpod::worker::{EXIT_DEVICE, EXIT_HANGING, EXIT_MEMORY, Ending};
use serde_json::json;

use super::platform::{Answer, Platform, Request, job};
use super::rig::{Rig, bury};
use crate::pool::gateway::within;
use crate::support::is_long;

fn end_of(id: &str) -> impl Fn(&Request) -> bool {
    move |request| request.is_end() && request.id() == id
}

/// Delivers the result of a job whose first posts are answered with `answers`; how often it was posted.
#[track_caller]
fn delivered_after(answers: Vec<Answer>) -> usize {
    let rig = Rig::new();
    let attempts = answers.len() + 1;
    answers.into_iter().for_each(|answer| rig.platform.end(answer));
    let working = rig.work();
    rig.platform.job("a", "instant");
    let posts = rig.platform.wait_for(attempts, end_of("a"));
    assert!(posts.iter().all(|post| post.body == posts[0].body && post.target == posts[0].target));
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!((rig.ran().len(), rig.spooled("results"), rig.spooled("rejected")), (1, 0, 0));
    rig.platform.seen(end_of("a")).len()
}

/// The outages that RunPod's Python worker was measured with, in units of back-off in place of seconds.
#[test]
fn fault_22_job_done_5xx() {
    for (status, times) in [(500, 1), (500, 2), (500, 3), (500, 7), (503, 3), (502, 2)] {
        assert_eq!(delivered_after(vec![Answer::status(status); times]), times + 1);
    }
}

/// The eight faults of which RunPod's Python worker loses five results. A short run takes a hundredth of the time
/// for everything, a long one the real seconds.
#[test]
fn fault_22_no_result_is_lost_in_the_eight_faults() {
    let second = if is_long() { Duration::from_secs(1) } else { Duration::from_millis(10) };
    let status = |status| move |platform: &Platform, time| platform.outage(Answer::status(status), time);
    let drop = |platform: &Platform, _: Duration| platform.end(Answer::HangUp);
    type Fault<'a> = &'a (dyn Fn(&Platform, Duration) + Sync);
    let faults: [(&str, u32, Fault); 8] = [
        ("500 for 1 s", 1, &status(500)),
        ("500 for 3 s", 3, &status(500)),
        ("500 for 6 s", 6, &status(500)),
        ("500 for 30 s", 30, &status(500)),
        ("503 for 6 s", 6, &status(503)),
        ("429 for 6 s", 6, &status(429)),
        // The platform looks the same to the worker whether or not it has stored what it does not acknowledge.
        ("dropped before it was stored", 0, &drop),
        ("dropped after it was stored", 0, &drop),
    ];
    std::thread::scope(|scope| {
        for (name, seconds, fault) in faults {
            scope.spawn(move || {
                let mut rig = Rig::new();
                rig.settings.unit = second;
                let outage = seconds * second;
                fault(&rig.platform, outage);
                let working = rig.work();
                rig.platform.job("a", "instant");
                let began = rig.platform.wait_for_end("a").at;
                // Its heartbeat names a job for as long as its result is not acknowledged.
                let over = |ping: &Request| {
                    ping.route() == "ping" && ping.at > began + outage && !ping.target.contains("job_id")
                };
                rig.platform.wait_for_within(2 * outage + Duration::from_secs(30), 1, over);
                let posts = rig.platform.seen(end_of("a"));
                assert!(posts.len() > 1 && posts.iter().all(|post| post.body == posts[0].body), "{name}");
                assert!(posts[posts.len() - 1].at >= began + outage, "{name}");
                assert_eq!(working.end(), Ending::Stopped, "{name}");
                assert_eq!(
                    (rig.ran().len(), rig.spooled("results"), rig.spooled("rejected")),
                    (1, 0, 0),
                    "{name}"
                );
            });
        }
    });
}

#[test]
fn fault_22_the_next_job_is_taken_while_a_result_is_undelivered() {
    let rig = Rig::new();
    (0..1000).for_each(|_| rig.platform.end(Answer::status(503)));
    let working = rig.work();
    rig.platform.job("a", "instant");
    rig.platform.wait_for(2, end_of("a"));
    rig.platform.job("b", "hold");
    // Both are answered for, so that the platform does not take the first one for lost.
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a%2Cb"));
    let takes = rig.platform.seen(|request| request.route() == "job-take");
    assert!(takes[1].target.ends_with("job_in_progress=1"), "{takes:?}");
    rig.platform.ends_are_fine();
    rig.script.release();
    rig.platform.wait_for_end("b");
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!(rig.spooled("results"), 0);
}

#[test]
fn fault_23_job_done_429() {
    let told = Answer::Reply(429, "Retry-After: 1".into(), String::new());
    let rig = Rig::new();
    rig.platform.end(told);
    rig.platform.end(Answer::status(429));
    let working = rig.work();
    rig.platform.job("a", "instant");
    let posts = rig.platform.wait_for(3, end_of("a"));
    assert!(posts[1].at - posts[0].at >= Duration::from_secs(1), "as told");
    assert!(posts[2].at - posts[1].at >= 5 * rig.settings.unit, "five units where nothing is told");
    assert_eq!(working.end(), Ending::Stopped);
}

/// Whether the platform stored the result before it hung up makes no difference: the same body comes again.
#[test]
fn fault_24_job_done_connection_dropped() {
    assert_eq!(delivered_after(vec![Answer::HangUp]), 2);
    assert_eq!(delivered_after(vec![Answer::HangUp; 5]), 6);
}

#[test]
fn fault_25_job_done_4xx() {
    for status in [400, 401, 404, 413] {
        let rig = Rig::new();
        rig.platform.end(Answer::status(status));
        let working = rig.work();
        rig.platform.job("a", "instant");
        let posts = rig.platform.wait_for(2, end_of("a"));
        let said = format!("result refused: HTTP {status} ({} bytes)", posts[0].body.len());
        assert_eq!(posts[1].json(), json!({ "error": said }));
        rig.platform.job("b", "instant");
        rig.platform.wait_for_end("b");
        assert_eq!(working.end(), Ending::Stopped);
        assert_eq!(rig.platform.seen(end_of("a")).len(), 2, "no endless loop");
        assert_eq!((rig.spooled("results"), rig.spooled("rejected")), (0, 1));
    }
}

#[test]
fn fault_25_an_undeliverable_result_is_put_aside_in_the_end() {
    let mut rig = Rig::new();
    rig.settings.result_ttl = Duration::from_millis(50);
    (0..1000).for_each(|_| rig.platform.end(Answer::status(500)));
    let working = rig.work();
    rig.platform.job("a", "instant");
    rig.platform.wait_for(1, end_of("a"));
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!((rig.spooled("results"), rig.spooled("rejected")), (0, 1));
}

/// The rest of the row is the scenario `take_statuses`.
#[test]
fn fault_26_two_jobs_when_one_was_asked_for() {
    let rig = Rig::new();
    rig.platform.take(Answer::json(&json!([job("a", "hold"), job("b", "instant")])));
    let working = rig.work();
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a%2Cb"));
    assert_eq!(rig.ran(), ["a"], "one after the other");
    assert_eq!(rig.platform.seen(|request| request.route() == "job-take").len(), 1);
    rig.script.release();
    rig.platform.wait_for_end("b");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn fault_27_job_take_hangs() {
    let mut rig = Rig::new();
    rig.poll_timeout = Duration::from_millis(50);
    let working = rig.work();
    rig.platform.wait_for(3, |request| request.route() == "job-take");
    rig.platform.wait_for(3, |request| request.route() == "job-stop");
    rig.platform.job("a", "instant");
    rig.platform.wait_for_end("a");
    assert_eq!(working.end(), Ending::Stopped);
}

#[test]
fn fault_28_a_stop_cancels_just_its_job() {
    let mut rig = Rig::new();
    rig.settings.slots = 2;
    let working = rig.work();
    rig.platform.job("done", "instant");
    rig.platform.wait_for_end("done");
    rig.platform.take(Answer::json(&json!([job("a", "wait"), job("b", "hold"), job("c", "instant")])));
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a%2Cb%2Cc"));
    // `c` waits for a slot; it is forgotten without having run.
    rig.platform.stops(Answer::json(&json!({"jobsToStop": ["done", "unknown", "c", "a"]})));
    rig.platform.wait_for(1, |request| request.target.contains("job_id=b&"));
    rig.script.release();
    rig.platform.wait_for_end("b");
    assert_eq!(working.end(), Ending::Stopped);
    let ends = rig.platform.seen(|request| request.is_end());
    assert_eq!(ends.iter().map(|end| end.id()).collect::<Vec<_>>(), ["done", "b"]);
    let mut ran = rig.ran();
    ran.sort();
    assert_eq!(ran, ["a", "b", "done"]);
}

#[test]
fn fault_29_ping_endpoint_down() {
    for down in [Answer::status(500), Answer::HangUp, Answer::Silence] {
        let rig = Rig::new();
        rig.platform.pings(down);
        let working = rig.work();
        rig.platform.job("a", "hold");
        rig.platform.wait_for(2, |request| request.route() == "ping");
        rig.script.release();
        rig.platform.wait_for_end("a");
        assert_eq!(working.end(), Ending::Stopped);
    }
}

/// A heartbeat that goes on would tell the platform that all is well. Nobody but the thread itself stops it: the
/// loop is not there.
#[test]
fn fault_30_the_heartbeat_stops_by_itself() {
    let rig = Rig::new();
    let endpoints = Endpoints::from_env(|name| rig.variables.get(name).cloned()).unwrap();
    let held = Held::default();
    held.set("a", Phase::Busy);
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    // The generation hangs at the third look, and moves again at the tenth.
    let defect = move || match counter.fetch_add(1, Ordering::SeqCst) {
        2..10 => Some("the generation hangs".to_string()),
        _ => None,
    };
    let heartbeat = Heartbeat::start(&endpoints, held, defect).unwrap();
    let pings = rig.platform.wait_for(3, |request| request.target.contains("job_id=a&"));
    assert!(asked.load(Ordering::SeqCst) > 10, "eight beats were left out before the third: {pings:?}");
    drop(heartbeat);
}

#[test]
fn fault_57_a_broken_device_ends_the_worker_after_its_report() {
    for (what, code, exit) in
        [("sticky", "GPU_UNAVAILABLE", EXIT_DEVICE), ("stall", "WORKER_LOST", EXIT_HANGING)]
    {
        let rig = Rig::new();
        let working = rig.work();
        rig.platform.job("a", what);
        rig.platform.job("b", "instant");
        let error = rig.platform.wait_for_end("a").error();
        assert_eq!((&error["code"], &error["retryable"]), (&json!(code), &json!(true)), "{what}");
        assert_eq!(working.ending(), Ending::Broken(exit), "{what}");
        assert_eq!((rig.ran(), rig.platform.takes_left()), (vec!["a".to_string()], 1), "{what}");
    }
}

#[test]
fn fault_56_two_jobs_in_a_row_out_of_memory_end_the_worker() {
    let rig = Rig::new();
    let working = rig.work();
    for (id, what) in [("a", "oom"), ("b", "instant"), ("c", "oom"), ("d", "oom"), ("e", "instant")] {
        rig.platform.job(id, what);
    }
    assert_eq!(rig.platform.wait_for_end("d").error()["code"], "GPU_OUT_OF_MEMORY");
    assert_eq!(working.ending(), Ending::Broken(EXIT_MEMORY));
    assert_eq!(rig.ran(), ["a", "b", "c", "d"]);
}

#[test]
fn fault_18_a_job_that_outlasts_the_grace_time_is_handed_back() {
    let mut rig = Rig::new();
    rig.settings.grace = Duration::from_millis(100);
    let working = rig.work();
    rig.platform.take(Answer::json(&json!([job("a", "hang"), job("b", "instant")])));
    rig.platform.wait_for(1, |request| request.target.contains("job_id=a%2Cb"));
    assert_eq!(working.end(), Ending::Stopped);
    for id in ["a", "b"] {
        let error = rig.platform.wait_for_end(id).error();
        assert_eq!((&error["details"]["reason"], &error["retryable"]), (&json!("PREEMPTED"), &json!(true)));
    }
    assert_eq!(rig.ran(), ["a"]);
}

/// Each round hands over a job at another moment around the signal.
#[test]
fn fault_18_no_job_is_dropped_during_take() {
    let rounds = if is_long() { 200 } else { 25 };
    for round in 0..rounds {
        let rig = Rig::new();
        let working = rig.work();
        rig.platform.wait_for(1, |request| request.route() == "job-take");
        let platform = &rig.platform;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(500) * round / rounds);
                platform.job("late", "instant");
            });
            working.ask_to_end();
        });
        assert_eq!(working.ending(), Ending::Stopped);
        let answered = !rig.platform.seen(end_of("late")).is_empty();
        // What was not answered was never read, round after round.
        rig.platform.wait_for_takes_left(usize::from(!answered));
    }
}

#[test]
fn fault_33_duplicate_delivery_is_answered_from_the_record() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("a", "instant");
    let first = rig.platform.wait_for_end("a");
    // The first is over when the heartbeat no longer names it.
    let is_over =
        |ping: &Request| ping.route() == "ping" && ping.at > first.at && !ping.target.contains("job_id");
    rig.platform.wait_for(1, is_over);
    rig.platform.job("a", "instant");
    let both = rig.platform.wait_for(2, end_of("a"));
    assert_eq!(both[1].body, first.body);
    assert_eq!(rig.ran(), ["a"]);
    // A job that failed comes again because somebody wants another try.
    for times in 1..=2 {
        rig.platform.job("f", "bad");
        let end = rig.platform.wait_for(times, end_of("f")).remove(times - 1);
        let is_over =
            |ping: &Request| ping.route() == "ping" && ping.at > end.at && !ping.target.contains("job_id");
        rig.platform.wait_for(1, is_over);
    }
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!(rig.ran(), ["a", "f", "f"]);
}

#[test]
fn fault_33_what_an_earlier_worker_left_answers_too() {
    let mut rig = Rig::new();
    (0..1000).for_each(|_| rig.platform.end(Answer::status(500)));
    let working = rig.work();
    rig.platform.job("a", "instant");
    rig.platform.wait_for(1, end_of("a"));
    working.kill();
    assert_eq!(rig.spooled("results"), 1);
    bury(&rig.spool);
    rig.platform.ends_are_fine();
    rig.variables.insert("RUNPOD_POD_ID", "pod2".into());
    let before = rig.platform.seen(|request| request.target.contains("job-take/pod2")).len();
    assert_eq!(before, 0);
    let working = rig.work();
    rig.platform.wait_for(1, |request| request.target.contains("job-take/pod2"));
    let posts = rig.platform.seen(end_of("a"));
    let replayed = &posts[posts.len() - 1];
    assert!(replayed.target.contains("job-done/pod1/a"), "in the name of the worker that ran it");
    assert_eq!(replayed.body, posts[0].body);
    // It came before the first take.
    let order = rig.platform.seen(|request| request.is_end() || request.target.contains("job-take/pod2"));
    assert!(order[order.len() - 1].target.contains("job-take/pod2"));
    rig.platform.job("a", "instant");
    rig.platform.wait_for(1, |request| request.is_end() && request.target.contains("job-done/pod2/a"));
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!((rig.ran(), rig.spooled("results")), (vec!["a".to_string()], 0));
}

/// A gateway knows a worker that it started no longer once that has died.
#[test]
fn fault_33_a_dead_workers_result_is_offered_by_the_living_one_where_its_name_is_unknown() {
    let mut rig = Rig::new();
    (0..1000).for_each(|_| rig.platform.end(Answer::status(500)));
    let working = rig.work();
    rig.platform.job("a", "instant");
    rig.platform.wait_for(1, end_of("a"));
    working.kill();
    bury(&rig.spool);
    rig.platform.ends_are_fine();
    rig.platform.end(Answer::status(401));
    rig.variables.insert("RUNPOD_POD_ID", "pod2".into());
    let working = rig.work();
    rig.platform.wait_for(1, |request| request.is_end() && request.target.contains("job-done/pod2/a"));
    assert_eq!(working.end(), Ending::Stopped);
    assert_eq!((rig.spooled("results"), rig.spooled("rejected")), (0, 0));
}

#[test]
fn fault_71_no_job_is_taken_while_the_bucket_is_gone() {
    let rig = Rig::new();
    let working = rig.work();
    rig.platform.job("a", "gone");
    assert_eq!(rig.platform.wait_for_end("a").error()["code"], "UPLOAD_FAILED");
    rig.platform.job("b", "instant");
    let asked = || rig.script.asked.load(Ordering::SeqCst);
    let before = asked();
    within(Duration::from_secs(10), || (asked() > before + 2).then_some(()))
        .expect("the bucket is asked again");
    assert_eq!((rig.platform.takes_left(), rig.ran()), (1, vec!["a".to_string()]));
    *rig.script.undeliverable.lock().unwrap() = None;
    rig.platform.wait_for_end("b");
    *rig.script.undeliverable.lock().unwrap() = Some(JobError::new(Code::UploadFailed, "the bucket is gone"));
    assert_eq!(working.end(), Ending::Stopped, "a worker that waits for its bucket can be stopped");
}
