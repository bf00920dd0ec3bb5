//! The bad inputs of JSON and HTTP, by their numbers: each has its answer, and leaves nothing behind.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::rig::{Rig, header, refused, request};
use crate::media;

const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

/// Sends this body to `/run` and checks that it is refused; the error.
#[track_caller]
fn refuse(rig: &Rig, body: &[u8], status: u16, code: &str) -> Value {
    let error = refused(&rig.send("POST", "/run", &JSON, body), status, code);
    assert_eq!(rig.get("/health").json()["jobs"]["inQueue"], 0, "nothing is kept");
    error
}

/// The same for an input with these fields instead of sound ones.
#[track_caller]
fn refuse_input(rig: &Rig, fields: Value, status: u16, code: &str) -> Value {
    let mut request = request();
    for (name, value) in fields.as_object().unwrap() {
        request["input"][name] = value.clone();
    }
    refuse(rig, request.to_string().as_bytes(), status, code)
}

#[test]
fn case_54_no_object_with_an_input() {
    let rig = Rig::start();
    for (body, code, reason) in [
        ("", "INVALID_INPUT", Some("INVALID_JSON")),
        ("null", "INVALID_INPUT", Some("INVALID_JSON")),
        ("[]", "INVALID_INPUT", Some("INVALID_JSON")),
        ("\"x\"", "INVALID_INPUT", Some("INVALID_JSON")),
        ("{}", "MISSING_FIELD", None),
    ] {
        let error = refuse(&rig, body.as_bytes(), 400, code);
        assert_eq!(error["details"]["reason"].as_str(), reason, "{body}");
    }
}

#[test]
fn case_55_an_input_that_is_no_object() {
    let rig = Rig::start();
    for body in [r#"{"input":null}"#, r#"{"input":"x"}"#, r#"{"input":[1]}"#, r#"{"input":1}"#] {
        let error = refuse(&rig, body.as_bytes(), 400, "INVALID_INPUT");
        assert_eq!(error["details"]["reason"], "INVALID_FIELD", "{body}");
    }
}

#[test]
fn case_56_no_json() {
    let rig = Rig::start();
    let bodies: [&[u8]; 7] = [
        br#"{"input":{"#,
        br#"{"input":{},}"#,
        br#"{"input":{}}{"input":{}}"#,
        b"\xef\xbb\xbf{\"input\":{}}",
        b"{\"input\":{\"prompt\":\"a\0b\"}}",
        b"{\"input\":{\"prompt\":\"\xff\xfe\"}}",
        b"\0",
    ];
    for body in bodies {
        assert_eq!(refuse(&rig, body, 400, "INVALID_INPUT")["details"]["reason"], "INVALID_JSON");
    }
}

#[test]
fn case_57_deep_nesting() {
    let rig = Rig::start();
    for body in ["[".repeat(100_000), format!("{{\"input\":{}1{}}}", "[".repeat(1000), "]".repeat(1000))] {
        assert_eq!(refuse(&rig, body.as_bytes(), 400, "INVALID_INPUT")["details"]["reason"], "INVALID_JSON");
    }
}

#[test]
fn case_58_a_name_twice() {
    let rig = Rig::start();
    for body in [r#"{"input":{"seed":1},"input":{"seed":2}}"#, r#"{"input":{"seed":1,"seed":1}}"#] {
        assert_eq!(
            refuse(&rig, body.as_bytes(), 400, "INVALID_INPUT")["details"]["reason"],
            "DUPLICATE_FIELD"
        );
    }
}

#[test]
fn case_59_numbers_out_of_this_world() {
    let rig = Rig::start();
    for number in ["1e999", "NaN", "-0", "18446744073709551616", "1.0", "1e2", "0.5", "-2"] {
        let body = format!(
            r#"{{"input":{{"image":"https://example.com/a","audio":"https://example.com/b","steps":{number}}}}}"#
        );
        refuse(&rig, body.as_bytes(), 400, "INVALID_INPUT");
    }
}

