//! `output.put_url`: a video sent to the URL that the job brings, under the rules for URLs that are fetched.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body_util::StreamBody;
use hyper::body::Frame;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::redirect::Policy;
use reqwest::{Body, Client, Url};
use talkie::request::redact_url;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::inputs::{FetchPolicy, chain, check_url, guarded_client};
use crate::job::{Code, JobError};

/// Tries, with a pause after each that doubles.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// For one try: a long video over a slow line.
const TIMEOUT: Duration = Duration::from_secs(900);
const BLOCK_BYTES: usize = 64 << 10;

/// The URL in `output.put_url`, if something may be sent there.
///
/// # Errors
/// [`Code::UrlNotAllowed`].
pub(super) fn parse_url(text: &str, allow_private: bool) -> Result<Url, JobError> {
    let refused = |why: &str| {
        JobError::new(Code::UrlNotAllowed, format!("`output.put_url` at {} {why}", redact_url(text)))
            .with_hint("give a presigned public http(s) URL")
    };
    let url = Url::parse(text).map_err(|e| refused(&format!("is not a URL ({e})")))?;
    check_url(&url, allow_private).map_err(|e| refused(&e.0))?;
    Ok(url)
}

/// Sends videos.
pub(super) struct Put {
    policy: FetchPolicy,
    /// Made at the first use, since few jobs need it.
    client: OnceLock<Result<Client, JobError>>,
}

impl Put {
    pub(super) fn new(policy: FetchPolicy) -> Self {
        Self { policy: FetchPolicy { total_timeout: TIMEOUT, ..policy }, client: OnceLock::new() }
    }

    /// Sends the video at `path`.
    ///
    /// # Errors
    /// [`Code::UploadFailed`]; it is retryable where the server, and not the URL, may be the cause.
    pub(super) async fn send(&self, url: &Url, path: &Path) -> Result<(), JobError> {
        let client = self.client.get_or_init(|| guarded_client(&self.policy, Policy::none()));
        let client = client.as_ref().map_err(Clone::clone)?;
        let mut pause = FIRST_PAUSE;
        for _ in 1..TRIES {
            match try_send(client, url, path).await {
                Err(e) if e.retryable => {
                    tracing::warn!("{e}; it is tried again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                settled => return settled,
            }
        }
        try_send(client, url, path).await
    }
}

async fn try_send(client: &Client, url: &Url, path: &Path) -> Result<(), JobError> {
    let shown = redact_url(url.as_str());
    let failed = |why: String, passing| {
        let message = format!("the video could not be sent to `output.put_url` at {shown}: {why}");
        JobError::new(Code::UploadFailed, message).with_retryable(passing)
    };
    let unreadable = |e: std::io::Error| failed(format!("its file cannot be read: {e}"), false);
    let file = File::open(path).await.map_err(unreadable)?;
    let len = file.metadata().await.map_err(unreadable)?.len();
    let request = client.put(url.clone()).header(CONTENT_TYPE, "video/mp4").header(CONTENT_LENGTH, len);
    let response = request.body(body(file)).send().await;
    let response = response.map_err(|e| failed(chain(&e.without_url()), true))?;
    let status = response.status();
    match status.is_success() {
        true => Ok(()),
        false => {
            let passing = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
            let error = failed(format!("it was answered with {status}, expected 200"), passing);
            Err(error.with_detail("status", status.as_u16()))
        }
    }
}

/// The file in blocks.
fn body(file: File) -> Body {
    let blocks = stream::unfold(file, |mut file| async move {
        let mut block = vec![0; BLOCK_BYTES];
        match file.read(&mut block).await {
            Ok(0) => None,
            Ok(len) => {
                block.truncate(len);
                Some((Ok(Frame::data(Bytes::from(block))), file))
            }
            Err(e) => Some((Err(e), file)),
        }
    });
    Body::wrap(StreamBody::new(blocks))
}
