//! What the gateway answers, as OpenAPI 3.1: every route of clients, with its parameters and all its statuses.

use serde_json::{Map, Value, json};

use super::admission::TTL_MS;
use super::config::ServeConfig;
use crate::job::JobStatus;
use crate::schema;

/// One method of one path.
struct Operation {
    /// As the router has it.
    path: &'static str,
    methods: &'static [&'static str],
    /// In words, and in one word for generated clients.
    summary: &'static str,
    name: &'static str,
    /// Of the query.
    query: &'static [Parameter],
    /// Whether it takes a job.
    takes_job: bool,
    /// The type and schema of an answer of 200.
    answer: (&'static str, &'static str),
    /// Besides those that every operation can have.
    statuses: &'static [u16],
    /// Which paths it has.
    place: Place,
}

/// Where an operation is found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Below `/v2/{endpoint}`, and for the local endpoint at its own path.
    Both,
    /// Below `/v2/{endpoint}` alone.
    Endpoint,
    /// At its own path alone; the flag says whether it needs a key where others do.
    Site(bool),
}

/// A whole number in a query.
struct Parameter {
    name: &'static str,
    range: (u64, u64),
    about: &'static str,
}

const JSON: &str = "application/json";
const WAIT: Parameter = Parameter {
    name: "wait",
    range: (0, u64::MAX),
    about: "How long to wait for the job's end, in milliseconds; more than 300000 counts as that [default: 90000]",
};
const STREAM_WAIT: Parameter = Parameter {
    name: "wait",
    range: (0, u64::MAX),
    about: "How long to wait for a part, in milliseconds; more than 9000 counts as that [default: 5000]",
};
const TTL: Parameter = Parameter {
    name: "ttl",
    range: (*TTL_MS.start(), *TTL_MS.end()),
    about: "Forgets the job after so many milliseconds from now, whatever its status",
};
const LIMIT: Parameter = Parameter { name: "limit", range: (1, 100), about: "Jobs to list [default: 30]" };
/// What a job can be refused with.
const REFUSALS: &[u16] = &[408, 409, 413, 415, 507];

const fn get(path: &'static str, name: &'static str, summary: &'static str) -> Operation {
    Operation {
        path,
        methods: &["get"],
        summary,
        name,
        query: &[],
        takes_job: false,
        answer: (JSON, "Job"),
        statuses: &[],
        place: Place::Both,
    }
}

const fn post(path: &'static str, name: &'static str, summary: &'static str) -> Operation {
    Operation { methods: &["post"], ..get(path, name, summary) }
}

const fn look(path: &'static str, name: &'static str, summary: &'static str) -> Operation {
    Operation { methods: &["get", "post"], ..get(path, name, summary) }
}

const OPERATIONS: &[Operation] = &[
    Operation {
        takes_job: true,
        answer: (JSON, "Receipt"),
        statuses: REFUSALS,
        ..post("/run", "run", "Sends a job; it is on disk when this is answered")
    },
    Operation {
        takes_job: true,
        query: &[WAIT],
        statuses: REFUSALS,
        ..post("/runsync", "runSync", "Sends a job and waits for its end")
    },
    Operation { query: &[TTL], ..look("/status/{id}", "status", "Where a job is, and its result") },
    Operation {
        query: &[WAIT],
        ..look("/status-sync/{id}", "statusSync", "The same when the job has ended")
    },
    Operation {
        query: &[STREAM_WAIT],
        answer: (JSON, "Parts"),
        ..look("/stream/{id}", "stream", "The parts of a result that have come since anybody last asked")
    },
    Operation {
        answer: ("text/event-stream", "Events"),
        ..get("/events/{id}", "events", "A job's life as Server-Sent Events, until it is final")
    },
    Operation {
        answer: (JSON, "Receipt"),
        ..post("/cancel/{id}", "cancel", "Cancels a job that is not final")
    },
    Operation {
        answer: (JSON, "Receipt"),
        ..post("/retry/{id}", "retry", "Sends a job that is FAILED or TIMED_OUT again, under the same id")
    },
    Operation {
        answer: (JSON, "Purged"),
        ..post("/purge-queue", "purgeQueue", "Cancels all jobs that wait")
    },
    Operation { answer: (JSON, "Health"), ..get("/health", "health", "Jobs and workers, counted") },
    Operation {
        query: &[LIMIT],
        answer: (JSON, "Recent"),
        ..get("/requests", "requests", "The recent jobs without their results, the newest first")
    },
    Operation {
        answer: (JSON, "Workers"),
        place: Place::Endpoint,
        ..get("/metrics", "workers", "Workers that are ready, and all of them")
    },
    Operation {
        answer: ("application/openmetrics-text", "Text"),
        place: Place::Site(true),
        ..get("/metrics", "metrics", "Figures for Prometheus")
    },
    Operation {
        answer: (JSON, "Document"),
        place: Place::Site(false),
        ..get("/openapi.json", "openapi", "This document")
    },
    Operation {
        answer: (JSON, "Alive"),
        place: Place::Site(false),
        ..get("/livez", "livez", "Whether the gateway runs")
    },
    Operation {
        answer: (JSON, "Ready"),
        place: Place::Site(false),
        ..get("/readyz", "readyz", "Whether jobs can be accepted; 503 with the reason where not")
    },
    Operation {
        answer: ("text/html", "Text"),
        place: Place::Site(false),
        ..get("/", "page", "The page for people")
    },
];

