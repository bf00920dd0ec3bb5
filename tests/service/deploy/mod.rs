//! `handler deploy`, against an account of our own making.

mod fake;
mod follow;

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Outcome, handler};
use fake::{Fake, Fault, KEY};

const OURS: &str = include_str!("../../../runpod.toml");

fn image(n: u8) -> String {
    format!("ghcr.io/o/talkie@sha256:{}", format!("{n:x}").repeat(64))
}

/// Somebody with a key, a file, and an account.
struct Deployer {
    fake: Fake,
    dir: TempDir,
}

impl Deployer {
    /// With the file of this repository.
    fn new() -> Self {
        let deployer = Self { fake: Fake::start(), dir: tempfile::tempdir().unwrap() };
        deployer.write(OURS);
        deployer
    }

    /// With an endpoint that has image `1`.
    fn with_endpoint() -> Self {
        let deployer = Self::new();
        deployer.deploy(&["--image", &image(1)]).output();
        deployer.fake.take_seen();
        deployer
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("runpod.toml")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.file(), text).unwrap();
    }

    /// Writes the file with `old` replaced.
    fn edit(&self, old: &str, new: &str) {
        assert!(OURS.contains(old), "{old}");
        self.write(&OURS.replace(old, new));
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = handler();
        command.arg("deploy").args(args).current_dir(self.dir.path());
        command.env("RUNPOD_API_KEY", KEY).env("RUNPOD_REST_URL", self.fake.url());
        command.env("BACKOFF_SECONDS", "0.001");
        command
    }

    fn deploy(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().unwrap())
    }
}

