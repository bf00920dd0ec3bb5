//! What the embedded store refuses.

use std::io::{Read, Write};
use std::net::TcpStream;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, ObjectCannedAcl, Tag, Tagging};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use handler::storage::embedded::BUCKET;

use super::world::{PART, World, bytes};

/// The status and the code of a refusal.
fn refusal<T: std::fmt::Debug, E: ProvideErrorMetadata>(
    result: Result<T, SdkError<E, HttpResponse>>,
) -> (u16, String) {
    let error = match result {
        Ok(done) => panic!("expected a refusal: {done:?}"),
        Err(error) => error,
    };
    let status = error.raw_response().expect("the store answers").status().as_u16();
    (status, error.code().unwrap_or_default().to_string())
}

fn is(status: u16, code: &str) -> (u16, String) {
    (status, code.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_written_once_a_second() {
    let world = World::new().await;
    let put = || world.raw().put_object().bucket(BUCKET).key("a").body(ByteStream::from_static(b"x")).send();
    put().await.unwrap();
    assert_eq!(refusal(put().await), is(429, "TooManyRequests"));
    world
        .raw()
        .put_object()
        .bucket(BUCKET)
        .key("b")
        .body(ByteStream::from_static(b"x"))
        .send()
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_69_unequal_parts_are_refused() {
    let world = World::new().await;
    let raw = world.raw();
    for (lens, expected) in [
        (vec![PART, PART + 1, 10], Some(is(400, "InvalidPart"))),
        (vec![PART, PART + 1], Some(is(400, "InvalidPart"))),
        (vec![PART - 1, 10], Some(is(400, "EntityTooSmall"))),
        (vec![PART, PART, 10], None),
    ] {
        let key = format!("parts-{}", lens.iter().sum::<u64>());
        let created = raw.create_multipart_upload().bucket(BUCKET).key(&key).send().await.unwrap();
        let id = created.upload_id().unwrap();
        let mut parts = Vec::new();
        for (number, len) in (1..).zip(&lens) {
            let body = ByteStream::from(bytes(*len as usize));
            let call =
                raw.upload_part().bucket(BUCKET).key(&key).upload_id(id).part_number(number).body(body);
            let tag = call.send().await.unwrap().e_tag;
            parts.push(CompletedPart::builder().part_number(number).set_e_tag(tag).build());
        }
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let call =
            raw.complete_multipart_upload().bucket(BUCKET).key(&key).upload_id(id).multipart_upload(parts);
        let done = call.send().await;
        match expected {
            Some(expected) => assert_eq!(refusal(done), expected, "{lens:?}"),
            None => assert!(done.unwrap().e_tag().unwrap().ends_with("-3\"")),
        }
    }
    assert_eq!(world.keys().await.len(), 1, "what is refused leaves no object");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_held_to_their_id_order_and_parts() {
    let world = World::new().await;
    let raw = world.raw();
    let created = raw.create_multipart_upload().bucket(BUCKET).key("a").send().await.unwrap();
    let id = created.upload_id().unwrap().to_string();
    let part = |key: &str, id: &str, number: i32| {
        let call = raw.upload_part().bucket(BUCKET).key(key).upload_id(id).part_number(number);
        call.body(ByteStream::from_static(b"x")).send()
    };
    assert_eq!(refusal(part("a", "../../data", 1).await), is(404, "NoSuchUpload"));
    assert_eq!(refusal(part("b", &id, 1).await), is(404, "NoSuchUpload"));
    assert_eq!(refusal(part("a", &id, 10_001).await), is(400, "InvalidArgument"));
    let tag = part("a", &id, 1).await.unwrap().e_tag.unwrap();
    // A key is completed at most once a second, so each try is of an upload of its own.
    for (key, parts, expected) in [
        ("a", vec![(1, "\"0\"".to_string())], is(400, "InvalidPart")),
        ("c", vec![], is(400, "MalformedXML")),
        ("d", vec![(2, tag.clone()), (1, tag.clone())], is(400, "InvalidPart")),
        ("e", vec![(1, tag.clone())], is(404, "NoSuchUpload")),
    ] {
        let own = match key {
            "a" | "e" => id.clone(),
            _ => {
                raw.create_multipart_upload().bucket(BUCKET).key(key).send().await.unwrap().upload_id.unwrap()
            }
        };
        let parts = parts
            .into_iter()
            .map(|(number, tag)| CompletedPart::builder().part_number(number).e_tag(tag).build());
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.collect())).build();
        let call =
            raw.complete_multipart_upload().bucket(BUCKET).key(key).upload_id(own).multipart_upload(parts);
        assert_eq!(refusal(call.send().await), expected, "{key}");
    }
    raw.abort_multipart_upload().bucket(BUCKET).key("a").upload_id(&id).send().await.unwrap();
    let again = raw.abort_multipart_upload().bucket(BUCKET).key("a").upload_id(&id).send().await;
    assert_eq!(refusal(again), is(404, "NoSuchUpload"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_kept_is_refused() {
    let world = World::new().await;
    let raw = world.raw();
    let put = |key: &str| raw.put_object().bucket(BUCKET).key(key).body(ByteStream::from_static(b"x"));
    let not_implemented = is(501, "NotImplemented");
    assert_eq!(refusal(put("a").tagging("a=b").send().await), not_implemented);
    assert_eq!(refusal(put("a").acl(ObjectCannedAcl::PublicRead).send().await), not_implemented);
    assert_eq!(refusal(put("a").metadata("a", "b").send().await), not_implemented);
    assert_eq!(refusal(put("a").if_none_match("*").send().await), not_implemented);
    assert_eq!(refusal(put("a").content_encoding("gzip").send().await), not_implemented);
    let tags =
        Tagging::builder().tag_set(Tag::builder().key("k").value("v").build().unwrap()).build().unwrap();
    assert_eq!(
        refusal(raw.put_object_tagging().bucket(BUCKET).key("a").tagging(tags).send().await),
        not_implemented
    );
    assert_eq!(refusal(raw.list_buckets().send().await).0, 404, "only the bucket is served");
    assert_eq!(refusal(raw.create_bucket().bucket("other").send().await).0, 404);
    assert_eq!(refusal(raw.delete_bucket().bucket(BUCKET).send().await), not_implemented);
    assert_eq!(
        refusal(raw.copy_object().bucket(BUCKET).key("b").copy_source("talkie-videos/a").send().await),
        not_implemented
    );
    let elsewhere = raw.put_object().bucket("other").key("a").body(ByteStream::from_static(b"x"));
    assert_eq!(refusal(elsewhere.send().await).0, 404);
    assert_eq!(refusal(raw.get_object().bucket(BUCKET).key("none").send().await), is(404, "NoSuchKey"));
    assert_eq!(refusal(put("a").content_md5("AAAAAAAAAAAAAAAAAAAAAA==").send().await), is(400, "BadDigest"));
    assert_eq!(world.keys().await, Vec::<String>::new());
}

/// A store over files must not be left by a key.
#[tokio::test(flavor = "multi_thread")]
async fn keys_do_not_climb_out() {
    let world = World::new().await;
    let too_long = "x".repeat(1025);
    let long_name = "x".repeat(254);
    for key in [
        "../../x",
        "a/../../../x",
        "a/./b",
        "..",
        "a//b",
        "/a",
        "a/",
        "a\u{0}b",
        "a\nb",
        &too_long,
        &long_name,
    ] {
        let put =
            world.raw().put_object().bucket(BUCKET).key(key).body(ByteStream::from_static(b"x")).send().await;
        let (status, code) = refusal(put);
        assert_eq!(status, 400, "{key:?}: {code}");
    }
    // A key is no path: none of these is in the way of another.
    for key in ["a", "a/b", "a/b/c", "d-a", "f-a", ".hidden", "ä ö+%"] {
        let put = world.raw().put_object().bucket(BUCKET).key(key);
        put.body(ByteStream::from_static(b"x")).send().await.unwrap_or_else(|e| panic!("{key}: {e:?}"));
    }
    let mut keys = world.keys().await;
    keys.sort();
    assert_eq!(keys, [".hidden", "a", "a/b", "a/b/c", "d-a", "f-a", "ä ö+%"]);
    for key in &keys {
        world.raw().delete_object().bucket(BUCKET).key(key).send().await.unwrap();
    }
    assert_eq!(
        std::fs::read_dir(world.dir.path().join("objects/data")).unwrap().count(),
        0,
        "no folder is left"
    );
    assert!(!world.dir.path().parent().unwrap().join("x").is_file());
}

/// Chunked bodies have no length.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_a_length_is_refused() {
    let world = World::new().await;
    let config = PresigningConfig::expires_in(std::time::Duration::from_secs(60)).unwrap();
    let link = world.raw().put_object().bucket(BUCKET).key("a").presigned(config).await.unwrap();
    let url = reqwest::Url::parse(link.uri()).unwrap();
    let (host, port) = (url.host_str().unwrap().to_string(), url.port().unwrap());
    let head = format!(
        "PUT {}?{} HTTP/1.1\r\nHost: {host}:{port}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        url.path(),
        url.query().unwrap()
    );
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect((host, port)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 411 "), "{answer}");
    assert!(answer.contains("<Code>MissingContentLength</Code>"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_last_a_week_at_most_and_other_keys_open_nothing() {
    let world = World::new().await;
    let published = world.publish("job", 10).await;
    let longer = published.video_url.replace("X-Amz-Expires=21600", "X-Amz-Expires=604801");
    let response = reqwest::get(longer).await.unwrap();
    assert_eq!(response.status(), 400);
    assert!(response.text().await.unwrap().contains("AuthorizationQueryParametersError"));
    let mut settings = world.settings.clone();
    settings.credentials.secret_access_key = handler::gateway::config::Secret::new("another".to_string());
    let got = super::world::raw(&settings).get_object().bucket(BUCKET).key(&published.key).send().await;
    assert_eq!(refusal(got), is(403, "SignatureDoesNotMatch"));
    settings.credentials.access_key_id = "another".to_string();
    let got = super::world::raw(&settings).get_object().bucket(BUCKET).key(&published.key).send().await;
    assert_eq!(refusal(got).0, 403);
}

/// A page of another origin may play a link, and only that.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_any_origin_may_read() {
    let world = World::new().await;
    let published = world.publish("job", 10).await;
    let client = reqwest::Client::new();
    let got = client
        .get(&published.video_url)
        .header("origin", "https://page.example")
        .header("range", "bytes=0-1");
    let got = got.send().await.unwrap();
    assert_eq!(
        (got.status().as_u16(), &got.headers()["access-control-allow-origin"]),
        (206, &"*".parse().unwrap())
    );
    let exposed = got.headers()["access-control-expose-headers"].to_str().unwrap().to_lowercase();
    assert!(exposed.contains("content-range"), "{exposed}");
    let asked = client
        .request(reqwest::Method::OPTIONS, &published.video_url)
        .header("origin", "https://page.example")
        .header("access-control-request-method", "PUT");
    let asked = asked.send().await.unwrap();
    let allowed = asked.headers()["access-control-allow-methods"].to_str().unwrap();
    assert!(!allowed.contains("PUT") && allowed.contains("GET"), "{allowed}");
}