#[test]
fn case_60_texts() {
    let rig = Rig::start();
    refuse(&rig, br#"{"input":{"prompt":"\ud800"}}"#, 400, "INVALID_INPUT");
    let error = refuse_input(&rig, json!({"prompt": "a".repeat(1 << 20)}), 400, "INVALID_INPUT");
    assert_eq!(error["details"]["reason"], "PROMPT_TOO_LONG");
    refuse_input(&rig, json!({"prompt": "🙂".repeat(20_000)}), 400, "INVALID_INPUT");
    for prompt in ["\u{202e}right to left\u{200b}", &"🙂".repeat(10_000)] {
        let mut request = request();
        request["input"]["prompt"] = prompt.into();
        rig.run(&request);
        assert_eq!(rig.take().1["input"]["prompt"], prompt);
    }
}

#[test]
fn case_61_unknown_fields() {
    let rig = Rig::start();
    let error = refuse_input(&rig, json!({"promt": "x"}), 400, "UNKNOWN_FIELD");
    assert!(error["hint"].as_str().unwrap().contains("`prompt`"), "{error}");
    refuse_input(&rig, json!({"image_path": "/etc/passwd"}), 400, "INVALID_INPUT");
}

#[test]
fn case_62_values_out_of_range() {
    let rig = Rig::start();
    for fields in [
        json!({"seed": 4_294_967_296u64}),
        json!({"seed": "1"}),
        json!({"seed": -2}),
        json!({"steps": 0}),
        json!({"steps": 1_000_000}),
        json!({"size": "4k"}),
        json!({"max_seconds": 0}),
        json!({"strict": "yes"}),
    ] {
        let error = refuse_input(&rig, fields.clone(), 400, "INVALID_INPUT");
        assert!(error["message"].as_str().unwrap().contains("expected"), "{fields}: {error}");
        assert_eq!(error["details"]["reason"], "INVALID_FIELD", "{fields}");
    }
    // −1 asks for a random seed.
    let mut request = request();
    request["input"]["seed"] = (-1).into();
    rig.run(&request);
}

#[test]
fn case_63_other_types_of_content() {
    let rig = Rig::start();
    let body = request().to_string();
    let form = "application/x-www-form-urlencoded";
    for kind in [None, Some("text/plain"), Some("application/json; charset=utf-16"), Some(form)] {
        let headers: Vec<_> = kind.iter().map(|kind| ("Content-Type", *kind)).collect();
        let reply = rig.send("POST", "/run", &headers, body.as_bytes());
        let error = refused(&reply, 415, "INVALID_INPUT");
        assert_eq!(error["details"]["reason"], "UNSUPPORTED_MEDIA_TYPE", "{kind:?}");
    }
    let headers = [("Content-Type", "application/json; charset=UTF-8")];
    assert_eq!(rig.send("POST", "/run", &headers, body.as_bytes()).status, 200);
}

#[test]
fn case_64_too_many_bytes() {
    let rig = Rig::start();
    for (path, megabytes) in [("/run", 11), ("/runsync", 21)] {
        let reply = rig.send("POST", path, &JSON, &vec![b' '; megabytes * 1_000_000]);
        assert_eq!(refused(&reply, 413, "INVALID_INPUT")["details"]["reason"], "BODY_TOO_LARGE");
        // Without a length the bytes themselves are counted.
        let chunked = [JSON[0], ("Transfer-Encoding", "chunked")];
        let piece = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{}: {}\r\n{}: {}\r\n\r\n",
            rig.addr(),
            chunked[0].0,
            chunked[0].1,
            chunked[1].0,
            chunked[1].1,
        );
        let (said, _) = rig.talk(&[head.as_bytes(), &piece.repeat(megabytes), b"0\r\n\r\n"].concat());
        assert!(said.starts_with("HTTP/1.1 413 "), "{said}");
    }
    // Who asks first is told before sending anything.
    let head = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\
                Expect: 100-continue\r\nConnection: close\r\n\r\n";
    let (said, _) = rig.talk(head.as_bytes());
    assert!(said.starts_with("HTTP/1.1 413 ") && said.contains("BODY_TOO_LARGE"), "{said}");
}

#[test]
fn case_65_lengths_that_contradict() {
    let rig = Rig::start();
    let head = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    for (lines, statuses) in [
        ("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", ["400", "400"]),
        ("Content-Length: x\r\n\r\n{}", ["400", "400"]),
        ("Content-Length: -1\r\n\r\n{}", ["400", "400"]),
        ("Transfer-Encoding: gzip\r\n\r\n{}", ["400", "400"]),
        ("X-Folded: a\r\n b\r\nContent-Length: 2\r\n\r\n{}", ["400", "400"]),
        // The chunks count, as RFC 9112 has it, and whatever follows them is not taken for a request.
        (
            "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n",
            ["400", "400"],
        ),
    ] {
        let (said, _) = rig.talk(format!("{head}{lines}").as_bytes());
        let status = said.split(' ').nth(1).unwrap_or_default();
        assert!(statuses.contains(&status), "{lines:?}: {said}");
        assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "the connection is closed: {said}");
    }
}