fn lines(outcome: &Outcome) -> Vec<Value> {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_first_deployment_makes_volume_and_endpoint_and_the_second_does_nothing() {
    let deployer = Deployer::new();
    let report = deployer.deploy(&["--image", &image(1)]).output();
    assert_eq!(
        (&report["endpoint_id"], &report["created"], &report["changed"]),
        (&json!("ep1"), &json!(true), &json!(["volume", "endpoint"]))
    );
    assert_eq!((&report["image"], &report["previous_image"]), (&json!(image(1)), &Value::Null));
    assert!(report["run_url"].as_str().unwrap().ends_with("/ep/ep1/run"), "{report}");

    let seen = deployer.fake.take_seen();
    assert!(seen.iter().all(|request| request.user_agent.starts_with("talkie/")), "{seen:?}");
    let writes: Vec<_> = seen.iter().filter(|request| request.method != "GET").collect();
    assert_eq!(writes.len(), 2, "{writes:?}");
    assert_eq!(
        writes[0].body,
        json!({"name": "talkie-models", "size": 160, "dataCenter": "EU-RO-1"}),
        "the volume comes first"
    );
    let endpoint = &writes[1].body;
    assert_eq!((&endpoint["type"], &endpoint["image"]), (&json!("QUEUE"), &json!(image(1))));
    assert_eq!(endpoint["networkVolumes"], json!(["vol1"]));
    assert_eq!(endpoint["gpu"]["pools"][0], "ADA_48_PRO");
    assert_eq!(endpoint["workers"], json!({"min": 0, "max": 5, "idleTimeout": 30}));
    assert_eq!(endpoint["env"]["R2_ACCOUNT_ID"], "{{ RUNPOD_SECRET_R2_ACCOUNT_ID }}");

    let again = deployer.deploy(&["--image", &image(1)]).output();
    assert_eq!((&again["changed"], &again["created"]), (&json!([]), &json!(false)));
    assert_eq!(deployer.fake.take_writes(), []);
    // The platform may have appended to the name.
    deployer.fake.change_endpoint(|endpoint| endpoint["name"] = "talkie -fb".into());
    assert_eq!(deployer.deploy(&[]).output()["changed"], json!([]));
    assert_eq!(deployer.fake.take_writes(), []);
}

#[test]
fn only_what_differs_is_sent() {
    let deployer = Deployer::with_endpoint();
    deployer.edit("max = 5", "max = 3");
    let report = deployer.deploy(&["--image", &image(2)]).output();
    assert_eq!(report["changed"], json!(["image", "workers.max"]));
    assert_eq!((&report["image"], &report["previous_image"]), (&json!(image(2)), &json!(image(1))));
    let body = json!({"image": image(2), "workers": {"min": 0, "max": 3, "idleTimeout": 30}});
    assert_eq!(deployer.fake.take_writes(), [("PATCH /serverless/ep1".to_string(), body)]);

    // Variables are replaced as a whole, and a variable of whoever deploys comes from there.
    deployer.edit("LOG_LEVEL = \"info\"", "HF_TOKEN = \"${TOKEN}\"");
    let mut command = deployer.command(&[]);
    let report = Outcome::of(command.env("TOKEN", "canary-token").output().unwrap());
    let changed = report.output()["changed"].clone();
    assert_eq!(changed, json!(["env.HF_TOKEN", "env.LOG_LEVEL", "workers.max"]));
    assert_eq!(deployer.fake.endpoint()["env"]["HF_TOKEN"], "canary-token");
    assert_eq!(deployer.fake.endpoint()["env"]["LOG_LEVEL"], Value::Null);
    assert!(!format!("{report:?}").contains("canary"), "{report:?}");
    let e = deployer.deploy(&[]).refused("INVALID_INPUT");
    assert!(e["message"].as_str().unwrap().contains("`TOKEN` is not set"), "{e}");
}

#[test]
fn a_dry_run_prints_the_requests_and_sends_none() {
    let deployer = Deployer::with_endpoint();
    deployer.edit("LOG_LEVEL = \"info\"", "HF_TOKEN = \"${TOKEN}\"");
    let dry = |command: &mut Command| Outcome::of(command.env("TOKEN", "canary-token").output().unwrap());
    let outcome = dry(&mut deployer.command(&["--dry-run", "--image", &image(2)]));
    assert_eq!(deployer.fake.take_writes(), []);
    let calls = lines(&outcome);
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0]["method"], "PATCH");
    assert_eq!(calls[0]["url"], format!("{}/serverless/ep1", deployer.fake.url()));
    assert_eq!(calls[0]["body"]["image"], image(2));
    assert_eq!(calls[0]["body"]["env"]["HF_TOKEN"], "[REDACTED]");
    assert_eq!(calls[0]["body"]["env"]["R2_BUCKET_NAME"], "{{ RUNPOD_SECRET_R2_BUCKET_NAME }}");
    assert!(!format!("{outcome:?}").contains("canary"), "{outcome:?}");

    // Without a key nobody is asked.
    let mut command = deployer.command(&["--dry-run", "--image", &image(2)]);
    let outcome = dry(command.env_remove("RUNPOD_API_KEY").env_remove("RUNPOD_REST_URL"));
    let calls = lines(&outcome);
    assert_eq!(deployer.fake.take_seen().len(), 0);
    let urls: Vec<_> = calls.iter().map(|call| call["url"].as_str().unwrap()).collect();
    assert_eq!(
        urls,
        ["https://api.runpod.io/v2/network-volumes", "https://api.runpod.io/v2/serverless"],
        "{calls:?}"
    );
    assert_eq!(calls[1]["body"]["networkVolumes"], json!(["<id of talkie-models>"]));
    let e = Outcome::of(
        deployer
            .command(&["--image", &image(2)])
            .env("RUNPOD_API_KEY", "")
            .env("TOKEN", "x")
            .output()
            .unwrap(),
    );
    assert_eq!(e.error()["code"], "UNAUTHORIZED");
}

