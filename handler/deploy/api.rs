//! RunPod's REST API v2: requests with retries, and refusals in the words of the contract.

use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Method, Url, redirect};
use serde_json::Value;

use crate::gateway::config::Secret;
use crate::inputs::chain;
use crate::job::{Code, JobError};
use crate::runpod::platform::{USER_AGENT, retry_after};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Making an endpoint takes RunPod some seconds.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Units of pauses between tries.
const PAUSES: [u32; 5] = [1, 2, 4, 8, 16];
/// The longest `Retry-After` that is waited for, in units.
const LONGEST_PAUSE: u32 = 120;

/// A client of the API with one account's key.
pub struct Api {
    http: Client,
    base: Url,
    key: HeaderValue,
    unit: Duration,
}

/// A request that has no answer worth having.
#[derive(Debug)]
pub enum Failure {
    /// The platform has refused it, and nothing was done.
    Refused(JobError),
    /// Whether it was carried out is not known: the connection broke, or the platform failed.
    Unknown(JobError),
}

impl From<Failure> for JobError {
    fn from(failure: Failure) -> Self {
        let (Failure::Refused(error) | Failure::Unknown(error)) = failure;
        error
    }
}

/// What came of one try.
enum Answer {
    Done(Value),
    /// It is worth another try, after as long as the platform asks for.
    Again(Failure, Option<Duration>),
    Failed(Failure),
}

impl Api {
    /// A client for the API at `base` whose pauses are multiples of `unit`.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] for an address that would send the key in the clear, or a key that is none.
    pub fn new(base: &str, key: &Secret, unit: Duration) -> Result<Self, JobError> {
        let wrong = || {
            let message = format!("`RUNPOD_REST_URL` (--runpod-rest-url) is {base:?}, expected an https URL");
            JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
        };
        let base = Url::parse(base).ok().filter(is_confidential).ok_or_else(wrong)?;
        let mut key = HeaderValue::from_str(&format!("Bearer {}", key.expose().trim())).map_err(|_| {
            let message = "`RUNPOD_API_KEY` holds characters that no HTTP header can, expected a key";
            JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
        })?;
        key.set_sensitive(true);
        // RunPod's edge refuses clients that do not name themselves.
        let http = Client::builder()
            .user_agent(USER_AGENT)
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|e| {
                JobError::new(Code::Internal, format!("no HTTP client can be made: {}", chain(&e)))
            })?;
        Ok(Self { http, base, key, unit })
    }

    /// The address of `path`, such as `/serverless`.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base.as_str().trim_end_matches('/'))
    }

    /// Waits for `units` of this client's pauses.
    pub async fn pause(&self, units: u32) {
        tokio::time::sleep(self.unit * units).await;
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// Why there is no answer, when further tries cannot help or did not.
    pub async fn get(&self, path: &str) -> Result<Value, JobError> {
        Ok(self.repeat(Method::GET, &self.url(path), None).await?)
    }

    /// Sets fields. To set them twice is to set them once, so it is tried again like a read.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn patch(&self, path: &str, body: &Value) -> Result<Value, JobError> {
        Ok(self.repeat(Method::PATCH, &self.url(path), Some(body)).await?)
    }

    /// Makes something. Only what was refused for the time being is tried again here: whoever calls has to look
    /// whether it is there before trying once more.
    ///
    /// # Errors
    /// [`Failure::Unknown`] when it may have been made all the same.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.repeat(Method::POST, &self.url(path), Some(body)).await
    }

    /// Asks the endpoint itself, at an address that the API has given, and waits for `timeout`.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] for an address that would send the key in the clear; else as [`Api::get`].
    pub async fn endpoint(
        &self,
        url: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Value, JobError> {
        if !Url::parse(url).is_ok_and(|url| is_confidential(&url)) {
            let message = format!("the endpoint's address is {url:?}, expected an https URL");
            return Err(JobError::new(Code::InvalidInput, message));
        }
        let method = if body.is_some() { Method::POST } else { Method::GET };
        match self.once(&method, url, body, timeout).await {
            Answer::Done(value) => Ok(value),
            Answer::Again(failure, _) | Answer::Failed(failure) => Err(failure.into()),
        }
    }

    async fn repeat(&self, method: Method, url: &str, body: Option<&Value>) -> Result<Value, Failure> {
        for units in PAUSES {
            let (failure, asked) = match self.once(&method, url, body, TIMEOUT).await {
                Answer::Done(value) => return Ok(value),
                Answer::Failed(failure) => return Err(failure),
                Answer::Again(failure @ Failure::Unknown(_), _) if method == Method::POST => {
                    return Err(failure);
                }
                Answer::Again(Failure::Refused(e) | Failure::Unknown(e), asked) => (e, asked),
            };
            let pause = self.unit * units;
            let pause = asked.map_or(pause, |asked| asked.clamp(pause, self.unit * LONGEST_PAUSE));
            tracing::warn!("{method} {url}: {failure}; next try in {pause:?}");
            tokio::time::sleep(pause).await;
        }
        match self.once(&method, url, body, TIMEOUT).await {
            Answer::Done(value) => Ok(value),
            Answer::Again(failure, _) | Answer::Failed(failure) => Err(failure),
        }
    }

    async fn once(&self, method: &Method, url: &str, body: Option<&Value>, timeout: Duration) -> Answer {
        let mut request = self.http.request(method.clone(), url).header(AUTHORIZATION, &self.key);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        let broken = |e: reqwest::Error| {
            let message = format!("{method} {url} has no answer: {}", chain(&e.without_url()));
            let error = JobError::new(Code::Internal, message).with_reason("PLATFORM").with_retryable(true);
            Answer::Again(Failure::Unknown(error), None)
        };
        let response = match request.timeout(timeout).send().await {
            Ok(response) => response,
            Err(e) => return broken(e),
        };
        let status = response.status().as_u16();
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
        let text = match response.bytes().await {
            Ok(text) => text,
            Err(e) => return broken(e),
        };
        if (200..300).contains(&status) {
            return match serde_json::from_slice(&text) {
                Ok(value) => Answer::Done(value),
                Err(e) => {
                    let message = format!("{method} {url} was answered with {status} and no JSON: {e}");
                    let error = JobError::new(Code::Internal, message).with_reason("PLATFORM");
                    Answer::Failed(Failure::Unknown(error))
                }
            };
        }
        let problem = Problem::read(&text);
        let error = problem.error(method, url, status);
        match status {
            429 => Answer::Again(Failure::Refused(error), asked),
            // A full quota comes as a failure of the platform, and no further try changes it.
            500.. if !problem.is_quota() => Answer::Again(Failure::Unknown(error), asked),
            _ => Answer::Failed(Failure::Refused(error)),
        }
    }
}

