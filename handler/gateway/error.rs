//! Answers that say why not.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::job::{Code, JobError};

/// An HTTP answer with the status of an error and `{"error": {…}}`.
#[derive(Debug)]
pub struct ApiError {
    /// 4xx or 5xx.
    pub status: StatusCode,
    /// What is said.
    pub error: Box<JobError>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

impl ApiError {
    /// An error of `code` with the status that belongs to it.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        JobError::new(code, message).into()
    }

    /// Another status than the code's own.
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Says when to try again.
    pub fn with_retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// No such job, whatever the reason: what is another's or forgotten looks like what never was.
    pub fn no_such_job() -> Self {
        JobError::new(Code::NotFound, "there is no such job here")
            .with_hint("jobs are forgotten after their time, and are seen under their own endpoint only")
            .into()
    }

    /// The words for a `status` that came without any, as those of the HTTP library do.
    pub fn of_status(status: StatusCode) -> Self {
        let (code, reason, message) = match status {
            StatusCode::NOT_FOUND => (Code::NotFound, "NO_ROUTE", "there is nothing at this path"),
            StatusCode::METHOD_NOT_ALLOWED => {
                (Code::InvalidInput, "METHOD_NOT_ALLOWED", "this path takes other methods: see `Allow`")
            }
            status if status.is_client_error() => {
                (Code::InvalidInput, "BAD_REQUEST", "the request is malformed")
            }
            _ => (Code::Internal, "INTERNAL", "the request has failed"),
        };
        let error = JobError::new(code, message).with_reason(reason);
        let error = match code {
            Code::NotFound => error.with_hint("all routes are in /openapi.json"),
            _ => error,
        };
        Self::from(error).with_status(status)
    }
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> Self {
        let passes = is_passing(&error);
        let status = match reason(&error) {
            _ if passes => Ok(StatusCode::SERVICE_UNAVAILABLE),
            // 413 is about bytes, and these are few.
            Some("IMAGE_DIMENSIONS") => Ok(StatusCode::BAD_REQUEST),
            _ => StatusCode::from_u16(error.code.http_status()),
        };
        let is_full = matches!(error.code, Code::QueueFull | Code::StoreFull | Code::RateLimited);
        Self {
            status: status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            error: Box::new(error),
            retry_after: (passes || is_full).then_some(1),
        }
    }
}

/// Whether the store cannot be used for now: another process holds it, the disk fails, or the gateway is ending.
fn is_passing(error: &JobError) -> bool {
    matches!(reason(error), Some("STORE_BUSY" | "STORE_IO" | "STORE_CLOSED"))
}

fn reason(error: &JobError) -> Option<&str> {
    error.details.get("reason").and_then(Value::as_str)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({"error": self.error}))).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
