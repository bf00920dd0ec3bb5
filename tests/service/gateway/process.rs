//! The real binary: its verbs for keys, its refusals, and what only a whole process shows.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::rig::{refused, request};
use crate::pool::client::call;
use crate::pool::gateway::{Gateway, within};
use crate::support::{Outcome, handler};

/// Without workers, whose starts would say nothing here.
const NO_WORKERS: (&str, &str) = ("MAX_WORKERS", "0");

fn keys(dir: &Path, args: &[&str]) -> Outcome {
    let output = handler().args(["keys"]).args(args).env("DATA_DIR", dir).output().unwrap();
    Outcome::of(output)
}

#[test]
fn keys_are_made_listed_and_revoked_beside_a_running_gateway() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[NO_WORKERS]);
    assert_eq!(gateway.get("/health").status, 200);
    let made = keys(dir.path(), &["create", "--name", "laptop"]).output();
    let (id, secret) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    assert!(secret.starts_with("talkie_") && secret.len() == 56, "{made}");
    assert_eq!((made["name"].as_str(), made["role"].as_str()), (Some("laptop"), Some("client")));
    let health = |key: &str| {
        call(&gateway.base, ("GET", "/health"), &[("Authorization", &format!("Bearer {key}"))], b"").unwrap()
    };
    refused(&gateway.get("/health"), 401, "UNAUTHORIZED");
    assert_eq!(health(secret).status, 200);
    let worker = keys(dir.path(), &["create", "--name", "gpu box", "--role", "worker"]).output();
    refused(&health(worker["key"].as_str().unwrap()), 401, "UNAUTHORIZED");

    let listed = keys(dir.path(), &["list"]);
    assert!(!listed.stdout.contains("talkie_"), "a secret is shown once: {}", listed.stdout);
    let listed = listed.output();
    assert_eq!(listed["keys"].as_array().unwrap().len(), 2);
    assert_eq!((&listed["keys"][0]["id"], &listed["keys"][0]["revoked_at"]), (&made["id"], &Value::Null));
    assert!(listed["keys"][0]["created_at"].as_str().unwrap().ends_with('Z'));
    // Nowhere on the disk is the secret itself.
    for entry in fs::read_dir(dir.path()).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        let bytes = fs::read(entry.path()).unwrap();
        assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()), "{:?}", entry.path());
    }

    let revoked = keys(dir.path(), &["revoke", id]).output();
    assert_eq!(revoked["revoked_now"], true);
    assert_eq!(keys(dir.path(), &["revoke", id]).output()["revoked_now"], false);
    let none = keys(dir.path(), &["revoke", "none"]);
    assert_eq!((none.code, none.error()["code"].as_str()), (Some(1), Some("NOT_FOUND")));
    assert!(health(secret).status == 200, "no client key is left, so none is needed on this machine");
    keys(dir.path(), &["create", "--name", "other"]).output();
    refused(&health(secret), 401, "UNAUTHORIZED");
    keys(dir.path(), &["create", "--name", " "]).refused("INVALID_INPUT");
    assert!(!gateway.log().contains(secret), "{}", gateway.log());
}

#[test]
fn an_address_that_others_reach_needs_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let serve = |variables: &[(&str, &str)]| {
        let all = [&[NO_WORKERS, ("ADDR", "0.0.0.0:0")], variables].concat();
        let mut command = handler();
        command.args(["serve", "--model", "tiny"]).env("DATA_DIR", dir.path()).envs(all.iter().copied());
        command
    };
    let refusal = Outcome::of(serve(&[]).output().unwrap()).refused("INVALID_INPUT");
    let hint = refusal["hint"].as_str().unwrap();
    assert!(hint.contains("API_KEY") && hint.contains("handler keys create"), "{refusal}");
    assert!(refusal["message"].as_str().unwrap().contains("0.0.0.0:"), "{refusal}");
    keys(dir.path(), &["create", "--name", "first"]).output();
    let mut child = serve(&[]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 12];
    child.stdout.take().unwrap().read_exact(&mut said).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(&said, b"listening on");
}

