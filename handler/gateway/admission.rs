//! What a request has to be to become a job. It is refused here, before anything is kept, for everything that
//! can be known from its text and from the media in it.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use talkie::request::{Draft, MediaSource, Medium, read_json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Gateway;
use super::config::ServeConfig;
use super::error::ApiError;
use super::store::{Accepted, Idempotency, NewJob, Queue};
use crate::config::Config;
use crate::disk::free_bytes;
use crate::faults::kill_point;
use crate::generate::{contained, open_image, open_voice, take_media};
use crate::inputs::parse_url;
use crate::job::{Code, JobError};

/// Requests that are decoded at once. One may take half a gigabyte and seconds of a processor.
const CHECKS_AT_ONCE: usize = 2;
/// What bodies may take in memory together, in KiB. More than one of the largest fits in, and many of the usual.
const ROOM_KIB: usize = 256 * 1024;
/// Longer bodies, in bytes, are read where nobody waits for it. Only they can hold texts that go to files.
const LARGE_BODY: usize = 64 * 1024;
/// RunPod's ranges, in milliseconds.
const EXECUTION_TIMEOUT_MS: RangeInclusive<u64> = 5_000..=604_800_000;
/// As above; also of `/status/{id}?ttl=`.
pub const TTL_MS: RangeInclusive<u64> = 10_000..=604_800_000;
/// A day to be made, as RunPod has it, and another for the result to be fetched.
const DEFAULT_TTL: Duration = Duration::from_secs(2 * 86_400);
/// Longest webhook in bytes.
const WEBHOOK_BYTES: usize = 2048;

/// Lets requests in.
pub struct Admission {
    checks: Arc<Semaphore>,
    /// One permit for a KiB.
    room: Arc<Semaphore>,
}

/// A request that has arrived.
pub struct Arrival {
    /// The endpoint in its path.
    pub endpoint: String,
    /// Whether its id shall say that its sender waits.
    pub sync: bool,
    /// The id of its API key.
    pub key: Option<String>,
    /// Its `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// All of it.
    pub body: Bytes,
    /// What it takes in memory.
    pub room: OwnedSemaphorePermit,
}

/// A job that has come of a request.
#[derive(Debug)]
pub struct Admitted {
    /// Its id.
    pub id: String,
    /// Whether the same request has come before, so that the job may be anywhere by now.
    pub earlier: bool,
}

/// An image or a voice that a request holds itself: its field, what it is, its bytes.
pub type InlineMedium = (&'static str, Medium, Vec<u8>);

/// A request that is well-formed.
pub struct Request {
    /// All of it.
    value: Value,
    webhook: Option<String>,
    policy: Policy,
    /// The media that came with it: field and bytes.
    media: Vec<InlineMedium>,
}

/// The `policy` of a request.
#[derive(Debug, Default, PartialEq, Eq)]
struct Policy {
    execution_timeout: Option<Duration>,
    ttl: Option<Duration>,
    low_priority: bool,
}

impl Default for Admission {
    fn default() -> Self {
        let [checks, room] = [CHECKS_AT_ONCE, ROOM_KIB].map(|n| Arc::new(Semaphore::new(n)));
        Self { checks, room }
    }
}

impl Admission {
    /// Room in memory for a body of `bytes`.
    ///
    /// # Errors
    /// [`Code::QueueFull`] when others have it.
    pub fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        self.room.clone().try_acquire_many_owned(kib).map_err(|_| {
            let error = JobError::new(Code::QueueFull, "too many large requests arrive at once");
            ApiError::from(error.with_reason("BUSY").with_hint("wait as `Retry-After` says"))
        })
    }

    /// Makes a job of a request. It is on disk when this returns.
    ///
    /// # Errors
    /// The codes of bad input, and those of [`Store::accept`](super::store::Store::accept).
    pub async fn admit(&self, gateway: &Arc<Gateway>, arrival: Arrival) -> Result<Admitted, ApiError> {
        kill_point("K1");
        check_disk(&gateway.config)?;
        let Arrival { endpoint, sync, key, idempotency_key, body, room: _room } = arrival;
        let queue = gateway.pool.queue_of(&endpoint);
        let (is_large, is_talkie) = (body.len() > LARGE_BODY, queue == Queue::Talkie);
        let idempotency = idempotency_key.map(|given| Idempotency {
            // The endpoint is part of it, since a job is seen under its own endpoint only.
            key: format!("{}/{endpoint}/{given}", key.unwrap_or_default()),
            body_hash: Sha256::digest(&body).into(),
        });
        let service = gateway.config.service.clone();
        let mut request = match is_large {
            true => self.aside(move || Request::read(&body, is_talkie, &service)).await?,
            false => Request::read(&body, is_talkie, &service)?,
        };
        let media = std::mem::take(&mut request.media);
        if !media.is_empty() {
            let service = gateway.config.service.clone();
            self.aside(move || check_media(media, &service)).await?;
        }
        let id = new_id(sync);
        let Request { mut value, webhook, policy, .. } = request;
        let text = match is_large {
            true => {
                let (gateway, id) = (gateway.clone(), id.clone());
                let spill = move || gateway.media.spill(&id, &mut value).map(|()| value.to_string());
                self.aside(spill).await?
            }
            false => value.to_string(),
        };
        let job = NewJob {
            id: id.clone(),
            endpoint,
            queue,
            request: text,
            webhook,
            execution_timeout: policy.execution_timeout.unwrap_or(gateway.config.execution_timeout),
            ttl: policy.ttl.unwrap_or(DEFAULT_TTL),
            low_priority: policy.low_priority,
            idempotency,
        };
        kill_point("K2");
        match gateway.store.accept(job).await {
            Ok(Accepted::New) => Ok(Admitted { id, earlier: false }),
            Ok(Accepted::Same(earlier)) => {
                gateway.media.remove(&id);
                Ok(Admitted { id: earlier, earlier: true })
            }
            Err(e) => {
                gateway.media.remove(&id);
                Err(e.into())
            }
        }
    }

    /// Runs what takes long on a thread of its own, a few at once.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, JobError> + Send + 'static,
    ) -> Result<T, JobError> {
        // Kept by the work itself, which goes on when its sender leaves. The semaphore is never closed.
        let permit = self.checks.clone().acquire_owned().await.ok();
        let work = move || {
            let _permit = permit;
            work()
        };
        let failed = |e| JobError::new(Code::Internal, format!("the request was not read: {e}"));
        tokio::task::spawn_blocking(work).await.map_err(failed)?
    }
}