#[test]
fn case_66_compressed_bodies() {
    let rig = Rig::start();
    for coding in ["gzip", "br", "deflate, gzip"] {
        let headers = [JSON[0], ("Content-Encoding", coding)];
        let reply = rig.send("POST", "/run", &headers, b"\x1f\x8b\x08");
        assert_eq!(refused(&reply, 415, "INVALID_INPUT")["details"]["reason"], "UNSUPPORTED_MEDIA_TYPE");
    }
}

/// Forms are not read: no name in one can become a path.
#[test]
fn case_67_forms() {
    let rig = Rig::start();
    let name = format!("{}-x", rig.dir.path().file_name().unwrap().display());
    let part =
        format!("--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"../../{name}\"\r\n\r\na\r\n");
    for (kind, body) in
        [("multipart/form-data", part.to_string()), ("multipart/form-data; boundary=b", part.repeat(10_000))]
    {
        let reply = rig.send("POST", "/run", &[("Content-Type", kind)], body.as_bytes());
        assert_eq!(refused(&reply, 400, "INVALID_INPUT")["details"]["reason"], "FORM");
    }
    assert!(!rig.dir.path().parent().unwrap().join(name).exists());
}

#[test]
fn case_68_ids_that_are_none() {
    let rig = Rig::start();
    let other = rig.run(&request());
    let long = "a".repeat(10_000);
    let none = ["..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "%C3%BC", "a'--", "..", &long, "1234"];
    for path in none.iter().flat_map(|id| [format!("/status/{id}"), format!("/v2/talkie/status/{id}")]) {
        refused(&rig.get(&path), 404, "NOT_FOUND");
    }
    for method in ["stream", "events", "status-sync"] {
        refused(&rig.get(&format!("/{method}/1234?wait=1000")), 404, "NOT_FOUND");
    }
    for method in ["cancel", "retry"] {
        refused(&rig.post(&format!("/{method}/1234"), &json!({})), 404, "NOT_FOUND");
    }
    // One of another endpoint is the same as none, to the letter.
    let foreign = rig.get(&format!("/v2/other/status/{other}"));
    assert_eq!(foreign.body, rig.get("/v2/other/status/1234").body);
    refused(&rig.post(&format!("/v2/other/cancel/{other}"), &json!({})), 404, "NOT_FOUND");
    assert_eq!(rig.status(&other)["status"], "IN_QUEUE");
    for name in ["a%2fb", &long[..65], "%20"] {
        refused(&rig.get(&format!("/v2/{name}/health")), 404, "NOT_FOUND");
    }
}

#[test]
fn case_69_other_methods() {
    let rig = Rig::start();
    for (method, path, allowed) in [
        ("GET", "/run", "POST"),
        ("OPTIONS", "/run", "POST"),
        ("TRACE", "/run", "POST"),
        ("PUT", "/v2/any/runsync", "POST"),
        ("DELETE", "/status/1", "GET,HEAD,POST"),
        ("GET", "/cancel/1", "POST"),
        ("POST", "/health", "GET,HEAD"),
        ("OPTIONS", "/health", "GET,HEAD"),
        ("POST", "/", "GET,HEAD"),
        ("BREW", "/openapi.json", "GET,HEAD"),
    ] {
        let reply = rig.send(method, path, &[], b"");
        assert_eq!(reply.status, 405, "{method} {path}: {}", reply.head);
        assert_eq!(header(&reply, "allow"), Some(allowed), "{method} {path}");
        assert_eq!(reply.json()["error"]["details"]["reason"], "METHOD_NOT_ALLOWED");
    }
    let (refused_head, _) = rig.talk(b"HEAD /run HTTP/1.0\r\n\r\n");
    assert!(
        refused_head.starts_with("HTTP/1.0 405 ") && refused_head.contains("allow: POST\r\n"),
        "{refused_head}"
    );
    let (get, head) = (rig.get("/livez"), rig.talk(b"HEAD /livez HTTP/1.0\r\n\r\n").0);
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert!(head.ends_with("\r\n\r\n"), "no body: {head}");
    assert_eq!(get.json()["status"], "alive");
    assert_eq!(refused(&rig.get("/nothing"), 404, "NOT_FOUND")["details"]["reason"], "NO_ROUTE");
}

#[test]
fn case_70_keys_of_all_sorts() {
    let rig = Rig::with(|wishes| {
        let key = handler::gateway::config::Secret::new("the-key".to_string());
        wishes.config.api_key = Some(key);
    });
    let long = format!("Bearer {}", "k".repeat(10_000));
    let mut said = Vec::new();
    for headers in [
        &[][..],
        &[("Authorization", "Basic dGhlLWtleQ==")],
        &[("Authorization", "Bearer ")],
        &[("Authorization", "Bearer wrong")],
        &[("Authorization", "the-key-and-more")],
        &[("Authorization", &long)],
        &[("Authorization", "Bearer the-key"), ("Authorization", "Bearer the-key")],
        &[("X-API-Key", "the-key")],
    ] {
        let reply = rig.send("GET", "/health?api_key=the-key", headers, b"");
        refused(&reply, 401, "UNAUTHORIZED");
        assert_eq!(header(&reply, "www-authenticate"), Some("Bearer"));
        said.push(reply.body);
    }
    said.dedup();
    assert_eq!(said.len(), 1, "whatever is wrong, the answer is the same");
    for key in ["Bearer the-key", "the-key", "bearer the-key"] {
        assert_eq!(rig.send("GET", "/health", &[("Authorization", key)], b"").status, 200);
    }
    let huge = format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
        "k".repeat(100_000)
    );
    // What was sent and not read may cost the sender the answer.
    let (head, _) = rig.talk(huge.as_bytes());
    let refused = ["HTTP/1.1 401 ", "HTTP/1.1 431 "].iter().any(|line| head.starts_with(line));
    assert!(head.is_empty() || refused, "{head}");
}

