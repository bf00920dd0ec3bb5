//! Secrets that are planted everywhere a secret can be, and then looked for in everything that comes out.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::pool::client::call;
use crate::pool::gateway::{Gateway, error_of, job};

/// Part of every planted secret.
const CANARY: &str = "canary";
/// Standard base64 of 32 bytes; it cannot hold the word above.
const WEBHOOK_SECRET: &str = "whsec_Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTE=";

/// Every file below `folder`, as text.
fn texts_below(folder: &Path) -> Vec<(String, String)> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            texts.append(&mut texts_below(&path));
        } else {
            texts.push((
                path.display().to_string(),
                String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned(),
            ));
        }
    }
    texts
}

fn send(gateway: &Gateway, request: (&str, &str), body: &Value) -> (u16, Value) {
    let headers = [("Authorization", "Bearer canary-api-key"), ("Content-Type", "application/json")];
    let reply = call(&gateway.base, request, &headers, body.to_string().as_bytes()).unwrap();
    (reply.status, serde_json::from_slice(&reply.body).unwrap_or_default())
}

/// The end of the job that `body` asks for.
fn end_of(gateway: &Gateway, body: &Value) -> Value {
    let (status, view) = send(gateway, ("POST", "/runsync?wait=120000"), body);
    assert_eq!(status, 200, "{view}");
    view
}

#[test]
fn planted_secrets_appear_in_no_log_error_or_metric() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(
        dir.path(),
        &[
            ("LOG_LEVEL", "trace"),
            ("API_KEY", "canary-api-key"),
            ("WEBHOOK_SECRET", WEBHOOK_SECRET),
            ("WEBHOOK_PAUSES", "0"),
            ("HF_TOKEN", "hf_canary"),
        ],
    );
    // A video, whose link holds a signature.
    let mut good = job("instant");
    good["webhook"] = "http://127.0.0.1:9/hook?token=canary-query".into();
    let done = end_of(&gateway, &good);
    assert_eq!(done["status"], "COMPLETED", "{done}");
    let link = done["output"]["video_url"].as_str().unwrap();
    let signature = link.split("X-Amz-Signature=").nth(1).unwrap().split('&').next().unwrap();
    let credentials = fs::read_to_string(dir.path().join("s3-credentials")).unwrap();
    let store_secret =
        credentials.split(|c: char| !c.is_ascii_alphanumeric()).max_by_key(|word| word.len()).unwrap();
    // Failures, which say why.
    let mut foreign_bucket = job("instant");
    foreign_bucket["s3Config"] = json!({
        "accessId": "canary-id", "accessSecret": "canary-secret", "bucketName": "b",
        "endpointUrl": "http://127.0.0.1:9",
    });
    let unreachable = json!({"input": {
        "image": "http://127.0.0.1:9/a.png?sig=canary-query", "audio": "http://127.0.0.1:9/a.wav?sig=canary-query",
        "prompt": "canary prompt",
    }});
    let mut errors = String::new();
    for body in [&foreign_bucket, &unreachable, &job("panic"), &job("abort")] {
        let view = end_of(&gateway, body);
        assert_eq!(view["status"], "FAILED", "{view}");
        error_of(&view);
        errors += &view.to_string();
    }
    let wrong =
        json!({"input": {"image": "http://canary:canary@x/", "audio": "canary", "prompt": 7, "canary": 1}});
    for path in ["/run", "/runsync"] {
        let (status, refusal) = send(&gateway, ("POST", path), &wrong);
        assert_eq!(status, 400);
        // An unknown field is named, since its name is what is wrong.
        errors += &refusal.to_string().replace("`canary`", "");
    }
    let headers = [("Authorization", "canary-wrong-key")];
    errors += &String::from_utf8_lossy(&call(&gateway.base, ("GET", "/health"), &headers, b"").unwrap().body);
    let headers = [("Authorization", "canary-api-key")];
    errors +=
        &String::from_utf8_lossy(&call(&gateway.base, ("GET", "/metrics"), &headers, b"").unwrap().body);

    let mut out = texts_below(&dir.path().join("logs"));
    assert!(!out.is_empty(), "workers have logs");
    out.push(("the gateway's log".into(), gateway.log()));
    out.push(("errors and metrics".into(), errors));
    let encoded = WEBHOOK_SECRET.trim_start_matches("whsec_");
    for (name, text) in &out {
        assert!(!text.is_empty(), "{name} holds something");
        for secret in [CANARY, encoded, signature, store_secret] {
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} is in {name}");
        }
    }
}
