//! URLs that lead inside, and servers that mean harm. What is already shown in `inputs` is not repeated here.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use handler::inputs::{FetchPolicy, Fetcher};
use handler::job::{Code, JobError};
use serde_json::json;
use talkie::request::{Limits, Medium};

use super::bench::Bench;
use super::{input, with};
use crate::media;
use crate::support::{Outcome, Server, empty, handler, ok};

const URLS: &str = include_str!("urls.txt");
const LIMITS: Limits = Limits { image_bytes: 100_000, audio_bytes: 100_000 };

/// Fetches with loopback allowed.
async fn fetch(url: &str, change: impl Fn(&mut FetchPolicy)) -> Result<Vec<u8>, JobError> {
    let mut policy = FetchPolicy { allow_private: true, ..FetchPolicy::new(LIMITS) };
    change(&mut policy);
    Fetcher::new(policy).unwrap().fetch("image", Medium::Image, url).await
}

#[tokio::test]
async fn fault_47_urls_that_lead_inside_are_refused() {
    let bench = Bench::with(|settings| settings.config.allow_private_urls = false);
    let mut refused = 0;
    for url in URLS.lines() {
        for field in ["image", "audio"] {
            let error = bench.run("a", with(&input(), &json!({field: url}))).await.unwrap_err();
            let code = match url {
                // Without a scheme it is taken for base64, which it is not; this one holds three bytes.
                _ if url.starts_with("//") => Code::InvalidInput,
                _ if url.starts_with("data:image/") && field == "image" => Code::InvalidImageFormat,
                _ if url.starts_with("data:image/") => Code::InvalidAudioFormat,
                _ => Code::UrlNotAllowed,
            };
            assert_eq!(error.code, code, "{url}: {error}");
            refused += 1;
        }
    }
    assert_eq!(refused, 2 * 61, "the list is whole");
}

#[tokio::test]
async fn fault_48_redirects_are_counted_and_judged() {
    let server = Server::start(|path, stream| match path.strip_prefix("/hops/").map(str::parse::<u32>) {
        Some(Ok(0)) => ok(stream, b"file"),
        Some(Ok(n)) => empty(stream, "302 Found", &format!("Location: /hops/{}", n - 1)),
        _ => {
            let to = path.strip_prefix("/to/").unwrap();
            empty(stream, "302 Found", &format!("Location: {to}"));
        }
    });
    assert_eq!(fetch(&server.url("/hops/5"), |_| {}).await.unwrap(), b"file");
    for path in
        ["/hops/6", "/to/file:///etc/passwd", "/to/gopher://x/", "/to/http://me@127.0.0.1/", "/to/ftp://x/"]
    {
        let error = fetch(&server.url(path), |_| {}).await.unwrap_err();
        assert!(matches!(error.code, Code::UrlNotAllowed | Code::DownloadFailed), "{path}: {error}");
    }
}

