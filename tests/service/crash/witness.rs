//! What a client saw.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::Value;

use crate::pool::client::call;
use crate::pool::gateway::Gateway;

/// Jobs that are looked at again in each round.
const SAMPLE: usize = 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Witness {
    accepted: Vec<String>,
    /// Jobs that have ended, and how, as it was seen first.
    ended: HashMap<String, Value>,
    /// Jobs of which a webhook told.
    told: HashMap<String, String>,
    /// Requests that were sent and not answered, with their idempotency keys.
    unanswered: Vec<(String, Value)>,
    sent: u64,
}

impl Witness {
    /// Sends a job. It is accepted if there is an answer; else nobody knows.
    pub fn send(&mut self, gateway: &Gateway, request: &Value) {
        self.sent += 1;
        let key = format!("key-{}", self.sent);
        match post(gateway, &key, request) {
            Some(id) => self.accepted.push(id),
            None => self.unanswered.push((key, request.clone())),
        }
    }

    /// Sends again what was not answered. It is the same job whether or not it had been accepted.
    pub fn resend(&mut self, gateway: &Gateway) {
        for (key, request) in std::mem::take(&mut self.unanswered) {
            let first = post(gateway, &key, &request).expect("an answer");
            let second = post(gateway, &key, &request).expect("an answer");
            assert_eq!(first, second, "one key, one job");
            self.accepted.push(first);
        }
    }

    pub fn accepted(&self) -> Vec<String> {
        self.accepted.clone()
    }

    /// Looks at some jobs: none is lost, and none that has ended changes.
    pub fn check_some(&mut self, gateway: &Gateway, random: &mut StdRng) {
        let sample: Vec<String> = self.accepted.choose_multiple(random, SAMPLE).cloned().collect();
        for id in sample {
            let path = format!("/v2/talkie/status/{id}");
            // This gateway may kill itself at any time.
            let Ok(reply) = call(&gateway.base, ("GET", &path), &[], b"") else { return };
            assert_eq!(reply.status, 200, "{id} is lost");
            self.saw(&reply.json());
        }
    }

    /// Compares a status with what was seen before.
    pub fn saw(&mut self, view: &Value) {
        let id = view["id"].as_str().unwrap().to_string();
        let is_open = matches!(view["status"].as_str(), Some("IN_QUEUE" | "IN_PROGRESS"));
        match self.ended.get(&id) {
            Some(before) => assert_eq!(view, before, "a job that has ended changes"),
            None if is_open => assert!(!self.told.contains_key(&id), "a webhook told of the end of {view}"),
            None => drop(self.ended.insert(id, view.clone())),
        }
    }

    /// A webhook came. All that tell of a job are the same.
    pub fn told(&mut self, id: &str, body: &str) {
        let view: Value = serde_json::from_str(body).unwrap();
        assert_eq!(view["status"], "COMPLETED", "{view}");
        let job = view["id"].as_str().unwrap().to_string();
        let message = format!("{id} {body}");
        if let Some(before) = self.told.insert(job.clone(), message.clone()) {
            assert_eq!(before, message, "{job} ended twice");
        }
    }

    /// Accepted jobs of whose end no webhook told.
    pub fn untold(&self) -> HashSet<&String> {
        self.accepted.iter().filter(|id| !self.told.contains_key(*id)).collect()
    }
}

fn post(gateway: &Gateway, key: &str, request: &Value) -> Option<String> {
    let headers = [("Content-Type", "application/json"), ("Idempotency-Key", key)];
    let body = request.to_string();
    let reply = call(&gateway.base, ("POST", "/v2/talkie/run"), &headers, body.as_bytes()).ok()?;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    Some(reply.json()["id"].as_str().unwrap().to_string())
}

/// Receives webhooks, for as long as the process lives.
#[derive(Debug)]
pub struct Hooks {
    port: u16,
    messages: Receiver<(String, String)>,
}

impl Hooks {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream);
                let Some(message) = read(&mut reader) else { continue };
                // Whoever sent it may be dead by now, and then it was told all the same.
                let _ = reader.into_inner().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        Self { port, messages }
    }

    /// `request` with this receiver in it.
    pub fn on(&self, mut request: Value) -> Value {
        request["webhook"] = format!("http://127.0.0.1:{}/", self.port).into();
        request
    }

    /// Shows `witness` what has come since the last call.
    pub fn check(&self, witness: &mut Witness) {
        for (id, body) in self.messages.try_iter() {
            witness.told(&id, &body);
        }
    }
}

/// The id and the body of a webhook; None where its sender died in the middle.
fn read(reader: &mut impl BufRead) -> Option<(String, String)> {
    let (mut id, mut len) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim().is_empty() {
            break;
        }
        match line.trim().split_once(": ") {
            Some(("webhook-id", value)) => id = value.to_string(),
            Some(("content-length", value)) => len = value.parse().ok()?,
            _ => {}
        }
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    Some((id, String::from_utf8(body).ok()?))
}
