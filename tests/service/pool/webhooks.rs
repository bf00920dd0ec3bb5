//! Row 81 of the matrix: what a receiver of webhooks can do to us, and what it gets.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tempfile::tempdir;

use super::gateway::{Gateway, SOON, job, job_with_policy};

const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const FINE: &str = "200 OK";
const BROKEN: &str = "503 Service Unavailable";

/// A webhook that came in.
struct Message {
    path: String,
    headers: HeaderMap,
    body: String,
    at: Instant,
}

impl Message {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().unwrap()
    }
}

/// A server that gives its answers in turn, the last one for ever. An empty one is none at all: the connection
/// stays open.
struct Hooks {
    port: u16,
    messages: Receiver<Message>,
}

impl Hooks {
    fn start(answers: &[&str]) -> Self {
        let answers: Vec<String> = answers.iter().map(|answer| (*answer).to_string()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            let mut open = Vec::new();
            for (i, stream) in listener.incoming().flatten().enumerate() {
                let mut reader = BufReader::new(stream);
                let Some(message) = read(&mut reader) else { continue };
                let answer = &answers[i.min(answers.len() - 1)];
                if answer.is_empty() {
                    open.push(reader);
                } else {
                    let head = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                    reader.into_inner().write_all(head.as_bytes()).unwrap();
                }
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        Self { port, messages }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook?token=canary-token", self.port)
    }

    /// `request` with this server's address in it.
    fn on(&self, mut request: Value) -> Value {
        request["webhook"] = self.url().into();
        request
    }

    #[track_caller]
    fn next(&self) -> Message {
        self.messages.recv_timeout(SOON).expect("no webhook came")
    }
}

fn read(reader: &mut impl BufRead) -> Option<Message> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_string();
    let mut headers = HeaderMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.parse::<HeaderName>().ok()?, HeaderValue::from_str(value).ok()?);
    }
    let len: usize = headers.get("content-length")?.to_str().ok()?.parse().ok()?;
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    Some(Message { path, headers, body: String::from_utf8(body).ok()?, at: Instant::now() })
}

#[test]
fn a_webhook_is_the_whole_job_and_is_signed() {
    let dir = tempdir().unwrap();
    let hooks = Hooks::start(&[FINE]);
    let gateway = Gateway::start(dir.path(), &[("WEBHOOK_SECRET", SECRET)]);
    // Long enough that its text is kept in a file, and put back.
    let mut request = hooks.on(job("instant"));
    let audio = crate::media::tone(16_000, 1, 3.0);
    request["input"]["audio"] =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, audio).into();
    let id = gateway.run(&request);
    let message = hooks.next();
    let view = gateway.success_of(&id);
    let mut expected = view;
    expected["input"] = request["input"].clone();
    expected["webhook"] = request["webhook"].clone();
    assert_eq!(message.json(), expected);
    assert_eq!(message.path, "/hook?token=canary-token");
    assert_eq!(message.header("content-type"), "application/json");
    Webhook::new(SECRET).unwrap().verify(message.body.as_bytes(), &message.headers).unwrap();
    assert!(!gateway.log().contains("canary-token"), "{}", gateway.log());

    for (what, policy, status) in [
        ("nan", json!({}), "FAILED"),
        ("hang", json!({"executionTimeout": 5000}), "TIMED_OUT"),
        ("wait", json!({}), "CANCELLED"),
    ] {
        let id = gateway.run(&hooks.on(job_with_policy(what, policy)));
        if status == "CANCELLED" {
            gateway.cancel(&id);
        }
        let told = hooks.next().json();
        assert_eq!((&told["id"], &told["status"]), (&json!(id), &json!(status)), "{told}");
    }
}

