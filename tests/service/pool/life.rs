//! The gateway as a process: how it ends, what it costs, and what it takes to bring it down.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tempfile::tempdir;

use super::client::call;
use super::gateway::{Gateway, is_alive, job, send_signal, within};
use crate::support::handler;

#[test]
fn fault_18_told_to_end_while_idle_and_while_it_waits_for_a_job() {
    let dir = tempdir().unwrap();
    let mut gateway = Gateway::start(dir.path(), &[]);
    gateway.signal(libc::SIGTERM);
    let began = Instant::now();
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.log());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

    // Now with a warm worker, whose polls are open.
    let mut gateway = Gateway::start(dir.path(), &[]);
    gateway.success_of(&gateway.run(&job("instant")));
    gateway.workers([1, 0, 0, 0]);
    let worker = gateway.children()[0];
    gateway.signal(libc::SIGINT);
    let began = Instant::now();
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.log());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(!is_alive(worker));
    assert!(!gateway.log().contains("WARN"), "{}", gateway.log());
}

#[test]
fn fault_18_told_to_end_with_a_job_that_can_be_finished() {
    let dir = tempdir().unwrap();
    let mut gateway = Gateway::start(dir.path(), &[]);
    let id = gateway.run(&job("steps 20"));
    gateway.at_work(&id);
    gateway.signal(libc::SIGTERM);
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.log());
    let gateway = Gateway::start(dir.path(), &[]);
    let view = gateway.status(&id);
    assert_eq!(view["status"], "COMPLETED", "{view}");
}

/// A job that takes too long is given back, and that is not its fault: it has all its attempts.
#[test]
fn fault_18_told_to_end_with_a_job_that_cannot_be_finished() {
    let dir = tempdir().unwrap();
    let variables = [("STOP_GRACE_SECONDS", "0.3"), ("MAX_ATTEMPTS", "1")];
    let mut gateway = Gateway::start(dir.path(), &variables);
    let id = gateway.run(&job("wait"));
    gateway.at_work(&id);
    gateway.signal(libc::SIGTERM);
    assert_eq!(gateway.ended().code(), Some(0), "{}", gateway.log());
    let gateway = Gateway::start(dir.path(), &variables);
    gateway.at_work(&id);
    assert_eq!(gateway.cancel(&id)["status"], "CANCELLED");
}

#[test]
fn fault_19_told_twice_to_end() {
    let dir = tempdir().unwrap();
    let mut gateway = Gateway::start(dir.path(), &[]);
    let id = gateway.run(&job("wait"));
    gateway.at_work(&id);
    gateway.signal(libc::SIGTERM);
    gateway.until("the worker is told to end", || (gateway.health()["workers"]["ready"] == 0).then_some(()));
    gateway.signal(libc::SIGINT);
    let began = Instant::now();
    let status = gateway.ended();
    assert_eq!((status.code(), status.signal()), (Some(1), None), "{}", gateway.log());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let gateway = Gateway::start(dir.path(), &[]);
    gateway.at_work(&id);
}

/// The terminal is closed, and nobody reads what is printed.
#[test]
fn fault_20_terminal_closed() {
    let dir = tempdir().unwrap();
    let mut child = handler()
        .args(["serve", "--addr", "127.0.0.1:0", "--log-level", "debug", "--data-dir"])
        .arg(dir.path())
        .envs([("FAULTS_FROM_PROMPT", "1"), ("MIN_FREE_BYTES", "0")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    drop(child.stderr.take());
    send_signal(child.id(), libc::SIGHUP);
    let base = line.trim().strip_prefix("listening on ").unwrap();
    let body = job("instant").to_string();
    let headers = [("Content-Type", "application/json")];
    let view =
        call(base, ("POST", "/v2/talkie/runsync?wait=30000"), &headers, body.as_bytes()).unwrap().json();
    assert_eq!(view["status"], "COMPLETED", "{view}");
    send_signal(child.id(), libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Few files may be open, and somebody opens many connections. The gateway lives, and serves when they are gone.
#[test]
fn fault_21_no_more_files() {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    limit_files(gateway.pid(), 64);
    let address = gateway.base.strip_prefix("http://").unwrap();
    let mut open = Vec::new();
    // More than it may have, and no more than the system queues for it.
    for _ in 0..120 {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /v2/talkie/health HTTP/1.1\r\n").unwrap();
        open.push(stream);
    }
    drop(open);
    let served = within(Duration::from_secs(10), || {
        let reply = call(&gateway.base, ("GET", "/v2/talkie/health"), &[], b"");
        reply.ok().filter(|reply| reply.status == 200)
    });
    assert!(served.is_some(), "{}", gateway.log());
    limit_files(gateway.pid(), 1024);
    gateway.success_of(&gateway.run(&job("instant")));
}

#[test]
fn the_gateway_is_small_at_rest_and_quick_to_start() {
    let dir = tempdir().unwrap();
    drop(Gateway::start(dir.path(), &[]));
    let began = Instant::now();
    let gateway = Gateway::start(dir.path(), &[]);
    assert_eq!(gateway.get("/v2/talkie/health").status, 200);
    let started = began.elapsed();
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    eprintln!("{kib} KiB at rest, first answer after {started:?}");
    assert!(kib <= 30 * 1024, "{kib} KiB at rest");
    // 50 ms are promised of a release build on a machine that does nothing else.
    assert!(started < Duration::from_secs(1), "{started:?}");
}

fn limit_files(pid: u32, most: u64) {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: 1024 };
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: the pointer is to a structure that lives until the call returns; no old limit is asked for.
    let done = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
