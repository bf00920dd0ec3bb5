//! What goes wrong between us and the store, by the rows of the fault matrix.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use handler::job::Code;
use handler::storage::Tuning;
use md5::{Digest, Md5};
use reqwest::StatusCode;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use super::world::{Fault, PART, World, bytes, quick};

/// A little more than two parts.
const LARGE: usize = 2 * PART as usize + 1;

/// The first `times` requests for `operation` go wrong.
async fn world_failing(operation: &'static str, times: usize, fault: Fault) -> World {
    let tuning = Tuning {
        call_timeout: Duration::from_millis(300),
        upload_timeout: Duration::from_secs(2),
        ..quick()
    };
    World::with(tuning, move |seen, before| match seen.operation == operation && before < times {
        true => fault.clone(),
        false => Fault::None,
    })
    .await
}

async fn opens(url: &str, len: usize) {
    let response = reqwest::get(url).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.bytes().await.unwrap() == bytes(len), "the object is what was sent");
}

fn passing_faults() -> Vec<Fault> {
    let mut faults: Vec<_> = [500, 502, 503, 520, 524]
        .map(|status| Fault::Answer(status, vec![], "<html>edge</html>".into()))
        .into();
    faults.extend([Fault::error(429, "TooManyRequests"), Fault::error(503, "SlowDown"), Fault::Cut]);
    faults
}

