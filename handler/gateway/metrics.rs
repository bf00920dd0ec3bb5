//! Figures for Prometheus. No label holds an id, a key or anything else that a client chooses.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::Gateway;
use super::store::Queue;
use crate::job::{Code, JobError};
use crate::memory::host_bytes;

/// Seconds: from what a store of this machine takes to the longest wait for a result.
const SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0];

type Level = Gauge<f64, AtomicU64>;

/// What has been counted so far.
pub struct Metrics {
    requests: Family<Answer, Counter>,
    seconds: Family<Route, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    route: Path,
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: Path,
}

/// A path with names in the places of ids; None for what is no route.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Path(Option<Arc<str>>);

impl EncodeLabelValue for Path {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        EncodeLabelValue::encode(&self.0.as_deref().unwrap_or("none"), encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    state: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
        }
    }
}

impl Metrics {
    /// Everything in the text format, with the present state of `gateway`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn text(&self, gateway: &Gateway) -> Result<String, JobError> {
        let mut registry = Registry::with_prefix("talkie");
        registry.register("http_requests", "Requests that were answered", self.requests.clone());
        registry.register("http_request_seconds", "Time until the answer began", self.seconds.clone());
        let endpoint = &gateway.config.endpoint;
        let (jobs, workers) = (gateway.store.counts(endpoint), gateway.pool.counts(&Queue::Talkie));
        let states = [
            ("in_queue", jobs.in_queue),
            ("in_progress", jobs.in_progress),
            ("completed", jobs.completed),
            ("failed", jobs.failed),
            ("retried", jobs.retried),
        ];
        registry.register("jobs", "Jobs of the local endpoint by where they are", levels(&states));
        let states = [
            ("idle", workers.idle),
            ("initializing", workers.initializing),
            ("running", workers.running),
            ("throttled", workers.throttled),
            ("unhealthy", workers.unhealthy),
        ];
        registry.register("workers", "Workers by what they do", levels(&states));
        registry.register(
            "worker_failures",
            "Workers in a row that have ended without finishing a job; from the second on starts are delayed, and \
             /readyz says why",
            level(gateway.pool.failures().into()),
        );
        let (waiting, _) = gateway.store.waiting(&Queue::Talkie);
        let wait = gateway.store.longest_wait(&Queue::Talkie)?.unwrap_or_default();
        let healthy = f64::from(u8::from(gateway.store.healthy()));
        let memory = host_bytes().unwrap_or(0);
        registry.register("queue_jobs", "Jobs that wait for Talkie's workers", level(waiting as f64));
        registry.register(
            "queue_wait_seconds",
            "How long the first of them has waited",
            level(wait.as_secs_f64()),
        );
        registry.register(
            "store_healthy",
            "Whether the last write to the job store went well",
            level(healthy),
        );
        registry.register("process_resident_memory_bytes", "Memory of the gateway", level(memory as f64));
        let mut text = String::new();
        let failed = |e| JobError::new(Code::Internal, format!("the figures cannot be written: {e}"));
        encode(&mut text, &registry).map_err(failed)?;
        Ok(text)
    }
}

fn level(value: f64) -> Level {
    let level = Level::default();
    level.set(value);
    level
}

fn levels(values: &[(&'static str, u64)]) -> Family<Kind, Level> {
    let family = Family::<Kind, Level>::default();
    for (state, value) in values {
        family.get_or_create(&Kind { state }).set(*value as f64);
    }
    family
}

/// Counts a request and takes its time.
pub async fn measure(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = Path(request.extensions().get::<MatchedPath>().map(|path| Arc::from(path.as_str())));
    let method = word_of(request.method());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    metrics.seconds.get_or_create(&Route { route: route.clone() }).observe(began.elapsed().as_secs_f64());
    metrics.requests.get_or_create(&Answer { route, method, status }).inc();
    response
}

/// A method by its name; one that a client has made up has none.
fn word_of(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        _ => "OTHER",
    }
}
