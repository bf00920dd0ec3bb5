//! Workers that this gateway has not started: our own on other machines, and RunPod's Python worker.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use handler::gateway::store::{KeyRole, KeyStore};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::tempdir;

use super::client::{Reply, call};
use super::gateway::{Gateway, job, send_signal};
use crate::support::handler;

/// The key of attached workers.
const KEY: &str = "key-of-workers";
const PYTHON: &str = "RunPod-Python-SDK/1.12.0 (Linux; x86_64) Language/Python 3.11.7";

fn make_key(dir: &Path) {
    let hash: [u8; 32] = Sha256::digest(KEY).into();
    KeyStore::open(dir).unwrap().create("k1", "elsewhere", KeyRole::Worker, hash).unwrap();
}

/// A worker as the Python SDK's requests show it.
struct Python<'a> {
    gateway: &'a Gateway,
    name: &'static str,
    key: &'static str,
}

impl<'a> Python<'a> {
    fn new(gateway: &'a Gateway, name: &'static str) -> Self {
        Self { gateway, name, key: KEY }
    }

    fn send(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        let kind = if method == "POST" { "application/x-www-form-urlencoded" } else { "application/json" };
        let headers = [("Authorization", self.key), ("User-Agent", PYTHON), ("Content-Type", kind)];
        call(&self.gateway.base, (method, path), &headers, body).unwrap()
    }

    fn take(&self, busy: bool) -> Reply {
        let busy = u8::from(busy);
        self.send("GET", &format!("/v2/py/job-take/{}?gpu=A&job_in_progress={busy}", self.name), b"")
    }

    fn stops(&self) -> Reply {
        self.send("GET", &format!("/v2/py/job-stop/{}?gpu=A", self.name), b"")
    }

    /// As with a URL that has no query.
    fn done(&self, job: &str, body: &str) -> Reply {
        let path = format!("/v2/py/job-done/{}/{job}&isStream=false", self.name);
        self.send("POST", &path, body.as_bytes())
    }

    fn ping(&self, jobs: &str) -> Reply {
        self.send("GET", &format!("/v2/py/ping/{}?gpu=A{jobs}&runpod_version=1.12.0", self.name), b"")
    }

    fn unhealthy(&self) -> Reply {
        let said = "status=unhealthy&check=gpu&reason=no+GPU";
        self.send("GET", &format!("/v2/py/ping/{}?gpu=A&{said}", self.name), b"")
    }
}

/// Sends a job to the endpoint of the Python worker; its id.
fn send(gateway: &Gateway, request: &Value) -> String {
    let reply = gateway.post("/v2/py/run", request);
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()["id"].as_str().unwrap().to_string()
}

fn status(gateway: &Gateway, job: &str) -> Value {
    gateway.get(&format!("/v2/py/status/{job}")).json()
}

/// A gateway that starts no workers, at whose endpoint `py` the worker `a` has attached itself.
fn with_python(variables: &[(&str, &str)]) -> (tempfile::TempDir, Gateway) {
    let dir = tempdir().unwrap();
    make_key(dir.path());
    let variables = [&[("MAX_WORKERS", "0")], variables].concat();
    let gateway = Gateway::start(dir.path(), &variables);
    // A ping with a job attaches; the poll that is held open for its first job is the tests' own.
    assert_eq!(Python::new(&gateway, "a").ping("&job_id=none").status, 200);
    (dir, gateway)
}