/// Two failures in a row are tried over within one round, five need a second one.
#[tokio::test(flavor = "multi_thread")]
async fn fault_65_what_passes_is_tried_again() {
    for fault in passing_faults() {
        for (operation, len, times) in [
            ("put", 1000, 2),
            ("put", 1000, 5),
            ("create", LARGE, 5),
            ("part", LARGE, 2),
            ("complete", LARGE, 5),
        ] {
            let world = world_failing(operation, times, fault.clone()).await;
            let published = world.publish("job", len).await;
            opens(&published.video_url, len).await;
            // The manifest is one more PUT; a part may be one of several.
            assert!(world.count(operation) > times, "{operation} {fault:?}: {}", world.count(operation));
            assert_eq!(world.keys().await.len(), 2, "{operation} {fault:?}: a video and its manifest");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_65_a_store_that_says_nothing_is_given_up_in_time() {
    let world = world_failing("create", 2, Fault::Hang).await;
    let started = Instant::now();
    opens(&world.publish("job", LARGE).await.video_url, LARGE).await;
    assert!(started.elapsed() >= Duration::from_millis(600), "both were waited for");
    assert_eq!(world.count("create"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_65_an_outage_ends_with_the_video_kept_and_resumed() {
    let down = Arc::new(Mutex::new(true));
    let is_down = down.clone();
    let world =
        World::with(quick(), move |seen, _| match seen.operation == "put" && *is_down.lock().unwrap() {
            true => Fault::error(503, "ServiceUnavailable"),
            false => Fault::None,
        })
        .await;
    let mut kept = world.keep("job", 1000).await;
    let error = world.storage.publish(&mut kept).await.unwrap_err();
    assert_eq!((error.code, error.retryable), (Code::UploadFailed, true), "{error}");
    assert_eq!(world.count("put"), 12, "three rounds of four tries");
    assert_eq!(error.details["kept"], kept.dir().display().to_string());
    assert!(
        error.hint.as_ref().is_some_and(|hint| hint.contains("handler gc --resume-uploads")),
        "{error:?}"
    );
    assert_eq!(std::fs::read(kept.video()).unwrap(), bytes(1000));
    // Far more failures than the SDK's own quota of retries would have borne.
    for _ in 0..4 {
        assert!(world.storage.publish(&mut kept).await.is_err());
    }
    assert_eq!(world.count("put"), 60);
    *down.lock().unwrap() = false;
    let published = world.storage.publish(&mut kept).await.unwrap();
    assert_eq!(published.key, kept.place().key, "under the key that it was kept under");
    opens(&published.video_url, 1000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_65_a_store_that_names_a_time_is_given_it() {
    let wait = Fault::Answer(429, vec![("retry-after", "1".to_string())], String::new());
    let world = world_failing("put", 1, wait).await;
    let started = Instant::now();
    world.publish("job", 10).await;
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_66_a_refusal_is_not_tried_again() {
    for (status, code) in [
        (403, "AccessDenied"),
        (403, "SignatureDoesNotMatch"),
        (403, "InvalidAccessKeyId"),
        (400, "InvalidArgument"),
        (501, "NotImplemented"),
    ] {
        let world = world_failing("put", usize::MAX, Fault::error(status, code)).await;
        let mut kept = world.keep("job", 10).await;
        let error = world.storage.publish(&mut kept).await.unwrap_err();
        assert_eq!((error.code, error.retryable), (Code::UploadFailed, false), "{error}");
        assert_eq!((&error.details["status"], &error.details["store_code"]), (&status.into(), &code.into()));
        assert_eq!(world.count("put"), 1, "{code}");
        assert!(kept.video().is_file());
    }
}

/// The store's clock is 20 minutes ahead of ours, and all that we sign and name follows it.
#[tokio::test(flavor = "multi_thread")]
async fn fault_66_a_wrong_clock_is_corrected() {
    let ahead = time::Duration::minutes(20);
    let there = OffsetDateTime::now_utc() + ahead;
    let date = there.format(&Rfc2822).unwrap().replace("+0000", "GMT");
    let tag = format!("\"{}\"", hex::encode(Md5::digest(bytes(10))));
    let world = World::with(quick(), move |seen, _| {
        let date = ("date", date.clone());
        let signed = seen.headers.get("x-amz-date").cloned().unwrap_or_default();
        match seen.operation {
            // Before the first answer we cannot know better.
            "bucket" => Fault::Answer(403, vec![date], String::new()),
            "put" if !is_near(&signed, there) => match Fault::error(403, "RequestTimeTooSkewed") {
                Fault::Answer(status, _, body) => Fault::Answer(status, vec![date], body),
                fault => fault,
            },
            "put" if seen.path.ends_with(".mp4") => {
                Fault::Answer(200, vec![date, ("etag", tag.clone())], String::new())
            }
            _ => Fault::Answer(200, vec![date], String::new()),
        }
    })
    .await;
    let published = world.publish("job", 10).await;
    let due: i64 = published.key.split_once("e=").unwrap().1[..10].parse().unwrap();
    let expected = (there + time::Duration::hours(6) + time::Duration::minutes(15)).unix_timestamp();
    assert!((due - expected).abs() < 60, "the key goes by the store's clock: {due}, {expected}");
    let signed = published.video_url.split("X-Amz-Date=").nth(1).unwrap();
    assert!(is_near(&signed[..16], there), "the link is signed at {}, not at {there}", &signed[..16]);
}

/// Whether the time of a signature is `there`, give or take what a test takes.
fn is_near(signed: &str, there: OffsetDateTime) -> bool {
    let format = time::format_description::parse_borrowed::<2>("[year][month][day]T[hour][minute][second]Z");
    let signed = time::PrimitiveDateTime::parse(signed, &format.unwrap()).unwrap().assume_utc();
    (signed - there).abs() < time::Duration::minutes(5)
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_67_an_error_with_status_200_is_an_error() {
    let world = world_failing("complete", 1, Fault::error(200, "InternalError")).await;
    opens(&world.publish("job", LARGE).await.video_url, LARGE).await;
    assert_eq!(world.count("complete"), 2);
    // One that stays leaves no object, no parts, and the video where it was.
    let world = world_failing("complete", usize::MAX, Fault::error(200, "InternalError")).await;
    let mut kept = world.keep("job", LARGE).await;
    let error = world.storage.publish(&mut kept).await.unwrap_err();
    assert_eq!((error.code, error.retryable), (Code::UploadFailed, true), "{error}");
    assert_eq!(world.count("abort"), 1);
    assert_eq!(world.keys().await, Vec::<String>::new());
    assert_eq!(world.dir.path().join("objects/uploads").read_dir().unwrap().count(), 0, "no part is left");
}

/// The store has the object, and we do not know.
#[tokio::test(flavor = "multi_thread")]
async fn fault_68_a_lost_reply_makes_no_second_object() {
    for (operation, len) in [("put", 1000), ("complete", LARGE)] {
        let world = world_failing(operation, 1, Fault::LoseReply).await;
        let published = world.publish("job", len).await;
        opens(&published.video_url, len).await;
        assert!(world.count("head") >= 1, "{operation}: it was looked for");
        assert_eq!(world.keys().await.len(), 2, "{operation}: one video and one manifest");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_68_a_reply_that_is_always_lost_is_still_found() {
    let world = world_failing("put", usize::MAX, Fault::LoseReply).await;
    opens(&world.publish("job", 1000).await.video_url, 1000).await;
}

/// R2 forgets the part that is being replaced, so the object must not be completed before each part is there.
#[tokio::test(flavor = "multi_thread")]
async fn fault_69_a_part_is_there_before_the_upload_is_completed() {
    for fault in [Fault::Cut, Fault::LoseReply, Fault::error(500, "InternalError")] {
        let world = world_failing("part", 3, fault).await;
        opens(&world.publish("job", LARGE).await.video_url, LARGE).await;
        let seen = world.seen.lock().unwrap();
        let last_part = seen.iter().rposition(|seen| seen.operation == "part").unwrap();
        let complete = seen.iter().position(|seen| seen.operation == "complete").unwrap();
        assert!(last_part < complete);
        let lens: HashMap<String, usize> =
            (seen.iter().filter(|seen| seen.operation == "part")).fold(HashMap::new(), |mut lens, seen| {
                *lens.entry(seen.headers["content-length"].clone()).or_default() += 1;
                lens
            });
        assert_eq!(lens.len(), 2, "all parts but the last have one length: {lens:?}");
    }
    let world = world_failing("part", usize::MAX, Fault::Cut).await;
    let mut kept = world.keep("job", LARGE).await;
    assert_eq!(world.storage.publish(&mut kept).await.unwrap_err().code, Code::UploadFailed);
    assert_eq!((world.count("complete"), world.count("abort")), (0, 1));
}

/// A store that holds other bytes than were sent has not taken the upload.
#[tokio::test(flavor = "multi_thread")]
async fn another_etag_is_no_success() {
    let tag = format!("\"{}\"", "0".repeat(32));
    let wrong = Fault::Answer(200, vec![("etag", tag)], String::new());
    let world = world_failing("put", 1, wrong.clone()).await;
    opens(&world.publish("job", 1000).await.video_url, 1000).await;
    let world = world_failing("put", usize::MAX, wrong).await;
    let mut kept = world.keep("job", 1000).await;
    let error = world.storage.publish(&mut kept).await.unwrap_err();
    assert!(error.code == Code::UploadFailed && error.message.contains("ETag"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_piece_carries_its_digest() {
    let world = World::new().await;
    world.publish("small", 1000).await;
    world.publish("large", LARGE).await;
    let seen = world.seen.lock().unwrap();
    for sent in seen.iter().filter(|seen| matches!(seen.operation, "put" | "part")) {
        assert_eq!(sent.headers["content-md5"].len(), 24, "{sent:?}");
        assert!(!sent.headers.contains_key("transfer-encoding"), "R2 wants a length");
        assert!(
            sent.headers.keys().all(|name| !name.contains("checksum") && !name.contains("trailer")),
            "{sent:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_71_a_bucket_that_is_gone_is_said_so() {
    for (status, code) in [(404, "NoSuchBucket"), (403, "InvalidAccessKeyId")] {
        let world = World::with(quick(), move |_, _| Fault::error(status, code)).await;
        let error = world.storage.check().await.unwrap_err();
        assert!(!error.retryable && error.details["status"] == status, "{error:?}");
        let mut kept = world.keep("job", 10).await;
        let error = world.storage.publish(&mut kept).await.unwrap_err();
        assert!(error.message.contains("talkie-videos") && error.details["store_code"] == code, "{error:?}");
        assert!(kept.video().is_file(), "the result is kept");
    }
}

/// Dropping the upload is how a job is cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_upload_is_aborted() {
    let world = world_failing("part", usize::MAX, Fault::Hang).await;
    let mut kept = world.keep("job", LARGE).await;
    tokio::select! {
        _ = world.storage.publish(&mut kept) => panic!("the parts hang"),
        _ = world.next("part") => {}
    }
    world.next("abort").await;
    assert!(kept.video().is_file());
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// At the most talkative level, client and store in one thread.
#[test]
fn fault_74_neither_keys_nor_signatures_are_logged() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (secrets, errors) = tracing::subscriber::with_default(subscriber, || {
        runtime.block_on(async {
            let world = world_failing("put", 6, Fault::error(500, "InternalError")).await;
            let published = world.publish("job", 10).await;
            opens(&published.video_url, 10).await;
            let expired = published.video_url.replace("X-Amz-Expires=21600", "X-Amz-Expires=1");
            assert_eq!(reqwest::get(&expired).await.unwrap().status(), StatusCode::FORBIDDEN);
            let failing = world_failing("put", usize::MAX, Fault::error(403, "AccessDenied")).await;
            let mut kept = failing.keep("job", 10).await;
            let error = failing.storage.publish(&mut kept).await.unwrap_err();
            let record = std::fs::read_to_string(kept.dir().join("publication.json")).unwrap();
            let signature = published.video_url.split("X-Amz-Signature=").nth(1).unwrap()[..64].to_string();
            let secret = |world: &World| world.settings.credentials.secret_access_key.expose().to_string();
            let secrets = [signature, secret(&world), secret(&failing)];
            let shown = format!("{error:?} {} {record} {:?}", serde_json::json!(error), world.storage);
            (secrets, shown)
        })
    });
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("it is tried again"), "the log is heard: {logged}");
    for secret in secrets {
        assert!(!logged.contains(&secret), "logged: {secret}");
        assert!(!errors.contains(&secret), "shown: {secret}");
    }
    for word in ["AWS4-HMAC-SHA256", "X-Amz-Credential"] {
        assert!(!logged.contains(word) && !errors.contains(word), "{word}");
    }
}
