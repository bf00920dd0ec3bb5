//! `handler estimate`, `handler doctor`, and the memory limit.

use std::time::{Duration, Instant};

use handler::job::Code;
use handler::progress::Stage;
use serde_json::{Value, json};
use talkie::device::Processor;
use talkie::media::image::Size;
use talkie::pipeline::{Activations, Extent, Settings, Weights};
use talkie::registry::Registry;
use talkie::request::{Draft, Limits};

use crate::runner::bench::{Bench as Runners, Watcher};
use crate::runner::{input, with};
use crate::support::{Bench, Outcome, handler};

/// `handler` with these words in a folder of its own, whose models and spool are below.
fn run(bench: &Bench, args: &[&str]) -> Outcome {
    let mut command = handler();
    command.current_dir(bench.dir.path()).args(args);
    command.env("MODEL_STORAGE_PATH", bench.path("models")).env("SPOOL_PATH", bench.path("spool"));
    Outcome::of(command.output().unwrap())
}

#[test]
fn an_estimate_says_what_a_request_takes_and_reads_no_weights() {
    let bench = Bench::new();
    let began = Instant::now();
    let args = ["estimate", "--model", "infinitetalk", "--image", "portrait.png", "--audio", "voice.wav"];
    let estimate = run(&bench, &args).output();
    assert!(began.elapsed() < Duration::from_secs(60));
    for (field, value) in [
        ("model", json!("infinitetalk")),
        ("width", json!(640)),
        ("height", json!(640)),
        ("frames", json!(13)),
        ("windows", json!(1)),
        ("passes", json!(3)),
        ("steps", json!(40)),
        ("forwards", json!(120)),
        ("tokens", json!(33_600)),
    ] {
        assert_eq!(estimate[field], value, "{field}");
    }
    let forward = estimate["flops"]["forward"].as_f64().unwrap();
    assert!((1.8e15..1.9e15).contains(&forward), "{forward}");
    assert_eq!(estimate["weights"]["files_of_unknown_size"], 1, "that of wav2vec2");
    let download = estimate["weights"]["download_bytes"].as_u64().unwrap();
    assert!((91_000_000_000..93_000_000_000).contains(&download), "{download}");
    let cards = estimate["cards"].as_array().unwrap();
    assert_eq!(cards.len(), 5);
    for card in cards {
        assert_eq!(card["basis"], "planned");
        let usd = |name: &str| card[name].as_f64().unwrap();
        assert!((usd("usd") / usd("usd_per_second_of_video") - 0.52).abs() < 0.01, "{card}");
        assert!(card["memory"]["rung"].is_string(), "{card}");
    }
    assert_eq!(cards[4]["memory"]["rung"], "resident");
    assert_eq!(estimate["machine"]["device"], "cpu");
    assert!(estimate["prices"]["source"].as_str().is_some_and(|source| source.starts_with("https://")));
    assert_eq!(bench.names(), ["portrait.png", "voice.wav"], "nothing is made");

    let other = run(
        &bench,
        &[&args[..], &["--steps", "4", "--text-guidance", "1", "--audio-guidance", "1"]].concat(),
    );
    assert_eq!(other.output()["forwards"], 4);
    bench.write("request.json", br#"{"image": "https://127.0.0.1:1/x", "audio": "https://127.0.0.1:1/x"}"#);
    run(&bench, &["estimate", "--input", "request.json"]).refused("URL_NOT_ALLOWED");
}

/// The check called `name`.
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}: {report}"))
}

#[test]
fn a_quick_look_takes_a_moment_and_says_what_is_missing() {
    let bench = Bench::new();
    let began = Instant::now();
    let looked = run(&bench, &["doctor", "--quick", "--json"]);
    let took = began.elapsed();
    let report = looked.output();
    // Seconds of leeway: this machine may be busy with other tests.
    assert!(took < Duration::from_secs(10), "{took:?}");
    for name in ["gpu", "memory", "model storage", "spool", "last cold start", "store", "runpod"] {
        let check = check(&report, name);
        assert!(["ok", "warn"].contains(&check["status"].as_str().unwrap()), "{check}");
        assert!(check["status"] == "ok" || check["remedy"].is_string(), "{check}");
    }
    let missing = check(&report, "model infinitetalk");
    assert_eq!(missing["status"], "warn");
    assert!(missing["remedy"].as_str().unwrap().contains("prefetch --model infinitetalk"));
    assert_eq!(check(&report, "model tiny")["status"], "ok");
    assert_eq!(check(&report, "memory plan tiny")["facts"]["rung"], "resident");
    assert!(report["checks"].as_array().unwrap().iter().all(|check| check["name"] != "volume speed"));
}

#[test]
fn what_will_fail_is_said_by_the_exit_code() {
    let bench = Bench::new();
    for args in [
        &["doctor", "--quick", "--json", "--model", "infinitetalk"][..],
        &["doctor", "--quick", "--json", "--model", "nobody"],
        &["doctor", "--quick", "--json", "--spool-path", "portrait.png"],
    ] {
        let looked = run(&bench, args);
        assert_eq!(looked.code, Some(1), "{args:?}: {}", looked.stdout);
        let report: Value = serde_json::from_str(&looked.stdout).unwrap();
        assert_eq!(report["status"], "fail");
    }
    let lines = run(&bench, &["doctor", "--quick", "--model", "nobody"]);
    assert!(
        lines.stdout.contains("FAIL  models") && lines.stdout.contains("→ correct TALKIE_MODEL"),
        "{}",
        lines.stdout
    );
}