#[test]
fn case_71_idempotency_keys() {
    let rig = Rig::start();
    let send = |key: &str, body: &Value| {
        let headers = [JSON[0], ("Idempotency-Key", key)];
        rig.send("POST", "/run", &headers, body.to_string().as_bytes())
    };
    for key in ["", " ", &"k".repeat(10_000), "\u{fc}"] {
        let error = refused(&send(key, &request()), 400, "INVALID_INPUT");
        assert_eq!(error["details"]["reason"], "IDEMPOTENCY_KEY");
    }
    let first = send("k", &request()).json();
    assert_eq!(send("k", &request()).json(), first);
    let mut other = request();
    other["input"]["seed"] = 7.into();
    refused(&send("k", &other), 409, "IDEMPOTENCY_CONFLICT");
    assert_eq!(rig.get("/health").json()["jobs"]["inQueue"], 1);
    // Another endpoint's jobs are not seen here, so its keys are others.
    let headers = [JSON[0], ("Idempotency-Key", "k")];
    let elsewhere = rig.send("POST", "/v2/other/run", &headers, other.to_string().as_bytes());
    assert_ne!(elsewhere.json()["id"], first["id"]);
    // A job that went on is shown as it is.
    rig.take();
    assert_eq!(send("k", &request()).json(), json!({"id": first["id"], "status": "IN_PROGRESS"}));
}

#[test]
fn case_72_policies_out_of_range() {
    let rig = Rig::start();
    for policy in [
        json!({"ttl": 9_000}),
        json!({"ttl": 691_200_000}),
        json!({"executionTimeout": 4_000}),
        json!({"executionTimeout": "5000"}),
        json!([]),
    ] {
        let mut request = request();
        request["policy"] = policy;
        let error = refuse(&rig, request.to_string().as_bytes(), 400, "INVALID_INPUT");
        assert!(error["message"].as_str().unwrap().starts_with("`policy"), "{error}");
    }
    let job = rig.run(&request());
    for ttl in ["9999", "604800001", "x", "-1", ""] {
        refused(&rig.get(&format!("/status/{job}?ttl={ttl}")), 400, "INVALID_INPUT");
    }
    assert_eq!(rig.get(&format!("/status/{job}?ttl=10000")).status, 200);
}