/// The document.
pub fn document(config: &ServeConfig) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for operation in OPERATIONS {
        let own = (operation.path.to_string(), false);
        let below = (format!("/v2/{{endpoint}}{}", operation.path), true);
        let found = match operation.place {
            Place::Both => vec![below, own],
            Place::Endpoint => vec![below],
            Place::Site(_) => vec![own],
        };
        for (path, of_endpoint) in found {
            let item = paths.entry(path).or_insert_with(|| json!({}));
            for method in operation.methods {
                item[*method] = describe(operation, method, of_endpoint);
            }
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Talkie gateway",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "A portrait and a voice go in; a talking video comes out. The routes are those of a \
                RunPod serverless endpoint.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": config.public_url}],
        "paths": paths,
        "components": {
            "schemas": schemas(config),
            "securitySchemes": {"key": {
                "type": "http",
                "scheme": "bearer",
                "description": "Needed where a key is set, and always where other machines reach the gateway",
            }},
        },
    })
}

fn describe(operation: &Operation, method: &str, of_endpoint: bool) -> Value {
    let name = format!(
        "{}{}{}",
        operation.name,
        if of_endpoint && operation.place == Place::Both { "At" } else { "" },
        if method == "post" && operation.methods.len() > 1 { "ByPost" } else { "" },
    );
    let mut described = json!({
        "operationId": name,
        "summary": operation.summary,
        "responses": responses(operation),
    });
    let parameters = parameters(operation, of_endpoint);
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if operation.place != Place::Site(false) {
        described["security"] = json!([{}, {"key": []}]);
    }
    if operation.takes_job {
        let content = json!({JSON: {"schema": reference("Request")}});
        described["requestBody"] = json!({"required": true, "content": content});
    }
    described
}

fn parameters(operation: &Operation, of_endpoint: bool) -> Vec<Value> {
    let mut all = Vec::new();
    let mut add = |place: &str, name: &str, about: &str, schema: Value| {
        let required = place == "path";
        let described = json!({"name": name, "in": place, "required": required, "description": about});
        let mut described = described;
        described["schema"] = schema;
        all.push(described);
    };
    if of_endpoint {
        let schema = json!({"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"});
        add("path", "endpoint", "The endpoint; on the local address any name will do", schema);
    }
    if operation.path.contains("{id}") {
        add("path", "id", "The job", json!({"type": "string", "pattern": "^[A-Za-z0-9-]{1,64}$"}));
    }
    for parameter in operation.query {
        let (minimum, maximum) = parameter.range;
        let mut schema = json!({"type": "integer", "minimum": minimum});
        if maximum < u64::MAX {
            schema["maximum"] = maximum.into();
        }
        add("query", parameter.name, parameter.about, schema);
    }
    if operation.takes_job {
        let schema = json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"});
        let about = "The same key with the same body is the same job, for a day at least";
        add("header", "Idempotency-Key", about, schema);
    }
    all
}