/// The body of a refusal, as RFC 9457 has it.
struct Problem {
    said: String,
}

impl Problem {
    fn read(text: &[u8]) -> Self {
        let body: Value = serde_json::from_slice(text).unwrap_or_default();
        let field = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_string);
        let mut said: Vec<String> = field("detail").or_else(|| field("title")).into_iter().collect();
        said.extend(field("error"));
        let errors = body.get("errors").and_then(Value::as_array);
        said.extend(
            errors.into_iter().flatten().map(|e| e.as_str().map_or_else(|| e.to_string(), str::to_string)),
        );
        Self { said: said.join("; ") }
    }

    fn is_quota(&self) -> bool {
        self.said.to_ascii_lowercase().contains("quota")
    }

    fn error(&self, method: &Method, url: &str, status: u16) -> JobError {
        let said = if self.said.is_empty() { "no reason is given" } else { &self.said };
        let message = format!("{method} {url} was answered with {status}: {said}");
        let error = |code| JobError::new(code, &*message).with_detail("status", status);
        match status {
            _ if self.is_quota() => error(Code::InvalidInput)
                .with_reason("QUOTA")
                .with_hint("lower `workers.max`, or that of another endpoint of the account"),
            400 | 422 => error(Code::InvalidInput).with_reason("REFUSED"),
            401 => error(Code::Unauthorized).with_hint("`RUNPOD_API_KEY` is not a key of this account"),
            402 => error(Code::Unauthorized).with_reason("BALANCE").with_hint("add funds to the account"),
            403 => error(Code::Unauthorized)
                .with_reason("FORBIDDEN")
                .with_hint("the key needs write access to serverless endpoints and network volumes"),
            404 => error(Code::NotFound),
            429 => error(Code::RateLimited),
            _ => error(Code::Internal).with_reason("PLATFORM").with_retryable(status >= 500),
        }
    }
}

/// Whether a key may be sent there: over TLS, or within this machine.
fn is_confidential(url: &Url) -> bool {
    let is_loopback = matches!(url.host_str(), Some("127.0.0.1" | "[::1]" | "localhost"));
    url.scheme() == "https" || (url.scheme() == "http" && is_loopback)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_goes_over_tls_only() {
        let api = |base: &str| Api::new(base, &Secret::new("canary".into()), Duration::ZERO);
        for base in ["https://api.runpod.io/v2", "https://api.runpod.io/v2/", "http://127.0.0.1:1/v2"] {
            assert!(api(base).unwrap().url("/serverless").ends_with("/v2/serverless"), "{base}");
        }
        for base in ["http://api.runpod.io/v2", "http://127.0.0.1.example/v2", "ftp://x", "x"] {
            assert!(api(base).is_err(), "{base}");
        }
        let e = Api::new("https://x", &Secret::new("a\ncanary".into()), Duration::ZERO).err().unwrap();
        assert!(e.message.contains("`RUNPOD_API_KEY`") && !e.message.contains("canary"), "{}", e.message);
    }

    #[test]
    fn refusals_have_codes() {
        let body = |text: &str| Problem::read(text.as_bytes());
        let error = |text: &str, status| body(text).error(&Method::GET, "https://x/v2", status);
        let e = error(r#"{"title": "Not Found", "status": 404, "detail": "no such endpoint"}"#, 404);
        assert_eq!(
            (e.code, &*e.message),
            (Code::NotFound, "GET https://x/v2 was answered with 404: no such endpoint")
        );
        let e = error(r#"{"title": "T", "detail": "invalid", "errors": ["a", {"b": 1}]}"#, 422);
        assert_eq!((e.code, e.message.ends_with("invalid; a; {\"b\":1}")), (Code::InvalidInput, true));
        assert_eq!(error("<html>", 401).code, Code::Unauthorized);
        assert_eq!(error("", 402).details["reason"], "BALANCE");
        assert!(error("", 503).retryable && !error("", 302).retryable);
        let full = r#"{"error": "Max workers across all endpoints must not exceed your workers quota (5)."}"#;
        let e = error(full, 500);
        assert_eq!((e.code, e.details["reason"].as_str()), (Code::InvalidInput, Some("QUOTA")));
    }
}