#[test]
fn a_rollback_returns_to_the_image_before() {
    let deployer = Deployer::with_endpoint();
    let e = deployer.deploy(&["--rollback"]).error();
    assert_eq!((&e["code"], &e["details"]["reason"]), (&json!("NOT_FOUND"), &json!("NO_RELEASE")), "{e}");
    deployer.deploy(&["--image", &image(2)]).output();
    deployer.edit("max = 5", "max = 3");
    deployer.deploy(&[]).output();
    deployer.fake.take_seen();

    // The deployment of another image has not come to pass.
    let report = deployer.deploy(&["--rollback", "--image", &image(7)]).output();
    assert_eq!((&report["changed"], &report["image"]), (&json!([]), &json!(image(2))));
    let calls = lines(&deployer.deploy(&["--rollback", "--dry-run"]));
    assert_eq!((calls.len(), &calls[0]["body"]), (1, &json!({"image": image(1)})));
    assert_eq!(deployer.fake.take_writes(), []);

    let report = deployer.deploy(&["--rollback", "--image", &image(2)]).output();
    assert_eq!(
        (&report["changed"], &report["image"], &report["previous_image"]),
        (&json!(["image"]), &json!(image(1)), &json!(image(2)))
    );
    let body = json!({"image": image(1)});
    assert_eq!(deployer.fake.take_writes(), [("PATCH /serverless/ep1".to_string(), body)]);
    // Once more undoes that.
    assert_eq!(deployer.deploy(&["--rollback"]).output()["image"], image(2));
}

#[test]
fn refusals_are_told_and_not_repeated() {
    let deployer = Deployer::new();
    let args = ["--image", &image(1)];
    let wrong_key =
        Outcome::of(deployer.command(&args).env("RUNPOD_API_KEY", "canary-other").output().unwrap());
    assert_eq!((wrong_key.code, &wrong_key.error()["code"]), (Some(1), &json!("UNAUTHORIZED")));
    assert!(!wrong_key.stderr.contains("canary"), "{}", wrong_key.stderr);
    assert_eq!(deployer.fake.take_seen().len(), 1);

    deployer.edit("AMPERE_80", "AMPERE_90");
    let e = deployer.deploy(&args).refused("INVALID_INPUT");
    assert_eq!(e["details"]["reason"], "UNKNOWN_POOL");
    assert!(e["message"].as_str().unwrap().contains("\"AMPERE_90\", expected one of ADA_24"), "{e}");
    assert_eq!(deployer.fake.take_writes(), []);

    deployer.write(OURS);
    let quota = "Max workers across all endpoints must not exceed your workers quota (5).";
    deployer.fake.fault("POST /serverless", Fault::Refuse(500, quota));
    let e = deployer.deploy(&args).refused("INVALID_INPUT");
    assert_eq!(e["details"]["reason"], "QUOTA");
    assert!(e["message"].as_str().unwrap().contains(quota), "{e}");
    let writes: Vec<_> = deployer.fake.take_writes().into_iter().map(|(what, _)| what).collect();
    assert_eq!(writes, ["POST /network-volumes", "POST /serverless"]);

    for (image, flags) in [("ghcr.io/o/talkie:v1", &[][..]), ("ghcr.io/o/talkie", &["--allow-tag"])] {
        let e = deployer.deploy(&[&["--image", image], flags].concat()).refused("INVALID_INPUT");
        assert_eq!(e["details"]["reason"], "IMAGE", "{e}");
    }
    deployer.edit("max = 5", "max = 5\nmost = 6");
    let e = deployer.deploy(&args).refused("INVALID_INPUT");
    assert!(e["message"].as_str().unwrap().contains("unknown field `most`"), "{e}");
    assert_eq!(deployer.fake.take_seen().len(), 0, "none of these was sent");
    deployer.write(OURS);
    let report = deployer.deploy(&["--image", "ghcr.io/o/talkie:v1", "--allow-tag"]).output();
    assert_eq!(report["image"], "ghcr.io/o/talkie:v1");
}

