//! RunPod's Python worker at the gateway, attached with a worker key.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use super::{command, python, script};
use crate::pool::gateway::{Gateway, SOON};
use crate::support::handler;

/// The worker, and the process that pings for it.
struct Worker {
    child: Child,
    lines: Receiver<String>,
}

impl Worker {
    /// Attaches one to `endpoint` and waits until it asks for jobs.
    fn attach(python: &Path, gateway: &Gateway, dir: &Path, endpoint: &str) -> Self {
        let route = |of: &str, rest: &str| format!("{}/v2/{endpoint}/{of}/{rest}?gpu=none", gateway.base);
        let mut worker = command(python, dir);
        worker
            .arg(script("worker.py"))
            .envs([
                ("RUNPOD_WEBHOOK_GET_JOB", route("job-take", "$ID")),
                ("RUNPOD_WEBHOOK_POST_OUTPUT", route("job-done", "$RUNPOD_POD_ID/$ID")),
                ("RUNPOD_WEBHOOK_POST_STREAM", route("job-stream", "$RUNPOD_POD_ID/$ID")),
                ("RUNPOD_WEBHOOK_PING", route("ping", "$RUNPOD_POD_ID")),
                ("RUNPOD_AI_API_KEY", worker_key(dir)),
            ])
            .envs([("RUNPOD_POD_ID", "python-1"), ("RUNPOD_PING_INTERVAL", "1000"), ("MODE", endpoint)])
            .envs([("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true"), ("RUNPOD_SKIP_GPU_CHECK", "true")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0);
        let mut child = worker.spawn().unwrap();
        let (send, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || out.lines().map_while(Result::ok).all(|line| send.send(line).is_ok()));
        let worker = Self { child, lines };
        gateway.until("the worker is idle", || {
            let health = gateway.get(&format!("/v2/{endpoint}/health")).json();
            (health["workers"]["idle"] == 1).then_some(())
        });
        worker
    }

    /// Waits until it prints `expected`.
    #[track_caller]
    fn prints(&self, expected: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|e| panic!("no {expected:?}: {e}"));
            if line == expected {
                return;
            }
        }
    }
}

impl Drop for Worker {
    /// Its heartbeat is a process that would outlive it.
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).unwrap();
        // SAFETY: the call takes integers; the group is that of a child which has not been waited for.
        unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

/// Makes a key for workers, as its owner does.
fn worker_key(dir: &Path) -> String {
    let mut keys = handler();
    keys.args(["keys", "create", "--role", "worker", "--name", "python", "--data-dir"]).arg(dir);
    let output = keys.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    let made: Value = serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{e}: {printed}"));
    made["key"].as_str().unwrap_or_else(|| panic!("no key: {printed}")).to_string()
}

/// A gateway that starts no workers.
fn gateway() -> (TempDir, Gateway) {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("MAX_WORKERS", "0")]);
    (dir, gateway)
}

fn send(gateway: &Gateway, input: Value) -> String {
    let reply = gateway.post("/v2/function/run", &json!({"input": input}));
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()["id"].as_str().unwrap().to_string()
}

#[test]
fn a_python_worker_does_jobs_fails_and_is_stopped() {
    let Some(python) = python() else { return };
    let (dir, gateway) = gateway();
    let worker = Worker::attach(&python, &gateway, dir.path(), "function");
    let status = |job: &str, of: &str| gateway.get(&format!("/v2/function/{of}/{job}")).json();
    let end_of = |job: &str| status(job, "status-sync");

    let done = end_of(&send(&gateway, json!({"text": "héllo", "n": 1.5})));
    assert_eq!((&done["status"], &done["workerId"]), (&json!("COMPLETED"), &json!("python-1")));
    assert_eq!(done["output"], json!({"echo": {"text": "héllo", "n": 1.5}}));

    let failed = end_of(&send(&gateway, json!({"fail": "no such face"})));
    assert_eq!(failed["status"], "FAILED");
    let error: Value = serde_json::from_str(failed["error"].as_str().unwrap()).unwrap();
    let what = (&error["error_type"], &error["error_message"]);
    assert_eq!(what, (&json!("<class 'ValueError'>"), &json!("no such face")));

    let long = send(&gateway, json!({"wait": true, "report": {"percent": 40}}));
    gateway.until("progress is seen", || (status(&long, "status")["output"]["percent"] == 40).then_some(()));
    let cancelled = gateway.post(&format!("/v2/function/cancel/{long}"), &json!({})).json();
    assert_eq!(cancelled["status"], "CANCELLED");
    worker.prints("cancelled");
    // Its slot is free again.
    assert_eq!(end_of(&send(&gateway, json!({})))["output"], json!({"echo": {}}));
    assert_eq!(status(&long, "status")["status"], "CANCELLED");
}

#[test]
fn chunks_of_a_python_generator_reach_the_python_client() {
    let Some(python) = python() else { return };
    let (dir, gateway) = gateway();
    let _worker = Worker::attach(&python, &gateway, dir.path(), "generator");
    let mut client = command(&python, dir.path());
    client.arg(script("stream.py")).args([&format!("{}/v2", gateway.base), "generator", "any"]);
    let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    client.stdin.take().unwrap().write_all(br#"{"to": 3}"#).unwrap();
    let mut printed = String::new();
    client.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert!(client.wait().unwrap().success(), "{}", gateway.log());
    let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let chunks = [json!({"n": 0}), json!({"n": 1}), json!({"n": 2})];
    assert_eq!(lines, [&chunks[..], &[json!(chunks)]].concat());
}
