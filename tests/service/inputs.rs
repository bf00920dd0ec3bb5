//! Fetching: what is reached, what is not, and what a server can do about it.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use handler::inputs::{FetchPolicy, Fetcher};
use handler::job::{Code, JobError};
use serde_json::json;
use talkie::request::{Limits, Medium};

use crate::media;
use crate::support::{Bench, Server, empty, ok};

const LIMITS: Limits = Limits { image_bytes: 1000, audio_bytes: 1000 };

/// Fetches with addresses on loopback allowed.
fn fetch(url: &str, change: impl Fn(&mut FetchPolicy)) -> Result<Vec<u8>, JobError> {
    let mut policy = FetchPolicy { allow_private: true, ..FetchPolicy::new(LIMITS) };
    change(&mut policy);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(Fetcher::new(policy).unwrap().fetch("image", Medium::Image, url))
}

fn code(fetched: Result<Vec<u8>, JobError>) -> (Code, bool) {
    let e = fetched.unwrap_err();
    (e.code, e.retryable)
}

#[test]
fn files_come_over_http() {
    let server = Server::start(|path, stream| match path {
        "/moved" => empty(stream, "302 Found", "Location: /file"),
        _ => ok(stream, b"file"),
    });
    assert_eq!(fetch(&server.url("/file?sig=1"), |_| {}).unwrap(), b"file");
    assert_eq!(fetch(&server.url("/moved"), |_| {}).unwrap(), b"file");
    assert_eq!(*server.asked.lock().unwrap(), ["/file?sig=1", "/moved", "/file"]);
}

#[test]
fn answers_that_are_no_file_are_failures() {
    let server = Server::start(|path, stream| match path {
        "/404" => empty(stream, "404 Not Found", "X: y"),
        "/503" => empty(stream, "503 Service Unavailable", "X: y"),
        "/none" => empty(stream, "204 No Content", "X: y"),
        "/loop" => empty(stream, "302 Found", "Location: /loop"),
        "/ftp" => empty(stream, "302 Found", "Location: ftp://example.com/"),
        "/file" => empty(stream, "302 Found", "Location: file:///etc/passwd"),
        "/short" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfive!");
        }
        _ => {}
    });
    for (path, want) in [
        ("/404", (Code::DownloadFailed, false)),
        ("/503", (Code::DownloadFailed, true)),
        ("/none", (Code::DownloadFailed, false)),
        ("/loop", (Code::UrlNotAllowed, false)),
        ("/ftp", (Code::UrlNotAllowed, false)),
        ("/short", (Code::DownloadFailed, true)),
        ("/hangs-up", (Code::DownloadFailed, true)),
    ] {
        assert_eq!(code(fetch(&server.url(path), |_| {})), want, "{path}");
    }
    let file = fetch(&server.url("/file"), |_| {}).unwrap_err();
    assert!(matches!(file.code, Code::UrlNotAllowed | Code::DownloadFailed), "{file}");
}

#[test]
fn files_are_cut_off_at_their_limit() {
    let server = Server::start(|path, stream| match path {
        "/declared" => ok(stream, &[7; 1001]),
        "/endless" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
            while stream.write_all(&[7; 100]).is_ok() {}
        }
        _ => ok(stream, &[7; 1000]),
    });
    assert_eq!(fetch(&server.url("/"), |_| {}).unwrap().len(), 1000);
    for path in ["/declared", "/endless"] {
        assert_eq!(code(fetch(&server.url(path), |_| {})).0, Code::ImageTooLarge, "{path}");
    }
}

#[test]
fn silent_servers_do_not_hold_a_job_up() {
    // Connections wait in the queue of this listener; nobody ever answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    let began = Instant::now();
    let e = fetch(&url, |policy| policy.idle_timeout = Duration::from_millis(100)).unwrap_err();
    assert_eq!(
        (e.code, e.retryable, &e.details["reason"]),
        (Code::DownloadFailed, true, &json!("URL_TIMEOUT"))
    );
    let e = fetch(&url, |policy| policy.total_timeout = Duration::from_millis(100)).unwrap_err();
    assert_eq!(e.details["reason"], "URL_TIMEOUT");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn nothing_inside_is_reached() {
    let server = Server::start(|_, stream| ok(stream, b"secret"));
    let local = format!("http://localhost:{}/", server.port);
    for url in
        [&server.url("/"), &local, "http://127.0.0.1/", "http://169.254.169.254/", "file:///etc/passwd"]
    {
        assert_eq!(code(fetch(url, |policy| policy.allow_private = false)).0, Code::UrlNotAllowed, "{url}");
    }
    assert!(server.asked.lock().unwrap().is_empty(), "not even a connection was answered");
}

#[test]
fn messages_hold_no_query() {
    let server = Server::start(|path, stream| match path {
        "/moved?canary" => empty(stream, "302 Found", "Location: http://user:canary@example.com/?canary"),
        _ => empty(stream, "404 Not Found", "X: y"),
    });
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for url in [
        server.url("/x?canary#canary"),
        server.url("/moved?canary"),
        format!("http://{closed}/?canary"),
        format!("http://me:canary@{closed}/"),
        "ftp://a.example/?canary".to_string(),
    ] {
        let e = fetch(&url, |_| {}).unwrap_err();
        assert!(!format!("{e:?}").contains("canary"), "{e:?}");
    }
}

#[test]
fn the_command_line_reaches_inside_only_when_told() {
    let server = Server::start(|path, stream| match path {
        "/p.png?sig=canary" => ok(stream, &media::png(96, 96)),
        "/v.wav" => ok(stream, &media::tone(16_000, 1, 0.2)),
        _ => empty(stream, "404 Not Found", "X: y"),
    });
    let bench = Bench::new();
    let (image, audio, lost) = (server.url("/p.png?sig=canary"), server.url("/v.wav"), server.url("/lost"));
    let refused = bench.run(&["--image", &image, "--audio", &audio]);
    refused.refused("URL_NOT_ALLOWED");
    assert!(!refused.stderr.contains("canary"), "{}", refused.stderr);
    let lost = bench.run(&["--allow-private-urls", "--image", &image, "--audio", &lost]);
    assert_eq!(lost.refused("DOWNLOAD_FAILED")["details"]["status"], 404);
    let request = json!({"input": {"image_url": image, "wav_url": audio}}).to_string();
    assert_eq!(bench.run_request(&request, &["--allow-private-urls"]).output()["frames"], 5);
}
