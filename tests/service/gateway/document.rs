//! The description of the routes, held against the routes.

use std::collections::BTreeSet;

use handler::gateway::config::Secret;
use serde_json::{Value, json};

use super::rig::{Rig, header, request};

fn document(rig: &Rig) -> Value {
    let reply = rig.get("/openapi.json");
    assert_eq!((reply.status, header(&reply, "content-type")), (200, Some("application/json")));
    reply.json()
}

/// Every operation: its path, its method and its description.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let of = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().clone();
        methods.into_iter().map(|(method, o)| (path.clone(), method.to_uppercase(), o)).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of).collect()
}

/// The path with something in the places of its parameters.
fn filled(path: &str, id: &str) -> String {
    path.replace("{endpoint}", "talkie").replace("{id}", id)
}

#[test]
fn every_described_route_is_there_and_answers_as_described() {
    let rig = Rig::start();
    let document = document(&rig);
    assert_eq!(document["openapi"], "3.1.0");
    let mut names = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let name = operation["operationId"].as_str().unwrap().to_string();
        assert!(names.insert(name), "{operation}");
        // A job of its own for each, which is final, so that nothing waits for it.
        let id = rig.finished(&json!(1));
        let takes_job = operation.get("requestBody").is_some();
        let headers = [("Content-Type", "application/json")];
        let body = if takes_job { request().to_string() } else { String::new() };
        let wait = if path.contains("runsync") { "?wait=1" } else { "" };
        let reply = rig.send(&method, &format!("{}{wait}", filled(&path, &id)), &headers, body.as_bytes());
        // A job that has succeeded cannot be sent again.
        let expected = if path.contains("/retry/") { 400 } else { 200 };
        assert_eq!(reply.status, expected, "{method} {path}: {}", String::from_utf8_lossy(&reply.body));
        let described = &operation["responses"][expected.to_string()]["content"];
        let kind = header(&reply, "content-type").unwrap().split(';').next().unwrap().to_string();
        assert!(described.get(&kind).is_some(), "{method} {path}: {kind} is none of {described}");
        rig.send("POST", "/purge-queue", &[], b"");
    }
}

#[test]
fn every_method_that_is_not_described_is_refused() {
    let rig = Rig::start();
    let described: Vec<_> = operations(&document(&rig));
    let paths: BTreeSet<_> = described.iter().map(|(path, ..)| path.clone()).collect();
    for path in paths {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
            if described.iter().any(|(p, m, _)| *p == path && m == method) {
                continue;
            }
            assert_eq!(rig.send(method, &filled(&path, "1"), &[], b"").status, 405, "{method} {path}");
        }
    }
}

#[test]
fn what_needs_a_key_says_so() {
    let rig = Rig::with(|wishes| wishes.config.api_key = Some(Secret::new("k".to_string())));
    for (path, method, operation) in operations(&document(&rig)) {
        let status = rig.send(&method, &filled(&path, "1"), &[], b"").status;
        let (guarded, documented) = (status == 401, operation["responses"].get("401").is_some());
        assert_eq!((guarded, documented), (operation.get("security").is_some(), guarded), "{method} {path}");
    }
}

#[test]
fn every_reference_leads_somewhere_and_is_used() {
    let rig = Rig::start();
    let document = document(&rig);
    let mut found = BTreeSet::new();
    collect(&document, &mut found);
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for name in &found {
        assert!(schemas.contains_key(name), "{name}");
    }
    let unused: Vec<_> = schemas.keys().filter(|name| !found.contains(*name)).collect();
    // What a job's output holds is described for readers, since foreign workers may put anything there.
    assert_eq!(unused, ["Output"]);
    assert!(schemas["Input"]["properties"]["image"].is_object());
    let error = schemas["Error"]["properties"]["error"]["required"].as_array().unwrap();
    assert_eq!(error.len(), 5);
}

fn collect(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(name) = fields.get("$ref").and_then(Value::as_str) {
                into.insert(name.trim_start_matches("#/components/schemas/").to_string());
            }
            fields.values().for_each(|value| collect(value, into));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, into)),
        _ => {}
    }
}

#[test]
fn figures_are_those_of_the_gateway() {
    let rig = Rig::start();
    rig.finished(&json!(1));
    rig.run(&request());
    rig.get("/status/some-client-chose-this");
    rig.get("/nothing/some-client-chose-this");
    rig.send("BREW", "/health", &[], b"");
    let reply = rig.get("/metrics");
    let text = String::from_utf8(reply.body.clone()).unwrap();
    for line in [
        "talkie_jobs{state=\"in_queue\"} 1.0",
        "talkie_jobs{state=\"completed\"} 1.0",
        "talkie_queue_jobs 1.0",
        "talkie_store_healthy 1.0",
        "talkie_workers{state=\"running\"} 0.0",
        "talkie_http_requests_total{route=\"/run\",method=\"POST\",status=\"200\"} 2",
        "talkie_http_requests_total{route=\"/status/{id}\",method=\"GET\",status=\"404\"} 1",
        "talkie_http_requests_total{route=\"none\",method=\"GET\",status=\"404\"} 1",
        "talkie_http_requests_total{route=\"/health\",method=\"OTHER\",status=\"405\"} 1",
        "talkie_http_request_seconds_count{route=\"/run\"} 2",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert!(!text.contains("some-client-chose-this") && !text.contains("BREW"), "{text}");
    let number = |name: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(number("talkie_process_resident_memory_bytes") > 1e6);
    assert!(number("talkie_queue_wait_seconds") >= 0.0);
}

#[test]
fn an_endpoints_workers_are_counted() {
    let rig = Rig::start();
    assert_eq!(rig.get("/v2/talkie/metrics").json(), json!({"readyWorkers": 0, "workers": 0}));
}