#[test]
fn fault_50_proxies_of_the_environment_are_not_asked() {
    let proxy = Server::start(|_, stream| ok(stream, b"from the proxy"));
    let server = Server::start(|path, stream| match path {
        "/p.png" => ok(stream, &media::png(96, 96)),
        _ => ok(stream, b"no voice"),
    });
    let dir = tempfile::tempdir().unwrap();
    let mut command = handler();
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env(name, proxy.url(""));
    }
    command.env("SPOOL_PATH", dir.path()).current_dir(dir.path()).arg("--allow-private-urls");
    let job = json!({"image": server.url("/p.png"), "audio": server.url("/v.wav")});
    command.args(["--test_input", &json!({"input": job}).to_string()]);
    let run = Outcome::of(command.output().unwrap());
    assert_eq!(run.error()["code"], "INVALID_AUDIO_FORMAT", "both came from the server itself");
    assert!(proxy.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn fault_51_what_is_compressed_stays_so_and_bytes_are_counted_on_the_wire() {
    // The head of a gzip of zeros; what follows is never unpacked.
    let packed = [b"\x1f\x8b\x08\0\0\0\0\0\0\x03".to_vec(), vec![0; 5000]].concat();
    let body = packed.clone();
    let server = Server::start(move |path, stream| {
        let len = match path {
            "/gzip" => format!("Content-Encoding: gzip\r\nContent-Length: {}", body.len()),
            "/lies" => format!("Content-Length: {}", body.len() + 1),
            _ => "Content-Length: 18446744073709551615".to_string(),
        };
        let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{len}\r\n\r\n").as_bytes());
        let _ = stream.write_all(&body);
    });
    assert_eq!(fetch(&server.url("/gzip"), |_| {}).await.unwrap(), packed);
    assert_eq!(fetch(&server.url("/lies"), |_| {}).await.unwrap_err().code, Code::DownloadFailed);
    let error = fetch(&server.url("/huge"), |_| {}).await.unwrap_err();
    assert!(matches!(error.code, Code::ImageTooLarge | Code::DownloadFailed), "{error}");
}

/// Sends `piece` again and again, until the client has had enough.
fn drip(stream: &mut TcpStream, head: &str, piece: &[u8], pause: Duration) {
    let _ = stream.write_all(head.as_bytes());
    while stream.write_all(piece).is_ok() {
        // The server is slow on purpose.
        thread::sleep(pause);
    }
}

#[tokio::test]
async fn fault_52_servers_that_drip_are_left() {
    let server = Server::start(|path, stream| match path {
        "/head" => drip(stream, "HTTP/1.1 200 OK\r\nX: ", b"x", Duration::from_millis(20)),
        "/body" => drip(stream, "HTTP/1.1 200 OK\r\n\r\n", b"x", Duration::from_millis(20)),
        _ => drip(stream, "HTTP/1.1 200 OK\r\n\r\n", &[7; 80], Duration::from_millis(100)),
    });
    for path in ["/head", "/body"] {
        let began = Instant::now();
        let url = server.url(path);
        let error =
            fetch(&url, |policy| policy.total_timeout = Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(
            (error.code, &error.details["reason"]),
            (Code::DownloadFailed, &json!("URL_TIMEOUT")),
            "{path}"
        );
        assert!(began.elapsed() < Duration::from_secs(5), "{path}");
    }
    // 800 bytes a second are fewer than 1 KiB: after the first seconds that is too slow, with no other limit near.
    let error = fetch(&server.url("/slow"), |_| {}).await.unwrap_err();
    assert_eq!(error.details["reason"], "URL_TIMEOUT", "{error}");
    assert!(error.message.contains("bytes in"), "{error}");
}

/// What is fetched once for the image and once for the voice is held to the limits of each, and nothing that a request
/// can say makes it more than its three media.
#[tokio::test]
async fn fault_55_one_url_for_two_fields_is_fetched_for_each() {
    let server = Server::start(|path, stream| match path {
        "/large" => ok(stream, &[media::png(96, 96), vec![0; 150_000]].concat()),
        _ => ok(stream, &media::png(96, 96)),
    });
    let bench = Bench::with(|settings| {
        settings.config.allow_private_urls = true;
        settings.config.limits = Limits { image_bytes: 100_000, audio_bytes: 200_000 };
    });
    for (path, code) in [("/small", Code::InvalidAudioFormat), ("/large", Code::ImageTooLarge)] {
        let changes = json!({"image": server.url(path), "audio": server.url(path)});
        let error = bench.run("a", with(&input(), &changes)).await.unwrap_err();
        assert_eq!(error.code, code, "{path}: {error}");
    }
    assert_eq!(*server.asked.lock().unwrap(), ["/small", "/small", "/large"]);
    // Each name of a field is one URL more, and the second is one too many.
    let names = ["image_url", "cond_image", "source_url", "wav_url", "audio_url"];
    for name in names {
        let error = bench.run("b", with(&input(), &json!({name: server.url("/x")}))).await.unwrap_err();
        assert_eq!(error.details["reason"], "CONFLICTING_FIELDS", "{name}: {error}");
    }
    assert_eq!(server.asked.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn fault_53_answers_that_are_no_http_are_failures() {
    let server = Server::start(|path, stream| {
        let head = match path {
            "/wide" => {
                format!("HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 1\r\n\r\nx", "x".repeat(10_000_000))
            }
            "/many" => format!("HTTP/1.1 200 OK\r\n{}Content-Length: 1\r\n\r\nx", "X: y\r\n".repeat(5000)),
            "/status" => "HTTP/1.1 abc OK\r\nContent-Length: 1\r\n\r\nx".to_string(),
            "/two" => "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy".to_string(),
            _ => "\0\x01\x02 no HTTP at all".to_string(),
        };
        let _ = stream.write_all(head.as_bytes());
    });
    for path in ["/wide", "/many", "/status", "/two", "/noise"] {
        let error = fetch(&server.url(path), |_| {}).await.unwrap_err();
        assert_eq!(error.code, Code::DownloadFailed, "{path}: {error}");
    }
    let flood = Server::start(|_, stream| {
        let _ = stream.write_all("HTTP/1.1 103 Early Hints\r\n\r\n".repeat(100_000).as_bytes());
        ok(stream, b"file");
    });
    // Early hints are allowed, however many; what counts is that they end.
    assert_eq!(fetch(&flood.url("/"), |_| {}).await.unwrap(), b"file");
}
