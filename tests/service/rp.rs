//! The modes without a verb, as RunPod's SDK has them.

use std::os::unix::process::ExitStatusExt;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::media;
use crate::runner::{input, with};
use crate::support::{Outcome, Server, handler, ok, with_small_files};

/// Runs one local job in `dir`.
fn test_input(dir: &TempDir, args: &[&str]) -> Outcome {
    let mut command = handler();
    command.current_dir(dir.path()).env("SPOOL_PATH", dir.path().join("spool")).args(args);
    Outcome::of(command.output().unwrap())
}

#[test]
fn one_job_is_run_and_its_output_printed() {
    let dir = tempfile::tempdir().unwrap();
    let job = json!({"input": with(&input(), &json!({"output": {"thumbnail": true}}))}).to_string();
    let printed = test_input(&dir, &["--test_input", &job]).output();
    let output = &printed["output"];
    let file = std::fs::read(dir.path().join("local_test.mp4")).unwrap();
    assert_eq!((&output["model"], &output["size_bytes"]), (&json!("tiny"), &json!(file.len())), "{printed}");
    assert_eq!(output["frames"], 8, "0.3 s of voice");
    assert!(output["video_url"].as_str().unwrap().ends_with("/local_test.mp4"));
    assert!(output["thumbnail_url"].as_str().unwrap().ends_with("/local_test.jpg"));
    assert!(dir.path().join("local_test.jpg").is_file());
}

#[test]
fn the_job_may_lie_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let missing = test_input(&dir, &["--test_input"]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.error()["message"].as_str().unwrap().contains("test_input.json"), "{}", missing.stderr);
    std::fs::write(dir.path().join("test_input.json"), r#"{"input": {"stepz": 1}}"#).unwrap();
    let run = test_input(&dir, &["--test_input", "--rp_log_level", "ERROR"]);
    assert_eq!((run.code, &run.error()["code"]), (Some(1), &json!("UNKNOWN_FIELD")));
}

#[test]
fn a_job_that_fails_ends_with_1_as_with_the_sdk() {
    let dir = tempfile::tempdir().unwrap();
    for (job, code) in [
        ("{}", "MISSING_FIELD"),
        (r#"{"input": null}"#, "INVALID_INPUT"),
        ("{", "INVALID_INPUT"),
        (r#"{"input": {"image": "AAAA", "audio": "AAAA"}}"#, "INVALID_IMAGE_FORMAT"),
    ] {
        let run = test_input(&dir, &["--test_input", job]);
        assert_eq!((run.code, &run.error()["code"]), (Some(1), &json!(code)), "{job}");
    }
}

#[test]
fn help_tells_the_modes_and_verbs_refuse_the_sdks_flags() {
    let dir = tempfile::tempdir().unwrap();
    let help = test_input(&dir, &["--help"]).stdout;
    for text in ["--test_input", "--rp_serve_api", "AWS_LAMBDA_RUNTIME_API", "RUNPOD_REALTIME_PORT", "worker"]
    {
        assert!(help.contains(text), "{text}");
    }
    let run = test_input(&dir, &["generate", "--rp_serve_api"]);
    assert_eq!(run.refused("INVALID_INPUT")["details"]["reason"], "USAGE");
}

#[test]
fn kill_points_of_a_generation_leave_nothing_that_the_next_start_trips_over() {
    let server = Server::start(|_, stream| ok(stream, &media::png(96, 96)));
    let dir = tempfile::tempdir().unwrap();
    // Two windows, as one point lies between them.
    let wishes =
        json!({"image": server.url("/"), "max_seconds": 0.3, "frames_per_window": 5, "motion_frames": 1});
    let job = json!({"input": with(&input(), &wishes)}).to_string();
    for point in ["K15", "K16", "K17", "K18"] {
        let mut command = handler();
        command.current_dir(dir.path()).env("SPOOL_PATH", dir.path().join("spool")).env("KILL_AT", point);
        let output = command.args(["--allow-private-urls", "--test_input", &job]).output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{point}: {output:?}");
        assert!(!dir.path().join("local_test.mp4").exists(), "{point}");
    }
    let output = test_input(&dir, &["--allow-private-urls", "--test_input", &job]).output();
    assert_eq!(output["output"]["frames"], 8);
    assert_eq!(std::fs::read_dir(dir.path().join("spool/videos")).unwrap().count(), 0);
}

#[test]
fn fault_64_a_video_that_cannot_be_written_is_an_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = handler();
    command.current_dir(dir.path()).env("SPOOL_PATH", dir.path().join("spool"));
    command.args(["--test_input", &json!({"input": input()}).to_string()]);
    with_small_files(&mut command, 20_000);
    let run = Outcome::of(command.output().unwrap());
    let error: Value = run.error();
    assert_eq!((run.code, &error["code"]), (Some(1), &json!("ENCODE_FAILED")), "{error}");
    assert!(!dir.path().join("local_test.mp4").exists());
    assert_eq!(std::fs::read_dir(dir.path().join("spool/videos")).unwrap().count(), 0);
}
