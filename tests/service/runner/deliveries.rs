//! Where videos go: buckets, the sender's own URL, the output itself.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use handler::job::{Code, JobError, JobOutput};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::bench::{Bench, Watcher};
use super::{input, with};
use crate::storage::world::{Fault, Seen, World, quick};
use crate::support::{Server, ok};

async fn world(plan: impl Fn(&Seen, usize) -> Fault + Send + Sync + 'static) -> (World, Bench) {
    let world = World::with(quick(), plan).await;
    let storage = world.storage.clone();
    (world, Bench::with(|settings| settings.storage = Some(storage)))
}

async fn get(url: &str) -> Vec<u8> {
    let response = reqwest::get(url).await.unwrap().error_for_status().unwrap();
    response.bytes().await.unwrap().to_vec()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[tokio::test]
async fn a_video_goes_into_the_bucket_with_a_manifest_that_makes_it_again() {
    let (_world, bench) = world(|_, _| Fault::None).await;
    let wishes = json!({"output": {"thumbnail": true, "key_prefix": "team/a", "expires_seconds": 600}});
    let output = bench.run("job-1", with(&input(), &wishes)).await.unwrap();
    assert_eq!(sha256(&get(&output.video_url).await), output.sha256);
    assert!(output.key.as_ref().is_some_and(|key| key.starts_with("team/a/e=")), "{output:?}");
    assert!(output.expires_at.is_some() && output.timings.upload_ms.is_some());
    let thumbnail = get(output.thumbnail_url.as_ref().unwrap()).await;
    assert_eq!(&thumbnail[..3], b"\xff\xd8\xff");
    let manifest: Value = serde_json::from_slice(&get(output.manifest_url.as_ref().unwrap()).await).unwrap();
    assert_eq!(manifest["objects"]["video"], json!(output.key));
    for name in ["image", "audio"] {
        let sent = BASE64_STANDARD.decode(input()[name].as_str().unwrap()).unwrap();
        assert_eq!(manifest["files"][name]["sha256"], sha256(&sent), "{manifest}");
    }
    // What the manifest says, with the same files beside it, is the same video.
    let again = with(&manifest["input"], &json!({"image": input()["image"], "audio": input()["audio"]}));
    assert_eq!(bench.run("job-2", again).await.unwrap().sha256, output.sha256);
    assert_eq!(bench.spooled(), 0, "what is in the bucket is not kept here");
}

#[tokio::test]
async fn p10_a_video_whose_upload_fails_is_kept_and_not_computed_again() {
    let refused = |seen: &Seen, before| match seen.operation {
        "put" if before == 0 => Fault::error(403, "AccessDenied"),
        _ => Fault::None,
    };
    let (_world, bench) = world(refused).await;
    let error = bench.run("job-1", input()).await.unwrap_err();
    assert_eq!(error.code, Code::UploadFailed, "{error}");
    assert!(error.hint.as_ref().is_some_and(|hint| hint.contains("gc --resume-uploads")), "{error:?}");
    let spooled = error.details["spooled_path"].as_str().unwrap();
    let kept = sha256(&std::fs::read(spooled).unwrap());
    // Another job of the same id is not taken for it.
    let watcher = Watcher::default();
    let output = bench.runner.run(watcher.task("job-1", input())).await.unwrap();
    assert_eq!((&output.sha256, output.frames), (&kept, 8), "{output:?}");
    let stages: Vec<_> = watcher.updates.lock().unwrap().iter().map(|u| u.stage.as_str()).collect();
    assert_eq!(stages, ["upload", "done"], "nothing was fetched or computed");
    assert_eq!(sha256(&get(&output.video_url).await), kept);
    assert_eq!(bench.spooled(), 0);
}

#[tokio::test]
async fn fault_71_a_bucket_is_in_doubt_from_a_failed_upload_to_its_next_answer() {
    let gone = Arc::new(AtomicBool::new(true));
    let is_gone = gone.clone();
    let (world, bench) = world(move |_, _| match is_gone.load(Ordering::SeqCst) {
        true => Fault::error(404, "NoSuchBucket"),
        false => Fault::None,
    })
    .await;
    bench.runner.can_deliver().await.unwrap();
    assert_eq!(world.count("bucket"), 0, "nothing has failed");
    bench.run("job-1", input()).await.unwrap_err();
    let before = world.count("bucket");
    let error = bench.runner.can_deliver().await.unwrap_err();
    assert!(error.code == Code::UploadFailed && !error.retryable, "{error:?}");
    // The next process finds the video that could not be uploaded.
    let storage = world.storage.clone();
    let spool = bench.dir.path().join("spool");
    let next = Bench::with(|settings| (settings.storage, settings.spool) = (Some(storage), spool));
    next.runner.can_deliver().await.unwrap_err();
    gone.store(false, Ordering::SeqCst);
    for runner in [&bench.runner, &bench.runner, &next.runner] {
        runner.can_deliver().await.unwrap();
    }
    assert_eq!(world.count("bucket") - before, 4, "what has answered is not asked again");
}

#[tokio::test]
async fn another_request_under_the_same_id_is_made_afresh() {
    let refused = |seen: &Seen, before| match seen.operation {
        "put" if before == 0 => Fault::error(403, "AccessDenied"),
        _ => Fault::None,
    };
    let (_world, bench) = world(refused).await;
    bench.run("job-1", input()).await.unwrap_err();
    let output = bench.run("job-1", with(&input(), &json!({"max_seconds": 0.12}))).await.unwrap();
    assert_eq!(output.frames, 3);
}

#[tokio::test]
async fn an_upload_is_cancelled() {
    let (world, bench) =
        world(|seen, _| if seen.operation == "put" { Fault::Hang } else { Fault::None }).await;
    let watcher = Watcher::default();
    let task = watcher.task("job-1", input());
    let (outcome, _) = tokio::join!(bench.runner.run(task), async {
        world.next("put").await;
        watcher.cancel.cancel();
    });
    assert_eq!(outcome.unwrap_err().code, Code::Cancelled);
}

#[tokio::test]
async fn a_small_video_comes_as_base64_and_a_large_one_as_a_link() {
    let (world, mut bench) = world(|_, _| Fault::None).await;
    let inline = with(&input(), &json!({"output": {"inline": true, "thumbnail": true}}));
    let output = bench.run("a", inline.clone()).await.unwrap();
    let encoded = output.video_url.strip_prefix("data:video/mp4;base64,").unwrap();
    assert_eq!(sha256(&BASE64_STANDARD.decode(encoded).unwrap()), output.sha256);
    assert!(output.thumbnail_url.unwrap().starts_with("data:image/jpeg;base64,"));
    assert_eq!(world.count("put"), 0);

    let storage = world.storage.clone();
    bench = Bench::with(|settings| (settings.storage, settings.max_inline_bytes) = (Some(storage), 1000));
    let output = bench.run("b", inline.clone()).await.unwrap();
    assert!(output.video_url.starts_with("http://"), "{}", output.video_url);
    assert!(output.warnings.iter().any(|warning| warning.contains("at most 1000")), "{:?}", output.warnings);

    bench = Bench::with(|settings| (settings.folder, settings.max_inline_bytes) = (None, 1000));
    let error = bench.run("c", inline).await.unwrap_err();
    assert_eq!((error.code, &error.details["reason"]), (Code::UploadFailed, &json!("NO_STORE")));
    assert!(Path::new(error.details["spooled_path"].as_str().unwrap()).is_file());
}

/// The head and the body of a request.
type Received = (String, Vec<u8>);

/// A server that keeps what is put to it, and answers with these heads in turn.
struct Receiver {
    port: u16,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    fn start(answers: &[&str]) -> Self {
        let answers: Vec<_> = answers.iter().map(|answer| answer.to_string()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = received.clone();
        thread::spawn(move || {
            for (stream, answer) in listener.incoming().flatten().zip(answers) {
                log.lock().unwrap().push(receive(stream, &answer));
            }
        });
        Self { port, received }
    }

    async fn run(&self, bench: &Bench) -> Result<JobOutput, JobError> {
        let url = format!("http://127.0.0.1:{}/v.mp4?signature=canary", self.port);
        bench.run("a", with(&input(), &json!({"output": {"put_url": url}}))).await
    }
}

/// Reads a request, answers it, and returns its head and body.
fn receive(mut stream: TcpStream, answer: &str) -> Received {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let len =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("S3 needs the length");
    let mut body = vec![0; len.parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    (head, body)
}

#[tokio::test]
async fn a_video_is_put_to_the_senders_url() {
    let (bench, receiver) = (Bench::new(), Receiver::start(&["503 Slow Down", "200 OK"]));
    let output = receiver.run(&bench).await.unwrap();
    assert_eq!(
        output.video_url,
        format!("http://127.0.0.1:{}/v.mp4", receiver.port),
        "the signature is secret"
    );
    let received = receiver.received.lock().unwrap();
    assert_eq!(received.len(), 2, "what may pass is tried again");
    for (head, body) in received.iter() {
        assert!(head.starts_with("put /v.mp4?signature=canary "), "{head}");
        assert!(head.contains("content-type: video/mp4"), "{head}");
        assert_eq!(sha256(body), output.sha256);
    }
    assert_eq!(bench.spooled(), 0);
}

#[tokio::test]
async fn a_url_that_does_not_take_the_video_leaves_it_in_the_spool() {
    let elsewhere = Server::start(|_, stream| ok(stream, b""));
    // Followed, this one would be asked with GET, and its 200 be taken for success.
    let see_other = format!("303 See Other\r\nLocation: {}", elsewhere.url("/"));
    for answer in ["403 Forbidden", &see_other, "307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/"] {
        let (bench, receiver) = (Bench::new(), Receiver::start(&[answer]));
        let error = receiver.run(&bench).await.unwrap_err();
        assert_eq!((error.code, error.retryable), (Code::UploadFailed, false), "{error}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        let kept = std::fs::read(error.details["spooled_path"].as_str().unwrap()).unwrap();
        assert_eq!(kept, receiver.received.lock().unwrap()[0].1);
        assert_eq!(bench.spooled(), 0);
    }
    assert!(elsewhere.asked.lock().unwrap().is_empty(), "redirects are not followed");
}

#[tokio::test]
async fn nothing_is_put_inside() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/?canary", listener.local_addr().unwrap());
    let bench = Bench::with(|settings| settings.config.allow_private_urls = false);
    for url in [url.as_str(), "http://169.254.169.254/?canary", "http://localhost/?canary"] {
        let error = bench.run("a", with(&input(), &json!({"output": {"put_url": url}}))).await.unwrap_err();
        assert_eq!(error.code, Code::UrlNotAllowed, "{url}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody has connected");
}