#[test]
fn fault_81_webhook_5xx_and_429() {
    let dir = tempdir().unwrap();
    let hooks = Hooks::start(&[BROKEN, "429 Too Many Requests\r\nRetry-After: 1", FINE]);
    let gateway = Gateway::start(dir.path(), &[("WEBHOOK_PAUSES", "0.1,0.1,0.1")]);
    gateway.run(&hooks.on(job("instant")));
    let messages = [hooks.next(), hooks.next(), hooks.next()];
    for message in &messages[1..] {
        assert_eq!(message.header("webhook-id"), messages[0].header("webhook-id"), "one message, one id");
        assert_eq!(message.body, messages[0].body);
    }
    assert!(messages[2].at - messages[1].at >= Duration::from_secs(1), "the receiver's pause is kept");
    // It was received, so nothing comes but the next job's.
    let next = gateway.run(&hooks.on(job("instant")));
    assert_eq!(hooks.next().json()["id"], next.as_str());
}

#[test]
fn fault_81_webhook_3xx_is_not_followed() {
    let dir = tempdir().unwrap();
    let target = Hooks::start(&[FINE]);
    let moved = format!("307 Temporary Redirect\r\nLocation: {}", target.url());
    let hooks = Hooks::start(&[&moved, FINE]);
    let gateway = Gateway::start(dir.path(), &[("WEBHOOK_PAUSES", "0.1")]);
    gateway.run(&hooks.on(job("instant")));
    hooks.next();
    // It counts as a failure, so it is tried again where it was sent to.
    hooks.next();
    assert!(target.messages.try_recv().is_err(), "the redirect was followed");
}

#[test]
fn fault_81_webhook_410_and_give_up() {
    let dir = tempdir().unwrap();
    let gone = Hooks::start(&["410 Gone"]);
    let broken = Hooks::start(&[BROKEN]);
    let gateway = Gateway::start(dir.path(), &[("WEBHOOK_PAUSES", "0.1,0.1")]);
    gateway.run(&gone.on(job("instant")));
    gone.next();
    let id = gateway.run(&broken.on(job("instant")));
    for _ in 0..3 {
        broken.next();
    }
    gateway.until("it is given up", || gateway.log().contains("is given up").then_some(()));
    // By now whatever could have come a second or a fourth time would have come.
    let after = gateway.run(&broken.on(job("instant")));
    assert_eq!(broken.next().json()["id"], after.as_str());
    assert!(gone.messages.try_recv().is_err(), "410 means no more");
    assert_eq!(gateway.status(&id)["status"], "COMPLETED", "a webhook does not change its job");
}

#[test]
fn fault_81_webhook_that_does_not_answer_holds_up_nobody() {
    let dir = tempdir().unwrap();
    let silent = Hooks::start(&["", FINE]);
    let quick = Hooks::start(&[FINE]);
    let variables = [("WEBHOOK_TIMEOUT_SECONDS", "1"), ("WEBHOOK_PAUSES", "0.1")];
    let gateway = Gateway::start(dir.path(), &variables);
    gateway.run(&silent.on(job("instant")));
    let first = silent.next();
    gateway.run(&quick.on(job("instant")));
    let other = quick.next();
    let second = silent.next();
    assert!(second.at - first.at >= Duration::from_secs(1), "the time is up, and it is tried again");
    assert!(other.at < second.at, "the other did not have to wait");
}

/// Webhooks that are due when the gateway dies are sent by the next one; one that was sent and not recorded is
/// sent again under the same id.
#[test]
fn fault_81_webhook_survives_the_gateway() {
    let dir = tempdir().unwrap();
    let hooks = Hooks::start(&[FINE]);
    let mut gateway = Gateway::start(dir.path(), &[("KILL_AT", "K10")]);
    gateway.run(&hooks.on(job("instant")));
    let first = hooks.next();
    assert_eq!(gateway.ended().signal(), Some(libc::SIGKILL));
    let _gateway = Gateway::start(dir.path(), &[]);
    let second = hooks.next();
    assert_eq!(second.header("webhook-id"), first.header("webhook-id"));
    assert_eq!(second.body, first.body);
}

#[test]
fn fault_81_webhook_that_leads_inside() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("ALLOW_PRIVATE_URLS", "false")]);
    for address in
        ["http://127.0.0.1/", "http://169.254.169.254/latest", "https://[::1]/", "http://localhost/"]
    {
        let mut request = job("instant");
        request["webhook"] = address.into();
        let reply = gateway.post("/v2/talkie/run", &request);
        assert_eq!(reply.status, 400, "{address}: {}", String::from_utf8_lossy(&reply.body));
    }
}
