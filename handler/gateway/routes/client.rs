//! RunPod's endpoint API, as clients call it.
//!
//! Success is exactly 200, and an `error` is in no answer about a job that is not final: the official clients
//! rely on both. Bodies of requests that need none are left unread.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::body::{Received, read_json};
use super::{Caller, Endpoint, Gate, JobId, Query, enter, find};
use crate::gateway::Gateway;
use crate::gateway::admission::{Admitted, Arrival, TTL_MS};
use crate::gateway::error::ApiError;
use crate::gateway::events::events;
use crate::gateway::quota::Operation;
use crate::gateway::server::Closing;
use crate::gateway::store::JobRecord;
use crate::job::{Code, JobError, JobStatus};
use crate::runpod::protocol::{Health, JobView};

/// The longest that a request is kept waiting for a job's end, in milliseconds.
const LONGEST_WAIT_MS: u64 = 300_000;
/// Where `wait` is not given, in milliseconds.
const DEFAULT_WAIT_MS: u64 = 90_000;
/// The same for parts of a result. The Python client, which does not say, gives up after 10 s.
const DEFAULT_STREAM_WAIT_MS: u64 = 5_000;
const LONGEST_STREAM_WAIT_MS: u64 = 9_000;
/// Jobs that `/requests` lists, and at most.
const LISTED: u64 = 30;
const MOST_LISTED: u64 = 100;
/// The longest `Idempotency-Key`, in bytes.
const IDEMPOTENCY_KEY_BYTES: usize = 255;

/// The routes below `/v2/{endpoint}` and, for the local endpoint, without it.
pub(super) fn router(gateway: &Arc<Gateway>) -> Router<Arc<Gateway>> {
    let gate = |operation| from_fn_with_state(Gate { gateway: gateway.clone(), operation }, enter);
    let looked_at = || gate(Operation::Status);
    Router::new()
        .route("/run", post(run).route_layer(gate(Operation::Run)))
        .route("/runsync", post(run_sync).route_layer(gate(Operation::RunSync)))
        .route("/status/{id}", get(status).post(status).route_layer(looked_at()))
        .route("/status-sync/{id}", get(status_sync).post(status_sync).route_layer(looked_at()))
        .route("/stream/{id}", get(stream).post(stream).route_layer(looked_at()))
        .route("/events/{id}", get(events_of).route_layer(looked_at()))
        .route("/cancel/{id}", post(cancel).route_layer(gate(Operation::Cancel)))
        .route("/retry/{id}", post(retry).route_layer(gate(Operation::Cancel)))
        .route("/purge-queue", post(purge).route_layer(gate(Operation::Purge)))
        .route("/health", get(health).route_layer(looked_at()))
        .route("/requests", get(requests).route_layer(gate(Operation::Requests)))
}

/// The route that only an endpoint's own path has: without it, it is that of Prometheus.
pub(super) fn endpoint_router(gateway: &Arc<Gateway>) -> Router<Arc<Gateway>> {
    let gate = Gate { gateway: gateway.clone(), operation: Operation::Status };
    Router::new().route("/metrics", get(workers).route_layer(from_fn_with_state(gate, enter)))
}

async fn run(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let most = gateway.config.max_body_bytes.0;
    let Admitted { id, earlier } =
        accept(&gateway, (&endpoint, false), caller, (&headers, body, most)).await?;
    let status = if earlier { find(&gateway, &endpoint.0, &id)?.status } else { JobStatus::InQueue };
    Ok(Json(json!({"id": id, "status": status})))
}

