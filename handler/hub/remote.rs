//! What is asked of the hub: which commit a branch is, how long files are and what they hash to, and their bytes.
//!
//! Names and facts come through `hf-hub`. Bytes do not: it neither resumes nor verifies them. They are asked for here,
//! by range, redirect by redirect: the hub's own answers say what the file is, and are held against what it has to be;
//! only the hub gets the token.

use std::time::Duration;

use hf_hub::{HFClient, HFError};
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Method, Response, StatusCode, Url, redirect};

use super::hashes::Hash;
use super::settings::{HubSettings, Token};
use crate::job::{Code, JobError};

const MAX_REDIRECTS: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server may not ask for a longer pause.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Pauses grow to this many times the first.
const MAX_PAUSE: u32 = 30;
/// Attempts in a row without a single byte.
const ATTEMPTS: u32 = 6;

/// A connection to the hub.
pub(super) struct Remote {
    hub: HFClient,
    client: Client,
    endpoint: Url,
    token: Option<Token>,
    pause: Duration,
}

/// What a file has to be.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) repo: String,
    pub(super) path: String,
    pub(super) commit: String,
    pub(super) size: u64,
    pub(super) hash: Hash,
}

/// A file in the hub's list.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub(super) path: String,
    pub(super) size: u64,
    /// Its git object; of a large file that is only a pointer.
    git_blob: String,
    is_pointer: bool,
}

/// Why something was not answered as it should be.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may work later, after this pause if the server said so.
    Passing(JobError, Option<Duration>),
    /// The whole file was sent where a part of it was asked for.
    Whole(JobError),
    Final(JobError),
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        Self::Final(error)
    }
}

impl Remote {
    /// # Errors
    /// [`Code::Internal`] when TLS cannot be set up.
    pub(super) fn new(settings: &HubSettings) -> Result<Self, JobError> {
        let client = |follow| {
            Client::builder()
                // Several connections are wanted, and not one with several streams in it.
                .http1_only()
                .redirect(follow)
                .referer(false)
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(settings.read_timeout)
                .user_agent(concat!("talkie/", env!("CARGO_PKG_VERSION")))
                .build()
        };
        let unusable = |e: &dyn std::fmt::Display| {
            JobError::new(Code::Internal, format!("HTTPS cannot be set up: {e}"))
                .with_hint("install the root certificates of this system (ca-certificates)")
        };
        let mut hub = HFClient::builder()
            .endpoint(settings.endpoint.as_str())
            .client(client(redirect::Policy::limited(MAX_REDIRECTS)).map_err(|e| unusable(&e))?)
            .cache_enabled(false)
            // Attempts are counted here, where a server's wish for a pause is honoured.
            .retry_max_attempts(0);
        if let Some(token) = &settings.token {
            hub = hub.token(token.reveal());
        }
        Ok(Self {
            hub: hub.build().map_err(|e| unusable(&e))?,
            client: client(redirect::Policy::none()).map_err(|e| unusable(&e))?,
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            pause: settings.pause,
        })
    }

