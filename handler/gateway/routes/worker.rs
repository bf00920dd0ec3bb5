//! RunPod's worker API: take, stop, ping, done, stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, Limited};
use serde_json::{Map, Value, json};

use crate::gateway::Gateway;
use crate::gateway::error::ApiError;
use crate::gateway::pool::{Turn, Visitor};
use crate::gateway::store::{Lease, Loss, Outcome};
use crate::job::{Code, JobError};
use crate::runpod::protocol::{Job, Post, Reporter, error_text};

/// How long a poll is kept open. The Python worker gives up after 90 s, and proxies often after 60 s or 30 s.
const HOLD: Duration = Duration::from_secs(25);
/// Seconds after which a worker that is turned away asks again, as the Python worker does in any case.
const ASK_LATER_SECONDS: &str = "5";
/// Jobs handed over at once.
const MOST_JOBS: usize = 64;

/// The worker routes below `/v2/{endpoint}`.
pub fn router() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/job-take/{worker}", get(take))
        .route("/job-take-batch/{worker}", get(take_batch))
        .route("/job-stop/{worker}", get(stops))
        .route("/job-done/{worker}/{job}", post(done))
        .route("/job-stream/{worker}/{job}", post(stream))
        .route("/ping/{worker}", get(ping))
}

async fn take(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    match call.take(&gateway, 1, &headers).await {
        Ok(jobs) => jobs.into_iter().next().map_or_else(nothing, |job| Json(job).into_response()),
        Err(other) => other,
    }
}

async fn take_batch(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    let most = call.parameter("batch_size").and_then(|n| n.parse().ok()).unwrap_or(1);
    match call.take(&gateway, most, &headers).await {
        Ok(jobs) if jobs.is_empty() => nothing(),
        Ok(jobs) => Json(jobs).into_response(),
        Err(other) => other,
    }
}

async fn stops(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    if !call.is_known(&gateway, &headers) {
        return later();
    }
    match gateway.pool.stops(&call.visitor, Instant::now() + HOLD).await {
        Turn::Given(jobs) => Json(json!({"jobsToStop": jobs})).into_response(),
        Turn::Nothing => nothing(),
        Turn::Later => later(),
    }
}

/// A result, or progress. Whatever can be said about it is said in the job; the worker hears 200, since it would
/// throw away or repeat what is answered otherwise.
async fn done(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker, job)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    call.check(&gateway, &headers)?;
    let (worker, job) = (call.visitor.worker.as_str(), split(&job).0);
    let most = gateway.config.max_result_bytes;
    let (outcome, stop) = match read(body, most).await? {
        Some(body) => match Post::parse(&body) {
            Post::Progress(progress) => {
                gateway.pool.progressed(worker, job, || gateway.hub.set_progress(job, progress));
                return Ok(StatusCode::OK);
            }
            Post::Finished { error, output, stop_pod } => {
                if let Some(loss) = error.as_deref().and_then(given_back) {
                    gateway.pool.give_back(worker, job, loss).await?;
                    return Ok(StatusCode::OK);
                }
                (outcome(error, output), stop_pod)
            }
        },
        None => (Outcome::Failed(too_large(worker, most)), false),
    };
    if !gateway.pool.finish(worker, job, outcome, stop).await? {
        tracing::info!(worker, job, "a result of worker {worker} for job {job} came too late, or again");
    }
    Ok(StatusCode::OK)
}

/// A part of a result.
async fn stream(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker, job)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    call.check(&gateway, &headers)?;
    let (worker, job) = (call.visitor.worker.as_str(), split(&job).0);
    let most = gateway.config.max_result_bytes;
    let Some(body) = read(body, most).await? else {
        tracing::warn!(worker, job, "a part of the result of job {job} has more than {most} bytes: left out");
        return Ok(StatusCode::OK);
    };
    if let Post::Finished { error: None, output: Some(output), .. } = Post::parse(&body)
        && gateway.store.push_chunk(job, worker, output.to_string()).await?
    {
        gateway.hub.job_changed(job);
    }
    Ok(StatusCode::OK)
}

async fn ping(
    State(gateway): State<Arc<Gateway>>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let call = Call::new(endpoint, &worker, query.as_deref(), &headers);
    call.check(&gateway, &headers)?;
    if call.parameter("status") == Some("unhealthy") {
        let said = |name| call.parameter(name).unwrap_or("unknown");
        gateway.pool.unhealthy(&call.visitor, &format!("{}: {}", said("check"), said("reason")));
        return Ok(StatusCode::OK);
    }
    let jobs = call.parameter("job_id").unwrap_or_default();
    let jobs: Vec<String> =
        jobs.split(',').map(str::trim).filter(|job| !job.is_empty()).map(str::to_string).collect();
    gateway.pool.pinged(&call.visitor, &jobs).await;
    Ok(StatusCode::OK)
}