#[test]
fn a_python_worker_passes_results_progress_and_errors() {
    let (_dir, gateway) = with_python(&[]);
    let python = Python::new(&gateway, "a");
    let first = send(&gateway, &json!({"input": {"x": 1}, "webhook": null, "s3Config": {"bucketName": "b"}}));
    let handed = python.take(false).json();
    assert_eq!((&handed["id"], &handed["input"]), (&json!(first), &json!({"x": 1})));
    assert_eq!(handed["s3Config"], json!({"bucketName": "b"}), "{handed}");
    assert_eq!(status(&gateway, &first)["status"], "IN_PROGRESS");

    python.done(&first, r#"{"status": "IN_PROGRESS", "output": "half"}"#);
    assert_eq!(status(&gateway, &first)["output"], "half");
    assert_eq!(python.done(&first, r#"{"output": {"n": NaN, "é": true}}"#).status, 200);
    let view = status(&gateway, &first);
    assert_eq!((&view["status"], &view["output"]), (&json!("COMPLETED"), &json!({"n": null, "é": true})));
    // Progress that comes after the end, a second end, and the end of a job that nobody knows.
    for (job, body) in [
        (first.as_str(), r#"{"status": "IN_PROGRESS", "output": "late"}"#),
        (first.as_str(), r#"{"error": "late"}"#),
        ("unknown-u1", r#"{"output": 1}"#),
    ] {
        assert_eq!(python.done(job, body).status, 200);
    }
    assert_eq!(status(&gateway, &first), view);

    for (body, expected) in [
        (r#"{"error": {"code": 5}}"#, json!(r#"{"code":5}"#)),
        (r#"{"error": "no", "output": 1}"#, json!("no")),
        ("<html>", json!("the worker's result is not JSON")),
    ] {
        let id = send(&gateway, &json!({"input": {}}));
        assert_eq!(python.take(false).json()["id"], id.as_str());
        python.done(&id, body);
        let view = status(&gateway, &id);
        assert_eq!((&view["status"], &view["error"]), (&json!("FAILED"), &expected), "{body}");
    }
}

#[test]
fn a_python_worker_takes_batches() {
    let (_dir, gateway) = with_python(&[]);
    let ids: Vec<String> = (0..3).map(|n| send(&gateway, &json!({"input": n}))).collect();
    let python = Python::new(&gateway, "a");
    let path = "/v2/py/job-take-batch/a?gpu=A&batch_size=2&job_in_progress=0";
    let handed = python.send("GET", path, b"").json();
    let handed: Vec<_> = handed.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(handed, [ids[0].as_str(), ids[1].as_str()]);
}

#[test]
fn wrong_keys_are_told_to_wait() {
    let (_dir, gateway) = with_python(&[]);
    let id = send(&gateway, &json!({"input": 1}));
    let stranger = Python { key: "wrong", ..Python::new(&gateway, "a") };
    for reply in [stranger.take(false), stranger.stops()] {
        assert_eq!(reply.status, 429, "{}", reply.head);
        assert!(reply.head.to_lowercase().contains("retry-after: 5"), "{}", reply.head);
    }
    assert_eq!((stranger.ping("").status, stranger.done(&id, r#"{"output": 1}"#).status), (401, 401));
    assert_eq!(status(&gateway, &id)["status"], "IN_QUEUE");
}

/// The Python worker gives up on a result after three tries, and asks for the next job as if nothing had been.
#[test]
fn a_job_whose_result_was_lost_runs_again() {
    let (_dir, gateway) = with_python(&[("MAX_ATTEMPTS", "3")]);
    let python = Python::new(&gateway, "a");
    let id = send(&gateway, &json!({"input": 1}));
    assert_eq!(python.take(false).json()["id"], id.as_str());
    // It has nothing in hand, so the job is over; and it is handed out again.
    assert_eq!(python.take(false).json()["id"], id.as_str());
    assert_eq!(status(&gateway, &id)["retries"], 1);
    // It says that it has the job, and then twice that it does not.
    assert_eq!(python.ping(&format!("&job_id={id}")).status, 200);
    python.ping("");
    assert_eq!(status(&gateway, &id)["status"], "IN_PROGRESS");
    python.ping("");
    assert_eq!(status(&gateway, &id)["status"], "IN_QUEUE");
    // The third attempt is the last.
    assert_eq!(python.take(false).json()["id"], id.as_str());
    python.ping(&format!("&job_id={id}"));
    python.ping("");
    python.ping("");
    let view = status(&gateway, &id);
    assert_eq!((view["status"].as_str(), view["retries"].as_u64()), (Some("FAILED"), Some(2)), "{view}");
    assert!(view["error"].as_str().unwrap().contains("WORKER_LOST"), "{view}");
}

#[test]
fn a_cancelled_job_is_stopped_in_its_worker() {
    let (_dir, gateway) = with_python(&[]);
    let python = Python::new(&gateway, "a");
    let id = send(&gateway, &json!({"input": 1}));
    python.take(false);
    let stops = thread::scope(|scope| {
        let waiting = scope.spawn(|| python.stops());
        gateway.post(&format!("/v2/py/cancel/{id}"), &json!({}));
        waiting.join().unwrap()
    });
    assert_eq!(stops.json(), json!({"jobsToStop": [id]}));
    // Its result comes too late.
    assert_eq!(python.done(&id, r#"{"output": 1}"#).status, 200);
    assert_eq!(status(&gateway, &id)["status"], "CANCELLED");
}

/// A worker that is silent for longer than its lease loses its job to another, and cannot write any more.
#[test]
fn a_silent_worker_loses_its_job_and_is_fenced() {
    let (_dir, gateway) = with_python(&[("LEASE_SECONDS", "0.5")]);
    let (first, second) = (Python::new(&gateway, "a"), Python::new(&gateway, "b"));
    let id = send(&gateway, &json!({"input": 1}));
    assert_eq!(first.take(false).json()["id"], id.as_str());
    assert_eq!(second.take(false).json()["id"], id.as_str(), "the second is given it when the lease is over");
    assert_eq!(first.done(&id, r#"{"output": "first"}"#).status, 200);
    assert_eq!(status(&gateway, &id)["status"], "IN_PROGRESS");
    second.done(&id, r#"{"output": "second"}"#);
    assert_eq!(status(&gateway, &id)["output"], "second");
}

#[test]
fn a_worker_that_cannot_work_gets_nothing() {
    let (_dir, gateway) = with_python(&[]);
    let sick = Python::new(&gateway, "a");
    sick.unhealthy();
    assert_eq!(gateway.get("/v2/py/health").json()["workers"]["unhealthy"], 1);
    let id = send(&gateway, &json!({"input": 1}));
    assert_eq!(sick.take(false).status, 429);
    assert_eq!(Python::new(&gateway, "b").take(false).json()["id"], id.as_str());
}

/// `stopPod` in a result: the worker is replaced, so it gets no further job although it goes on asking.
#[test]
fn a_worker_that_asks_to_be_replaced_gets_nothing_more() {
    let (_dir, gateway) = with_python(&[]);
    let python = Python::new(&gateway, "a");
    let id = send(&gateway, &json!({"input": 1}));
    python.take(false);
    python.done(&id, r#"{"output": 1, "stopPod": true}"#);
    let next = send(&gateway, &json!({"input": 2}));
    assert_eq!((python.take(false).status, python.stops().status), (429, 429));
    assert_eq!(status(&gateway, &next)["status"], "IN_QUEUE");
}

/// The Python worker ends only when both its polls have been answered, which are held open for 25 s otherwise.
#[test]
fn the_open_polls_of_a_worker_that_is_to_go_are_let_go_at_once() {
    let (_dir, gateway) = with_python(&[]);
    // A poll that comes only after the result is turned away; then another worker has its turn.
    let names = ["w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9"];
    let let_go = names.into_iter().any(|name| {
        let python = Python::new(&gateway, name);
        let id = send(&gateway, &json!({"input": 1}));
        assert_eq!(python.take(false).json()["id"], id.as_str());
        let began = Instant::now();
        let polls = thread::scope(|scope| {
            let polls = [scope.spawn(|| python.take(true)), scope.spawn(|| python.stops())];
            // Time for both to arrive; how much it takes cannot be seen from outside.
            for _ in 0..10 {
                python.ping(&format!("&job_id={id}"));
            }
            python.done(&id, r#"{"output": 1, "stopPod": true}"#);
            polls.map(|poll| poll.join().unwrap().status)
        });
        assert!(began.elapsed() < Duration::from_secs(10), "{name} was held for {:?}", began.elapsed());
        assert!(polls.iter().all(|status| matches!(status, 204 | 429)), "{polls:?}");
        polls == [204, 204]
    });
    assert!(let_go, "no pair of polls was open in time");
}

#[test]
fn a_result_that_is_too_large_fails_its_job() {
    let (_dir, gateway) = with_python(&[("MAX_RESULT_BYTES", "1000")]);
    let python = Python::new(&gateway, "a");
    let id = send(&gateway, &json!({"input": 1}));
    python.take(false);
    let large = json!({"output": "x".repeat(2000)}).to_string();
    assert_eq!(python.done(&id, &large).status, 200);
    let view = status(&gateway, &id);
    assert_eq!(view["status"], "FAILED");
    assert!(view["error"].as_str().unwrap().contains("more than 1000 bytes"), "{view}");
}

/// The gateway forgets its workers when it dies, and knows them again by what they say.
#[test]
fn a_foreign_worker_and_its_job_survive_the_gateway() {
    let (dir, gateway) = with_python(&[]);
    let id = send(&gateway, &json!({"input": 1}));
    Python::new(&gateway, "a").take(false);
    gateway.kill();
    let gateway = Gateway::start(dir.path(), &[("MAX_WORKERS", "0")]);
    assert_eq!(status(&gateway, &id)["status"], "IN_PROGRESS", "its worker may still have it");
    // The endpoint is still that of the Python worker: its jobs are not checked as Talkie's.
    send(&gateway, &json!({"input": "anything"}));
    let python = Python::new(&gateway, "a");
    python.ping(&format!("&job_id={id}"));
    assert_eq!(gateway.get("/v2/py/health").json()["workers"]["running"], 1);
    python.done(&id, r#"{"output": 1}"#);
    assert_eq!(status(&gateway, &id)["status"], "COMPLETED");
}

/// Our own worker, as it would run on another machine.
#[test]
fn our_own_worker_attaches_itself_with_a_key() {
    let dir = tempdir().unwrap();
    make_key(dir.path());
    let gateway = Gateway::start(dir.path(), &[("MAX_WORKERS", "0")]);
    let waiting = gateway.run(&job("instant"));
    let elsewhere = tempdir().unwrap();
    let mut worker = Ending(start_worker(&gateway, dir.path(), elsewhere.path()));
    let view = gateway.success_of(&waiting);
    assert_eq!(view["workerId"], "elsewhere-1");
    let running = gateway.run(&job("wait"));
    gateway.at_work(&running);
    gateway.cancel(&running);
    gateway.success_of(&gateway.run(&job("instant")));
    send_signal(worker.0.id(), libc::SIGTERM);
    assert_eq!(worker.0.wait().unwrap().code(), Some(0));
}

fn start_worker(gateway: &Gateway, gateways: &Path, dir: &Path) -> Child {
    let url = |route: &str| format!("{}/v2/talkie/{route}?gpu=none", gateway.base);
    let log = fs::File::create(dir.join("log")).unwrap();
    handler()
        .args(["worker", "--model", "tiny"])
        .env("RUNPOD_WEBHOOK_GET_JOB", url("job-take/$ID"))
        .env("RUNPOD_WEBHOOK_POST_OUTPUT", url("job-done/$RUNPOD_POD_ID/$ID"))
        .env("RUNPOD_WEBHOOK_PING", url("ping/$RUNPOD_POD_ID"))
        .env("RUNPOD_POD_ID", "elsewhere-1")
        .env("RUNPOD_AI_API_KEY", KEY)
        .env("SPOOL_PATH", dir.join("spool"))
        .envs([("HOME", dir)])
        .envs([("FAULTS_FROM_PROMPT", "1"), ("MIN_FREE_BYTES", "0")])
        .envs(bucket(gateway, gateways))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .unwrap()
}

/// The gateway's own bucket, with the key that lies in its folder.
fn bucket(gateway: &Gateway, dir: &Path) -> Vec<(&'static str, String)> {
    let text = fs::read_to_string(dir.join("s3-credentials")).unwrap();
    let key: Value = serde_json::from_str(&text).unwrap();
    let field = |name: &str| key[name].as_str().unwrap().to_string();
    vec![
        ("BUCKET_ENDPOINT_URL", gateway.base.clone()),
        ("BUCKET_NAME", "talkie-videos".to_string()),
        ("BUCKET_ACCESS_KEY_ID", field("access_key_id")),
        ("BUCKET_SECRET_ACCESS_KEY", field("secret_access_key")),
    ]
}

/// A process that ends with its test.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
