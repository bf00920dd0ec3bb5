//! The binary as a function of AWS Lambda, against a runtime API of our own: what Lambda sends comes from the test.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::runner::{input, with};
use crate::support::{Outcome, handler};

/// Lambda's side: hands out events, takes answers.
struct RuntimeApi {
    address: String,
    events: Sender<Event>,
    answers: Receiver<Answer>,
}

struct Event {
    id: String,
    body: String,
    deadline: SystemTime,
}

/// What the function has posted.
#[derive(Debug)]
struct Answer {
    path: String,
    body: Value,
}

impl RuntimeApi {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (events, pending) = mpsc::channel();
        let (tell, answers) = mpsc::channel();
        let pending = Arc::new(Mutex::new(pending));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (pending, tell) = (pending.clone(), tell.clone());
                thread::spawn(move || serve(stream, &pending, &tell));
            }
        });
        Self { address, events, answers }
    }
}

/// Answers the requests of one connection until it is closed.
fn serve(stream: TcpStream, pending: &Mutex<Receiver<Event>>, tell: &Sender<Answer>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        (reader.read_line(&mut line).ok()? > 0).then_some(())?;
        let mut words = line.split_whitespace().map(str::to_string);
        let (method, path) = (words.next()?, words.next()?);
        let mut len = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let header = header.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            len = header.strip_prefix("content-length:").map_or(len, |value| value.trim().parse().unwrap());
        }
        let mut body = vec![0; len];
        reader.read_exact(&mut body).ok()?;
        let response = match method.as_str() {
            "GET" => {
                let Event { id, body, deadline } = pending.lock().unwrap().recv().ok()?;
                let ms = deadline.duration_since(UNIX_EPOCH).unwrap().as_millis();
                format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nLambda-Runtime-Aws-Request-Id: {id}\r\n\
                     Lambda-Runtime-Deadline-Ms: {ms}\r\nLambda-Runtime-Invoked-Function-Arn: arn:x\r\n\
                     Content-Length: {}\r\n\r\n{body}",
                    body.len()
                )
            }
            _ => {
                let body = serde_json::from_slice(&body).unwrap();
                tell.send(Answer { path, body }).ok()?;
                "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n".to_string()
            }
        };
        writer.write_all(response.as_bytes()).ok()?;
    }
}

/// The binary as a function.
pub struct Function {
    api: RuntimeApi,
    child: Child,
    dir: TempDir,
    invoked: usize,
}

impl Function {
    /// Starts it with these variables; prompts are directives.
    pub fn start(variables: &[(&str, &str)]) -> Self {
        let api = RuntimeApi::start();
        let dir = tempfile::tempdir().unwrap();
        let mut command = function(&api.address, dir.path());
        let stderr = File::create(dir.path().join("stderr")).unwrap();
        let child = command.envs(variables.iter().copied()).stderr(stderr).spawn().unwrap();
        Self { api, child, dir, invoked: 0 }
    }

    /// Invokes it: the output, or the error as an object beside its type.
    pub fn invoke(&mut self, event: &Value) -> Result<Value, (String, Value)> {
        self.invoked += 1;
        let id = format!("request-{}", self.invoked);
        self.invoke_as(&id, &event.to_string(), Duration::from_secs(300))
    }

    fn invoke_as(&self, id: &str, body: &str, time: Duration) -> Result<Value, (String, Value)> {
        let event = Event { id: id.to_string(), body: body.to_string(), deadline: SystemTime::now() + time };
        self.api.events.send(event).unwrap();
        let Answer { path, body } =
            self.api.answers.recv_timeout(Duration::from_secs(120)).expect("the function answers");
        let path =
            path.strip_prefix(&format!("/2018-06-01/runtime/invocation/{id}/")).expect("its own request");
        match path {
            "response" => Ok(body),
            _ => {
                let message = body["errorMessage"].as_str().unwrap();
                let error = serde_json::from_str(message).unwrap_or_else(|_| json!(message));
                Err((body["errorType"].as_str().unwrap().to_string(), error))
            }
        }
    }

    /// What lies in the spool's folder of this name.
    pub fn spooled(&self, folder: &str) -> usize {
        std::fs::read_dir(self.dir.path().join(folder)).map_or(0, Iterator::count)
    }

