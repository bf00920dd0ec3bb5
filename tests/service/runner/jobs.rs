//! Sound jobs, wrong jobs, cancelled jobs.

use std::net::TcpListener;

use handler::job::{Code, ColdStart};
use handler::progress::Stage;
use serde_json::json;
use tokio::sync::oneshot;

use super::bench::{Bench, Watcher};
use super::{input, with};
use crate::media;
use crate::support::{Server, empty, ok};

#[tokio::test]
async fn the_second_job_finds_its_model_warm() {
    let bench = Bench::new();
    let watcher = Watcher::default();
    let first = bench.runner.run(watcher.task("a", with(&input(), &json!({"seed": 3})))).await.unwrap();
    assert!(first.timings.cold_start.load_ms > 0, "{:?}", first.timings);
    let stages: Vec<_> = watcher.updates.lock().unwrap().iter().map(|update| update.stage).collect();
    let mut expected = vec![Stage::Fetch, Stage::Validate, Stage::Load, Stage::Audio, Stage::Denoise];
    expected.extend([Stage::Decode, Stage::Upload, Stage::Done]);
    let mut seen = stages.clone();
    seen.dedup();
    assert_eq!(seen, expected);
    let percents: Vec<_> = watcher.updates.lock().unwrap().iter().map(|update| update.percent).collect();
    assert!(percents.is_sorted() && percents.last() == Some(&100), "{percents:?}");

    let watcher = Watcher::default();
    let second = bench.runner.run(watcher.task("b", with(&input(), &json!({"seed": 3})))).await.unwrap();
    assert_eq!(second.timings.cold_start, ColdStart::default(), "nothing is booted or read again");
    let first_step = |watcher: &Watcher| {
        let updates = watcher.updates.lock().unwrap();
        updates.iter().find(|update| update.stage == Stage::Denoise).unwrap().eta_s
    };
    assert!(first_step(&watcher).is_some(), "how long a window takes is known from the first job");
    assert!(watcher.updates.lock().unwrap().iter().all(|update| update.stage != Stage::Load));
    assert_eq!(second.sha256, first.sha256, "the same seed, the same video");
    assert_eq!(bench.spooled(), 0);
}

#[tokio::test]
async fn jobs_at_once_do_not_mix() {
    let bench = Bench::new();
    let long = with(&input(), &json!({"seed": 1}));
    let short = with(&input(), &json!({"seed": 2, "max_seconds": 0.12}));
    let (first, second) = tokio::join!(bench.run("a", long.clone()), bench.run("b", short.clone()));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!((first.frames, first.seed, second.frames, second.seed), (8, 1, 3, 2));
    let file = |name: &str| std::fs::metadata(bench.dir.path().join(name)).unwrap().len();
    assert_eq!((file("a.mp4"), file("b.mp4")), (first.size_bytes, second.size_bytes));
    assert_eq!(bench.run("c", long).await.unwrap().sha256, first.sha256);
}

#[tokio::test]
async fn bad_input_is_refused_before_anything_is_fetched_or_loaded() {
    let server = Server::start(|_, stream| ok(stream, b"file"));
    let bench = Bench::new();
    let url = server.url("/file");
    for (changes, code) in [
        (json!({"imgae": "x", "image": url}), Code::UnknownField),
        (json!({"audio": null, "image": url}), Code::MissingField),
        (json!({"steps": 0, "image": url}), Code::InvalidInput),
        (json!({"model": "nobody", "image": url}), Code::ModelNotFound),
        (json!({"frames_per_window": 5, "motion_frames": 9, "image": url}), Code::InvalidInput),
        (json!({"output": {"put_url": "file:///etc/passwd"}, "image": url}), Code::UrlNotAllowed),
        (json!({"image": "AAAA"}), Code::InvalidImageFormat),
        (json!({"audio": "AAAA"}), Code::InvalidAudioFormat),
    ] {
        let watcher = Watcher::default();
        let error = bench.runner.run(watcher.task("a", with(&input(), &changes))).await.unwrap_err();
        assert_eq!(error.code, code, "{changes}: {error}");
        let updates = watcher.updates.lock().unwrap();
        assert!(updates.iter().all(|update| update.stage < Stage::Load), "{changes}: {updates:?}");
    }
    assert!(server.asked.lock().unwrap().is_empty());
    let made = bench.run("a", input()).await.unwrap();
    assert!(made.timings.cold_start.load_ms > 0, "only the sound job has loaded the model");
}