impl Request {
    /// Reads the body of a request. The input is looked into where `is_talkie` says that Talkie's own workers will
    /// read it.
    ///
    /// # Errors
    /// The codes of bad input.
    pub fn read(body: &[u8], is_talkie: bool, service: &Config) -> Result<Self, JobError> {
        let value = read_json(body)?;
        let Value::Object(fields) = &value else {
            let message = format!("the request is {}, expected an object with `input`", kind_of(&value));
            return Err(invalid(message).with_reason("INVALID_JSON"));
        };
        let Some(input) = fields.get("input") else {
            return Err(JobError::new(Code::MissingField, "`input` is missing")
                .with_hint("send {\"input\": {…}}; /openapi.json has the fields"));
        };
        let policy = Policy::read(fields.get("policy"))?;
        let webhook = webhook(fields.get("webhook"), service.allow_private_urls)?;
        if !matches!(fields.get("s3Config"), None | Some(Value::Null | Value::Object(_))) {
            return Err(wrong("s3Config", &fields["s3Config"], "an object"));
        }
        let media = if is_talkie { inline_media(input, service)? } else { Vec::new() };
        Ok(Self { value, webhook, policy, media })
    }
}

impl Policy {
    fn read(value: Option<&Value>) -> Result<Self, JobError> {
        let fields = match value {
            None | Some(Value::Null) => return Ok(Self::default()),
            Some(Value::Object(fields)) => fields,
            Some(other) => return Err(wrong("policy", other, "an object")),
        };
        let low_priority = match fields.get("lowPriority") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(low)) => *low,
            Some(other) => return Err(wrong("policy.lowPriority", other, "true or false")),
        };
        Ok(Self {
            execution_timeout: milliseconds(fields, "executionTimeout", EXECUTION_TIMEOUT_MS)?,
            ttl: milliseconds(fields, "ttl", TTL_MS)?,
            low_priority,
        })
    }
}

/// Decodes media as a worker will do it, to refuse those that it would refuse.
///
/// # Errors
/// The image and audio codes.
pub fn check_media(media: Vec<InlineMedium>, service: &Config) -> Result<(), JobError> {
    contained(|| {
        for (_, medium, bytes) in media {
            match medium {
                Medium::Image => drop(open_image(&bytes, service)?),
                Medium::Audio => drop(open_voice(bytes, service)?),
            }
        }
        Ok(())
    })
}

fn milliseconds(
    fields: &Map<String, Value>,
    name: &str,
    range: RangeInclusive<u64>,
) -> Result<Option<Duration>, JobError> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|ms| range.contains(ms)) {
            Some(ms) => Ok(Some(Duration::from_millis(ms))),
            None => {
                let expected = format!("milliseconds from {} to {}", range.start(), range.end());
                Err(wrong(&format!("policy.{name}"), value, &expected))
            }
        },
    }
}

fn webhook(value: Option<&Value>, allow_private: bool) -> Result<Option<String>, JobError> {
    let refused = |message: String| {
        invalid(message)
            .with_reason("WEBHOOK_NOT_ALLOWED")
            .with_hint("give a public https URL of at most 2048 bytes")
    };
    let text = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text,
        Some(other) => return Err(refused(format!("`webhook` is {}, expected a URL", kind_of(other)))),
    };
    if text.len() > WEBHOOK_BYTES {
        return Err(refused(format!("`webhook` has {} bytes, expected at most {WEBHOOK_BYTES}", text.len())));
    }
    let url = parse_url("webhook", text, allow_private).map_err(|e| refused(e.message))?;
    if url.scheme() != "https" && !allow_private {
        return Err(refused("`webhook` is not encrypted, expected https".to_string()));
    }
    Ok(Some(text.clone()))
}

