//! The platform as a worker sees it: the addresses in `RUNPOD_*`, and a client for them.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, Url, redirect};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use super::protocol::Reporter;
use crate::gateway::config::Secret;
use crate::job::{Code, JobError};

/// How this program names itself.
pub const USER_AGENT: &str = concat!("talkie/", env!("CARGO_PKG_VERSION"));
/// The same, where the Python worker tells the version of RunPod's SDK.
pub const VERSION: &str = concat!("talkie-", env!("CARGO_PKG_VERSION"));
/// An idle connection is not trusted for longer: a worker may be frozen between jobs, and its peer gone.
const POOL_IDLE: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A result of 20 MB over a slow line takes this long at most.
const POST_TIMEOUT: Duration = Duration::from_secs(120);
/// Progress is news: what takes longer is out of date.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait that a `Retry-After` may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// Characters of a reason that fit in an address.
const REASON_CHARS: usize = 256;

/// The addresses of the platform, and who this worker is there.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// This process, to the platform.
    pub worker_id: String,
    /// Who reports errors.
    pub reporter: Reporter,
    /// How often it says that it lives.
    pub ping_interval: Duration,
    take: String,
    /// Holds `$RUNPOD_POD_ID` and `$ID`, for the worker and the job.
    done: String,
    ping: Option<String>,
    key: Option<HeaderValue>,
}

impl Endpoints {
    /// Reads `RUNPOD_*` with `env`. An empty variable is one that is not set.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming the variable that is missing or wrong.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self, JobError> {
        let env = |name: &str| env(name).filter(|value| !value.trim().is_empty());
        let worker_id = env("RUNPOD_POD_ID").unwrap_or_else(|| format!("w-{:016x}", rand::random::<u64>()));
        let gpu = env("RUNPOD_GPU_TYPE_ID").unwrap_or_default();
        let template = |name: &str| {
            let Some(text) = env(name) else { return Ok(None) };
            let text = text.replace("$RUNPOD_GPU_TYPE_ID", &gpu);
            let sample = expand(&text, &worker_id, "job");
            match Url::parse(&sample) {
                Ok(url) if matches!(url.scheme(), "http" | "https") => Ok(Some(text)),
                _ => Err(wrong(name, &sample, "an http or https URL")),
            }
        };
        let required = |name: &str| {
            let missing = || {
                let message = format!("`{name}` is not set, expected the URL that the platform gives");
                JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
            };
            template(name)?.ok_or_else(missing)
        };
        let take = expand(&required("RUNPOD_WEBHOOK_GET_JOB")?, &worker_id, &worker_id);
        if !take.contains("/job-take/") {
            return Err(wrong("RUNPOD_WEBHOOK_GET_JOB", &take, "a URL with `/job-take/` in its path"));
        }
        let interval = env("RUNPOD_PING_INTERVAL").unwrap_or_else(|| "10000".to_string());
        let ping_interval = interval
            .trim()
            .parse()
            .ok()
            .filter(|ms| (10..=3_600_000).contains(ms))
            .ok_or_else(|| wrong("RUNPOD_PING_INTERVAL", &interval, "milliseconds from 10 to 3600000"))?;
        let ping = template("RUNPOD_WEBHOOK_PING")?;
        if ping.is_none() {
            tracing::warn!("`RUNPOD_WEBHOOK_PING` is not set: no heartbeat is sent");
        }
        Ok(Self {
            reporter: Reporter {
                hostname: env("RUNPOD_POD_HOSTNAME").unwrap_or_else(|| "unknown".to_string()),
                worker_id: worker_id.clone(),
            },
            ping_interval: Duration::from_millis(ping_interval),
            take,
            done: required("RUNPOD_WEBHOOK_POST_OUTPUT")?,
            ping: ping.map(|text| expand(&text, &worker_id, &worker_id)),
            key: env("RUNPOD_AI_API_KEY").map(|key| header_of(&Secret::new(key))).transpose()?,
            worker_id,
        })
    }

    /// Polls for one job, or for as many as there are free slots.
    fn take_url(&self, free: usize, in_progress: bool) -> String {
        let in_progress = u8::from(in_progress).to_string();
        if free < 2 {
            return with_query(&self.take, &[("job_in_progress", &in_progress)]);
        }
        let batch = self.take.replacen("/job-take/", "/job-take-batch/", 1);
        with_query(&batch, &[("batch_size", &free.to_string()), ("job_in_progress", &in_progress)])
    }

    /// Whether the platform is a gateway that speaks plain HTTP, such as one on the same machine.
    fn need_no_tls(&self) -> bool {
        [Some(&self.take), Some(&self.done), self.ping.as_ref()]
            .into_iter()
            .flatten()
            .all(|url| url.starts_with("http://"))
    }

    fn stop_url(&self) -> String {
        self.take.replacen("/job-take/", "/job-stop/", 1)
    }

    fn done_url(&self, worker: &str, job: &str) -> String {
        with_query(&expand(&self.done, worker, &encoded(job)), &[("isStream", "false")])
    }

    fn ping_url(&self, query: &[(&str, &str)]) -> Option<String> {
        Some(with_query(self.ping.as_deref()?, &[query, &[("runpod_version", VERSION)]].concat()))
    }
}