#[test]
fn a_full_look_reads_the_volume_and_asks_the_bucket_without_telling_its_keys() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("models")).unwrap();
    let mut command = handler();
    command.current_dir(bench.dir.path()).args(["doctor", "--json"]);
    command.env("MODEL_STORAGE_PATH", bench.path("models")).env("SPOOL_PATH", bench.path("spool"));
    // Nobody listens there.
    command.env("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9").env("BUCKET_NAME", "videos");
    command.env("BUCKET_ACCESS_KEY_ID", "AKIDVISIBLE").env("BUCKET_SECRET_ACCESS_KEY", "HIDDENKEY");
    let looked = Outcome::of(command.output().unwrap());
    assert_eq!(looked.code, Some(1), "{}", looked.stderr);
    let report: Value = serde_json::from_str(&looked.stdout).unwrap();
    assert_eq!(check(&report, "store")["status"], "fail");
    let speed = check(&report, "volume speed");
    assert!(speed["facts"]["bytes_per_s"].as_u64() > Some(0), "{speed}");
    assert!(!looked.stdout.contains("HIDDENKEY") && !looked.stderr.contains("HIDDENKEY"));
}

/// What a job of [`input`] needs at `size` at least.
fn needed(size: &str) -> u64 {
    let registry = Registry::built_in().unwrap();
    let spec = registry.model("tiny").unwrap();
    let draft = with(&input(), &json!({"size": size}));
    let (request, _) = Draft::parse(&draft, &Limits::default()).unwrap().finish().unwrap();
    let settings = Settings::resolve(&request, spec).unwrap();
    let size = settings.video_size(Size { height: 96, width: 96 });
    let on = Processor::Cpu;
    let extent = Extent { size, frames: 8, persons: 1 };
    Weights::of(spec, on).unwrap().total() + Activations::of(spec, &settings, extent, on).most()
}

#[tokio::test]
async fn what_720p_has_no_memory_for_is_made_at_480p_without_a_try() {
    let limit = needed("480p");
    assert!(limit < needed("720p") / 3 * 2, "no rung of 720p fits either");
    let bench = Runners::with(|settings| settings.config.memory_limit = Some(limit));
    let watcher = Watcher::default();
    let large = with(&input(), &json!({"size": "720p"}));
    let output = bench.runner.run(watcher.task("a", large.clone())).await.unwrap();
    assert_eq!((output.width, output.height), (128, 128));
    assert!(output.downgrades[0].starts_with("size: 480p in place of 720p"), "{:?}", output.downgrades);
    let windows =
        watcher.updates.lock().unwrap().iter().filter(|update| update.stage == Stage::Denoise).count();
    assert_eq!(windows, 1, "one step, of the video that was made");
    let strict = with(&large, &json!({"strict": true}));
    let error = bench.run("b", strict).await.unwrap_err();
    assert_eq!((error.code, &error.details["reason"]), (Code::GpuOutOfMemory, &json!("MEMORY_PLAN")));
    assert!(error.message.contains("bytes of device memory") && error.hint.is_some(), "{error}");
    let warm = bench.run("c", with(&input(), &json!({}))).await.unwrap();
    assert_eq!(warm.timings.cold_start.load_ms, 0, "a refusal leaves the networks where they are");
}

#[test]
fn a_video_from_the_command_line_is_made_at_480p_where_720p_does_not_fit() {
    let bench = Bench::new();
    let limit = needed("480p").to_string();
    let args = ["--size", "720p", "--steps", "1", "--memory-limit", &limit];
    let made = bench.run(&args);
    let output = made.output();
    assert_eq!((&output["width"], &output["height"]), (&json!(128), &json!(128)));
    let downgrade = output["downgrades"][0].as_str().unwrap();
    assert!(downgrade.starts_with("size: 480p in place of 720p"), "{output}");
    assert!(made.stderr.contains(downgrade), "{}", made.stderr);
}

#[test]
fn a_limit_that_nothing_fits_is_an_error_and_one_that_is_no_number_another() {
    let bench = Bench::new();
    let refused = bench.run(&["--memory-limit", "1000"]);
    let error = refused.error();
    assert_eq!((refused.code, &error["code"]), (Some(1), &json!("GPU_OUT_OF_MEMORY")));
    bench.run(&["--memory-limit", "much"]).refused("INVALID_INPUT");
}

#[tokio::test]
async fn the_phases_of_the_last_cold_start_are_kept_for_the_doctor() {
    let bench = Runners::with(|_| ());
    let made = bench.run("a", input()).await.unwrap();
    let cold = &made.timings.cold_start;
    assert!(cold.load_ms > 0 && cold.bytes_read == 0, "{cold:?}");
    let kept = std::fs::read(bench.dir.path().join("spool/cold-start.json")).unwrap();
    let kept: Value = serde_json::from_slice(&kept).unwrap();
    assert_eq!((&kept["model"], &kept["phases"]), (&json!("tiny"), &json!(cold)));
}
