//! What comes after a change: waiting for workers, the test job; and what is never said.

use serde_json::{Value, json};

use super::{Deployer, Outcome, image};

fn worker(status: &str, is_old: bool) -> Value {
    json!({"id": "w1", "status": status, "isStale": is_old, "gpuCount": 1})
}

#[test]
fn it_waits_until_workers_have_the_new_version() {
    let deployer = Deployer::with_endpoint();
    for list in [
        json!([worker("IDLE", true), worker("RUNNING", true)]),
        json!([worker("RUNNING", true), worker("INITIALIZING", false)]),
        json!([worker("RUNNING", true), worker("IDLE", false)]),
    ] {
        deployer.fake.workers(list);
    }
    let outcome = deployer.deploy(&["--image", &image(2)]);
    assert_eq!(outcome.output()["changed"], json!(["image"]));
    let told: Vec<_> = outcome.stderr.lines().filter(|line| line.starts_with("workers: ")).collect();
    assert_eq!(told.len(), 3, "{}", outcome.stderr);
    assert!(told[0].ends_with("1 finish a job, 1 end"), "{}", told[0]);
    let looks = deployer.fake.take_seen().iter().filter(|seen| seen.path.ends_with("/workers")).count();
    assert_eq!(looks, 3);
}

#[test]
fn a_version_that_does_not_start_is_an_error_that_says_what_was_changed() {
    let deployer = Deployer::with_endpoint();
    deployer.fake.workers(json!([worker("UNHEALTHY", false)]));
    let e = deployer.deploy(&["--image", &image(2)]).error();
    assert_eq!((&e["code"], &e["details"]["reason"]), (&json!("INTERNAL"), &json!("WORKER_UNHEALTHY")));
    assert_eq!((&e["details"]["endpoint_id"], &e["details"]["changed"]), (&json!("ep1"), &json!(["image"])));

    (0..2000).for_each(|_| deployer.fake.workers(json!([worker("INITIALIZING", false)])));
    let args = ["--image", &image(3), "--deploy-timeout-seconds", "0.05"];
    let e = deployer.deploy(&args).error();
    assert_eq!((&e["code"], &e["details"]["reason"]), (&json!("TIMEOUT"), &json!("ROLLOUT")), "{e}");
}

#[test]
fn the_test_job_has_to_give_a_video() {
    let deployer = Deployer::with_endpoint();
    let job = |status: &str| json!({"id": "job1", "status": status});
    let mut done = job("COMPLETED");
    done["output"] = json!({"video_url": "https://bucket.example/v.mp4?X-Amz-Signature=canary"});
    done["delayTime"] = 824.into();
    done["executionTime"] = 3391.into();
    for reply in [job("IN_QUEUE"), job("IN_PROGRESS"), done] {
        deployer.fake.job(reply);
    }
    let outcome = deployer.deploy(&["--smoke"]);
    let smoke = outcome.output()["smoke"].clone();
    assert_eq!(smoke, json!({"job_id": "job1", "delay_ms": 824, "execution_ms": 3391, "worker_id": null}));
    assert!(outcome.stderr.contains("the test job job1 is IN_QUEUE"), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("canary") && !outcome.stdout.contains("canary"));
    let sent = deployer.fake.take_writes().remove(0);
    assert_eq!(sent.0, "POST /ep/ep1/runsync");
    let input = &sent.1["input"];
    assert_eq!((&input["model"], &input["max_seconds"]), (&json!("tiny"), &json!(1)));
    assert!(input["image"].as_str().unwrap().starts_with("data:image/png;base64,"));

    let mut failed = job("FAILED");
    failed["error"] = json!(r#"{"code": "UPLOAD_FAILED", "message": "no bucket", "hint": null}"#);
    deployer.fake.job(failed);
    let e = deployer.deploy(&["--smoke=infinitetalk"]).error();
    assert_eq!(e["details"]["reason"], "SMOKE");
    assert!(e["message"].as_str().unwrap().contains("is FAILED: UPLOAD_FAILED: no bucket"), "{e}");
    assert_eq!(deployer.fake.take_writes()[0].1["input"]["model"], "infinitetalk");

    let e = deployer.deploy(&["--smoke", "--deploy-timeout-seconds", "0.05"]).error();
    assert_eq!((&e["code"], &e["details"]["reason"]), (&json!("TIMEOUT"), &json!("SMOKE")));
    assert_eq!(deployer.fake.take_writes().pop().unwrap().0, "POST /ep/ep1/cancel/job1");
}

#[test]
fn no_secret_is_ever_said() {
    let deployer = Deployer::new();
    deployer.edit("LOG_LEVEL = \"info\"", "HF_TOKEN = \"${TOKEN}\"");
    let run = |args: &[&str]| {
        let mut command = deployer.command(args);
        Outcome::of(command.env("LOG_LEVEL", "trace").env("TOKEN", "canary-token").output().unwrap())
    };
    let refused = super::Fault::Refuse(503, "later");
    deployer.fake.fault("GET /catalog/gpus", refused);
    let mut said = String::new();
    for args in [&["--image", &image(1)][..], &["--dry-run"], &["--smoke=x"], &["--rollback"], &["--help"]] {
        deployer.fake.job(json!({"id": "job1", "status": "FAILED", "error": "broken"}));
        said += &format!("{:?}", run(args));
    }
    deployer.fake.change_endpoint(|endpoint| endpoint["env"]["HF_TOKEN"] = "canary-before".into());
    said += &format!("{:?}{:?}", run(&["--dry-run"]), run(&[]));
    assert!(said.contains("next try in") && said.contains("env.HF_TOKEN"), "{said}");
    assert!(!said.contains("canary"), "{said}");
}
