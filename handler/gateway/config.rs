//! Settings of the gateway.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::server;
use crate::config::Config;

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Where to listen.
    pub addr: SocketAddr,
    /// The endpoint that the routes without a prefix stand for.
    pub endpoint: String,
    /// The profile that workers use where a job names none.
    pub model: Option<String>,
    /// Holds the store, the media, the objects and the spool.
    pub data_dir: PathBuf,
    /// How clients reach this gateway, for links; without a slash at its end.
    pub public_url: String,
    /// Origins of pages that may call, or `*`.
    pub allowed_origins: Vec<String>,
    /// A key that clients may use besides those of the store.
    pub api_key: Option<Secret>,
    /// How long an attempt may run where the job does not say.
    pub execution_timeout: Duration,
    /// Bytes of a body of `/run` and of `/runsync`.
    pub max_body_bytes: (usize, usize),
    /// Bytes of a worker's result.
    pub max_result_bytes: usize,
    /// Nothing is accepted when the disk of the data folder has less room than this, in bytes.
    pub min_free_bytes: u64,
    /// What connections may do.
    pub connections: server::Limits,
    /// The settings of every verb, among them the limits of media and URLs.
    pub service: Config,
}

/// The spool of the workers of a gateway that keeps everything in `data_dir`.
pub fn spool(data_dir: &Path) -> PathBuf {
    data_dir.join("spool")
}

/// A text that is never shown.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[REDACTED]")
    }
}