#[tokio::test]
async fn without_a_place_for_the_video_nothing_is_begun() {
    let server = Server::start(|_, stream| ok(stream, &media::png(96, 96)));
    let bench = Bench::with(|settings| settings.folder = None);
    let error = bench.run("a", with(&input(), &json!({"image": server.url("/")}))).await.unwrap_err();
    assert_eq!((error.code, error.retryable), (Code::UploadFailed, false), "{error}");
    assert_eq!(error.details["reason"], "NO_STORE");
    assert!(error.hint.is_some_and(|hint| hint.contains("s3Config")));
    assert!(server.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_job_is_cancelled_in_the_middle_of_denoising() {
    let bench = Bench::new();
    let watcher = Watcher::default();
    let long = with(&input(), &json!({"steps": 100}));
    let task = watcher.task_with("a", long, |update, cancel| {
        if update.stage == Stage::Denoise && update.step == 2 {
            cancel.cancel();
        }
    });
    let error = bench.runner.run(task).await.unwrap_err();
    assert_eq!(error.code, Code::Cancelled);
    let last = watcher.updates.lock().unwrap().iter().map(|update| update.step).max();
    assert_eq!(last, Some(2), "no further step has begun");
    assert_eq!(bench.spooled(), 0);
    let after = bench.run("b", input()).await.unwrap();
    assert_eq!(after.timings.cold_start.load_ms, 0, "the model is still warm");
}

#[tokio::test]
async fn a_job_is_cancelled_before_it_begins_while_it_fetches_and_while_it_waits() {
    // Connections wait in the queue of this listener; nobody ever answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let bench = Bench::new();
    let cancelled = Watcher::default();
    cancelled.cancel.cancel();
    let error = bench.runner.run(cancelled.task("a", input())).await.unwrap_err();
    assert_eq!(error.code, Code::Cancelled);
    assert!(cancelled.updates.lock().unwrap().is_empty());

    let fetching = with(&input(), &json!({"image": format!("http://{}/", silent.local_addr().unwrap())}));
    let task = Watcher::default().task_with("b", fetching, |update, cancel| {
        if update.stage == Stage::Fetch {
            cancel.cancel();
        }
    });
    assert_eq!(bench.runner.run(task).await.unwrap_err().code, Code::Cancelled);

    let (first, second) = (Watcher::default(), Watcher::default());
    let (begun, has_begun) = oneshot::channel();
    let begun = std::sync::Mutex::new(Some(begun));
    let long = with(&input(), &json!({"steps": 100}));
    let task = first.task_with("c", long.clone(), move |update, _| {
        if update.stage == Stage::Denoise
            && let Some(begun) = begun.lock().unwrap().take()
        {
            begun.send(()).unwrap();
        }
    });
    let running = tokio::spawn({
        let runner = bench.runner.clone();
        async move { runner.run(task).await }
    });
    has_begun.await.unwrap();
    // The second job's inputs are opened; then it waits for the first.
    let task = second.task_with("d", long, |update, cancel| {
        if update.stage == Stage::Validate {
            cancel.cancel();
        }
    });
    assert_eq!(bench.runner.run(task).await.unwrap_err().code, Code::Cancelled);
    assert!(!running.is_finished(), "the first job is not touched");
    first.cancel.cancel();
    assert_eq!(running.await.unwrap().unwrap_err().code, Code::Cancelled);
    assert_eq!(bench.spooled(), 0);
}

#[tokio::test]
async fn a_job_that_nobody_waits_for_ends() {
    let bench = Bench::new();
    let watcher = Watcher::default();
    let (begun, has_begun) = oneshot::channel();
    let begun = std::sync::Mutex::new(Some(begun));
    let task = watcher.task_with("a", with(&input(), &json!({"steps": 100})), move |update, _| {
        if update.stage == Stage::Denoise
            && let Some(begun) = begun.lock().unwrap().take()
        {
            begun.send(()).unwrap();
        }
    });
    tokio::select! {
        outcome = bench.runner.run(task) => panic!("{outcome:?}"),
        _ = has_begun => {}
    }
    assert!(watcher.cancel.check().is_err());
    assert!(bench.run("b", input()).await.is_ok(), "the thread is free again");
}

#[tokio::test]
async fn fault_54_urls_bring_inputs_and_what_they_bring_is_judged() {
    let server = Server::start(|path, stream| match path {
        "/p.png?sig=canary" => ok(stream, &media::png(96, 96)),
        "/v.wav" => ok(stream, &media::tone(16_000, 1, 0.3)),
        "/page" => ok(stream, b"<html>404</html>"),
        _ => empty(stream, "404 Not Found", "X: y"),
    });
    let bench = Bench::new();
    let job = |image: &str, audio: &str| {
        with(&input(), &json!({"image": server.url(image), "audio": server.url(audio)}))
    };
    assert_eq!(bench.run("a", job("/p.png?sig=canary", "/v.wav")).await.unwrap().frames, 8);
    for (image, audio, code) in [
        ("/gone", "/v.wav", Code::DownloadFailed),
        ("/page", "/v.wav", Code::InvalidImageFormat),
        ("/p.png?sig=canary", "/page", Code::InvalidAudioFormat),
        // fault_55: one URL for both; each is judged as what it is given for.
        ("/v.wav", "/v.wav", Code::InvalidImageFormat),
    ] {
        let error = bench.run("a", job(image, audio)).await.unwrap_err();
        assert_eq!(error.code, code, "{image} {audio}");
        assert!(!format!("{error:?}").contains("canary"));
    }
}
