//! RunPod's own clients call the gateway: Python, synchronous and not, and JavaScript.

use std::collections::HashMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use super::{KEY, command, node_sdk, python, script};
use crate::pool::gateway::{Gateway, job};

/// A folder and a gateway on it, which needs a key.
fn gateway() -> (TempDir, Gateway) {
    let dir = tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[("API_KEY", KEY)]);
    (dir, gateway)
}

/// A job whose real video is made by the model `tiny`, quickly, and one that runs until it is cancelled.
static JOBS: LazyLock<String> = LazyLock::new(|| {
    let mut quick = job("")["input"].take();
    for (name, value) in [("model", json!("tiny")), ("steps", json!(1)), ("prompt", json!("hello"))] {
        quick[name] = value;
    }
    (quick["frames_per_window"], quick["motion_frames"]) = (json!(17), json!(5));
    json!({"quick": quick, "waits": job("wait")["input"]}).to_string()
});

/// What a driver printed, by step.
struct Steps(HashMap<String, Value>);

impl Steps {
    fn of(mut driver: Command, gateway: &Gateway) -> Self {
        driver.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = driver.spawn().unwrap();
        child.stdin.take().unwrap().write_all(JOBS.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}\n{out}\n{err}\n{}", output.status, gateway.log());
        let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        Self(lines.map(|line| (line["step"].as_str().unwrap().to_string(), line)).collect())
    }

    #[track_caller]
    fn value(&self, step: &str) -> &Value {
        let line = &self.0[step];
        line.get("value").unwrap_or_else(|| panic!("{line}"))
    }

    #[track_caller]
    fn returned(&self, expected: &[(&str, Value)]) {
        for (step, value) in expected {
            assert_eq!(self.value(step), value, "{step}");
        }
    }

    #[track_caller]
    fn failed(&self, step: &str, words: &str) {
        let line = self.0[step].to_string();
        assert!(self.0[step].get("error").is_some() && line.contains(words), "{line}");
    }

    /// Whether `step` was an MP4 of the size and the hash that were announced.
    #[track_caller]
    fn was_video(&self, step: &str) {
        let video = self.value(step);
        assert_eq!((&video["type"], &video["brand"]), (&json!("video/mp4"), &json!("ftyp")));
        assert_eq!(video["size"][0], video["size"][1]);
        assert_eq!(video["sha256"][0], video["sha256"][1]);
        assert!(video["size"][0].as_u64() > Some(1000), "{video}");
    }

    #[track_caller]
    fn was_health(&self, step: &str) {
        let health = self.value(step);
        for (of, names) in [
            ("jobs", &["completed", "failed", "inProgress", "inQueue", "retried"][..]),
            ("workers", &["idle", "initializing", "ready", "running", "throttled", "unhealthy"]),
        ] {
            for name in names {
                assert!(health[of][name].is_u64(), "{of}.{name}: {health}");
            }
        }
    }
}

#[test]
fn the_python_client_is_served() {
    let Some(python) = python() else { return };
    let (home, gateway) = gateway();
    let mut driver = command(python, home.path());
    driver.arg(script("client.py")).args([&format!("{}/v2", gateway.base), KEY]);
    let steps = Steps::of(driver, &gateway);
    steps.was_health("health");
    steps.was_video("video");
    steps.was_video("run_sync");
    assert!(["IN_QUEUE", "IN_PROGRESS"].contains(&steps.value("status").as_str().unwrap()));
    steps.returned(&[
        ("status at the end", json!("COMPLETED")),
        ("stream", json!([])),
        ("running", json!("IN_PROGRESS")),
        ("progress", json!("denoise")),
        ("purge_queue", json!({"removed": 2, "status": "completed"})),
        ("purged", json!(["CANCELLED", "CANCELLED"])),
        ("cancel", json!("CANCELLED")),
        ("cancelled", json!("CANCELLED")),
    ]);
    steps.failed("timeout", "TimeoutError");
    steps.failed("unknown job", "404");
    steps.failed("empty input", "400");
    steps.failed("bad key", "401 Unauthorized");
}

#[test]
fn the_asyncio_client_is_served() {
    let Some(python) = python() else { return };
    let (home, gateway) = gateway();
    let mut driver = command(python, home.path());
    driver.arg(script("client_async.py")).args([&format!("{}/v2", gateway.base), KEY]);
    let steps = Steps::of(driver, &gateway);
    steps.was_health("health");
    steps.was_video("video");
    steps.returned(&[
        ("status at the end", json!("COMPLETED")),
        ("stream", json!([])),
        ("running", json!("IN_PROGRESS")),
        ("purge_queue", json!({"removed": 2, "status": "completed"})),
        ("purged", json!(["CANCELLED", "CANCELLED"])),
        ("cancelled", json!("CANCELLED")),
    ]);
    assert_eq!(steps.value("cancel")["status"], "CANCELLED");
    steps.failed("timeout", "TimeoutError");
    steps.failed("unknown job", "KeyError");
}

#[test]
fn the_javascript_client_is_served() {
    let Some(sdk) = node_sdk() else { return };
    let (home, gateway) = gateway();
    let mut driver = command("node", home.path());
    driver.arg(script("client.mjs")).arg(sdk).args([&format!("{}/v2", gateway.base), KEY]);
    let steps = Steps::of(driver, &gateway);
    steps.was_health("health");
    steps.was_video("video");
    steps.was_video("runSync");
    assert!(["IN_QUEUE", "IN_PROGRESS"].contains(&steps.value("status").as_str().unwrap()));
    steps.returned(&[
        ("statusSync", json!("COMPLETED")),
        ("stream", json!([])),
        ("running", json!("IN_PROGRESS")),
        ("timeout", json!(false)),
        ("purgeQueue", json!({"removed": 1, "status": "completed"})),
        ("cancel", json!("CANCELLED")),
        ("cancelled", json!("CANCELLED")),
    ]);
    steps.failed("unknown job", "404");
    steps.failed("empty input", "400");
    steps.failed("bad key", "401");
}