/// Checks the fields and the addresses of an input, and returns the media in it.
fn inline_media(input: &Value, service: &Config) -> Result<Vec<InlineMedium>, JobError> {
    if !input.is_object() {
        return Err(wrong("input", input, "an object"));
    }
    let (mut request, _) = Draft::parse(input, &service.limits)?.finish()?;
    if let Some(url) = &request.output.put_url {
        parse_url("output.put_url", url, service.allow_private_urls)?;
    }
    let mut inline = Vec::new();
    for (name, medium, source) in take_media(&mut request) {
        match source {
            MediaSource::Bytes(bytes) => inline.push((name, medium, bytes)),
            MediaSource::Url(url) => drop(parse_url(name, &url, service.allow_private_urls)?),
        }
    }
    Ok(inline)
}

/// Refuses everything when the disk is nearly full.
///
/// # Errors
/// [`Code::StoreFull`].
pub fn check_disk(config: &ServeConfig) -> Result<(), JobError> {
    // Where the system does not tell, the write itself will.
    let Ok(free) = free_bytes(&config.data_dir) else { return Ok(()) };
    if free >= config.min_free_bytes {
        return Ok(());
    }
    let message = format!(
        "the disk of the data folder is nearly full: less than {} bytes are free",
        config.min_free_bytes
    );
    Err(JobError::new(Code::StoreFull, message).with_hint("make room on the disk, or set MIN_FREE_BYTES"))
}

/// In RunPod's form: a random UUID and a region, with `sync-` before it where the sender waits.
fn new_id(sync: bool) -> String {
    let mut bytes = rand::random::<[u8; 16]>();
    // Version 4, variant 1 of RFC 9562.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    format!("{}{}-u1", if sync { "sync-" } else { "" }, parts.join("-"))
}

fn invalid(message: String) -> JobError {
    JobError::new(Code::InvalidInput, message)
}

fn wrong(name: &str, value: &Value, expected: &str) -> JobError {
    let shown = match value {
        Value::Number(number) => number.to_string(),
        other => kind_of(other).to_string(),
    };
    invalid(format!("`{name}` is {shown}, expected {expected}")).with_reason("INVALID_FIELD")
}

/// What `value` is, without saying what is in it.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::config::ConfigArgs;

    fn config(allow_private_urls: bool) -> Config {
        let config = Config::new(&ConfigArgs::default(), |_| None, Path::new("/nonexistent")).unwrap();
        Config { allow_private_urls, ..config }
    }

    fn read(value: &Value, allow_private: bool) -> Result<Request, JobError> {
        Request::read(value.to_string().as_bytes(), false, &config(allow_private))
    }

    #[test]
    fn policies_are_taken_within_runpods_ranges() {
        let request = json!({"input": 1, "policy": {"executionTimeout": 5000, "ttl": 604_800_000, "x": 1}});
        let policy = read(&request, false).unwrap().policy;
        assert_eq!(policy.execution_timeout, Some(Duration::from_secs(5)));
        assert_eq!(policy.ttl, Some(Duration::from_secs(604_800)));
        for bad in [json!(1), json!({"ttl": 9999}), json!({"ttl": 604_800_001}), json!({"ttl": "1"})] {
            assert!(read(&json!({"input": 1, "policy": bad}), false).is_err(), "{bad}");
        }
        for bad in [json!({"executionTimeout": 4999}), json!({"lowPriority": 1}), json!({"ttl": 20000.5})] {
            assert!(read(&json!({"input": 1, "policy": bad}), false).is_err(), "{bad}");
        }
        for none in [json!(null), json!({}), json!({"ttl": null, "lowPriority": null})] {
            assert_eq!(read(&json!({"input": 1, "policy": none}), false).unwrap().policy, Policy::default());
        }
    }

    #[test]
    fn only_development_may_have_webhooks_inside() {
        let webhook = |url: &str, private| read(&json!({"input": 1, "webhook": url}), private);
        assert!(webhook("https://example.com/hook?a=1", false).is_ok());
        assert!(webhook("http://127.0.0.1:3000/hook", true).is_ok());
        for url in
            ["http://example.com/", "https://10.0.0.1/", "https://u:p@example.com/", "", "ftp://x.example/"]
        {
            let e = webhook(url, false).map(drop).unwrap_err();
            assert_eq!(e.details["reason"], "WEBHOOK_NOT_ALLOWED", "{url}: {e}");
        }
        let e = webhook("https://u:secret@example.com/?s3cret", false).map(drop).unwrap_err();
        assert!(!e.message.contains("cret"), "{e}");
    }

    #[test]
    fn ids_have_runpods_form() {
        let (run, sync) = (new_id(false), new_id(true));
        assert_eq!((run.len(), &run[8..9], &run[14..15], &run[36..]), (39, "-", "4", "-u1"), "{run}");
        assert!(sync.starts_with("sync-") && sync.len() == 44, "{sync}");
        assert_ne!(sync[5..], run);
    }
}