    /// What it has said so far on standard error.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    /// The most resident memory that it has had so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Waits for the process to end by itself.
    pub fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status.code(),
                None => assert!(Instant::now() < deadline, "the process goes on"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn function(address: &str, spool: &Path) -> Command {
    let mut command = handler();
    command.env("AWS_LAMBDA_RUNTIME_API", address).env("SPOOL_PATH", spool).env("TALKIE_MODEL", "tiny");
    command.env("FAULTS_FROM_PROMPT", "1");
    for (name, value) in [("NAME", "talkie"), ("MEMORY_SIZE", "10240"), ("VERSION", "1")] {
        command.env(format!("AWS_LAMBDA_FUNCTION_{name}"), value);
    }
    command
}

fn inline(changes: Value) -> Value {
    with(&with(&input(), &json!({"output": {"inline": true}})), &changes)
}

#[test]
fn a_function_makes_videos_and_keeps_its_model() {
    let mut function = Function::start(&[]);
    let first = function.invoke(&json!({"input": inline(json!({"seed": 7}))})).unwrap();
    assert!(first["video_url"].as_str().unwrap().starts_with("data:video/mp4;base64,"), "{first}");
    let cold = &first["timings"]["cold_start"];
    assert!(cold["load_ms"].as_u64() > Some(0), "{cold}");
    // The event as a whole is an input too.
    let second = function.invoke(&inline(json!({"seed": 7}))).unwrap();
    let warm = second["timings"]["cold_start"].as_object().unwrap();
    assert!(
        warm.contains_key("bytes_read") && warm.values().all(|value| value.as_f64() == Some(0.0)),
        "{warm:?}"
    );
    assert_eq!(second["sha256"], first["sha256"]);
    assert_eq!(function.spooled("videos"), 0, "nothing is left in the spool");
}

#[test]
fn an_event_that_comes_again_is_the_same_job() {
    let function = Function::start(&[]);
    let event = json!({"input": inline(json!({"prompt": "fault: instant"}))}).to_string();
    let invoke = |id| function.invoke_as(id, &event, Duration::from_secs(60)).unwrap();
    let first = invoke("a");
    assert_eq!(invoke("a"), first);
    assert_ne!(invoke("b")["seed"], first["seed"], "another request draws another seed");
}

#[test]
fn errors_carry_their_code_and_their_json() {
    let mut function = Function::start(&[]);
    for (event, code) in [
        (json!({"input": {"imgae": "x"}}), "UNKNOWN_FIELD"),
        (json!({"input": {"image": "AAAA"}}), "MISSING_FIELD"),
        (json!("text"), "INVALID_INPUT"),
        (json!(null), "INVALID_INPUT"),
        (json!({"input": input()}), "UPLOAD_FAILED"),
    ] {
        let (kind, error) = function.invoke(&event).unwrap_err();
        assert_eq!((kind.as_str(), &error["code"]), (code, &json!(code)), "{error}");
        for field in ["message", "hint", "retryable", "details"] {
            assert!(error.get(field).is_some(), "{error}");
        }
    }
    let broken = function.invoke_as("broken", "{not json", Duration::from_secs(60));
    assert!(broken.is_err());
    assert!(function.invoke(&inline(json!({"prompt": "fault: instant"}))).is_ok(), "it goes on");
}

#[test]
fn p6_a_job_ends_before_its_deadline() {
    let mut function = Function::start(&[]);
    let wait = inline(json!({"prompt": "fault: wait"})).to_string();
    // Two seconds are kept for the answer.
    let (kind, error) = function.invoke_as("late", &wait, Duration::from_millis(2300)).unwrap_err();
    assert_eq!(kind, "TIMEOUT", "{error}");
    assert!(function.invoke(&inline(json!({"prompt": "fault: instant"}))).is_ok());
}

#[test]
fn a_response_that_lambda_would_drop_is_an_error_that_says_so() {
    let mut function = Function::start(&[("MAX_INLINE_BYTES", "100000000")]);
    assert!(function.invoke(&inline(json!({"prompt": "fault: instant 4700000"}))).is_ok());
    let (kind, error) = function.invoke(&inline(json!({"prompt": "fault: instant 4800000"}))).unwrap_err();
    assert_eq!((kind.as_str(), &error["details"]["reason"]), ("INTERNAL", &json!("RESULT_TOO_LARGE")));
}

#[test]
fn without_lambdas_own_variables_it_says_which_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = function("127.0.0.1:1", dir.path());
    let run = Outcome::of(command.env_remove("AWS_LAMBDA_FUNCTION_VERSION").output().unwrap());
    let error = run.refused("INVALID_INPUT");
    assert!(error["message"].as_str().unwrap().contains("AWS_LAMBDA_FUNCTION_VERSION"), "{error}");
}