#[test]
fn fault_12_clients_that_leave_change_nothing_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[NO_WORKERS]);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count();
    let threads = || fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap().count();
    let body = request().to_string();
    let head = "POST /runsync?wait=300000 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let sent = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    let connect = || TcpStream::connect(gateway.base.strip_prefix("http://").unwrap()).unwrap();
    let waiting = || gateway.health()["jobs"]["inQueue"].as_u64().unwrap();
    let leave_after = |clients: u64, before: u64| {
        let streams: Vec<_> = (0..clients)
            .map(|_| {
                let mut stream = connect();
                stream.write_all(sent.as_bytes()).unwrap();
                stream
            })
            .collect();
        gateway.until("all requests are jobs", || (waiting() == before + clients).then_some(()));
        streams.into_iter().for_each(|stream| stream.shutdown(Shutdown::Both).unwrap());
    };
    // The first ones open what stays open.
    leave_after(20, 0);
    gateway.until("they are gone", || (descriptors() < 40).then_some(()));
    let (files, tasks) = (descriptors(), threads());
    for round in 0..10 {
        leave_after(100, 20 + round * 100);
    }
    let slack = 4;
    gateway.until("they are gone", || (descriptors() <= files + slack).then_some(()));
    assert!(threads() <= tasks + slack, "{} threads, {tasks} before", threads());
    assert_eq!(waiting(), 1020, "each job goes on");
}

#[test]
fn fault_79_what_a_client_writes_stays_within_its_line_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[NO_WORKERS, ("LOG_LEVEL", "trace")]);
    let forged = "x\r\n2026-01-01T00:00:00Z ERROR forged: canary-line";
    let mut sent = request();
    sent["input"]["prompt"] = forged.into();
    assert_eq!(gateway.post("/run", &sent).status, 200);
    sent["input"] = json!({"image": forged, "audio": forged, forged: 1});
    assert_eq!(gateway.post("/run", &sent).status, 400);
    sent = json!({"input": {}, "webhook": forged, "policy": forged});
    gateway.post("/run", &sent);
    let encoded = "x%0d%0a2026-01-01T00:00:00Z%20ERROR%20forged:%20canary-line";
    for path in
        [format!("/status/{encoded}"), format!("/v2/{encoded}/health"), format!("/v2/talkie/ping/{encoded}")]
    {
        gateway.get(&path);
    }
    let headers = [("Content-Type", "application/json"), ("Idempotency-Key", "canary-line\tERROR")];
    call(&gateway.base, ("POST", "/run"), &headers, b"{}").unwrap();
    let log = gateway.log();
    let lines: Vec<_> =
        log.lines().filter(|line| line.trim_start().starts_with("2026-01-01T00:00:00Z")).collect();
    assert!(lines.is_empty(), "{lines:?}");
    assert!(!log.contains("canary-line"), "neither prompts nor headers are logged: {log}");
}

/// As many descriptors as it takes to start, and no more: what cannot be served is not served, and the process
/// lives on.
#[test]
fn fault_21_a_gateway_without_descriptors_waits_for_some() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[NO_WORKERS]);
    assert_eq!(gateway.get("/health").status, 200);
    let open = fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count() as u64;
    let limit = libc::rlimit { rlim_cur: open + 8, rlim_max: open + 8 };
    let pid = i32::try_from(gateway.pid()).unwrap();
    // SAFETY: the pointer is to a structure that lives until the call returns; the process is a child of this one.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    let connect = || TcpStream::connect(gateway.base.strip_prefix("http://").unwrap()).unwrap();
    let silent: Vec<_> = (0..64).map(|_| connect()).collect();
    gateway.until("it says so", || {
        gateway.log().contains("no connection can be accepted for now").then_some(())
    });
    drop(silent);
    let answered = within(Duration::from_secs(30), || {
        call(&gateway.base, ("GET", "/livez"), &[], b"").ok().filter(|reply| reply.status == 200)
    });
    assert!(answered.is_some(), "{}", gateway.log());
}
