//! Keys, sites and quotas.

use std::net::SocketAddr;

use handler::gateway::config::Secret;
use handler::gateway::key;
use handler::gateway::store::{KeyRole, KeyStore};
use serde_json::json;

use super::rig::{Rig, header, refused, request};

/// A gateway that listens, as far as it knows, where other machines reach it.
fn reachable() -> Rig {
    Rig::with(|wishes| {
        wishes.config.addr = SocketAddr::from(([192, 0, 2, 1], 80));
        wishes.config.api_key = Some(Secret::new("the-key".to_string()));
    })
}

/// A new key of the store; its id and the key.
fn key(rig: &Rig, role: KeyRole) -> (String, String) {
    let (id, secret) = (format!("k{}", rand::random::<u32>()), key::generate());
    let keys = KeyStore::open(rig.dir.path()).unwrap();
    keys.create(&id, "test", role, key::hash(secret.expose())).unwrap();
    (id, secret.expose().to_string())
}

const CLOSED: [(&str, &str); 20] = [
    ("POST", "/run"),
    ("POST", "/runsync"),
    ("GET", "/status/1"),
    ("POST", "/status/1"),
    ("GET", "/status-sync/1"),
    ("GET", "/stream/1"),
    ("GET", "/events/1"),
    ("POST", "/cancel/1"),
    ("POST", "/retry/1"),
    ("POST", "/purge-queue"),
    ("GET", "/health"),
    ("GET", "/requests"),
    ("GET", "/metrics"),
    ("POST", "/v2/talkie/run"),
    ("GET", "/v2/talkie/status/1"),
    ("GET", "/v2/talkie/metrics"),
    ("POST", "/v2/other/cancel/1"),
    ("GET", "/v2/other/health"),
    ("GET", "/v2/other/events/1"),
    ("GET", "/v2/other/requests"),
];
const OPEN: [&str; 6] = ["/", "/page.js", "/page.css", "/livez", "/readyz", "/openapi.json"];

#[test]
fn without_a_key_only_the_page_and_the_probes_answer() {
    let rig = reachable();
    for (method, path) in CLOSED {
        refused(&rig.send(method, path, &[], b""), 401, "UNAUTHORIZED");
    }
    for path in OPEN {
        assert_eq!(rig.get(path).status, 200, "{path}");
    }
    let with_key = |path: &str| rig.send("GET", path, &[("Authorization", "the-key")], b"").status;
    assert_eq!([with_key("/health"), with_key("/metrics"), with_key("/requests")], [200; 3]);
}

#[test]
fn other_endpoints_are_served_on_this_machine_only() {
    let (far, near) = (reachable(), Rig::start());
    let health = |rig: &Rig| rig.send("GET", "/v2/other/health", &[("Authorization", "the-key")], b"");
    refused(&health(&far), 404, "NOT_FOUND");
    assert_eq!(health(&near).status, 200);
}

#[test]
fn a_key_is_needed_as_soon_as_there_is_one_and_until_it_is_revoked() {
    let rig = Rig::start();
    assert_eq!(rig.send("GET", "/health", &[("Authorization", "Bearer anything")], b"").status, 200);
    let (id, secret) = key(&rig, KeyRole::Client);
    refused(&rig.get("/health"), 401, "UNAUTHORIZED");
    let health = || rig.send("GET", "/health", &[("Authorization", &format!("Bearer {secret}"))], b"").status;
    assert_eq!(health(), 200);
    let (_, other) = key(&rig, KeyRole::Client);
    assert!(KeyStore::open(rig.dir.path()).unwrap().revoke(&id).unwrap());
    assert_eq!(health(), 401, "at once");
    assert_eq!(rig.send("GET", "/health", &[("Authorization", &other)], b"").status, 200);
}

