//! What works: a first download, a second start, what is learned, what is found elsewhere, what is only looked at.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::Value;

use super::server::{COMMIT, File};
use super::{Bench, LARGE, SMALL, WEIGHTS, listed, names_below};
use crate::support::{Outcome, handler};

#[test]
fn a_model_is_fetched_verified_and_noted_and_a_second_start_asks_nobody() {
    let bench = Bench::new();
    let output = bench.run(&[]).output();
    assert_eq!(output["fetched_bytes"], LARGE + 8);
    assert_eq!((&output["need_bytes"], &output["have_bytes"]), (&0.into(), &(LARGE + 8).into()));
    bench.check_complete(&bench.files());
    let asked = bench.hub.asked();
    assert!(
        asked.iter().filter(|asked| asked.of_cdn).count() == 3,
        "a large file comes in pieces: {asked:#?}"
    );
    assert!(
        asked.iter().all(|asked| asked.path.contains(COMMIT) || asked.of_cdn || asked.path.ends_with("main"))
    );

    bench.hub.forget();
    let again = bench.run(&[]).output();
    assert_eq!((&again["fetched_bytes"], again["files"][0]["state"].as_str()), (&0.into(), Some("ready")));
    assert!(bench.hub.asked().is_empty(), "a warm start asks nobody");
}

#[test]
fn only_listed_files_are_fetched() {
    let bench = Bench::new();
    bench.hub.put("unlisted.safetensors", File::large(1000, 3));
    bench.run(&[]).output();
    assert!(!bench.hub.asked().iter().any(|asked| asked.path.contains("unlisted")));
}

#[test]
fn what_is_learned_is_printed_enforced_and_kept() {
    let bench = Bench::new();
    let outcome = bench.run(&[]);
    let files = bench.files();
    for expected in [
        format!("revision = \"{COMMIT}\""),
        format!("{{ path = {WEIGHTS:?}, size = {LARGE}, sha256 = {:?} }}", files[0].1.sha256()),
        format!("{{ path = {SMALL:?}, size = 8, sha256 = {:?} }}", files[1].1.sha256()),
    ] {
        assert!(outcome.stderr.contains(&expected), "{expected}\n{}", outcome.stderr);
    }
    // The branch moves on and a file goes missing here: what was learned counts.
    bench.hub.move_branch(&"1".repeat(40));
    bench.hub.forget();
    fs::remove_file(bench.place(SMALL)).unwrap();
    bench.run(&[]).output();
    assert!(bench.hub.asked().iter().all(|asked| asked.path.contains(COMMIT)), "{:#?}", bench.hub.asked());
    // Other bytes at that commit are refused.
    fs::remove_file(bench.place(SMALL)).unwrap();
    bench.hub.put(SMALL, File::small("{\"a\": 2}"));
    let error = bench.run(&[]).error();
    assert_eq!(error["code"], "MODEL_DOWNLOAD_FAILED", "{error}");
    assert!(!bench.place(SMALL).exists());
}

#[test]
fn a_pinned_model_is_fetched_as_it_is_pinned() {
    let bench = Bench::new();
    let files = bench.files();
    let pinned: Vec<_> = files
        .iter()
        .map(|(path, file)| listed(path, &file.bytes.len().to_string(), &file.sha256()))
        .collect();
    bench.write_models(COMMIT, &pinned);
    let outcome = bench.run(&[]);
    assert_eq!(outcome.output()["fetched_bytes"], LARGE + 8);
    assert!(!outcome.stderr.contains("learned"), "{}", outcome.stderr);
    assert!(
        !bench.hub.asked().iter().any(|asked| asked.path.contains("/revision/") || asked.method == "HEAD")
    );
    bench.check_complete(&files);
}

#[test]
fn files_that_were_put_there_by_hand_are_verified_once() {
    let bench = Bench::new();
    for (path, file) in bench.files() {
        fs::create_dir_all(bench.place(path).parent().unwrap()).unwrap();
        fs::write(bench.place(path), &*file.bytes).unwrap();
    }
    assert_eq!(bench.run(&[]).output()["fetched_bytes"], 0);
    assert_eq!(bench.hub.served(), 0);
    bench.check_complete(&bench.files());
    bench.hub.forget();
    bench.run(&[]).output();
    assert!(bench.hub.asked().is_empty());
}

