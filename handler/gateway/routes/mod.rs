//! The routes: what clients call, what workers call, and what the gateway says of itself.

mod body;
pub mod client;
mod query;
mod site;
pub mod worker;

use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, RawPathParams, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::Gateway;
use super::error::ApiError;
use super::metrics::{Metrics, measure};
use super::quota::Operation;
use super::store::{JobRecord, Queue};

/// The longest name of an endpoint.
const ENDPOINT_BYTES: usize = 64;
/// The longest id that is looked up; ours have 44 letters at most.
const ID_BYTES: usize = 64;

/// Everything that `gateway` answers.
pub fn router(gateway: &Arc<Gateway>) -> Router {
    let metrics = Arc::new(Metrics::default());
    let api = client::router(gateway);
    let endpoint = client::endpoint_router(gateway).merge(api.clone()).merge(worker::router());
    let router = Router::new()
        .nest("/v2/{endpoint}", endpoint)
        .merge(api)
        .merge(site::router(gateway, &metrics))
        .fallback(|| async { ApiError::of_status(axum::http::StatusCode::NOT_FOUND) })
        .layer(map_response(in_words))
        .layer(from_fn_with_state(metrics, measure))
        .layer(map_response(protect))
        .with_state(gateway.clone());
    let origins = &gateway.config.allowed_origins;
    if origins.is_empty() { router } else { router.layer(cors(origins)) }
}

/// Lets pages of these origins call.
fn cors(origins: &[String]) -> CorsLayer {
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        // What is no header is no origin either.
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse::<HeaderValue>().ok())),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("idempotency-key"),
        ])
        .expose_headers([header::RETRY_AFTER])
}

/// Gives an error that has no words the words of ours: those of the HTTP library come as plain text, or bare.
async fn in_words(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let is_json = |value: &HeaderValue| value.as_bytes().starts_with(b"application/json");
    if !is_error || response.headers().get(header::CONTENT_TYPE).is_some_and(is_json) {
        return response;
    }
    let (parts, _) = response.into_parts();
    let mut worded = ApiError::of_status(status).into_response();
    for name in [header::ALLOW, header::RETRY_AFTER, header::CONNECTION] {
        if let Some(value) = parts.headers.get(&name) {
            worded.headers_mut().insert(name, value.clone());
        }
    }
    worded
}

/// Tells browsers to take an answer for nothing else than it is, and to keep it to themselves.
async fn protect(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        if !headers.contains_key(&name) {
            headers.insert(name, HeaderValue::from_static(value));
        }
    }
    response
}

/// Who asks for what.
#[derive(Clone)]
struct Gate {
    gateway: Arc<Gateway>,
    operation: Operation,
}

/// The id of the key of a request; None where none is needed.
#[derive(Clone)]
struct Caller(Option<String>);

/// Lets in who may, and counts it for as long as it takes to answer.
async fn enter(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let visit = gate.gateway.auth.enter(request.method(), request.headers(), gate.operation);
    match visit {
        Ok(visit) => {
            request.extensions_mut().insert(Caller(visit.key));
            let response = next.run(request).await;
            drop(visit.pass);
            response
        }
        Err(e) => {
            let (parts, body) = request.into_parts();
            body::forget(&parts.headers, body).await;
            e.into_response()
        }
    }
}

/// The endpoint that a path names, or the local one.
struct Endpoint(String);

impl FromRequestParts<Arc<Gateway>> for Endpoint {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let Some(name) = path_part(parts, gateway, "endpoint").await? else {
            return Ok(Self(gateway.config.endpoint.clone()));
        };
        let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let is_name = (1..=ENDPOINT_BYTES).contains(&name.len()) && name.bytes().all(letter);
        // On this machine any name will do. Where others come, only those are served that someone has set up.
        let is_served = gateway.config.addr.ip().is_loopback()
            || name == gateway.config.endpoint
            || gateway.pool.queue_of(&name) != Queue::Talkie;
        if is_name && is_served {
            return Ok(Self(name));
        }
        let status = axum::http::StatusCode::NOT_FOUND;
        Err(ApiError::new(crate::job::Code::NotFound, "there is no such endpoint").with_status(status))
    }
}

/// The job that a path names, which may be none of ours.
struct JobId(String);

impl FromRequestParts<Arc<Gateway>> for JobId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let id = path_part(parts, gateway, "id").await?.unwrap_or_default();
        let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if (1..=ID_BYTES).contains(&id.len()) && id.bytes().all(letter) {
            return Ok(Self(id));
        }
        Err(ApiError::no_such_job())
    }
}

async fn path_part(
    parts: &mut Parts,
    gateway: &Arc<Gateway>,
    name: &str,
) -> Result<Option<String>, ApiError> {
    // What is not UTF-8 names nothing.
    let found =
        RawPathParams::from_request_parts(parts, gateway).await.map_err(|_| ApiError::no_such_job())?;
    Ok(found.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
}

/// The query of a request.
struct Query(Uri);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self(parts.uri.clone()))
    }
}

/// The job `id`, if it was sent to `endpoint`.
fn find(gateway: &Gateway, endpoint: &str, id: &str) -> Result<JobRecord, ApiError> {
    let job = gateway.store.job(id)?;
    job.filter(|job| job.endpoint == endpoint).ok_or_else(ApiError::no_such_job)
}
