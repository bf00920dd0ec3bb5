//! Requests that are large, and a gateway that is full.

use std::fs;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use handler::gateway::store::Outcome;
use serde_json::json;

use super::rig::{Rig, header, refused, request};
use crate::media;
use crate::storage::world::{Fault, World, quick};

#[test]
fn large_media_lie_beside_the_store_before_the_answer() {
    let rig = Rig::start();
    // A minute of sound: 1.9 MB.
    let voice = STANDARD.encode(media::tone(16_000, 1, 60.0));
    let sent =
        json!({"input": {"image": STANDARD.encode(media::png(96, 96)), "audio": voice, "prompt": "p"}});
    let job = rig.run(&sent);
    let file = fs::read(rig.dir.path().join("media").join(&job)).unwrap();
    assert!(file.ends_with(voice.as_bytes()), "{} bytes", file.len());
    let (taken, mut request) = rig.take();
    assert_eq!((taken.as_str(), request["input"]["audio"].is_null()), (job.as_str(), true));
    rig.gateway.media.restore(&job, &mut request).unwrap();
    assert_eq!(request, sent);
    for name in ["jobs.db", "jobs.db-wal"] {
        let len = fs::metadata(rig.dir.path().join(name)).map_or(0, |m| m.len());
        assert!(len < 1 << 20, "{name} has {len} bytes");
    }
}

#[test]
fn a_request_that_was_refused_leaves_no_media() {
    let rig = Rig::with(|wishes| wishes.store.max_queued = 1);
    let sent = |seed: u32| {
        let mut request = request();
        request["input"]["audio"] = STANDARD.encode(media::tone(16_000, 1, 5.0)).into();
        request["input"]["seed"] = seed.into();
        request
    };
    let left = || fs::read_dir(rig.dir.path().join("media")).unwrap().count();
    let headers = [("Content-Type", "application/json"), ("Idempotency-Key", "k")];
    let send = |seed| rig.send("POST", "/run", &headers, sent(seed).to_string().as_bytes());
    let first = send(1).json();
    assert_eq!(left(), 1);
    assert_eq!(send(1).json(), first, "the same job");
    refused(&send(2), 409, "IDEMPOTENCY_CONFLICT");
    let full = rig.post("/run", &sent(3));
    refused(&full, 503, "QUEUE_FULL");
    assert!(header(&full, "retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(left(), 1);
    let (job, _) = rig.take();
    rig.finish(&job, Outcome::Completed("1".to_string()));
    assert_eq!(rig.post("/run", &sent(3)).status, 200);
}

#[test]
fn a_disk_that_is_nearly_full_takes_no_more_jobs_and_shows_those_it_has() {
    let rig = Rig::start();
    let job = rig.run(&request());
    let other = Rig::with(|wishes| wishes.config.min_free_bytes = u64::MAX);
    let reply = other.post("/run", &request());
    let error = refused(&reply, 507, "STORE_FULL");
    assert_eq!((error["retryable"].as_bool(), header(&reply, "retry-after")), (Some(true), Some("1")));
    refused(&other.get("/readyz"), 503, "STORE_FULL");
    assert_eq!((other.get("/livez").status, other.get("/health").status), (200, 200));
    assert_eq!(
        (rig.get("/readyz").json()["status"].as_str(), rig.status(&job)["status"].as_str()),
        (Some("ready"), Some("IN_QUEUE"))
    );
}

#[test]
fn fault_71_a_gateway_whose_bucket_is_gone_is_not_ready() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let gateway = |fault: Fault| {
        let world = runtime.block_on(World::with(quick(), move |_, _| fault.clone()));
        let rig = Rig::with(|wishes| wishes.bucket = Some(world.storage.clone()));
        (world, rig)
    };
    for (status, code) in [(404, "NoSuchBucket"), (403, "InvalidAccessKeyId")] {
        let (world, rig) = gateway(Fault::error(status, code));
        for _ in 0..2 {
            let error = refused(&rig.get("/readyz"), 503, "UPLOAD_FAILED");
            assert!(error["message"].as_str().unwrap().contains("the bucket cannot be used"), "{error}");
        }
        assert_eq!(world.count("bucket"), 1, "an answer counts for a while");
        assert_eq!(rig.get("/livez").status, 200);
    }
    for fault in [Fault::None, Fault::error(503, "SlowDown")] {
        assert_eq!(gateway(fault).1.get("/readyz").status, 200, "what passes is no reason");
    }
}

#[test]
fn bodies_share_the_memory_that_there_is_for_them() {
    let rig = Rig::start();
    let room = rig.gateway.admission.room(250 << 20).unwrap();
    let sent = json!({"input": {"image": "A".repeat(8 << 20), "audio": "x"}});
    let reply = rig.post("/run", &sent);
    let error = refused(&reply, 503, "QUEUE_FULL");
    assert_eq!(
        (error["details"]["reason"].as_str(), header(&reply, "retry-after")),
        (Some("BUSY"), Some("1"))
    );
    assert_eq!(rig.post("/run", &request()).status, 200, "a small one fits");
    drop(room);
    refused(&rig.post("/run", &sent), 400, "INVALID_INPUT");
}

#[test]
fn a_policy_goes_with_the_job() {
    let rig = Rig::start();
    let mut sent = request();
    sent["policy"] = json!({"executionTimeout": 7000, "ttl": 20_000, "lowPriority": true});
    sent["webhook"] = "https://example.com/hook".into();
    sent["s3Config"] =
        json!({"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": "https://d.example"});
    sent["more"] = json!([1, {"b": null}]);
    let job = rig.run(&sent);
    let record = rig.gateway.store.job(&job).unwrap().unwrap();
    assert_eq!((record.webhook.as_deref(), record.low_priority), (Some("https://example.com/hook"), true));
    assert_eq!(rig.take(), (job, sent), "the worker gets all of it");
}