#[test]
fn a_workers_key_opens_the_workers_side_alone() {
    let rig = reachable();
    let (_, worker) = key(&rig, KeyRole::Worker);
    refused(&rig.send("GET", "/health", &[("Authorization", &worker)], b""), 401, "UNAUTHORIZED");
    let ping = |key: &str| rig.send("GET", "/v2/talkie/ping/w-1", &[("Authorization", key)], b"").status;
    assert_ne!(ping(&worker), 401);
    assert!(!matches!(ping(&worker), 403 | 404 | 429), "{}", ping(&worker));
    assert_eq!(ping("the-key"), ping("wrong"), "a client's key is none of a worker's");
    assert_ne!(ping("the-key"), ping(&worker));
}

#[test]
fn fault_77_a_key_that_asks_too_often_waits() {
    let rig = reachable();
    let (_, second) = key(&rig, KeyRole::Client);
    let purge = |key: &str| rig.send("POST", "/purge-queue", &[("Authorization", key)], b"");
    let statuses: Vec<_> = (0..3).map(|_| purge("the-key").status).collect();
    assert_eq!(statuses, [200, 200, 429]);
    let reply = purge("the-key");
    refused(&reply, 429, "RATE_LIMITED");
    let seconds: u64 = header(&reply, "retry-after").unwrap().parse().unwrap();
    assert!((1..=10).contains(&seconds), "{seconds}");
    assert_eq!(purge(&second).status, 200, "another key has its own share");
    refused(&purge("wrong"), 401, "UNAUTHORIZED");
    assert_eq!(rig.send("GET", "/health", &[("Authorization", "the-key")], b"").status, 200);
}

/// Keys are compared as hashes, which are of one length: what is compared in no case depends on how much of a key
/// is right. The rest is coarse: a right beginning may not show in the time.
#[test]
fn fault_78_a_key_that_begins_right_takes_no_longer() {
    let rig = reachable();
    let time = |key: &str| {
        let began = std::time::Instant::now();
        refused(&rig.send("GET", "/health", &[("Authorization", key)], b""), 401, "UNAUTHORIZED");
        began.elapsed()
    };
    let median = |key: &str| {
        let mut times: Vec<_> = (0..101).map(|_| time(key)).collect();
        times.sort();
        times[50]
    };
    let (near, far) = (median("the-kez"), median("x"));
    let ratio = near.as_secs_f64() / far.as_secs_f64();
    assert!((0.2..5.0).contains(&ratio), "{near:?} {far:?}");
}

#[test]
fn pages_of_other_sites_reach_nothing() {
    let rig = Rig::start();
    let raw = |lines: &str| {
        let head = format!("POST /purge-queue HTTP/1.1\r\n{lines}Connection: close\r\n\r\n");
        rig.talk(head.as_bytes()).0
    };
    let port = rig.addr().rsplit(':').next().unwrap();
    for host in ["evil.example", "127.0.0.1.evil.example", "192.0.2.1", "localhost.evil.example:80", "a b"] {
        let said = raw(&format!("Host: {host}\r\n"));
        assert!(said.starts_with("HTTP/1.1 403 ") && said.contains("HOST_NOT_ALLOWED"), "{host}: {said}");
    }
    for origin in ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"] {
        let said = raw(&format!("Host: localhost:{port}\r\nOrigin: {origin}\r\n"));
        assert!(said.starts_with("HTTP/1.1 403 ") && said.contains("ORIGIN_NOT_ALLOWED"), "{origin}: {said}");
    }
    for lines in [
        format!("Host: localhost:{port}\r\nOrigin: http://localhost:{port}\r\n"),
        format!("Host: 127.0.0.1:{port}\r\n"),
        format!("Host: [::1]:{port}\r\n"),
        "Host: talkie.localhost\r\n".to_string(),
    ] {
        let said = raw(&lines);
        assert!(said.starts_with("HTTP/1.1 200 "), "{lines}: {said}");
    }
    let behind_proxy = Rig::with(|wishes| wishes.config.public_url = "https://talk.example".to_string());
    let lines = "Host: talk.example\r\nOrigin: https://talk.example\r\n";
    let head = format!("POST /purge-queue HTTP/1.1\r\n{lines}Connection: close\r\n\r\n");
    let said = behind_proxy.talk(head.as_bytes()).0;
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
}