async fn run_sync(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    Extension(caller): Extension<Caller>,
    closing: Option<Extension<Closing>>,
    query: Query,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<JobView>, ApiError> {
    let until = deadline(&query, DEFAULT_WAIT_MS, LONGEST_WAIT_MS)?;
    let most = gateway.config.max_body_bytes.1;
    let Admitted { id, .. } = accept(&gateway, (&endpoint, true), caller, (&headers, body, most)).await?;
    view(&gateway, &ended(&gateway, (&endpoint.0, &id), until, closing).await?)
}

async fn status(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
    query: Query,
) -> Result<Json<JobView>, ApiError> {
    let ttl = query.number("ttl", TTL_MS)?;
    let job = find(&gateway, &endpoint.0, &id)?;
    if let Some(ttl) = ttl {
        gateway.store.set_ttl(&id, Duration::from_millis(ttl)).await?;
    }
    view(&gateway, &job)
}

async fn status_sync(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
    closing: Option<Extension<Closing>>,
    query: Query,
) -> Result<Json<JobView>, ApiError> {
    let until = deadline(&query, DEFAULT_WAIT_MS, LONGEST_WAIT_MS)?;
    view(&gateway, &ended(&gateway, (&endpoint.0, &id), until, closing).await?)
}

/// What `/stream` answers.
#[derive(Serialize)]
struct Parts {
    id: String,
    status: JobStatus,
    /// A list always: clients loop over it.
    stream: Vec<Part>,
}

/// One part of a result.
#[derive(Serialize)]
struct Part {
    output: Box<RawValue>,
}

/// The parts that have come since anybody last asked. They are forgotten then.
async fn stream(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
    closing: Option<Extension<Closing>>,
    query: Query,
) -> Result<Json<Parts>, ApiError> {
    let until = deadline(&query, DEFAULT_STREAM_WAIT_MS, LONGEST_STREAM_WAIT_MS)?;
    let closing = closing.map(|closing| closing.0).unwrap_or_default();
    let mut watch = gateway.hub.watch(&id);
    let mut last = false;
    loop {
        // The status first: what ended before it was read has no part that the next line does not see.
        let status = find(&gateway, &endpoint.0, &id)?.status;
        let parts = gateway.store.drain_chunks(&id).await?;
        if !parts.is_empty() || status.is_terminal() || last {
            let part = |output| RawValue::from_string(output).map(|output| Part { output });
            let stream = parts.into_iter().map(part).collect::<Result<_, _>>().map_err(|e| unreadable(&e))?;
            return Ok(Json(Parts { id, status, stream }));
        }
        tokio::select! {
            () = watch.changed() => {}
            () = sleep_until(until) => last = true,
            () = closing.0.cancelled() => last = true,
        }
    }
}

async fn events_of(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
    closing: Option<Extension<Closing>>,
) -> Result<axum::response::Response, ApiError> {
    find(&gateway, &endpoint.0, &id)?;
    Ok(events(gateway, id, closing.map(|closing| closing.0).unwrap_or_default()))
}

/// Cancels a job that is not final. One that is stays as it is, however often this is asked.
async fn cancel(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
) -> Result<Json<Value>, ApiError> {
    let before = find(&gateway, &endpoint.0, &id)?;
    let after = gateway.store.cancel(&id).await?.ok_or_else(ApiError::no_such_job)?;
    if !before.status.is_terminal()
        && let Some(worker) = &after.worker
    {
        gateway.pool.stop_job(worker, &id);
    }
    Ok(Json(json!({"id": id, "status": after.status})))
}

async fn retry(
    State(gateway): State<Arc<Gateway>>,
    endpoint: Endpoint,
    JobId(id): JobId,
) -> Result<Json<Value>, ApiError> {
    find(&gateway, &endpoint.0, &id)?;
    let job = gateway.store.retry(&id).await?.ok_or_else(ApiError::no_such_job)?;
    Ok(Json(json!({"id": id, "status": job.status})))
}

async fn purge(State(gateway): State<Arc<Gateway>>, endpoint: Endpoint) -> Result<Json<Value>, ApiError> {
    let removed = gateway.store.purge(&endpoint.0).await?;
    Ok(Json(json!({"removed": removed, "status": "completed"})))
}

async fn health(State(gateway): State<Arc<Gateway>>, Endpoint(endpoint): Endpoint) -> Json<Health> {
    let workers = gateway.pool.counts(&gateway.pool.queue_of(&endpoint));
    Json(Health { jobs: gateway.store.counts(&endpoint), workers })
}

/// One of the recent jobs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    /// Without its result, which may be large.
    #[serde(flatten)]
    view: JobView,
    /// Milliseconds since 1970.
    created_at: i64,
}