#[test]
fn case_73_webhooks_that_lead_inside() {
    let rig = Rig::start();
    for webhook in [
        json!("http://example.com/hook"),
        json!("https://10.0.0.1/hook"),
        json!("https://[::ffff:127.0.0.1]/"),
        json!("https://metadata.google.internal/"),
        json!(format!("https://example.com/{}", "x".repeat(5000))),
        json!("https://user:pw@example.com/"),
        json!("file:///etc/passwd"),
        json!(""),
        json!(["https://example.com/"]),
    ] {
        let mut request = request();
        request["webhook"] = webhook;
        let error = refuse(&rig, request.to_string().as_bytes(), 400, "INVALID_INPUT");
        assert_eq!(error["details"]["reason"], "WEBHOOK_NOT_ALLOWED");
    }
    let development = Rig::with(|wishes| wishes.config.service.allow_private_urls = true);
    let mut request = request();
    request["webhook"] = "http://127.0.0.1:3000/hook".into();
    development.run(&request);
}

#[test]
fn case_74_too_few_media_and_too_many() {
    let rig = Rig::start();
    let error =
        refuse_input(&rig, json!({"image_url": "https://example.com/other.png"}), 400, "INVALID_INPUT");
    assert_eq!(error["details"]["reason"], "CONFLICTING_FIELDS");
    refuse(&rig, br#"{"input":{}}"#, 400, "MISSING_FIELD");
    refuse(&rig, br#"{"input":{"image":"https://example.com/a"}}"#, 400, "MISSING_FIELD");
    for image in
        ["http://127.0.0.1/a", "http://169.254.169.254/", "ftp://example.com/a", "http://localhost/a"]
    {
        refuse_input(&rig, json!({"image": image}), 400, "URL_NOT_ALLOWED");
    }
    let error = refuse_input(
        &rig,
        json!({"output": {"put_url": "https://10.0.0.1/?s3cret"}}),
        400,
        "URL_NOT_ALLOWED",
    );
    assert!(!error.to_string().contains("s3cret"));
}

#[test]
fn case_75_base64() {
    let rig = Rig::start();
    let (image, voice) = (media::png(96, 96), media::tone(16_000, 1, 0.5));
    let lines =
        |text: String| text.as_bytes().chunks(76).map(|l| format!(" {}\r\n", str(l))).collect::<String>();
    for image in [
        STANDARD.encode(&image),
        lines(STANDARD.encode(&image)),
        URL_SAFE_NO_PAD.encode(&image),
        STANDARD_NO_PAD.encode(&image),
        format!("data:image/png;base64,{}", STANDARD.encode(&image)),
    ] {
        rig.run(&json!({"input": {"image": image, "audio": STANDARD.encode(&voice)}}));
        let (job, request) = rig.take();
        assert_eq!(request["input"]["image"], image);
        rig.finish(&job, handler::gateway::store::Outcome::Completed("1".to_string()));
    }
    for (fields, status, code) in [
        (
            json!({"image": format!("data:text/html;base64,{}", STANDARD.encode(&image))}),
            400,
            "INVALID_IMAGE_FORMAT",
        ),
        (json!({"image": STANDARD.encode(media::png_of(9000, 9000, &[0; 64]))}), 400, "IMAGE_TOO_LARGE"),
        (json!({"image": ""}), 400, "INVALID_IMAGE_FORMAT"),
        (json!({"audio": "data:audio/wav;base64,"}), 400, "EMPTY_AUDIO"),
        (json!({"image": "AAAAA"}), 400, "INVALID_INPUT"),
        (json!({"image": "not base64!"}), 400, "INVALID_INPUT"),
        (json!({"image": STANDARD.encode("<html>")}), 400, "INVALID_IMAGE_FORMAT"),
        (json!({"audio": STANDARD.encode("<html>")}), 400, "INVALID_AUDIO_FORMAT"),
        (json!({"audio": STANDARD.encode(media::tone(16_000, 1, 0.0))}), 400, "EMPTY_AUDIO"),
        (json!({"image": STANDARD.encode(media::png(32, 32))}), 400, "INVALID_IMAGE_FORMAT"),
    ] {
        let shown = fields.to_string().chars().take(60).collect::<String>();
        let mut request = request();
        for (name, value) in fields.as_object().unwrap() {
            request["input"][name] = value.clone();
        }
        let reply = rig.post("/run", &request);
        assert_eq!(
            (reply.status, reply.json()["error"]["code"].as_str()),
            (status, Some(code)),
            "{shown}: {}",
            reply.json()
        );
    }
    // Within the bytes of a request, and above those of an image.
    let large = Rig::with(|wishes| wishes.config.service.limits.image_bytes = 1_000_000);
    refuse_input(&large, json!({"image": "A".repeat(2_000_000)}), 413, "IMAGE_TOO_LARGE");
}

fn str(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
