//! A job's life as its sender sees it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use handler::gateway::store::{Loss, Outcome};
use serde_json::{Value, json};

use super::rig::{Rig, header, refused, request};
use crate::pool::client::call;

#[test]
fn a_job_is_seen_from_its_acceptance_to_its_result() {
    let rig = Rig::start();
    let job = rig.run(&request());
    assert_eq!(rig.status(&job), json!({"id": job, "status": "IN_QUEUE"}));
    assert_eq!(rig.take(), (job.clone(), request()));
    let view = rig.status(&job);
    assert_eq!((view["status"].as_str(), view["workerId"].as_str()), (Some("IN_PROGRESS"), Some("w-test")));
    assert!(view["delayTime"].is_u64() && view["executionTime"].is_null(), "{view}");
    rig.gateway.hub.set_progress(&job, json!({"percent": 40}));
    assert_eq!(rig.status(&job)["output"], json!({"percent": 40}));
    rig.finish(&job, Outcome::Completed(r#"{"video_url": "x", "n": 1.50}"#.to_string()));
    let view = rig.status(&job);
    assert_eq!((view["status"].as_str(), &view["output"]["video_url"]), (Some("COMPLETED"), &json!("x")));
    assert!(
        view["delayTime"].is_u64() && view["executionTime"].is_u64() && view["error"].is_null(),
        "{view}"
    );
    let counts = rig.get("/v2/talkie/health").json();
    assert_eq!(
        counts["jobs"],
        json!({"completed": 1, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0})
    );
    assert_eq!(counts["workers"].as_object().unwrap().len(), 6, "{counts}");
}

#[test]
fn an_error_is_told_at_the_end_and_no_sooner() {
    let rig = Rig::start();
    let job = rig.run(&request());
    for attempt in 0..2 {
        rig.take();
        let loss = Loss { reason: "it died".to_string(), log_tail: "last words".to_string(), counts: true };
        rig.runtime.block_on(rig.gateway.store.lose(&job, "w-test", loss)).unwrap();
        let view = rig.status(&job);
        assert_eq!(view["status"], "IN_QUEUE", "{view}");
        assert!(view.get("error").is_none(), "attempt {attempt}: clients stop at the sight of an error");
    }
    rig.take();
    assert_eq!(rig.status(&job)["retries"], 2);
    rig.finish(&job, Outcome::Failed("{\"code\":\"GPU_OUT_OF_MEMORY\"}".to_string()));
    let reply = rig.get(&format!("/status/{job}"));
    assert_eq!((reply.status, reply.json()["status"].as_str()), (200, Some("FAILED")));
    assert_eq!(reply.json()["error"], "{\"code\":\"GPU_OUT_OF_MEMORY\"}", "a text");
    assert!(reply.json().get("output").is_none());
}

#[test]
fn runsync_waits_for_the_result_and_no_longer_than_asked() {
    let rig = Rig::start();
    let began = Instant::now();
    let reply = rig.post("/runsync?wait=1000", &request());
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    let waiting = reply.json();
    let id = waiting["id"].as_str().unwrap();
    assert!(id.starts_with("sync-") && id.ends_with("-u1"), "{id}");
    assert_eq!((reply.status, waiting["status"].as_str()), (200, Some("IN_QUEUE")));

    let base = rig.base.clone();
    let headers = [("Content-Type", "application/json")];
    let body = request().to_string();
    let asked = thread::spawn(move || call(&base, ("POST", "/v2/talkie/runsync"), &headers, body.as_bytes()));
    rig.take();
    let job = loop {
        let queued = rig.get("/health").json()["jobs"]["inQueue"] == 1;
        if queued {
            break rig.take().0;
        }
    };
    rig.finish(&job, Outcome::Completed("[1, 2]".to_string()));
    let reply = asked.join().unwrap().unwrap();
    assert_eq!((reply.json()["id"].as_str(), &reply.json()["output"]), (Some(job.as_str()), &json!([1, 2])));
    for field in ["delayTime", "executionTime", "workerId"] {
        assert!(!reply.json()[field].is_null(), "{field}");
    }
    for wait in ["x", "-1", "1.5", ""] {
        refused(&rig.post(&format!("/runsync?wait={wait}"), &request()), 400, "INVALID_INPUT");
    }
}

#[test]
fn status_sync_ends_with_the_job_or_with_the_wait() {
    let rig = Rig::start();
    let job = rig.run(&request());
    let path = format!("/status-sync/{job}");
    let began = Instant::now();
    assert_eq!(rig.get(&format!("{path}?wait=1000")).json()["status"], "IN_QUEUE");
    assert!(began.elapsed() >= Duration::from_secs(1));
    let (base, asked) = (rig.base.clone(), format!("{path}?wait=60000"));
    let waiting = thread::spawn(move || call(&base, ("POST", &asked), &[], b""));
    rig.take();
    rig.finish(&job, Outcome::Completed("7".to_string()));
    assert_eq!(waiting.join().unwrap().unwrap().json()["output"], 7);
    assert_eq!(rig.get(&path).json()["output"], 7, "at once");
}

#[test]
fn parts_are_told_once_and_a_final_reply_has_a_list() {
    let rig = Rig::start();
    let job = rig.run(&request());
    let path = format!("/stream/{job}");
    let began = Instant::now();
    let empty = rig.get(&format!("{path}?wait=300")).json();
    assert_eq!(empty, json!({"id": job, "status": "IN_QUEUE", "stream": []}));
    assert!(began.elapsed() >= Duration::from_millis(300));
    rig.take();
    rig.push(&job, &json!({"n": 1}));
    rig.push(&job, &json!("two"));
    let parts = rig.get(&path).json();
    assert_eq!(parts["stream"], json!([{"output": {"n": 1}}, {"output": "two"}]));
    // Whoever waits is told of the next part when it comes.
    let (base, asked) = (rig.base.clone(), path.clone());
    let waiting = thread::spawn(move || call(&base, ("POST", &asked), &[], b""));
    rig.push(&job, &json!(3));
    assert_eq!(waiting.join().unwrap().unwrap().json()["stream"], json!([{"output": 3}]));
    rig.push(&job, &json!(4));
    rig.finish(&job, Outcome::Completed("[]".to_string()));
    let last = rig.get(&path).json();
    assert_eq!((last["status"].as_str(), &last["stream"]), (Some("COMPLETED"), &json!([{"output": 4}])));
    assert_eq!(rig.get(&path).json()["stream"], json!([]));
}

#[test]
fn no_answer_about_parts_takes_as_long_as_the_python_client_waits() {
    let rig = Rig::start();
    let job = rig.run(&request());
    let began = Instant::now();
    assert_eq!(rig.get(&format!("/stream/{job}?wait=90000")).status, 200);
    assert!(began.elapsed() < Duration::from_millis(9_900), "{:?}", began.elapsed());
}

#[test]
fn a_cancelled_job_stays_cancelled() {
    let rig = Rig::start();
    let (waiting, running) = (rig.run(&request()), rig.run(&request()));
    for _ in 0..3 {
        let reply =
            rig.send("POST", &format!("/cancel/{waiting}"), &[("Content-Type", "application/json")], b"");
        assert_eq!((reply.status, reply.json()), (200, json!({"id": waiting, "status": "CANCELLED"})));
    }
    assert_eq!(rig.take().0, running);
    let reply = rig.send("POST", &format!("/cancel/{running}"), &[], b"not json, and not read");
    assert_eq!(reply.json(), json!({"id": running, "status": "CANCELLED"}));
    assert!(!rig.finish(&running, Outcome::Completed("1".to_string())), "too late");
    assert!(rig.status(&running).get("output").is_none());
    let done = rig.finished(&json!(1));
    assert_eq!(rig.post(&format!("/cancel/{done}"), &json!({})).json()["status"], "COMPLETED");
}

#[test]
fn a_failed_job_can_be_sent_again() {
    let rig = Rig::start();
    let job = rig.run(&request());
    refused(&rig.post(&format!("/retry/{job}"), &json!({})), 400, "INVALID_INPUT");
    rig.take();
    rig.finish(&job, Outcome::Failed("no".to_string()));
    let reply = rig.send("POST", &format!("/v2/talkie/retry/{job}"), &[], b"");
    assert_eq!((reply.status, reply.json()), (200, json!({"id": job, "status": "IN_QUEUE"})));
    assert!(rig.status(&job).get("error").is_none());
    assert_eq!(rig.take(), (job.clone(), request()));
    rig.finish(&job, Outcome::Completed("1".to_string()));
    refused(&rig.post(&format!("/retry/{job}"), &json!({})), 400, "INVALID_INPUT");
}

#[test]
fn purging_cancels_what_waits() {
    let rig = Rig::start();
    let running = rig.run(&request());
    rig.take();
    let waiting = [rig.run(&request()), rig.run(&request())];
    let elsewhere = rig.post("/v2/other/run", &request()).json()["id"].clone();
    assert_eq!(
        rig.send("POST", "/purge-queue", &[], b"").json(),
        json!({"removed": 2, "status": "completed"})
    );
    assert_eq!(rig.status(&running)["status"], "IN_PROGRESS");
    for job in waiting {
        assert_eq!(rig.status(&job)["status"], "CANCELLED");
    }
    let path = format!("/v2/other/status/{}", elsewhere.as_str().unwrap());
    assert_eq!(rig.get(&path).json()["status"], "IN_QUEUE");
}

#[test]
fn recent_jobs_are_listed_without_their_results() {
    let rig = Rig::start();
    let done = rig.finished(&json!({"secret": "x".repeat(1000)}));
    let waiting = rig.run(&request());
    let listed = rig.get("/requests").json()["requests"].clone();
    let ids: Vec<_> = listed.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [waiting.as_str(), done.as_str()], "the newest first");
    assert_eq!(listed[1]["status"], "COMPLETED");
    assert!(
        listed[1].get("output").is_none() && listed[1]["createdAt"].as_i64().unwrap() > 1_600_000_000_000
    );
    assert_eq!(rig.get("/requests?limit=1").json()["requests"].as_array().unwrap().len(), 1);
    for limit in ["0", "101", "x"] {
        refused(&rig.get(&format!("/requests?limit={limit}")), 400, "INVALID_INPUT");
    }
    assert_eq!(rig.get("/v2/other/requests").json(), json!({"requests": []}));
}

/// The events of a job, one after another.
struct Events(BufReader<TcpStream>);

impl Events {
    fn of(rig: &Rig, job: &str) -> Self {
        let mut stream = rig.connect();
        write!(stream, "GET /events/{job} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
        let mut events = Self(BufReader::new(stream));
        let head = events.block();
        assert!(head.contains("200 OK") && head.contains("text/event-stream"), "{head}");
        events
    }

    /// The lines up to the next empty one.
    fn block(&mut self) -> String {
        let mut block = String::new();
        loop {
            let mut line = String::new();
            let end = self.0.read_line(&mut line).unwrap() == 0;
            if end || line.trim().is_empty() {
                return block;
            }
            block.push_str(&line);
        }
    }

    /// The next event that is one; None at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        loop {
            let block = self.block();
            if block.is_empty() {
                return None;
            }
            let field =
                |name: &str| block.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_string()));
            if let Some(data) = field("data:") {
                return Some((field("event:").unwrap(), serde_json::from_str(&data).unwrap()));
            }
        }
    }
}