/// A worker's request.
struct Call {
    visitor: Visitor,
    parameters: Vec<(String, String)>,
}

impl Call {
    /// Of a worker whose id is `segment` of the path, where parameters may be glued to it.
    fn new(endpoint: String, segment: &str, query: Option<&str>, headers: &HeaderMap) -> Self {
        let (worker, glued) = split(segment);
        let mut parameters = Vec::new();
        for text in [glued, query.unwrap_or_default()] {
            parameters.extend(url_pairs(text));
        }
        let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
        let talkie = agent.is_some_and(|agent| agent.starts_with("talkie/"));
        Self { visitor: Visitor { worker: worker.to_string(), endpoint, talkie }, parameters }
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn is_known(&self, gateway: &Gateway, headers: &HeaderMap) -> bool {
        !self.visitor.worker.is_empty() && gateway.auth.is_worker(headers, &self.visitor.worker)
    }

    fn check(&self, gateway: &Gateway, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_known(gateway, headers) {
            return Ok(());
        }
        Err(ApiError::new(Code::Unauthorized, "the key does not open the worker routes for this worker"))
    }

    /// At most `most` jobs, or the answer that there are none.
    async fn take(
        &self,
        gateway: &Arc<Gateway>,
        most: usize,
        headers: &HeaderMap,
    ) -> Result<Vec<Job>, Response> {
        if !self.is_known(gateway, headers) {
            return Err(later());
        }
        let idle = self.parameter("job_in_progress") == Some("0");
        let most = most.clamp(1, MOST_JOBS);
        let until = Instant::now() + HOLD;
        let leases = match gateway.pool.take(&self.visitor, most, idle, until).await {
            Ok(Turn::Given(leases)) => leases,
            Ok(Turn::Nothing) => return Err(nothing()),
            Ok(Turn::Later) => return Err(later()),
            Err(e) => return Err(ApiError::from(e).into_response()),
        };
        let mut jobs = Vec::new();
        for lease in leases {
            let id = lease.id.clone();
            match unpack(gateway, lease).await {
                Ok(job) => jobs.push(job),
                Err(e) => self.refuse(gateway, &id, &e).await,
            }
        }
        Ok(jobs)
    }

    /// Ends a job that cannot be handed over.
    async fn refuse(&self, gateway: &Gateway, job: &str, e: &JobError) {
        tracing::error!(job, "job {job} cannot be handed to a worker: {e}");
        let outcome = Outcome::Failed(error_text(e, &Reporter::default()));
        if let Err(e) = gateway.pool.finish(&self.visitor.worker, job, outcome, false).await {
            tracing::error!(job, "job {job} waits for the end of its lease: {e}");
        }
    }
}

/// The job of `lease` as its sender wrote it.
async fn unpack(gateway: &Arc<Gateway>, lease: Lease) -> Result<Job, JobError> {
    let gateway = gateway.clone();
    let read = tokio::task::spawn_blocking(move || {
        let broken = |e| JobError::new(Code::Internal, format!("a stored request is not JSON: {e}"));
        let mut request: Value = serde_json::from_str(&lease.request).map_err(broken)?;
        gateway.media.restore(&lease.id, &mut request)?;
        let mut rest = match request {
            Value::Object(fields) => fields,
            // Foreign endpoints may be sent anything.
            other => Map::from_iter([("input".to_string(), other)]),
        };
        rest.remove("id");
        // Workers refuse a job without an input.
        let input = rest.remove("input").unwrap_or(Value::Null);
        Ok(Job { id: lease.id, input, rest })
    });
    read.await.unwrap_or_else(|e| Err(JobError::new(Code::Internal, format!("a job was not read: {e}"))))
}

/// What became of a job whose error says that its worker was at fault and not the job. It runs again; a worker
/// that was told to end has not even used up an attempt.
fn given_back(error: &str) -> Option<Loss> {
    let error: Value = serde_json::from_str(error).ok()?;
    if error.get("code")?.as_str()? != Code::WorkerLost.as_str() {
        return None;
    }
    let reason = error.get("message").and_then(Value::as_str).unwrap_or("its worker gave it back");
    let counts = error.pointer("/details/reason").and_then(Value::as_str) != Some("PREEMPTED");
    Some(Loss { reason: reason.to_string(), log_tail: String::new(), counts })
}

fn outcome(error: Option<String>, output: Option<Value>) -> Outcome {
    match error {
        Some(error) => Outcome::Failed(error),
        None => Outcome::Completed(output.unwrap_or(Value::Null).to_string()),
    }
}

fn too_large(worker: &str, most: usize) -> String {
    let message = format!("the result has more than {most} bytes, which is the most that is kept");
    let error = JobError::new(Code::Internal, message)
        .with_reason("RESULT_TOO_LARGE")
        .with_hint("let the job upload its result and return where it is");
    error_text(&error, &Reporter { hostname: String::new(), worker_id: worker.to_string() })
}

/// The whole body; None when it is longer than `most`.
///
/// # Errors
/// [`Code::InvalidInput`] when it does not come to an end; the worker will send it again.
async fn read(body: Body, most: usize) -> Result<Option<Bytes>, ApiError> {
    match Limited::new(body, most).collect().await {
        Ok(body) => Ok(Some(body.to_bytes())),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => Ok(None),
        Err(e) => {
            let message = format!("the body is not complete: {e}");
            Err(ApiError::new(Code::Internal, message).with_status(StatusCode::SERVICE_UNAVAILABLE))
        }
    }
}

/// An id in a path, and the parameters that the Python worker glues to it where its URL has no query.
fn split(segment: &str) -> (&str, &str) {
    segment.split_once('&').unwrap_or((segment, ""))
}

/// The parameters of a query. One that is not well-formed has none.
fn url_pairs(query: &str) -> Vec<(String, String)> {
    let uri = format!("/?{query}").parse().ok();
    let pairs = uri.and_then(|uri| axum::extract::Query::try_from_uri(&uri).ok());
    pairs.map(|pairs| pairs.0).unwrap_or_default()
}

fn nothing() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// The one answer after which the Python worker pauses.
fn later() -> Response {
    (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, ASK_LATER_SECONDS)]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_where_the_python_worker_glues_them() {
        let headers = HeaderMap::from_iter([(header::USER_AGENT, "talkie/0.1.0".parse().unwrap())]);
        let call = Call::new("ep".into(), "w-1&job_in_progress=0", Some("gpu=A+B&batch_size=3"), &headers);
        assert_eq!((call.visitor.worker.as_str(), call.visitor.talkie), ("w-1", true));
        let found = ["job_in_progress", "gpu", "batch_size", "x"].map(|name| call.parameter(name));
        assert_eq!(found, [Some("0"), Some("A B"), Some("3"), None]);
        assert_eq!(split("job-u1&isStream=false").0, "job-u1");
        let agent = HeaderMap::from_iter([(header::USER_AGENT, "RunPod-Python-SDK/1.12.0".parse().unwrap())]);
        assert!(!Call::new("ep".into(), "w", None, &agent).visitor.talkie);
    }