fn expand(template: &str, worker: &str, id: &str) -> String {
    template.replace("$RUNPOD_POD_ID", worker).replace("$ID", id)
}

/// Adds parameters to an address that may or may not have some.
fn with_query(url: &str, parameters: &[(&str, &str)]) -> String {
    let mut url = url.to_string();
    for (name, value) in parameters {
        url.push(if url.contains('?') { '&' } else { '?' });
        url.push_str(&format!("{name}={}", encoded(value)));
    }
    url
}

/// `text` with everything escaped that has a meaning in an address. Ids as RunPod makes them stay as they are.
fn encoded(text: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(byte);
    let escape = |byte: u8| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}

fn header_of(key: &Secret) -> Result<HeaderValue, JobError> {
    let mut header = HeaderValue::from_str(key.expose().trim()).map_err(|_| {
        let message = "`RUNPOD_AI_API_KEY` holds characters that no HTTP header can, expected a key";
        JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

/// Says what a variable was, without what may follow a `?`.
fn wrong(name: &str, value: &str, expected: &str) -> JobError {
    let shown = value.split('?').next().unwrap_or_default();
    JobError::new(Code::InvalidInput, format!("`{name}` is {shown:?}, expected {expected}"))
        .with_reason("CONFIG")
}

/// The platform's answer, whatever it is.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// What `Retry-After` asks for.
    pub retry_after: Option<Duration>,
    /// The body.
    pub body: Bytes,
    /// How long the platform took.
    pub after: Duration,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// None came in time.
    TimedOut,
    /// The connection failed; in words.
    Failed(String),
}

/// A client of the platform; clones share its connections.
#[derive(Clone)]
pub struct Platform {
    endpoints: Arc<Endpoints>,
    http: Client,
    poll_timeout: Duration,
}

impl Platform {
    /// A client for `endpoints` whose polls are given up, and begun again, after `poll_timeout`.
    ///
    /// # Errors
    /// [`Code::Internal`] when there is no TLS.
    pub fn new(endpoints: Arc<Endpoints>, poll_timeout: Duration) -> Result<Self, JobError> {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .http1_only()
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE);
        // Reading the system's certificates takes longer than all else before the first take.
        let builder = if endpoints.need_no_tls() { builder.tls_certs_only([]) } else { builder };
        let http = builder
            .build()
            .map_err(|e| JobError::new(Code::Internal, format!("no HTTP client can be made: {e}")))?;
        Ok(Self { endpoints, http, poll_timeout })
    }

    /// Who this worker is.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// Polls for at most `free` jobs.
    pub async fn take(&self, free: usize, in_progress: bool) -> Result<Reply, NoReply> {
        self.poll(&self.endpoints.take_url(free, in_progress)).await
    }

    /// Polls for the ids of jobs to stop.
    pub async fn stops(&self) -> Result<Reply, NoReply> {
        self.poll(&self.endpoints.stop_url()).await
    }

    async fn poll(&self, url: &str) -> Result<Reply, NoReply> {
        let request = self.http.get(url).header(CONTENT_TYPE, "application/json");
        self.send(request.timeout(self.poll_timeout)).await
    }

    /// Posts what ends `job`, in the name of `worker`.
    pub async fn post_result(&self, worker: &str, job: &str, body: Bytes) -> Result<Reply, NoReply> {
        self.send(self.post(worker, job, body).timeout(POST_TIMEOUT)).await
    }

    /// Posts how far `job` is.
    pub async fn post_progress(&self, job: &str, body: Bytes) -> Result<Reply, NoReply> {
        self.send(self.post(&self.endpoints.worker_id, job, body).timeout(PROGRESS_TIMEOUT)).await
    }

    /// The headers are those of the Python worker, the only one that the platform was made for.
    fn post(&self, worker: &str, job: &str, body: Bytes) -> RequestBuilder {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        headers.insert("charset", HeaderValue::from_static("utf-8"));
        if let Ok(id) = HeaderValue::from_str(job) {
            headers.insert("x-request-id", id);
        }
        self.http.post(self.endpoints.done_url(worker, job)).headers(headers).body(body)
    }

    /// Says that this worker lives, and with which jobs. `None` where the platform wants no heartbeat.
    pub async fn ping(&self, jobs: &[String]) -> Option<Result<Reply, NoReply>> {
        let ids = jobs.join(",");
        let query = [("job_id", ids.as_str())];
        let url = self.endpoints.ping_url(if jobs.is_empty() { &[] } else { &query })?;
        Some(self.send(self.http.get(url).timeout(2 * self.endpoints.ping_interval)).await)
    }

    /// Says that this worker will take no job, because `check` failed.
    pub async fn ping_unhealthy(&self, check: &str, reason: &str) {
        let reason: String = reason.chars().take(REASON_CHARS).collect();
        let query = [("status", "unhealthy"), ("check", check), ("reason", reason.as_str())];
        let Some(url) = self.endpoints.ping_url(&query) else { return };
        if let Err(e) = self.send(self.http.get(url).timeout(PROGRESS_TIMEOUT)).await {
            tracing::warn!(?e, "the platform could not be told that this worker is unhealthy");
        }
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Reply, NoReply> {
        if let Some(key) = &self.endpoints.key {
            request = request.header(AUTHORIZATION, key);
        }
        let began = Instant::now();
        let response = request.send().await.map_err(no_reply)?;
        let status = response.status().as_u16();
        let retry_after =
            response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
        let body = response.bytes().await.map_err(no_reply)?;
        Ok(Reply { status, retry_after, body, after: began.elapsed() })
    }
}

/// The chain of causes, without the address.
fn no_reply(error: reqwest::Error) -> NoReply {
    if error.is_timeout() {
        return NoReply::TimedOut;
    }
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    NoReply::Failed(text)
}

/// Seconds, or a date.
pub(crate) fn retry_after(text: &str) -> Option<Duration> {
    let wait = match text.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = SystemTime::from(OffsetDateTime::parse(text.trim(), &Rfc2822).ok()?);
            at.duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "secret-worker-key";

    fn endpoints(change: &[(&str, &str)]) -> Result<Endpoints, JobError> {
        let usual = [
            ("RUNPOD_WEBHOOK_GET_JOB", "http://p/v2/ep/job-take/$ID?gpu=$RUNPOD_GPU_TYPE_ID"),
            (
                "RUNPOD_WEBHOOK_POST_OUTPUT",
                "http://p/v2/ep/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID",
            ),
            ("RUNPOD_WEBHOOK_PING", "http://p/v2/ep/ping/$RUNPOD_POD_ID"),
            ("RUNPOD_POD_ID", "pod1"),
            ("RUNPOD_GPU_TYPE_ID", "NVIDIA+A40"),
            ("RUNPOD_AI_API_KEY", KEY),
        ];
        Endpoints::from_env(|name| {
            let found = change.iter().chain(&usual).find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_string())
        })
    }

    #[test]
    fn addresses_are_expanded_and_parameters_appended_as_fits() {
        let with = endpoints(&[]).unwrap();
        assert_eq!(with.take_url(1, false), "http://p/v2/ep/job-take/pod1?gpu=NVIDIA+A40&job_in_progress=0");
        assert_eq!(
            with.take_url(3, true),
            "http://p/v2/ep/job-take-batch/pod1?gpu=NVIDIA+A40&batch_size=3&job_in_progress=1"
        );
        assert!(with.need_no_tls());
        assert_eq!(with.stop_url(), "http://p/v2/ep/job-stop/pod1?gpu=NVIDIA+A40");
        assert_eq!(
            with.done_url("pod0", "a-u1"),
            "http://p/v2/ep/job-done/pod0/a-u1?gpu=NVIDIA+A40&isStream=false"
        );
        assert_eq!(
            with.ping_url(&[("job_id", "a,b")]).unwrap(),
            format!("http://p/v2/ep/ping/pod1?job_id=a%2Cb&runpod_version={VERSION}")
        );
        let bare = [
            ("RUNPOD_WEBHOOK_GET_JOB", "http://p/job-take/$ID"),
            ("RUNPOD_WEBHOOK_POST_OUTPUT", "https://p/job-done/$RUNPOD_POD_ID/$ID"),
        ];
        let without = endpoints(&bare).unwrap();
        assert_eq!(without.take_url(1, true), "http://p/job-take/pod1?job_in_progress=1");
        assert_eq!(without.done_url("pod1", "a b/?"), "https://p/job-done/pod1/a%20b%2F%3F?isStream=false");
        assert!(!without.need_no_tls());
    }

    #[test]
    fn a_wrong_variable_is_named_and_the_key_is_not_shown() {
        for (change, said) in [
            (("RUNPOD_WEBHOOK_GET_JOB", ""), "`RUNPOD_WEBHOOK_GET_JOB` is not set"),
            (("RUNPOD_WEBHOOK_GET_JOB", "nowhere"), "`RUNPOD_WEBHOOK_GET_JOB` is \"nowhere\""),
            (
                ("RUNPOD_WEBHOOK_GET_JOB", "http://p/take/$ID?k=v"),
                "is \"http://p/take/pod1\", expected a URL with",
            ),
            (("RUNPOD_WEBHOOK_POST_OUTPUT", "ftp://p"), "an http or https URL"),
            (("RUNPOD_PING_INTERVAL", "soon"), "`RUNPOD_PING_INTERVAL` is \"soon\", expected milliseconds"),
            (("RUNPOD_PING_INTERVAL", "0"), "milliseconds from 10"),
            (("RUNPOD_AI_API_KEY", "secret\nkey"), "`RUNPOD_AI_API_KEY` holds characters"),
        ] {
            let e = endpoints(&[change]).unwrap_err();
            assert!(e.message.contains(said) && !e.message.contains("secret"), "{}", e.message);
        }
        assert!(!format!("{:?}", endpoints(&[]).unwrap()).contains(KEY));
    }

    #[test]
    fn without_a_pod_id_each_process_has_an_id_of_its_own() {
        let ids = [(); 2].map(|()| endpoints(&[("RUNPOD_POD_ID", "")]).unwrap().worker_id);
        assert_ne!(ids[0], ids[1]);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after("7"), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("99999999"), Some(LONGEST_RETRY_AFTER));
        assert_eq!(retry_after("soon"), None);
    }
}