#[test]
fn events_tell_a_jobs_life_until_its_end() {
    let rig = Rig::start();
    let (first, job) = (rig.run(&request()), rig.run(&request()));
    let mut events = Events::of(&rig, &job);
    let waiting = events.next().unwrap();
    assert_eq!(waiting, ("status".to_string(), json!({"id": job, "status": "IN_QUEUE", "position": 1})));
    rig.take();
    let (name, moved) = events.next().unwrap();
    assert_eq!((name.as_str(), &moved["position"]), ("status", &json!(0)));
    rig.finish(&first, Outcome::Completed("1".to_string()));
    rig.take();
    let (_, running) = events.next().unwrap();
    assert_eq!((running["status"].as_str(), running.get("position")), (Some("IN_PROGRESS"), None));
    for percent in [10, 20] {
        rig.gateway.hub.set_progress(&job, json!({"stage": "denoise", "percent": percent}));
        let progress = events.next().unwrap();
        assert_eq!(progress, ("progress".to_string(), json!({"stage": "denoise", "percent": percent})));
    }
    rig.finish(&job, Outcome::Completed(r#"{"video_url":"x"}"#.to_string()));
    let (name, end) = events.next().unwrap();
    assert_eq!((name.as_str(), &end["output"]["video_url"]), ("status", &json!("x")));
    assert_eq!(events.next(), None, "it ends");
    let mut late = Events::of(&rig, &job);
    assert_eq!(late.next().unwrap().1["status"], "COMPLETED");
    assert_eq!(late.next(), None);
}

#[test]
fn events_of_no_job_are_none() {
    let rig = Rig::start();
    let reply = rig.get("/v2/talkie/events/1234");
    refused(&reply, 404, "NOT_FOUND");
    assert_eq!(header(&reply, "content-type"), Some("application/json"));
}