    #[test]
    fn a_worker_that_is_at_fault_gives_its_job_back() {
        let counts = |error: &JobError| {
            given_back(&error_text(error, &Reporter::default())).map(|loss| (loss.reason, loss.counts))
        };
        let lost = |reason| JobError::new(Code::WorkerLost, "why").with_reason(reason);
        assert_eq!(counts(&lost("PREEMPTED")), Some(("why".to_string(), false)));
        assert_eq!(counts(&lost("WORKER_BROKEN")), Some(("why".to_string(), true)));
        assert_eq!(counts(&JobError::new(Code::EmptyAudio, "why")), None);
        assert!(given_back("WORKER_LOST").is_none() && given_back(r#""WORKER_LOST""#).is_none());
    }

    #[test]
    fn what_a_result_comes_to() {
        let said = |outcome| match outcome {
            Outcome::Completed(json) => format!("completed {json}"),
            Outcome::Failed(error) => format!("failed {error}"),
        };
        assert_eq!(said(outcome(None, Some(json!({"a": 1})))), r#"completed {"a":1}"#);
        assert_eq!(said(outcome(None, None)), "completed null");
        assert_eq!(said(outcome(Some("no".into()), Some(json!(1)))), "failed no");
        let error: Value = serde_json::from_str(&too_large("w", 5)).unwrap();
        assert_eq!(error["details"]["reason"], "RESULT_TOO_LARGE");
    }
}