#[test]
fn caches_of_the_hubs_tools_are_used_and_left_alone() {
    let bench = Bench::new();
    let cache = bench.dir.path().join("hf/hub/models--o--m");
    let snapshot = cache.join("snapshots").join(COMMIT);
    for (path, file) in bench.files() {
        let name = if file.is_large { file.sha256() } else { file.git_blob() };
        let blob = cache.join("blobs").join(name);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, &*file.bytes).unwrap();
        fs::create_dir_all(snapshot.join(path).parent().unwrap()).unwrap();
        symlink(&blob, snapshot.join(path)).unwrap();
    }
    fs::create_dir_all(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), COMMIT).unwrap();
    let before = names_below(&cache);
    let run = || {
        let mut command = bench.command(&[]);
        command.env("HF_HOME", bench.dir.path().join("hf")).env("HF_HUB_OFFLINE", "1");
        Outcome::of(command.output().unwrap()).output()
    };
    for _ in 0..2 {
        let output = run();
        assert_eq!((output["fetched_bytes"].as_u64(), output["need_bytes"].as_u64()), (Some(0), Some(0)));
        let place = output["files"][0]["place"].as_str().unwrap();
        assert_eq!(
            (place, output["files"][0]["state"].as_str()),
            (snapshot.join(WEIGHTS).to_str().unwrap(), Some("ready"))
        );
    }
    assert!(bench.hub.asked().is_empty(), "the names of the cache's files are their hashes");
    // A file of the cache that is damaged is not used.
    let blob = cache.join("blobs").join(bench.files()[0].1.sha256());
    let mut bytes = fs::read(&blob).unwrap();
    bytes[5] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let mut command = bench.command(&[]);
    command.env("HF_HOME", bench.dir.path().join("hf"));
    assert_eq!(Outcome::of(command.output().unwrap()).output()["fetched_bytes"], LARGE);
    assert_eq!(names_below(&cache), before);
}

#[test]
fn offline_nothing_is_asked_and_what_is_missing_is_listed() {
    let bench = Bench::new();
    let mut command = bench.command(&[]);
    command.env("HF_HUB_OFFLINE", "1");
    for outcome in [bench.run(&["--offline"]), Outcome::of(command.output().unwrap())] {
        let error = outcome.error();
        assert_eq!((outcome.code, error["details"]["reason"].as_str()), (Some(1), Some("OFFLINE")));
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(WEIGHTS) && message.contains(SMALL), "{message}");
    }
    assert!(bench.hub.asked().is_empty());
}

#[test]
fn a_dry_run_says_what_there_is_to_fetch_and_changes_nothing() {
    let bench = Bench::new();
    let outcome = bench.run(&["--dry-run"]);
    let output = outcome.output();
    assert_eq!((&output["total_bytes"], &output["need_bytes"]), (&(LARGE + 8).into(), &(LARGE + 8).into()));
    assert!(output["free_bytes"].as_u64().unwrap() > 0);
    assert_eq!(
        (output["files"][0]["path"].as_str(), &output["files"][0]["size"]),
        (Some(WEIGHTS), &LARGE.into())
    );
    assert!(outcome.stderr.contains("missing") && outcome.stderr.contains("to fetch"), "{}", outcome.stderr);
    assert!(!bench.root().exists());
    assert_eq!(bench.hub.served(), 0);
    // Without a hub, what is not known stays so.
    let output = bench.run(&["--dry-run", "--offline"]).output();
    assert_eq!((&output["unknown_sizes"], &output["files"][0]["size"]), (&2.into(), &Value::Null));
}

