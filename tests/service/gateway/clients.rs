//! What the official clients send, byte for byte where it matters, and what each of them needs to hear.

use handler::gateway::store::Outcome;
use serde_json::{Value, json};

use super::rig::{Rig, header, refused, request};

const BASE: &str = "/v2/any-endpoint";
const KEY: (&str, &str) = ("Authorization", "Bearer test-key");

/// One client's way of asking.
struct Client<'a> {
    rig: &'a Rig,
    headers: Vec<(&'a str, &'a str)>,
    /// The method of status, status-sync and stream.
    look: &'a str,
    /// The body of what needs none.
    nothing: &'a [u8],
}

impl Client<'_> {
    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: &[u8]) -> Value {
        let reply = self.rig.send(method, &format!("{BASE}{path}"), &self.headers, body);
        assert_eq!(reply.status, 200, "{method} {path}: {}", String::from_utf8_lossy(&reply.body));
        assert_eq!(header(&reply, "content-type"), Some("application/json"));
        reply.json()
    }

    #[track_caller]
    fn whole_life(&self) {
        let sent = self.ask("POST", "/run", request().to_string().as_bytes());
        assert_eq!(sent["status"], "IN_QUEUE");
        let id = sent["id"].as_str().unwrap();
        let looked = || self.ask(self.look, &format!("/status/{id}"), b"");
        assert_eq!(looked()["status"], "IN_QUEUE");
        assert_eq!(self.ask(self.look, &format!("/stream/{id}?wait=1"), b"")["stream"], json!([]));
        assert_eq!(self.rig.take().0, id);
        let view = looked();
        assert_eq!(view["status"], "IN_PROGRESS");
        assert!(view.get("error").is_none());
        self.rig.finish(id, Outcome::Completed("{\"ok\":true}".to_string()));
        let end = self.ask(self.look, &format!("/status-sync/{id}?wait=90000"), b"");
        assert_eq!((end["status"].as_str(), &end["output"]), (Some("COMPLETED"), &json!({"ok": true})));
        assert_eq!(self.ask(self.look, &format!("/stream/{id}"), b"")["stream"], json!([]));

        let sent = self.ask("POST", "/runsync?wait=1000", request().to_string().as_bytes());
        assert_eq!(sent["status"], "IN_QUEUE");
        let id = sent["id"].as_str().unwrap();
        let cancelled = self.ask("POST", &format!("/cancel/{id}"), self.nothing);
        assert_eq!((cancelled["id"].as_str(), cancelled["status"].as_str()), (Some(id), Some("CANCELLED")));
        self.ask("POST", "/run", request().to_string().as_bytes());
        assert_eq!(self.ask("POST", "/purge-queue", self.nothing)["removed"], 1);
        let health = self.ask("GET", "/health", b"");
        for (group, names) in [
            ("jobs", &["completed", "failed", "inProgress", "inQueue", "retried"][..]),
            ("workers", &["idle", "initializing", "ready", "running", "throttled", "unhealthy"]),
        ] {
            assert!(names.iter().all(|name| health[group][name].is_u64()), "{health}");
        }
        let unknown = self.rig.send(self.look, &format!("{BASE}/status/unknown"), &self.headers, b"");
        refused(&unknown, 404, "NOT_FOUND");
    }
}

#[test]
fn the_python_client() {
    let rig = Rig::start();
    let headers = vec![KEY, ("Content-Type", "application/json"), ("User-Agent", "RunPod-Python-SDK/1.12.0")];
    Client { rig: &rig, headers, look: "GET", nothing: b"" }.whole_life();
    // An empty input is wrapped once more.
    let json = [("Content-Type", "application/json")];
    let reply = rig.send("POST", "/run", &json, br#"{"input":{"input":{}}}"#);
    refused(&reply, 400, "MISSING_FIELD");
}

#[test]
fn the_javascript_client() {
    let rig = Rig::start();
    let headers =
        vec![KEY, ("Content-Type", "application/json"), ("Accept", "application/json, text/plain, */*")];
    Client { rig: &rig, headers, look: "GET", nothing: b"{}" }.whole_life();
}

/// It asks with POST, sends an empty body as JSON, and leaves out an input that is empty.
#[test]
fn the_go_client() {
    let rig = Rig::start();
    let headers = vec![KEY, ("Content-Type", "application/json"), ("User-Agent", "Go-http-client/1.1")];
    let client = Client { rig: &rig, headers, look: "POST", nothing: b"" };
    client.whole_life();
    refused(&rig.send("POST", &format!("{BASE}/run"), &client.headers, b"{}"), 400, "MISSING_FIELD");
}

/// The documentation's examples give the key bare, as curl sends it.
#[test]
fn curl() {
    let rig = Rig::with(|wishes| {
        wishes.config.api_key = Some(handler::gateway::config::Secret::new("rp-key".to_string()));
    });
    let headers = vec![("authorization", "rp-key"), ("content-type", "application/json"), ("accept", "*/*")];
    Client { rig: &rig, headers, look: "GET", nothing: b"" }.whole_life();
}
