//! The bodies of requests that carry JSON.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use bytes::BytesMut;
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;

use crate::gateway::Gateway;
use crate::gateway::error::ApiError;
use crate::gateway::server::TooSlow;
use crate::job::{Code, JobError};

/// So much of a body that is not wanted is read and forgotten: a sender who does not listen before it has sent all
/// would not hear why, since what arrives at a closed connection resets it.
const FORGOTTEN_BYTES: usize = 64 << 20;

/// What forms with files are sent as. They are bad input rather than another encoding of the same.
const MULTIPART: &str = "multipart/";

/// A body in memory, and the room that it takes there.
pub(super) struct Received {
    pub(super) bytes: Bytes,
    pub(super) room: OwnedSemaphorePermit,
}

/// Reads a body of JSON, of at most `most` bytes.
///
/// # Errors
/// 415 for anything but JSON, 413 for more than `most` bytes, 408 and 400 for what does not come in time or does
/// not come to an end, 503 when too many bodies are being read.
pub(super) async fn read_json(
    gateway: &Arc<Gateway>,
    headers: &HeaderMap,
    mut body: Body,
    most: usize,
) -> Result<Received, ApiError> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    let expected = declared.map_or(most, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let room = check_type(headers)
        .and_then(|()| if expected > most { Err(too_large(most)) } else { Ok(()) })
        .and_then(|()| gateway.admission.room(expected));
    let room = match room {
        Ok(room) => room,
        Err(e) => {
            forget(headers, body).await;
            return Err(e);
        }
    };
    let mut bytes = BytesMut::with_capacity(declared.map_or(0, |_| expected));
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|e| broken_off(&e))?.into_data() else { continue };
        if bytes.len() + data.len() > most {
            forget(headers, body).await;
            return Err(too_large(most));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Received { bytes: bytes.freeze(), room })
}

fn broken_off(e: &axum::Error) -> ApiError {
    if TooSlow::is_cause_of(e) {
        let error =
            JobError::new(Code::Timeout, "the body did not come in time").with_reason("BODY_TOO_SLOW");
        return ApiError::from(error).with_status(StatusCode::REQUEST_TIMEOUT);
    }
    let error = JobError::new(Code::InvalidInput, "the body did not come to its end");
    error.with_reason("BODY_INCOMPLETE").into()
}

/// JSON in UTF-8, as it is.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or_default());
    let unsupported = |message: String| {
        let error = JobError::new(Code::InvalidInput, message).with_reason("UNSUPPORTED_MEDIA_TYPE");
        let error = error.with_hint("send JSON with the header `Content-Type: application/json`");
        ApiError::from(error).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE)
    };
    if let Some(coding) = text(header::CONTENT_ENCODING).filter(|c| !c.eq_ignore_ascii_case("identity")) {
        let shown: String = coding.chars().take(40).collect();
        return Err(unsupported(format!("`Content-Encoding` is {shown:?}, expected none")));
    }
    let Some(given) = text(header::CONTENT_TYPE) else {
        return Err(unsupported("`Content-Type` is missing, expected application/json".to_string()));
    };
    let mut parts = given.split(';').map(str::trim);
    let is_json = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
    let is_utf8 = parts.filter_map(|part| part.split_once('=')).all(|(name, value)| {
        let value = value.trim_matches('"');
        !name.eq_ignore_ascii_case("charset") || value.eq_ignore_ascii_case("utf-8")
    });
    if is_json && is_utf8 {
        return Ok(());
    }
    if given.get(..MULTIPART.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(MULTIPART)) {
        let error = JobError::new(Code::InvalidInput, "forms are not read, expected JSON");
        let error = error.with_reason("FORM").with_hint("send image and audio as URLs, data URIs or base64");
        return Err(error.into());
    }
    let shown: String = given.chars().take(60).collect();
    Err(unsupported(format!("`Content-Type` is {shown:?}, expected application/json in UTF-8")))
}

/// Reads a body that is not wanted, within limits, unless its sender waits to be asked for it.
pub(super) async fn forget(headers: &HeaderMap, mut body: Body) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let mut forgotten = 0;
    while let Some(Ok(frame)) = body.frame().await {
        forgotten += frame.data_ref().map_or(0, Bytes::len);
        if forgotten > FORGOTTEN_BYTES {
            return;
        }
    }
}

fn too_large(most: usize) -> ApiError {
    let error = JobError::new(Code::InvalidInput, format!("the request has more than {most} bytes"))
        .with_reason("BODY_TOO_LARGE")
        .with_hint("give image and audio as URLs");
    ApiError::from(error).with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(headers: &[(&'static str, &'static str)]) -> bool {
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
        check_type(&headers.collect::<HeaderMap>()).is_ok()
    }

    #[test]
    fn only_plain_json_is_taken() {
        for kind in
            ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=\"utf-8\""]
        {
            assert!(checked(&[("content-type", kind)]), "{kind}");
        }
        for kind in
            ["", "text/plain", "application/json; charset=utf-16", "Multipart/form-data", "application/json5"]
        {
            assert!(!checked(&[("content-type", kind)]), "{kind}");
        }
        assert!(!checked(&[]));
        assert!(!checked(&[("content-type", "application/json"), ("content-encoding", "gzip")]));
        assert!(checked(&[("content-type", "application/json"), ("content-encoding", "identity")]));
    }
}
