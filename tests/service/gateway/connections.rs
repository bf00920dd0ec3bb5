//! Connections that are slow, silent, many or broken off.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use handler::gateway::server::{self, Limits};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::rig::{Rig, request};
use crate::pool::client::call;

/// What the limits of these tests allow, and what a busy machine may add.
const SPAN: Duration = Duration::from_millis(500);
const SLACK: Duration = Duration::from_secs(4);

fn impatient() -> Rig {
    Rig::with(|wishes| {
        wishes.config.connections = Limits { head: SPAN, body: SPAN, write: SPAN, ..Limits::default() };
    })
}

/// Sends `bytes` one by one with pauses until the other side has had enough; when that was.
fn drip(mut stream: TcpStream, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    for byte in bytes.iter().cycle() {
        // The pace of the client is what is tested; nothing waits for it to be right.
        thread::sleep(SPAN / 10);
        let gone = stream.write_all(std::slice::from_ref(byte)).is_err();
        if gone || began.elapsed() > SPAN + 2 * SLACK {
            return began.elapsed();
        }
    }
    unreachable!("it goes in circles")
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let limits = Limits::default();
    assert_eq!((limits.connections, limits.per_address), (2048, 64));
    assert_eq!((limits.head, limits.body), (Duration::from_secs(5), Duration::from_secs(5)));
}

#[test]
fn fault_75_silent_and_dripping_connections_are_closed() {
    let rig = impatient();
    let post = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n";
    for (what, bytes) in [
        ("silence", String::new()),
        ("one byte", "G".to_string()),
        ("half a head", "GET /livez HTTP/1.1\r\nHost: loc".to_string()),
        ("no body", post.to_string()),
        ("half a body", format!("{post}{{\"input\"")),
        ("a body that nobody reads", post.replace("/run", "/status/1")),
    ] {
        let (said, after) = rig.talk(bytes.as_bytes());
        assert!(after < SPAN + SLACK, "{what}: {after:?}");
        assert!(!said.contains("200 OK"), "{what}: {said}");
    }
    let (said, _) = rig.talk(format!("{post}{{").as_bytes());
    assert!(said.starts_with("HTTP/1.1 408 ") && said.contains("BODY_TOO_SLOW"), "{said}");
    let mut head = rig.connect();
    head.write_all(b"GET /livez HTTP/1.1\r\n").unwrap();
    assert!(drip(head, b"X-Drip: 1\r\n") < SPAN + SLACK, "a dripping head");
    let mut body = rig.connect();
    body.write_all(post.as_bytes()).unwrap();
    assert!(drip(body, b" ") < SPAN + SLACK, "a dripping body");
    assert_eq!(rig.get("/livez").status, 200);
}

#[test]
fn a_connection_that_was_used_is_closed_when_it_stays_silent() {
    let rig = impatient();
    let (said, after) = rig.talk(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(said.starts_with("HTTP/1.1 200 OK"), "{said}");
    assert!(after < SPAN + SLACK, "{after:?}");
}

#[test]
fn fault_75_more_connections_than_there_is_room_for() {
    let rig = Rig::with(|wishes| {
        wishes.config.connections = Limits { connections: 8, head: SPAN, body: SPAN, ..Limits::default() };
    });
    let silent: Vec<TcpStream> = (0..200).map(|_| rig.connect()).collect();
    // Behind all of them, one that speaks is answered when they have been closed in turn.
    let answered = (0..3).all(|_| rig.get("/livez").status == 200);
    assert!(answered);
    drop(silent);
    assert_eq!(rig.get("/health").status, 200);
}

#[test]
fn fault_13_a_reader_that_does_not_read_is_dropped_and_the_others_are_served() {
    let rig = impatient();
    let job = rig.run(&request());
    rig.take();
    let part = json!("x".repeat(1 << 20));
    for _ in 0..32 {
        rig.push(&job, &part);
    }
    let mut slow = rig.connect();
    write!(slow, "GET /stream/{job} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    slow.read_exact(&mut [0; 16]).unwrap();
    // The answer has begun, and its reader pauses for longer than it may. The system's buffers are full long before
    // 32 MiB, so the gateway gives it up, which shows as an end in the middle of the answer.
    assert_eq!(rig.get("/health").status, 200);
    thread::sleep(6 * SPAN);
    let (mut taken, began) = (Vec::new(), Instant::now());
    let _ = slow.read_to_end(&mut taken);
    assert!(taken.len() < 32 << 20, "{} bytes", taken.len());
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    rig.push(&job, &json!("later"));
    let parts = rig.get(&format!("/stream/{job}")).json();
    assert_eq!(parts["stream"], json!([{"output": "later"}]));
}

#[test]
fn fault_80_a_request_whose_handling_panics_is_one_failed_request() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    async fn broken() -> &'static str {
        panic!("as this test wants it")
    }
    let router = Router::new().route("/broken", get(broken)).route("/sound", get(|| async { "sound" }));
    let closing = CancellationToken::new();
    let served = runtime.spawn(server::serve(listener, router, Limits::default(), closing.clone()));
    let reply = call(&base, ("GET", "/broken"), &[], b"").unwrap();
    let error = super::rig::refused(&reply, 500, "INTERNAL");
    assert_eq!(error["details"]["incident"].as_str().map(str::len), Some(16), "{error}");
    assert!(!error.to_string().contains("as this test wants it"));
    let mut stream = TcpStream::connect(base.strip_prefix("http://").unwrap()).unwrap();
    stream.write_all(b"GET /broken HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains("connection: close"), "{said}");
    assert_eq!(call(&base, ("GET", "/sound"), &[], b"").unwrap().body, b"sound");
    closing.cancel();
    runtime.block_on(served).unwrap();
}

#[test]
fn those_who_wait_are_answered_when_the_server_ends() {
    let rig = Rig::start();
    let job = rig.run(&request());
    let (base, path) = (rig.base.clone(), format!("/status-sync/{job}?wait=300000"));
    let mut events = rig.connect();
    write!(events, "GET /events/{job} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut first = [0; 16];
    events.read_exact(&mut first).unwrap();
    let waiting = thread::spawn(move || call(&base, ("GET", &path), &[], b""));
    // It has arrived when the gateway knows of one more reader of this job; there is no sign of that from outside
    // but the time it takes, so the server is told to end until it has answered.
    let began = Instant::now();
    while !waiting.is_finished() && began.elapsed() < SPAN {
        thread::sleep(Duration::from_millis(10));
    }
    rig.close();
    let reply = waiting.join().unwrap().unwrap();
    assert_eq!((reply.status, reply.json()["status"].as_str()), (200, Some("IN_QUEUE")));
    let mut rest = Vec::new();
    events.read_to_end(&mut rest).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
}