    /// The commit that `branch` of `repo` is now.
    pub(super) async fn commit(&self, repo: &str, branch: &str) -> Result<String, JobError> {
        let (owner, name) = hf_hub::split_id(repo);
        let what = &format!("branch `{branch}` of {repo}");
        let ask = move || async move {
            let model = self.hub.model(owner, name);
            model.info().revision(branch).send().await.map_err(|e| failure(what, e))
        };
        let info = self.patiently(ask).await?;
        let is_commit = |sha: &String| sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit());
        info.sha.filter(is_commit).ok_or_else(|| {
            JobError::new(Code::ModelDownloadFailed, format!("the hub names no commit for {what}"))
                .with_reason("MODEL_METADATA")
        })
    }

    /// The files at `paths` of `repo`, as they are at `commit`.
    pub(super) async fn list(
        &self,
        repo: &str,
        commit: &str,
        paths: Vec<String>,
    ) -> Result<Vec<Listed>, JobError> {
        use hf_hub::repository::RepoTreeEntry;
        let (owner, name) = hf_hub::split_id(repo);
        let (what, paths) = (&format!("{repo} at {commit}"), &paths);
        let ask = move || async move {
            let model = self.hub.model(owner, name);
            let sent = model.get_paths_info().paths(paths.clone()).revision(commit).send();
            sent.await.map_err(|e| failure(what, e))
        };
        let entries = self.patiently(ask).await?;
        let listed = entries.into_iter().filter_map(|entry| match entry {
            RepoTreeEntry::File { oid, size, path, lfs, .. } => {
                Some(Listed { path, size, git_blob: oid, is_pointer: lfs.is_some() })
            }
            RepoTreeEntry::Directory { .. } => None,
        });
        let listed: Vec<_> = listed.collect();
        match paths.iter().find(|path| !listed.iter().any(|file| file.path == **path)) {
            Some(path) => Err(missing(repo, path, commit)),
            None => Ok(listed),
        }
    }

    /// What `listed` hashes to.
    pub(super) async fn hash(&self, repo: &str, commit: &str, listed: &Listed) -> Result<Hash, JobError> {
        if !listed.is_pointer {
            return Ok(Hash::GitBlob(listed.git_blob.clone()));
        }
        let ask = move || async move {
            let url = self.address(repo, commit, &listed.path);
            let response = self.send(Method::HEAD, url, &[]).await?;
            match response.status() {
                status if status.is_success() || status.is_redirection() => Ok(response),
                _ => Err(self.refusal(&format!("{repo}/{}", listed.path), &response)),
            }
        };
        let response = self.patiently(ask).await?;
        etag(response.headers()).and_then(|etag| Hash::from_etag(&etag)).ok_or_else(|| {
            let message = format!("the hub names no hash of {repo}/{}", listed.path);
            JobError::new(Code::ModelDownloadFailed, message)
                .with_reason("MODEL_METADATA")
                .with_hint("write its `sha256` into models.toml")
        })
    }

    /// Asks for the bytes `from..until` of a file. The response begins with the first of them.
    pub(super) async fn open(&self, facts: &Facts, from: u64, until: u64) -> Result<Response, Failure> {
        let range = HeaderValue::try_from(format!("bytes={from}-{}", until - 1)).map_err(internal)?;
        let mut headers =
            vec![(header::RANGE, range), (header::ACCEPT_ENCODING, HeaderValue::from_static("identity"))];
        if from > 0 {
            // Another file than the one that was begun is sent whole, which is refused below.
            let tag = HeaderValue::try_from(format!("\"{}\"", facts.hash.as_str())).map_err(internal)?;
            headers.push((header::IF_RANGE, tag));
        }
        let name = format!("{}/{}", facts.repo, facts.path);
        let mut url = self.address(&facts.repo, &facts.commit, &facts.path);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(Method::GET, url.clone(), &headers).await?;
            if self.is_hub(&url) {
                check_pins(facts, response.headers())?;
            }
            if response.status().is_redirection() {
                let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
                let next = location.and_then(|location| url.join(location).ok());
                url = next.ok_or_else(|| passing(format!("{name} is redirected to nowhere")))?;
                // Elsewhere a file has other tags.
                if !self.is_hub(&url) {
                    headers.retain(|(name, _)| *name != header::IF_RANGE);
                }
                continue;
            }
            if !response.status().is_success() {
                return Err(self.refusal(&name, &response));
            }
            return check_bytes(facts, from, response);
        }
        Err(passing(format!("{name} is redirected more than {MAX_REDIRECTS} times")))
    }

    /// One request, with the token where it is for the hub itself.
    async fn send(
        &self,
        method: Method,
        url: Url,
        headers: &[(header::HeaderName, HeaderValue)],
    ) -> Result<Response, Failure> {
        let is_hub = self.is_hub(&url);
        let mut request = self.client.request(method, url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let (true, Some(token)) = (is_hub, &self.token) {
            request = request.bearer_auth(token.reveal());
        }
        // The address of a file elsewhere holds a signature.
        request
            .send()
            .await
            .map_err(|e| passing(format!("the hub does not answer: {}", chain(&e.without_url()))))
    }

    /// Repeats `ask` after failures that may pass.
    async fn patiently<T, F>(&self, ask: impl Fn() -> F) -> Result<T, JobError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut failures = 0;
        loop {
            match ask().await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Whole(error)) => return Err(error),
                Err(Failure::Passing(error, retry_after)) => {
                    failures += 1;
                    self.pause_or_give_up(error, retry_after, failures).await?;
                }
            }
        }
    }

    /// Waits after the `failures`-th failure in a row.
    ///
    /// # Errors
    /// The failure itself, when there were too many.
    pub(super) async fn pause_or_give_up(
        &self,
        error: JobError,
        retry_after: Option<Duration>,
        failures: u32,
    ) -> Result<(), JobError> {
        if failures >= ATTEMPTS {
            return Err(error);
        }
        tracing::info!(failures, "{}; it is tried again", error.message);
        let grown = self.pause * 2u32.saturating_pow(failures - 1).min(MAX_PAUSE);
        let jittered = grown.mul_f64(rand::random_range(0.5..1.0));
        let told = retry_after.map_or(Duration::ZERO, |told| told.min(MAX_RETRY_AFTER));
        tokio::time::sleep(jittered.max(told)).await;
        Ok(())
    }

    /// `<endpoint>/<owner>/<name>/resolve/<commit>/<path>`.
    fn address(&self, repo: &str, commit: &str, path: &str) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments
                .pop_if_empty()
                .extend(repo.split('/'))
                .extend(["resolve", commit])
                .extend(path.split('/'));
        }
        url
    }

    fn is_hub(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// What a status that is no success means.
    fn refusal(&self, name: &str, response: &Response) -> Failure {
        let status = response.status();
        let message = format!("{name} is refused with {status}");
        match status {
            // Elsewhere it is the signature of the address that has expired, and the hub gives out a new one.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.is_hub(response.url()) => {
                auth(message).into()
            }
            StatusCode::NOT_FOUND | StatusCode::GONE if self.is_hub(response.url()) => {
                download_failed(message).with_reason("MODEL_FILE_MISSING").with_retryable(false).into()
            }
            _ => Failure::Passing(download_failed(message), retry_after(response.headers())),
        }
    }
}

