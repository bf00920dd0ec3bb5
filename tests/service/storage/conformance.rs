//! What any store has to do. With `TALKIE_S3_TEST=1` and `R2_…` (or another store's variables) set, the same
//! tests run against that store.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::presigning::PresigningConfig;
use handler::storage::{Publication, Published, Storage, StorageSettings, Tuning};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::world::{PART, World, bytes, keep, quick, raw, real_store};

/// A store, and a folder for videos.
struct Store {
    settings: StorageSettings,
    storage: Storage,
    dir: TempDir,
    embedded: bool,
    _world: Option<World>,
}

impl Store {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        if let Some(settings) = real_store() {
            // With the patience of production, but for what makes a file large.
            let Tuning { put_limit, part_size, .. } = quick();
            let tuning = Tuning { put_limit, part_size, ..Tuning::default() };
            let storage = Storage::with_tuning(settings.clone(), tuning);
            return Self { settings, storage, dir, embedded: false, _world: None };
        }
        let world = World::new().await;
        let (settings, storage) = (world.settings.clone(), world.storage.clone());
        Self { settings, storage, dir, embedded: true, _world: Some(world) }
    }

    async fn publish(&self, job: &str, len: usize) -> Published {
        let publication = Publication { manifest: json!({"seed": 7}), ..Default::default() };
        let mut kept = keep(&self.storage, self.dir.path(), job, len, &publication).await;
        let published = self.storage.publish(&mut kept).await.unwrap();
        kept.done();
        published
    }

    fn raw(&self) -> Client {
        raw(&self.settings)
    }

    async fn remove(&self, published: &Published) {
        for end in [".mp4", ".json", ".jpg"] {
            let key = published.key.replace(".mp4", end);
            self.raw().delete_object().bucket(&self.settings.bucket).key(key).send().await.unwrap();
        }
    }

    /// A link that was signed at `start`.
    async fn link_from(&self, key: &str, start: SystemTime, life: Duration) -> String {
        let config = PresigningConfig::builder().start_time(start).expires_in(life).build().unwrap();
        let call = self.raw().get_object().bucket(&self.settings.bucket).key(key);
        call.presigned(config).await.unwrap().uri().to_string()
    }
}

/// `url` with the last digit of its signature changed.
fn with_another_signature(url: &str) -> String {
    let (before, rest) = url.split_once("X-Amz-Signature=").unwrap();
    let (signature, after) = rest.split_at(64);
    let last = if signature.ends_with('0') { '1' } else { '0' };
    format!("{before}X-Amz-Signature={}{last}{after}", &signature[..63])
}

