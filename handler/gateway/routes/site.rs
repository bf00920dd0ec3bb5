//! What the gateway says of itself: the page, its health, its figures, its description.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

use super::{Gate, enter};
use crate::gateway::Gateway;
use crate::gateway::admission::check_disk;
use crate::gateway::error::ApiError;
use crate::gateway::metrics::Metrics;
use crate::gateway::openapi;
use crate::gateway::quota::Operation;
use crate::job::{Code, JobError};

/// The page runs its own script and nothing else, and calls nobody but this gateway. Videos may lie anywhere.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data: blob:; media-src 'self' blob: http: https:; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// The routes that belong to no endpoint.
pub(super) fn router(gateway: &Arc<Gateway>, metrics: &Arc<Metrics>) -> Router<Arc<Gateway>> {
    let gate = Gate { gateway: gateway.clone(), operation: Operation::Status };
    let figures = get(figures).layer(Extension(metrics.clone())).route_layer(from_fn_with_state(gate, enter));
    Router::new()
        .route("/", get(index))
        .route("/page.css", get(|| async { page("text/css", include_str!("../page/page.css")) }))
        .route("/page.js", get(|| async { page("text/javascript", include_str!("../page/page.js")) }))
        .route("/metrics", figures)
        .route(
            "/openapi.json",
            get(|State(g): State<Arc<Gateway>>| async move { Json(openapi::document(&g.config)) }),
        )
        .route("/livez", get(|| async { Json(json!({"status": "alive"})) }))
        .route("/readyz", get(readyz))
}

/// The page, with the limits that it holds files to.
async fn index(State(gateway): State<Arc<Gateway>>) -> Response {
    let (limits, request) = (gateway.config.service.limits, gateway.config.max_body_bytes.0);
    let numbers = [
        ("{image-bytes}", limits.image_bytes),
        ("{audio-bytes}", limits.audio_bytes),
        ("{request-bytes}", request as u64),
    ];
    let text = numbers.iter().fold(include_str!("../page/index.html").to_string(), |text, (name, number)| {
        text.replace(name, &number.to_string())
    });
    page("text/html; charset=utf-8", text)
}

fn page(kind: &'static str, text: impl Into<Body>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    let body: Body = text.into();
    (headers, body).into_response()
}

async fn figures(
    State(gateway): State<Arc<Gateway>>,
    Extension(metrics): Extension<Arc<Metrics>>,
) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.text(&gateway) {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(e) => ApiError::from(e).into_response(),
    }
}

/// Whether jobs can be accepted. A gateway whose workers do not start accepts them, and says what keeps them waiting.
async fn readyz(State(gateway): State<Arc<Gateway>>) -> Result<Json<Value>, ApiError> {
    let unready = |error: JobError| ApiError::from(error).with_status(StatusCode::SERVICE_UNAVAILABLE);
    if !gateway.store.healthy() {
        let error =
            JobError::new(Code::Internal, "the job store cannot be written").with_reason("STORE_UNWRITABLE");
        return Err(unready(error));
    }
    // Any id will do: it is the reading that counts.
    gateway.store.job("ready").map_err(unready)?;
    check_disk(&gateway.config).map_err(unready)?;
    if let Some(bucket) = &gateway.bucket {
        bucket.check().await.map_err(unready)?;
    }
    let mut ready = json!({"status": "ready"});
    if let Some(trouble) = gateway.pool.trouble() {
        ready["trouble"] = trouble.into();
    }
    Ok(Json(ready))
}