/// `product.md`, "Real weights": what videos of one person need.
#[test]
fn the_dry_run_of_infinitetalk_lists_the_official_files_and_their_total() {
    let run = |args: &[&str]| {
        let mut command = handler();
        command.args(["prefetch", "--dry-run", "--offline", "--model", "infinitetalk"]).args(args);
        let outcome = Outcome::of(command.env("MODEL_STORAGE_PATH", "/nonexistent/models").output().unwrap());
        outcome.output()
    };
    let listed = |output: &Value| {
        let files = output["files"].as_array().unwrap().clone();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let mut files: Vec<_> = files
            .iter()
            .map(|file| (text(&file["repo"]), text(&file["path"]), file["size"].as_u64()))
            .collect();
        files.sort();
        files
    };
    let (wan, talk, wav) =
        ("Wan-AI/Wan2.1-I2V-14B-480P", "MeiGen-AI/InfiniteTalk", "TencentGameMate/chinese-wav2vec2-base");
    let shards = [
        9_847_223_624,
        9_797_021_016,
        9_797_041_744,
        9_692_142_864,
        9_692_142_864,
        9_692_142_864,
        7_061_933_536_u64,
    ];
    let mut expected: Vec<_> = (1..)
        .zip(shards)
        .map(|(i, size)| {
            (wan.to_string(), format!("diffusion_pytorch_model-0000{i}-of-00007.safetensors"), Some(size))
        })
        .collect();
    for (repo, path, size) in [
        (talk, "single/infinitetalk.safetensors", Some(9_948_708_152)),
        (wan, "models_t5_umt5-xxl-enc-bf16.pth", Some(11_361_920_418)),
        (wan, "google/umt5-xxl/tokenizer.json", Some(16_837_417)),
        (wan, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", Some(4_772_359_047)),
        (wan, "Wan2.1_VAE.pth", Some(507_609_880)),
        (wav, "model.safetensors", None),
    ] {
        expected.push((repo.to_string(), path.to_string(), size));
    }
    expected.sort();
    let output = run(&[]);
    assert_eq!(listed(&output), expected);
    assert_eq!((&output["total_bytes"], &output["unknown_sizes"]), (&92_187_083_426_u64.into(), &1.into()));
    let both = listed(&run(&["--speakers", "both"]));
    let more: Vec<_> = both.into_iter().filter(|file| !expected.contains(file)).collect();
    assert_eq!(more, [(talk.to_string(), "multi/infinitetalk.safetensors".to_string(), None)]);
}

#[test]
fn generate_fetches_the_model_that_it_is_asked_for_and_no_other() {
    let bench = Bench::of(&[(WEIGHTS, File::large(1000, 1))]);
    let generate = |args: &[&str]| {
        let mut command = handler();
        command
            .current_dir(bench.dir.path())
            .args(["generate", "--steps", "1", "--frames-per-window", "17", "--motion-frames", "5"])
            .args(args)
            .env("MODEL_STORAGE_PATH", bench.root())
            .env("HF_ENDPOINT", bench.hub.endpoint());
        Outcome::of(command.output().unwrap())
    };
    // A model that is not installed is fetched only where it is named: nobody waits for 92 GB unasked.
    let output = generate(&["--max-seconds", "0.2"]).output();
    assert_eq!(output["model"], "tiny");
    assert!(bench.hub.asked().is_empty());
    // These bytes are no weights, which the loader says once they are there.
    let models = bench.dir.path().join("models.toml");
    let outcome = generate(&["--model", "m", "--models-file", models.to_str().unwrap()]);
    assert_eq!(outcome.error()["code"], "MODEL_CORRUPT");
    assert_eq!(bench.hub.served(), 1000);
    assert!(outcome.stderr.contains("fetch"), "{}", outcome.stderr);
}

#[test]
fn progress_is_told_in_plain_lines() {
    let bench = Bench::new();
    let outcome = bench.run(&[]);
    assert!(outcome.stderr.lines().any(|line| line.contains("% fetch")), "{}", outcome.stderr);
    let quiet = bench.run(&["--quiet"]);
    assert_eq!(quiet.stderr, "");
}

#[test]
fn a_receipt_that_cannot_be_written_is_no_reason_to_fail() {
    let bench = Bench::new();
    bench.run(&[]).output();
    // For root there are no permissions: a folder in the place of the receipt is in the way of everyone.
    let receipt = bench.place(&format!("{SMALL}.receipt.json"));
    fs::remove_file(&receipt).unwrap();
    fs::create_dir(&receipt).unwrap();
    fs::set_permissions(&receipt, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(receipt.join("x"), "").unwrap();
    bench.hub.forget();
    let outcome = bench.run(&[]);
    assert_eq!(outcome.output()["fetched_bytes"], 0);
    assert!(outcome.stderr.contains("cannot be written"), "{}", outcome.stderr);
}