async fn requests(
    State(gateway): State<Arc<Gateway>>,
    Endpoint(endpoint): Endpoint,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let most = query.number("limit", 1..=MOST_LISTED)?.unwrap_or(LISTED);
    let listed = |job: JobRecord| {
        let created_at = job.created_ms;
        let bare = JobRecord { output: None, error: None, ..job };
        view(&gateway, &bare).map(|Json(view)| Listed { view: JobView { output: None, ..view }, created_at })
    };
    let jobs = gateway.store.recent(&endpoint, usize::try_from(most).unwrap_or(usize::MAX))?;
    let listed: Vec<Listed> = jobs.into_iter().map(listed).collect::<Result<_, _>>()?;
    Ok(Json(json!({"requests": listed})))
}

async fn workers(State(gateway): State<Arc<Gateway>>, Endpoint(endpoint): Endpoint) -> Json<Value> {
    let counts = gateway.pool.counts(&gateway.pool.queue_of(&endpoint));
    // An idle worker counts as ready too.
    let ready = counts.ready + counts.running;
    Json(json!({"readyWorkers": ready, "workers": ready + counts.initializing + counts.unhealthy}))
}

/// Makes a job of a request to `endpoint` (whose sender waits, or not), with a body of so many bytes at most.
async fn accept(
    gateway: &Arc<Gateway>,
    (endpoint, sync): (&Endpoint, bool),
    caller: Caller,
    (headers, body, most): (&HeaderMap, Body, usize),
) -> Result<Admitted, ApiError> {
    let idempotency_key = idempotency_key(headers)?;
    let Received { bytes, room } = read_json(gateway, headers, body, most).await?;
    let endpoint = endpoint.0.clone();
    let arrival = Arrival { endpoint, sync, key: caller.0, idempotency_key, body: bytes, room };
    gateway.admission.admit(gateway, arrival).await
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if values.next().is_none() && (1..=IDEMPOTENCY_KEY_BYTES).contains(&text.len()) {
        return Ok(Some(text.to_string()));
    }
    let message = format!("`Idempotency-Key` is not one text of 1 to {IDEMPOTENCY_KEY_BYTES} characters");
    Err(JobError::new(Code::InvalidInput, message).with_reason("IDEMPOTENCY_KEY").into())
}

/// When a wait is over; more than `longest` is not waited.
fn deadline(query: &Query, default: u64, longest: u64) -> Result<Instant, ApiError> {
    let wait = query.number("wait", 0..=u64::MAX)?.unwrap_or(default).min(longest);
    Ok(Instant::now() + Duration::from_millis(wait))
}

/// The job when it is final, when the time is up, or when this server ends.
async fn ended(
    gateway: &Gateway,
    (endpoint, id): (&str, &str),
    until: Instant,
    closing: Option<Extension<Closing>>,
) -> Result<JobRecord, ApiError> {
    let closing = closing.map(|closing| closing.0).unwrap_or_default();
    let mut watch = gateway.hub.watch(id);
    loop {
        let job = find(gateway, endpoint, id)?;
        if job.status.is_terminal() {
            return Ok(job);
        }
        tokio::select! {
            () = watch.changed() => {}
            () = sleep_until(until) => return find(gateway, endpoint, id),
            () = closing.0.cancelled() => return Ok(job),
        }
    }
}

fn view(gateway: &Gateway, job: &JobRecord) -> Result<Json<JobView>, ApiError> {
    gateway.view(job).map(Json).map_err(|e| unreadable(&e))
}

fn unreadable(e: &serde_json::Error) -> ApiError {
    ApiError::new(Code::Internal, format!("the job's result is not JSON: {e}"))
}