/// Holds what the hub says of a file against what it has to be.
fn check_pins(facts: &Facts, headers: &HeaderMap) -> Result<(), JobError> {
    let moved = |what: &str, found: &str, expected: &str| {
        let message =
            format!("{what} of {}/{} is {found} on the hub, expected {expected}", facts.repo, facts.path);
        Err(changed(message))
    };
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(commit) = text("x-repo-commit").filter(|commit| *commit != facts.commit) {
        return moved("the commit", commit, &facts.commit);
    }
    if let Some(size) = text("x-linked-size").filter(|size| size.parse() != Ok(facts.size)) {
        return moved("the size", size, &facts.size.to_string());
    }
    match etag(headers).and_then(|etag| Hash::from_etag(&etag)) {
        Some(hash) if hash.contradicts(&facts.hash) => moved("the hash", hash.as_str(), facts.hash.as_str()),
        _ => Ok(()),
    }
}

/// Whether the body is the bytes from `from` of a file of the right length.
fn check_bytes(facts: &Facts, from: u64, response: Response) -> Result<Response, Failure> {
    let name = format!("{}/{}", facts.repo, facts.path);
    if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let parts = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('/'));
        let fits = parts.is_some_and(|(range, total)| {
            let begins = range.split('-').next().is_some_and(|start| start.parse() == Ok(from));
            begins && (total == "*" || total.parse() == Ok(facts.size))
        });
        let range = range.unwrap_or("no range");
        return match fits {
            true => Ok(response),
            false => {
                let message =
                    format!("{name} was answered with {range:.80}, expected {from}- of {} bytes", facts.size);
                Err(passing(message))
            }
        };
    }
    let len = response.content_length();
    if let Some(len) = len.filter(|len| *len != facts.size) {
        return Err(passing(format!("{name} was answered with {len} bytes, expected {}", facts.size)));
    }
    match from {
        0 => Ok(response),
        _ => Err(Failure::Whole(download_failed(format!("{name} is sent whole only, and was cut")))),
    }
}

fn etag(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-linked-etag").or_else(|| headers.get(header::ETAG))?;
    value.to_str().ok().map(str::to_string)
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// What an error of `hf-hub` means for the question about `what`.
fn failure(what: &str, error: HFError) -> Failure {
    let message = format!("the hub cannot be asked about {what}");
    let (status, retry_after) = match &error {
        HFError::AuthRequired { context } | HFError::Forbidden { context } => {
            return auth(format!("{message}: {}", context.status)).into();
        }
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } | HFError::EntryNotFound { .. } => {
            return download_failed(format!("{message}: there is no such repository, revision or file"))
                .with_reason("MODEL_FILE_MISSING")
                .with_retryable(false)
                .into();
        }
        HFError::RateLimited { retry_after, context } => (context.status.to_string(), *retry_after),
        HFError::Http { context } => (context.status.to_string(), None),
        HFError::Request { source, .. } => (chain(source), None),
        other => (other.to_string(), None),
    };
    Failure::Passing(download_failed(format!("{message}: {status}")), retry_after)
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// A download that did not work, and may later.
pub(super) fn download_failed(message: String) -> JobError {
    JobError::new(Code::ModelDownloadFailed, message)
}

/// The hub has another file than the one that is pinned or was learned.
pub(super) fn changed(message: String) -> JobError {
    download_failed(message)
        .with_reason("MODEL_CHANGED")
        .with_hint(
            "what is pinned or was learned counts: change models.toml, or delete the file and its receipt",
        )
        .with_retryable(false)
}

/// A failure that may pass.
pub(super) fn passing(message: String) -> Failure {
    Failure::Passing(download_failed(message), None)
}

fn auth(message: String) -> JobError {
    download_failed(message)
        .with_reason("MODEL_AUTH")
        .with_hint("set HF_TOKEN to a token that may read the repository; a gated one asks to accept its terms first")
        .with_retryable(false)
}

fn missing(repo: &str, path: &str, commit: &str) -> JobError {
    download_failed(format!("{repo} has no file {path} at {commit}"))
        .with_reason("MODEL_FILE_MISSING")
        .with_retryable(false)
}

fn internal(e: impl std::fmt::Display) -> Failure {
    JobError::new(Code::Internal, format!("a header cannot be sent: {e}")).into()
}