async fn ask(method: Method, url: &str, range: Option<&str>) -> reqwest::Response {
    let request = reqwest::Client::new().request(method, url);
    let request = match range {
        Some(range) => request.header("range", range),
        None => request,
    };
    request.send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_video_is_published_with_all_that_belongs_to_it() {
    let store = Store::new().await;
    let publication = Publication {
        thumbnail: Some(b"\xff\xd8jpeg"),
        manifest: json!({"seed": 7}),
        key_prefix: None,
        expires: None,
    };
    let mut kept = keep(&store.storage, store.dir.path(), "job-1-u1", 100_000, &publication).await;
    let published = store.storage.publish(&mut kept).await.unwrap();
    assert!(kept.video().is_file(), "only `done` removes the video");
    let dir = kept.dir().to_path_buf();
    kept.done();
    assert!(!dir.exists());

    let response = ask(Method::GET, &published.video_url, None).await;
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_string();
    assert_eq!((response.status(), header("content-type").as_str()), (StatusCode::OK, "video/mp4"));
    let name = published.key.rsplit('/').next().unwrap();
    assert_eq!(header("content-disposition"), format!("inline; filename=\"{name}\""));
    assert_eq!((header("accept-ranges").as_str(), header("content-length").as_str()), ("bytes", "100000"));
    if store.embedded {
        assert_eq!(header("referrer-policy"), "no-referrer");
    }
    assert_eq!(response.bytes().await.unwrap(), bytes(100_000));

    let thumbnail = ask(Method::GET, published.thumbnail_url.as_ref().unwrap(), None).await;
    assert_eq!(thumbnail.headers()["content-type"], "image/jpeg");
    assert_eq!(&thumbnail.bytes().await.unwrap()[..], b"\xff\xd8jpeg");
    let manifest = ask(Method::GET, &published.manifest_url, None).await;
    assert_eq!(manifest.headers()["content-type"], "application/json");
    let manifest: Value = serde_json::from_slice(&manifest.bytes().await.unwrap()).unwrap();
    assert_eq!((&manifest["seed"], &manifest["objects"]["video"]), (&json!(7), &json!(published.key)));
    assert_eq!(manifest["objects"]["thumbnail"], json!(published.key.replace(".mp4", ".jpg")));

    let ends = OffsetDateTime::parse(&published.expires_at, &Rfc3339).unwrap();
    let life = ends - OffsetDateTime::now_utc();
    let six_hours = time::Duration::hours(6);
    assert!(
        life > six_hours - time::Duration::minutes(2) && life <= six_hours + time::Duration::minutes(2),
        "{life}"
    );
    let due: i64 = published.key.split_once("e=").unwrap().1[..10].parse().unwrap();
    let after = due - ends.unix_timestamp();
    assert!((10 * 60..=15 * 60).contains(&after), "the object goes {after} s after its link");
    store.remove(&published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_video_goes_in_equal_parts() {
    let store = Store::new().await;
    let len = 2 * PART as usize + 12_345;
    let published = store.publish("large", len).await;
    let head =
        store.raw().head_object().bucket(&store.settings.bucket).key(&published.key).send().await.unwrap();
    let etag = head.e_tag().unwrap().trim_matches('"').to_string();
    assert!(etag.ends_with("-3"), "{etag}");
    assert_eq!(head.content_type(), Some("video/mp4"));
    let response = ask(Method::GET, &published.video_url, None).await;
    assert!(response.bytes().await.unwrap() == bytes(len), "the video comes back in its order");
    store.remove(&published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_gives_ranges() {
    let store = Store::new().await;
    let published = store.publish("ranges", 1000).await;
    for (range, shown, expected) in [
        ("bytes=10-19", "bytes 10-19/1000", 10..20),
        ("bytes=0-", "bytes 0-999/1000", 0..1000),
        ("bytes=990-2000", "bytes 990-999/1000", 990..1000),
        ("bytes=-5", "bytes 995-999/1000", 995..1000),
    ] {
        let response = ask(Method::GET, &published.video_url, Some(range)).await;
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        assert_eq!(response.headers()["content-range"], shown);
        assert_eq!(response.bytes().await.unwrap(), bytes(1000)[expected], "{range}");
    }
    let beyond = ask(Method::GET, &published.video_url, Some("bytes=1000-")).await;
    assert_eq!(beyond.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    store.remove(&published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_72_a_link_opens_one_object_for_reading_and_for_a_time() {
    let store = Store::new().await;
    let published = store.publish("locked", 1000).await;
    let other = store.publish("other", 10).await;
    let url = &published.video_url;
    for method in [Method::HEAD, Method::PUT, Method::DELETE, Method::POST] {
        let status = ask(method.clone(), url, None).await.status();
        assert!(matches!(status.as_u16(), 400 | 403 | 405), "{method}: {status}");
    }
    let name = |key: &str| key.rsplit('/').next().unwrap().to_string();
    let bare = url.split('?').next().unwrap().to_string();
    let life = url.split("X-Amz-Expires=").nth(1).unwrap().split('&').next().unwrap();
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    for (what, link) in [
        ("another key", url.replacen(&name(&published.key), &name(&other.key), 1)),
        ("another signature", with_another_signature(url)),
        ("a longer life", url.replace(&format!("X-Amz-Expires={life}"), "X-Amz-Expires=99999")),
        ("another file name", url.replace("inline", "attachment")),
        ("no signature", bare),
        ("expired", store.link_from(&published.key, now - hour, hour - Duration::from_secs(5)).await),
        ("from the future", store.link_from(&published.key, now + Duration::from_secs(1200), hour).await),
    ] {
        let status = ask(Method::GET, &link, None).await.status();
        assert!(matches!(status.as_u16(), 400 | 401 | 403), "{what}: {status}");
    }
    assert_eq!(ask(Method::GET, url, None).await.status(), StatusCode::OK, "nothing of this did harm");
    if store.embedded {
        let expired = store.link_from(&published.key, now - hour, hour - Duration::from_secs(5)).await;
        let response = ask(Method::GET, &expired, None).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(response.text().await.unwrap().contains("<Code>ExpiredRequest</Code>"));
    }
    store.remove(&published).await;
    store.remove(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_in_order_and_deleted_for_good() {
    let store = Store::new().await;
    let (raw, bucket) = (store.raw(), &store.settings.bucket);
    let prefix = format!("suite-{}/", std::process::id());
    let keys: Vec<String> = ["a", "b/c", "b/d", "e"].iter().map(|name| format!("{prefix}{name}")).collect();
    for key in &keys {
        let body = aws_sdk_s3::primitives::ByteStream::from_static(b"x");
        raw.put_object().bucket(bucket).key(key).body(body).send().await.unwrap();
    }
    let (mut listed, mut token, mut pages) = (Vec::new(), None, 0);
    loop {
        let call = raw.list_objects_v2().bucket(bucket).prefix(&prefix).max_keys(3);
        let page = call.set_continuation_token(token).send().await.unwrap();
        listed.extend(page.contents().iter().map(|object| object.key().unwrap().to_string()));
        pages += 1;
        token = page.next_continuation_token().map(str::to_string);
        if token.is_none() {
            break;
        }
    }
    assert_eq!((&listed, pages), (&keys, 2));
    let grouped = raw.list_objects_v2().bucket(bucket).prefix(&prefix).delimiter("/").send().await.unwrap();
    let groups: Vec<_> = grouped.common_prefixes().iter().map(|group| group.prefix().unwrap()).collect();
    assert_eq!((groups, grouped.contents().len()), (vec![format!("{prefix}b/").as_str()], 2));
    for key in &keys {
        raw.delete_object().bucket(bucket).key(key).send().await.unwrap();
        raw.delete_object().bucket(bucket).key(key).send().await.expect("that it is gone is no error");
    }
    let left = raw.list_objects_v2().bucket(bucket).prefix(&prefix).send().await.unwrap();
    assert_eq!(left.contents().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_names_its_prefix_and_shortens_its_links() {
    let store = Store::new().await;
    let publication = Publication {
        manifest: json!({}),
        key_prefix: Some("clients/a-1"),
        expires: Some(Duration::from_secs(90)),
        ..Default::default()
    };
    let mut kept = keep(&store.storage, store.dir.path(), "own", 10, &publication).await;
    let published = store.storage.publish(&mut kept).await.unwrap();
    assert!(published.key.starts_with("clients/a-1/e="), "{}", published.key);
    assert!(published.video_url.contains("X-Amz-Expires=90&"), "the link lasts as asked");
    assert_eq!(ask(Method::GET, &published.video_url, None).await.status(), StatusCode::OK);
    let long = Publication { expires: Some(Duration::from_secs(604_800)), ..Default::default() };
    let mut kept = keep(&store.storage, store.dir.path(), "long", 10, &long).await;
    let capped = store.storage.publish(&mut kept).await.unwrap();
    assert!(capped.video_url.contains("X-Amz-Expires=21600&"), "no link outlives its object");
    store.remove(&published).await;
    store.remove(&capped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bucket_can_be_checked() {
    Store::new().await.storage.check().await.unwrap();
}