#[test]
fn sites_that_are_allowed_may_call() {
    let rig = Rig::with(|wishes| wishes.config.allowed_origins = vec!["https://app.example".to_string()]);
    let preflight = |origin: &str| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,content-type"),
        ];
        rig.send("OPTIONS", "/run", &headers, b"")
    };
    let allowed = preflight("https://app.example");
    assert_eq!(allowed.status, 200);
    assert_eq!(header(&allowed, "access-control-allow-origin"), Some("https://app.example"));
    assert!(header(&allowed, "access-control-allow-headers").unwrap().contains("authorization"));
    assert_eq!(header(&preflight("https://evil.example"), "access-control-allow-origin"), None);
    let send = |origin: &str| {
        let headers = [("Origin", origin), ("Content-Type", "application/json")];
        rig.send("POST", "/run", &headers, request().to_string().as_bytes())
    };
    let sent = send("https://app.example");
    assert_eq!(sent.status, 200);
    assert_eq!(header(&sent, "access-control-allow-origin"), Some("https://app.example"));
    refused(&send("https://evil.example"), 403, "UNAUTHORIZED");
    // Errors can be read by the page as well.
    let refusal = rig.send("GET", "/status/1", &[("Origin", "https://app.example")], b"");
    assert_eq!(header(&refusal, "access-control-allow-origin"), Some("https://app.example"));
}

#[test]
fn every_answer_is_to_be_taken_for_what_it_is() {
    let rig = Rig::start();
    for path in ["/", "/page.js", "/health", "/status/1", "/nothing", "/openapi.json", "/metrics"] {
        let reply = rig.get(path);
        assert_eq!(header(&reply, "x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(header(&reply, "referrer-policy"), Some("no-referrer"), "{path}");
        let policy = header(&reply, "content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
            "{path}"
        );
        assert!(!policy.contains("unsafe"), "{path}");
        assert!(header(&reply, "content-type").is_some(), "{path}");
    }
    let page = rig.get("/");
    assert_eq!(header(&page, "content-type"), Some("text/html; charset=utf-8"));
    assert!(header(&page, "content-security-policy").unwrap().contains("script-src 'self'"));
}

#[test]
fn fault_82_health_and_figures_tell_no_secret() {
    let rig = Rig::with(|wishes| {
        wishes.config.addr = SocketAddr::from(([192, 0, 2, 1], 80));
        wishes.config.api_key = Some(Secret::new("canary-key".to_string()));
    });
    let headers = [("Authorization", "canary-key"), ("Content-Type", "application/json")];
    let mut canary = request();
    canary["input"]["prompt"] = "canary-prompt".into();
    canary["input"]["image"] = "https://example.com/a.png?sig=canary-query".into();
    canary["s3Config"] = json!({"accessId": "canary-id", "accessSecret": "canary-secret"});
    let job = rig.send("POST", "/run", &headers, canary.to_string().as_bytes()).json()["id"].clone();
    let id = job.as_str().unwrap();
    rig.send("GET", &format!("/status/{id}"), &headers, b"");
    rig.send("GET", "/status/canary-path", &headers, b"");
    for path in ["/health", "/metrics", "/requests", "/readyz", "/livez", "/openapi.json"] {
        let reply = rig.send("GET", path, &headers, b"");
        let text = String::from_utf8(reply.body).unwrap();
        assert!(!text.contains("canary"), "{path}: {text}");
        assert!(path != "/metrics" || !text.contains(id), "no label holds an id: {text}");
    }
    // Without the key there is neither the one nor the other, and with it not without end.
    for path in ["/health", "/metrics"] {
        refused(&rig.get(path), 401, "UNAUTHORIZED");
    }
    let one = || rig.send("GET", "/requests", &headers, b"").status;
    assert!((0..20).any(|_| one() == 429));
}
