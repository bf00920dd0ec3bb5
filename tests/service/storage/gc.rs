//! `handler gc` as a process, against the store behind the wire.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use handler::storage::embedded::{Embedded, Rules};
use handler::storage::{Lifetimes, Publication, Storage, VideoSpool};
use serde_json::json;

use super::sweep::{key, put};
use super::world::{Fault, World, bytes, keep, quick};
use crate::support::{Outcome, handler};

/// `handler gc` for the store and the spool of `world`.
fn gc(world: &World, args: &[&str]) -> Command {
    let mut command = handler();
    command.arg("gc").args(args).arg("--spool-path").arg(world.dir.path().join("spool"));
    for (name, value) in world.settings.to_env() {
        command.env(name, value.expose());
    }
    command
}

async fn run(mut command: Command) -> Outcome {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    Outcome::of(output)
}

async fn opens(url: &str, len: usize) {
    let response = reqwest::get(url).await.unwrap();
    assert_eq!(response.status(), 200, "{url}");
    assert!(response.bytes().await.unwrap() == bytes(len));
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_videos_are_deleted() {
    let world = World::new().await;
    let (due, live) = (key("videos", -60, 0), key("clients/a", 60, 0));
    put(&world, &due).await;
    put(&world, &live).await;
    assert_eq!(run(gc(&world, &["--dry-run"])).await.output(), json!({"expired": [due]}));
    assert_eq!(run(gc(&world, &[])).await.output(), json!({"deleted": 1, "pruned": 0}));
    assert_eq!(run(gc(&world, &[])).await.output(), json!({"deleted": 0, "pruned": 0}));
    assert_eq!(world.keys().await, [live]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_73_a_sweep_that_was_killed_is_finished_by_the_next() {
    let world = World::new().await;
    for number in 0..40 {
        put(&world, &key("videos", -60 - number, number as usize)).await;
    }
    put(&world, &key("videos", 600, 0)).await;
    let mut child = gc(&world, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for _ in 0..5 {
        world.next("delete").await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let rest = run(gc(&world, &[])).await.output()["deleted"].as_u64().unwrap();
    assert!((1..40).contains(&rest), "{rest}");
    assert_eq!(world.keys().await.len(), 1);
}

/// A worker that died before its upload (K19) or whose upload failed leaves the same behind.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_resumed_under_their_recorded_key() {
    let world = World::new().await;
    let kept = world.keep("job-1", 1000).await;
    let key = kept.place().key.clone();
    let publication = Publication { thumbnail: Some(b"jpeg"), manifest: json!({}), ..Default::default() };
    drop(keep(&world.storage, world.dir.path(), "sync-2/../odd", 10, &publication).await);
    // One that is still being made is not touched.
    let making = VideoSpool::open(&world.dir.path().join("spool")).unwrap().job("job-3").unwrap();
    std::fs::write(making.path(), "half").unwrap();
    let output = run(gc(&world, &["--resume-uploads"])).await.output();
    assert_eq!((&output["failed"], &output["pruned"]), (&json!([]), &json!(0)));
    let resumed = output["resumed"].as_array().unwrap();
    let of =
        |job: &str| resumed.iter().find(|links| links["job_id"] == job).unwrap_or_else(|| panic!("{output}"));
    assert_eq!(of("job-1")["key"], key);
    opens(of("job-1")["video_url"].as_str().unwrap(), 1000).await;
    assert_eq!(
        reqwest::get(of("sync-2/../odd")["thumbnail_url"].as_str().unwrap()).await.unwrap().status(),
        200
    );
    assert!(making.path().is_file());
    let spool = std::fs::read_dir(world.dir.path().join("spool/videos")).unwrap();
    assert_eq!(spool.count(), 1, "what is uploaded is forgotten");
    assert_eq!(run(gc(&world, &["--resume-uploads"])).await.output()["resumed"], json!([]));
}

/// A video that no upload was resumed for, and a result that the platform did not want, are not kept for ever.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_came_for_goes_in_the_end() {
    let world = World::new().await;
    let kept = world.keep("job-1", 10).await;
    let rejected = world.dir.path().join("spool/rejected/a.json");
    std::fs::create_dir_all(rejected.parent().unwrap()).unwrap();
    std::fs::write(&rejected, "{}").unwrap();
    assert_eq!(run(gc(&world, &[])).await.output()["pruned"], 0, "a week is not over");
    let files = std::fs::read_dir(kept.dir()).unwrap().map(|entry| entry.unwrap().path());
    for path in files.chain([kept.dir().to_path_buf(), rejected.clone()]) {
        let long_ago = SystemTime::now() - Duration::from_secs(8 * 86_400);
        File::open(path).unwrap().set_modified(long_ago).unwrap();
    }
    let mut longer = gc(&world, &[]);
    longer.env("SPOOL_RETENTION_HOURS", "200");
    assert_eq!(run(longer).await.output()["pruned"], 0);
    assert!(kept.video().is_file() && rejected.is_file());
    assert_eq!(run(gc(&world, &[])).await.output()["pruned"], 2);
    assert!(!kept.dir().exists() && !rejected.exists());
}

/// K20: two parts are there. K21: all of it is, but nobody was told.
#[tokio::test(flavor = "multi_thread")]
async fn fault_68_an_upload_that_was_killed_is_resumed_without_a_second_object() {
    for (point, len) in [("K20", (64 << 20) + 1), ("K21", 1000)] {
        let world = World::new().await;
        let kept = world.keep("job", len).await;
        let key = kept.place().key.clone();
        let mut killed = gc(&world, &["--resume-uploads"]);
        killed.env("KILL_AT", point);
        let outcome = run(killed).await;
        assert_eq!((outcome.code, outcome.stdout.as_str()), (None, ""), "{point}: {}", outcome.stderr);
        assert!(kept.video().is_file() && world.keys().await.len() == if point == "K20" { 0 } else { 2 });
        let writes = world.count("put") + world.count("complete");
        let output = run(gc(&world, &["--resume-uploads"])).await.output();
        assert_eq!(output["resumed"][0]["key"], key, "{point}: {output}");
        opens(output["resumed"][0]["video_url"].as_str().unwrap(), len).await;
        assert_eq!(world.keys().await.len(), 2, "{point}");
        if point == "K21" {
            assert_eq!(world.count("put") + world.count("complete"), writes, "nothing is written again");
        }
    }
}

/// An hour before its object would go, a video gets a key with a whole life before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_video_that_waited_too_long_gets_another_key() {
    let world = World::new().await;
    let kept = world.keep("job", 10).await;
    let record = kept.dir().join("publication.json");
    let due: i64 = kept.place().key.split_once("e=").unwrap().1[..10].parse().unwrap();
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(&due.to_string(), &(due - 5 * 3600).to_string())).unwrap();
    let output = run(gc(&world, &["--resume-uploads"])).await.output();
    let links = &output["resumed"][0];
    let now_due: i64 = links["key"].as_str().unwrap().split_once("e=").unwrap().1[..10].parse().unwrap();
    assert!(
        now_due >= due && links["video_url"].as_str().unwrap().contains("X-Amz-Expires=21600&"),
        "{output}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_video_for_another_bucket_is_left_alone() {
    let world = World::new().await;
    let other = World::new().await;
    drop(keep(&other.storage, world.dir.path(), "job", 10, &Publication::default()).await);
    let outcome = run(gc(&world, &["--resume-uploads"])).await;
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let output: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(output["failed"][0]["error"]["code"], "UPLOAD_FAILED");
    let said = output["failed"][0]["error"]["message"].as_str().unwrap();
    assert!(said.contains(&other.settings.endpoint.port().unwrap().to_string()), "{said}");
    assert!(world.dir.path().join("spool/videos/job/video.mp4").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_down_leaves_the_video() {
    let world = World::with(quick(), |seen, _| match seen.operation {
        "put" => Fault::error(403, "AccessDenied"),
        _ => Fault::None,
    })
    .await;
    drop(world.keep("job", 10).await);
    let outcome = run(gc(&world, &["--resume-uploads"])).await;
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.lines().last().unwrap().contains("UPLOAD_FAILED"), "{}", outcome.stderr);
    assert!(world.dir.path().join("spool/videos/job/video.mp4").is_file());
}

/// Without a bucket, the gateway's own store is meant, whether or not the gateway runs.
#[tokio::test(flavor = "multi_thread")]
async fn the_gateways_own_store_needs_no_settings() {
    let dir = tempfile::tempdir().unwrap();
    let embedded = Embedded::open(dir.path(), Rules::S3).unwrap();
    let public = reqwest::Url::parse("http://talk.example:8000").unwrap();
    let storage: Storage = embedded.serve_here(public, Lifetimes::default()).await.unwrap();
    drop(keep(&storage, dir.path(), "job", 1000, &Publication::default()).await);
    let mut command = handler();
    command.args(["gc", "--resume-uploads", "--bucket-public-url", "http://talk.example:8000", "--data-dir"]);
    command.arg(dir.path());
    let output = run(command).await.output();
    let url = output["resumed"][0]["video_url"].as_str().unwrap();
    assert!(url.starts_with("http://talk.example:8000/talkie-videos/videos/e%3D"), "{output}");
    // Opened as behind a front that keeps the host's name.
    let local = embedded.router();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, local).await });
    let client = reqwest::Client::builder().resolve("talk.example", address).build().unwrap();
    let url = url.replace("talk.example:8000", &format!("{address}"));
    let wrong_host = client.get(&url).send().await.unwrap();
    assert_eq!(wrong_host.status(), 403, "the host is part of the signature");
    let right_host = client.get(&url).header("host", "talk.example:8000").send().await.unwrap();
    assert_eq!(right_host.status(), 200);
    assert!(right_host.bytes().await.unwrap() == bytes(1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named() {
    let mut nothing = handler();
    nothing.arg("gc");
    let error = run(nothing).await.refused("INVALID_INPUT");
    assert!(error["message"].as_str().unwrap().contains("no bucket is configured"), "{error}");
    let mut half = handler();
    half.arg("gc").env("R2_ACCOUNT_ID", "abc").env("R2_ACCESS_KEY_ID", "key");
    let error = run(half).await.refused("INVALID_INPUT");
    assert!(error["message"].as_str().unwrap().contains("`R2_SECRET_ACCESS_KEY`"), "{error}");
    let mut unreachable = handler();
    unreachable.arg("gc").env("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9/talk");
    unreachable.env("BUCKET_ACCESS_KEY_ID", "key").env("BUCKET_SECRET_ACCESS_KEY", "canary");
    let started = std::time::Instant::now();
    let outcome = run(unreachable).await;
    assert!(outcome.code == Some(1) && !outcome.stderr.contains("canary"), "{}", outcome.stderr);
    assert!(started.elapsed() < Duration::from_secs(60));
}
