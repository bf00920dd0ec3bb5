//! An account at RunPod: as much of its REST API v2 as `handler deploy` uses, and the endpoint's own API. Bodies are
//! checked as strictly as RunPod's schema has it; tests can put an answer in the way of any request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

pub const KEY: &str = "canary-account-key";

const POOLS: [&str; 5] = ["ADA_24", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO", "HOPPER_141"];
const ENDPOINT_FIELDS: [&str; 14] = [
    "name",
    "type",
    "image",
    "args",
    "disk",
    "env",
    "registry",
    "gpu",
    "workers",
    "scaling",
    "timeout",
    "flashboot",
    "networkVolumes",
    "dataCenterIds",
];

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub user_agent: String,
    pub body: Value,
}

/// What stands in the way of a request.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// It is answered like this and not carried out. `Retry-After: 0` comes with it.
    Refuse(u16, &'static str),
    /// It is carried out, and answered with a failure.
    Forget,
}

#[derive(Default)]
struct Account {
    port: u16,
    endpoints: Vec<Value>,
    volumes: Vec<Value>,
    /// Of all endpoints, the newest first.
    releases: Vec<Value>,
    /// What `/workers` shows, each once; none when there is nothing more.
    workers: VecDeque<Value>,
    /// What `/runsync` and `/status` answer.
    jobs: VecDeque<Value>,
    faults: VecDeque<(&'static str, Fault)>,
    seen: Vec<Seen>,
}

/// The account.
#[derive(Clone)]
pub struct Fake(Arc<Mutex<Account>>);

impl Fake {
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let fake = Self(Arc::new(Mutex::new(Account { port, ..Account::default() })));
        let app = Router::new().fallback(handle).with_state(fake.clone());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, app).await.unwrap();
            });
        });
        fake
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.0.lock().unwrap()
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v2", self.account().port)
    }

    /// Puts `fault` in the way of the next request that is `what`, such as `POST /serverless`.
    pub fn fault(&self, what: &'static str, fault: Fault) {
        self.account().faults.push_back((what, fault));
    }

    pub fn workers(&self, list: Value) {
        self.account().workers.push_back(list);
    }

    pub fn job(&self, reply: Value) {
        self.account().jobs.push_back(reply);
    }

    /// The only endpoint.
    pub fn endpoint(&self) -> Value {
        let account = self.account();
        assert_eq!(account.endpoints.len(), 1);
        account.endpoints[0].clone()
    }

    pub fn change_endpoint(&self, change: impl FnOnce(&mut Value)) {
        change(&mut self.account().endpoints[0]);
    }

    pub fn add_endpoint(&self, endpoint: Value) {
        self.account().endpoints.push(endpoint);
    }

    pub fn volumes(&self) -> Vec<Value> {
        self.account().volumes.clone()
    }

    pub fn add_volume(&self, volume: Value) {
        self.account().volumes.push(volume);
    }

    /// The requests so far, and forgets them.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.account().seen)
    }

    /// Those that were to change something, as `PATCH /serverless/ep1`.
    pub fn take_writes(&self) -> Vec<(String, Value)> {
        let writes = self.take_seen().into_iter().filter(|seen| seen.method != "GET");
        writes.map(|seen| (format!("{} {}", seen.method, seen.path), seen.body)).collect()
    }
}

async fn handle(
    State(fake): State<Fake>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_string());
    let mut account = fake.account();
    let path = uri.path().strip_prefix("/v2").unwrap_or(uri.path()).to_string();
    account.seen.push(Seen {
        method: method.to_string(),
        path: path.clone(),
        user_agent: header("user-agent").unwrap_or_default(),
        body: serde_json::from_slice(&body).unwrap_or_default(),
    });
    if header("authorization") != Some(format!("Bearer {KEY}")) {
        return problem(401, "invalid bearer token", &[]);
    }
    let asked = format!("{method} {path}");
    let fault = account.faults.front().filter(|(what, _)| *what == asked).map(|(_, fault)| *fault);
    if fault.is_some() {
        account.faults.pop_front();
    }
    if let Some(Fault::Refuse(status, said)) = fault {
        return ([("Retry-After", "0")], problem(status, said, &[])).into_response();
    }
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let reply = account.answer(method.as_str(), &parts, &body);
    match fault {
        Some(_) => problem(500, "upstream timed out", &[]),
        None => reply,
    }
}

fn problem(status: u16, detail: &str, errors: &[String]) -> Response {
    let body = json!({"title": "Refused", "status": status, "detail": detail, "errors": errors});
    let head = [("Content-Type", "application/problem+json")];
    (StatusCode::from_u16(status).unwrap(), head, body.to_string()).into_response()
}

fn ok(status: u16, body: &Value) -> Response {
    (StatusCode::from_u16(status).unwrap(), [("Content-Type", "application/json")], body.to_string())
        .into_response()
}