fn responses(operation: &Operation) -> Value {
    let (kind, schema) = operation.answer;
    let mut responses = Map::new();
    responses.insert(
        "200".into(),
        json!({"description": "Done", "content": {kind: {"schema": reference(schema)}}}),
    );
    let mut add = |status: u16| {
        let mut response = json!({
            "description": meaning(status),
            "content": {JSON: {"schema": reference("Error")}},
        });
        if matches!(status, 429 | 503 | 507) {
            let seconds =
                json!({"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait"});
            response["headers"] = json!({"Retry-After": seconds});
        }
        responses.insert(status.to_string(), response);
    };
    let always: &[u16] = &[400, 405, 431, 500, 503];
    let guarded: &[u16] = if operation.place == Place::Site(false) { &[] } else { &[401, 403, 404, 429] };
    let mut statuses = [always, guarded, operation.statuses].concat();
    statuses.sort_unstable();
    statuses.into_iter().for_each(&mut add);
    responses.into()
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "Bad input; `code` and `details.reason` say which",
        401 => "No valid key",
        403 => "The host or the origin is not allowed",
        404 => "No such endpoint or job, or it is forgotten",
        405 => "Another method; `Allow` lists those of the path",
        408 => "The body did not come in time",
        409 => "The `Idempotency-Key` was used with another body",
        413 => "Too large",
        415 => "Not JSON in UTF-8",
        429 => "Too many requests with this key",
        431 => "Too long a head",
        503 => "The queue is full, or the gateway is not ready",
        507 => "The disk is full",
        _ => "The gateway has failed",
    }
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn schemas(config: &ServeConfig) -> Value {
    let text = json!({"type": "string"});
    let count = json!({"type": "integer", "minimum": 0});
    let counts = |names: &[&str]| {
        let properties: Map<String, Value> = names.iter().map(|n| (n.to_string(), count.clone())).collect();
        json!({"type": "object", "properties": properties, "required": names})
    };
    let statuses: Vec<_> = JobStatus::ALL.iter().map(|status| status.as_str()).collect();
    let job = json!({
        "id": text,
        "status": {"enum": statuses},
        "delayTime": {"type": "integer", "minimum": 0, "description": "Milliseconds in the queue"},
        "executionTime": {"type": "integer", "minimum": 0, "description": "Milliseconds that the last attempt ran"},
        "workerId": text,
        "retries": {"type": "integer", "minimum": 1, "description": "Attempts after the first"},
        "output": {"description": "The result; of a running job its last progress"},
        "error": {"type": "string", "description": "Why a job that is final has no result"},
    });
    let mut listed = job.clone();
    listed["createdAt"] = json!({"type": "integer", "description": "Milliseconds since 1970"});
    let of = |properties: Value, required: &[&str]| json!({"type": "object", "properties": properties, "required": required});
    let part = of(json!({"output": {}}), &["output"]);
    let health = json!({
        "jobs": counts(&["completed", "failed", "inProgress", "inQueue", "retried"]),
        "workers": counts(&["idle", "initializing", "ready", "running", "throttled", "unhealthy"]),
    });
    let error = of(
        json!({
            "code": text,
            "message": text,
            "hint": {"type": ["string", "null"]},
            "retryable": {"type": "boolean"},
            "details": {"type": "object", "properties": {"reason": text}},
        }),
        &["code", "message", "hint", "retryable", "details"],
    );
    json!({
        "Request": request(config),
        "Input": schema::input(),
        "Output": schema::output(),
        "Job": of(job.clone(), &["id", "status"]),
        "Receipt": of(json!({"id": job["id"], "status": job["status"]}), &["id", "status"]),
        "Parts": of(json!({"id": text, "status": job["status"], "stream": {"type": "array", "items": part}}),
                    &["id", "status", "stream"]),
        "Events": {"type": "string", "description": "`status`: the job, with `position` while it waits; \
            `progress`: the worker's last report"},
        "Purged": of(json!({"removed": count, "status": {"const": "completed"}}), &["removed", "status"]),
        "Health": of(health, &["jobs", "workers"]),
        "Recent": of(json!({"requests": {"type": "array", "items": of(listed, &["id", "status", "createdAt"])}}),
                     &["requests"]),
        "Workers": counts(&["readyWorkers", "workers"]),
        "Alive": of(json!({"status": text}), &["status"]),
        "Ready": of(json!({"status": text, "trouble": {"type": "string", "description": "Why no worker starts"}}),
                    &["status"]),
        "Document": {"type": "object"},
        "Text": text,
        "Error": of(json!({"error": error}), &["error"]),
    })
}

fn request(config: &ServeConfig) -> Value {
    let (run, run_sync) = config.max_body_bytes;
    let ms = |least: u64, most: u64, about: &str| json!({"type": ["integer", "null"], "minimum": least, "maximum": most, "description": about});
    json!({
        "type": "object",
        "description": format!("At most {run} bytes to /run, {run_sync} to /runsync. An endpoint that other \
            workers than Talkie's serve takes any input."),
        "properties": {
            "input": reference("Input"),
            "webhook": {"type": ["string", "null"], "maxLength": 2048, "format": "uri",
                        "description": "A public https URL, told when the job is final"},
            "policy": {"type": ["object", "null"], "properties": {
                "executionTimeout": ms(5000, *TTL_MS.end(), "How long an attempt may run, in milliseconds"),
                "ttl": ms(*TTL_MS.start(), *TTL_MS.end(), "When the job is forgotten, in milliseconds from now"),
                "lowPriority": {"type": ["boolean", "null"], "description": "Waits without starting a worker"},
            }},
            "s3Config": {"type": ["object", "null"], "description": "The bucket of this job's video", "properties": {
                "accessId": {"type": "string"}, "accessSecret": {"type": "string"},
                "bucketName": {"type": "string"}, "endpointUrl": {"type": "string"},
            }},
        },
        "required": ["input"],
    })
}