#[test]
fn what_fails_for_the_time_being_is_tried_again() {
    let deployer = Deployer::new();
    let refuse = |what, status| deployer.fake.fault(what, Fault::Refuse(status, "later"));
    refuse("GET /catalog/gpus", 429);
    refuse("GET /catalog/gpus", 503);
    refuse("POST /network-volumes", 429);
    refuse("POST /serverless", 502);
    let report = deployer.deploy(&["--image", &image(1)]).output();
    assert_eq!(report["changed"], json!(["volume", "endpoint"]));
    refuse("PATCH /serverless/ep1", 500);
    assert_eq!(deployer.deploy(&["--image", &image(2)]).output()["changed"], json!(["image"]));

    deployer.fake.take_seen();
    (0..6).for_each(|_| refuse("GET /catalog/gpus", 503));
    let outcome = deployer.deploy(&["--image", &image(3)]);
    let e = outcome.error();
    assert_eq!((outcome.code, &e["code"], &e["retryable"]), (Some(1), &json!("INTERNAL"), &json!(true)));
    assert_eq!(deployer.fake.take_seen().len(), 6, "tries have an end");
    (0..6).for_each(|_| refuse("GET /catalog/gpus", 429));
    assert_eq!(deployer.deploy(&["--image", &image(3)]).error()["code"], "RATE_LIMITED");
}

#[test]
fn what_was_made_in_spite_of_a_failure_is_not_made_twice() {
    let deployer = Deployer::new();
    deployer.fake.fault("POST /network-volumes", Fault::Forget);
    deployer.fake.fault("POST /serverless", Fault::Forget);
    let report = deployer.deploy(&["--image", &image(1)]).output();
    assert_eq!((&report["endpoint_id"], &report["volume_id"]), (&json!("ep1"), &json!("vol1")));
    assert_eq!((deployer.fake.volumes().len(), deployer.fake.take_writes().len()), (1, 2));
    assert_eq!(deployer.fake.endpoint()["id"], "ep1");
}

#[test]
fn a_volume_grows_and_neither_shrinks_nor_moves() {
    let volume = |size: u64, place: &str| json!({"id": "vol9", "name": "talkie-models", "size": size, "dataCenter": place});
    let deployer = Deployer::new();
    deployer.fake.add_volume(volume(100, "EU-RO-1"));
    let report = deployer.deploy(&["--image", &image(1)]).output();
    assert_eq!(report["changed"], json!(["volume.size", "endpoint"]));
    assert_eq!(deployer.fake.volumes()[0]["size"], 160);
    deployer.edit("size_gb = 160", "size_gb = 120");
    assert_eq!(deployer.deploy(&[]).output()["changed"], json!([]));
    deployer.edit("data_center = \"EU-RO-1\"", "data_center = \"US-KS-2\"");
    let e = deployer.deploy(&[]).refused("INVALID_INPUT");
    assert_eq!(e["details"]["reason"], "VOLUME_ELSEWHERE");
    deployer.write(OURS);
    deployer.fake.add_volume(volume(160, "EU-RO-1"));
    assert_eq!(deployer.deploy(&[]).refused("INVALID_INPUT")["details"]["reason"], "AMBIGUOUS");
}

#[test]
fn of_several_endpoints_one_is_named() {
    let deployer = Deployer::with_endpoint();
    let mut other = deployer.fake.endpoint();
    other["id"] = "ep2".into();
    deployer.fake.add_endpoint(other);
    let e = deployer.deploy(&["--image", &image(2)]).refused("INVALID_INPUT");
    assert_eq!(e["details"]["reason"], "AMBIGUOUS");
    let report = deployer.deploy(&["--image", &image(2), "--endpoint", "ep2"]).output();
    assert_eq!((&report["endpoint_id"], &report["changed"]), (&json!("ep2"), &json!(["image"])));
    let e = deployer.deploy(&["--endpoint", "ep3"]).error();
    assert_eq!(e["code"], "NOT_FOUND", "{e}");
}
