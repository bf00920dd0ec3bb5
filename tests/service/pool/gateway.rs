//! `handler serve` as a child process, and what can be seen of it from outside.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::client::{Reply, call};
use crate::media;
use crate::support::handler;

/// How long something may take that should not take long.
pub const SOON: Duration = Duration::from_secs(120);
/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(10);

/// A gateway. Its workers do what the prompts of their jobs say.
pub struct Gateway {
    child: Child,
    /// Its address, such as `http://127.0.0.1:8000`.
    pub base: String,
    log: Arc<Mutex<String>>,
}

impl Gateway {
    /// Starts one over `dir`, with more variables than all of them have.
    pub fn start(dir: &Path, variables: &[(&str, &str)]) -> Self {
        Self::try_start(dir, variables).unwrap_or_else(|log| panic!("the gateway did not start: {log}"))
    }

    /// The same for one that may end before it listens; what it printed then.
    pub fn try_start(dir: &Path, variables: &[(&str, &str)]) -> Result<Self, String> {
        let mut command = handler();
        command
            .args(["serve", "--addr", "127.0.0.1:0", "--model", "tiny", "--data-dir"])
            .arg(dir)
            .envs([("HOME", dir)])
            .envs([("FAULTS_FROM_PROMPT", "1"), ("MIN_FREE_BYTES", "0"), ("LOG_LEVEL", "info")])
            .envs([("IDLE_TIMEOUT", "60"), ("RESTART_PAUSE", "0.2"), ("ALLOW_PRIVATE_URLS", "true")])
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let printed = collect(child.stderr.take().unwrap(), log.clone());
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let Some(base) = line.trim().strip_prefix("listening on ") else {
            child.wait().unwrap();
            printed.join().unwrap();
            return Err(log.lock().unwrap().clone());
        };
        let base = base.to_string();
        // Nobody has to read the rest, and a full pipe must not hold the gateway up.
        thread::spawn(move || out.read_to_string(&mut String::new()));
        Ok(Self { child, base, log })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Reply {
        call(&self.base, ("GET", path), &[], b"")
            .unwrap_or_else(|e| panic!("GET {path}: {e}\n{}", self.log()))
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        let headers = [("Content-Type", "application/json")];
        call(&self.base, ("POST", path), &headers, body.to_string().as_bytes())
            .unwrap_or_else(|e| panic!("POST {path}: {e}\n{}", self.log()))
    }

    /// Sends a job; its id.
    #[track_caller]
    pub fn run(&self, request: &Value) -> String {
        let reply = self.post("/v2/talkie/run", request);
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()["id"].as_str().unwrap().to_string()
    }

    #[track_caller]
    pub fn status(&self, job: &str) -> Value {
        let reply = self.get(&format!("/v2/talkie/status/{job}"));
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()
    }

    #[track_caller]
    pub fn cancel(&self, job: &str) -> Value {
        self.post(&format!("/v2/talkie/cancel/{job}"), &json!({})).json()
    }

    /// Waits for the end of a job.
    #[track_caller]
    pub fn end_of(&self, job: &str) -> Value {
        let deadline = Instant::now() + SOON;
        loop {
            let view = self.get(&format!("/v2/talkie/status-sync/{job}?wait=20000")).json();
            if !matches!(view["status"].as_str(), Some("IN_QUEUE" | "IN_PROGRESS")) {
                return view;
            }
            assert!(Instant::now() < deadline, "{view} is not the end\n{}", self.log());
        }
    }

    /// Waits for the successful end of a job.
    #[track_caller]
    pub fn success_of(&self, job: &str) -> Value {
        let view = self.end_of(job);
        assert_eq!(view["status"], "COMPLETED", "{view}\n{}", self.log());
        view
    }

    /// Waits until the worker of `job` is at work: it has reported a step.
    #[track_caller]
    pub fn at_work(&self, job: &str) -> Value {
        self.until("the job is at work", || {
            let view = self.status(job);
            (view["status"] == "IN_PROGRESS" && view["output"]["stage"] == "denoise").then_some(view)
        })
    }

    #[track_caller]
    pub fn health(&self) -> Value {
        self.get("/v2/talkie/health").json()
    }

    /// Waits until the counts of workers are these: idle, initializing, running, unhealthy.
    #[track_caller]
    pub fn workers(&self, expected: [u64; 4]) {
        self.until(&format!("workers are {expected:?}"), || {
            let workers = self.health()["workers"].clone();
            let counts = ["idle", "initializing", "running", "unhealthy"].map(|name| workers[name].as_u64());
            (counts == expected.map(Some)).then_some(())
        });
    }

    /// The processes that it has started and that are not dead.
    pub fn children(&self) -> Vec<u32> {
        children(self.pid())
    }

    /// Looks until `look` finds something.
    #[track_caller]
    pub fn until<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> T {
        within(SOON, look).unwrap_or_else(|| panic!("in vain until {what}\n{}", self.log()))
    }

    /// As `kill -9` does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: i32) {
        send_signal(self.pid(), signal);
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        within(SOON, || {
            status = self.child.try_wait().unwrap();
            status.map(drop)
        });
        status.unwrap_or_else(|| panic!("it does not end\n{}", self.log.lock().unwrap()))
    }
}

impl Drop for Gateway {
    /// Its workers end with it.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static, into: Arc<Mutex<String>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut piece) {
            into.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..n]));
        }
    })
}

/// Looks until `look` finds something or the time is up.
pub fn within<T>(time: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(LOOK);
    }
}

pub fn send_signal(pid: u32, signal: i32) {
    // SAFETY: the call takes integers; the process is a child of this one or of its child, and not waited for.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) };
}

/// The children of `parent` that are not dead.
pub fn children(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|(ppid, state)| ppid == parent && state != 'Z')).collect()
}

/// Whether the process is there and not dead.
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != 'Z')
}

/// The parent and the state of a process.
fn stat(pid: u32) -> Option<(u32, char)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

/// A request whose job does what `what` says.
pub fn job(what: &str) -> Value {
    let data = |kind: &str, bytes: &[u8]| format!("data:{kind};base64,{}", STANDARD.encode(bytes));
    json!({"input": {
        "image": data("image/png", &media::png(96, 96)),
        "audio": data("audio/wav", &media::tone(16_000, 1, 0.5)),
        "prompt": format!("fault: {what}"),
    }})
}

/// The same with a policy.
pub fn job_with_policy(what: &str, policy: Value) -> Value {
    let mut request = job(what);
    request["policy"] = policy;
    request
}

/// The error of a failed job, which is a text that holds JSON.
#[track_caller]
pub fn error_of(view: &Value) -> Value {
    let text = view["error"].as_str().unwrap_or_else(|| panic!("no error: {view}"));
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}