impl Account {
    fn answer(&mut self, method: &str, parts: &[&str], body: &Value) -> Response {
        match (method, parts) {
            ("GET", ["catalog", "gpus"]) => {
                let mut gpus: Vec<_> = POOLS.map(|pool| json!({"id": pool, "pool": pool})).to_vec();
                gpus.push(json!({"id": "Tesla V100", "pool": null}));
                ok(200, &json!({"gpus": gpus}))
            }
            ("GET", ["serverless"]) => ok(200, &json!({"endpoints": self.endpoints})),
            ("POST", ["serverless"]) => self.create(body),
            ("GET", ["network-volumes"]) => ok(200, &json!({"networkVolumes": self.volumes})),
            ("POST", ["network-volumes"]) => {
                let mut volume = body.clone();
                volume["id"] = format!("vol{}", self.volumes.len() + 1).into();
                self.volumes.push(volume.clone());
                ok(201, &volume)
            }
            ("PATCH", ["network-volumes", id]) => {
                let found = self.volumes.iter_mut().find(|volume| volume["id"] == **id);
                let Some(volume) = found else { return problem(404, "no such volume", &[]) };
                if body["size"].as_u64() < volume["size"].as_u64() {
                    return problem(400, "a volume cannot shrink", &[]);
                }
                volume["size"] = body["size"].clone();
                ok(200, volume)
            }
            ("POST", ["ep", _, "runsync"]) | ("GET", ["ep", _, "status", _]) => {
                ok(200, &self.jobs.pop_front().unwrap_or_else(|| json!({"id": "job1", "status": "IN_QUEUE"})))
            }
            ("POST", ["ep", _, "cancel", id]) => ok(200, &json!({"id": id, "status": "CANCELLED"})),
            (_, ["serverless", id, rest @ ..]) => {
                let Some(at) = self.endpoints.iter().position(|endpoint| endpoint["id"] == **id) else {
                    return problem(404, "no such endpoint", &[]);
                };
                match (method, rest) {
                    ("GET", []) => ok(200, &self.endpoints[at]),
                    ("PATCH", []) => self.update(at, body),
                    ("GET", ["workers"]) => {
                        ok(200, &json!({"workers": self.workers.pop_front().unwrap_or(json!([]))}))
                    }
                    ("GET", ["releases"]) => ok(200, &json!({"releases": self.releases})),
                    _ => problem(405, "no such operation", &[]),
                }
            }
            _ => problem(404, "no such path", &[]),
        }
    }

    fn create(&mut self, body: &Value) -> Response {
        let missing = ["name", "type", "scaling", "image"].iter().filter(|field| body[**field].is_null());
        let errors: Vec<_> =
            missing.map(|field| format!("missing property {field}")).chain(wrong(body)).collect();
        if !errors.is_empty() {
            return problem(422, "Request validation failed.", &errors);
        }
        let id = format!("ep{}", self.endpoints.len() + 1);
        let base = format!("http://127.0.0.1:{}/ep/{id}", self.port);
        let mut endpoint = body.clone();
        endpoint["id"] = id.into();
        endpoint["args"] = "".into();
        endpoint["gpu"]["allowedCudaVersions"] = json!([]);
        endpoint["requestUrls"] = json!({
            "run": format!("{base}/run"), "runSync": format!("{base}/runsync"),
            "status": format!("{base}/status/{{job_id}}"), "cancel": format!("{base}/cancel/{{job_id}}"),
        });
        self.release(&Value::Null, &endpoint);
        self.endpoints.push(endpoint.clone());
        ok(201, &endpoint)
    }

    fn update(&mut self, at: usize, body: &Value) -> Response {
        let mut errors: Vec<_> = wrong(body).collect();
        errors.extend((!body["type"].is_null()).then(|| "type cannot be changed".to_string()));
        if !errors.is_empty() {
            return problem(422, "Request validation failed.", &errors);
        }
        let before = self.endpoints[at].clone();
        for (field, value) in body.as_object().unwrap() {
            match (field.as_str(), value) {
                ("gpu" | "workers", Value::Object(fields)) => {
                    for (name, value) in fields {
                        self.endpoints[at][field][name] = value.clone();
                    }
                }
                _ => self.endpoints[at][field] = value.clone(),
            }
        }
        let after = self.endpoints[at].clone();
        self.release(&before, &after);
        ok(200, &after)
    }

    /// A change of the container makes a release.
    fn release(&mut self, before: &Value, after: &Value) {
        let fields = [("image", "template.imageName"), ("env", "template.env")];
        let changed = fields.iter().filter(|(field, _)| before[field] != after[field]);
        let entry =
            |(field, name): &(&str, &str)| json!({"field": name, "old": before[field], "new": after[field]});
        let diff: Vec<_> = changed.map(entry).collect();
        if !diff.is_empty() {
            self.releases.insert(0, json!({"id": format!("rel{}", self.releases.len() + 1), "diff": diff}));
        }
    }
}

/// What RunPod's schema would not let through.
fn wrong(body: &Value) -> impl Iterator<Item = String> + use<> {
    let fields = body.as_object().cloned().unwrap_or_default();
    let unknown = |fields: &Map<String, Value>, known: &[&str], of: &str| {
        let strange = fields.keys().filter(|name| !known.contains(&name.as_str()));
        strange.map(|name| format!("unknown property {of}{name}")).collect::<Vec<_>>()
    };
    let mut errors = unknown(&fields, &ENDPOINT_FIELDS, "");
    if let Some(gpu) = fields.get("gpu").and_then(Value::as_object) {
        let known = ["pools", "excludedTypes", "count", "allowedCudaVersions", "minCudaVersion"];
        errors.extend(unknown(gpu, &known, "gpu."));
        let pools = gpu["pools"].as_array().unwrap();
        let strange = pools.iter().filter(|pool| !POOLS.contains(&pool.as_str().unwrap()));
        errors.extend(strange.map(|pool| format!("unknown pool {pool}")));
    }
    if let Some(workers) = fields.get("workers").and_then(Value::as_object) {
        errors.extend(unknown(workers, &["min", "max", "idleTimeout"], "workers."));
        let idle = workers["idleTimeout"].as_u64().unwrap();
        errors.extend((!(1..=3600).contains(&idle)).then(|| "workers.idleTimeout out of range".to_string()));
    }
    if let Some(env) = fields.get("env").and_then(Value::as_object) {
        errors.extend(
            env.iter().filter(|(_, value)| !value.is_string()).map(|(name, _)| format!("env.{name}")),
        );
    }
    errors.into_iter()
}
