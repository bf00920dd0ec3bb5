//! Flags of `handler serve`, and the settings that they come to.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use reqwest::Url;

use crate::config::{Config, Setting};
use crate::gateway::config::{Secret, ServeConfig, spool};
use crate::gateway::pool::{self, Launch};
use crate::gateway::{Setup, server, store, webhook};
use crate::generate::DeviceChoice;
use crate::job::{Code, JobError};
use crate::storage::embedded::{Embedded, Rules};
use crate::storage::{Storage, StorageArgs, StorageSettings};

/// Between two signs of life of a worker. A lease is six of them.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Two polls of a worker, and a bit.
const SILENCE: Duration = Duration::from_secs(60);
/// A worker delivers what it has after the time that its job was given, and then ends.
const LAST_DELIVERY: Duration = Duration::from_secs(5);
/// What is nobody's business but the gateway's.
const SECRETS: [&str; 2] = ["API_KEY", "WEBHOOK_SECRET"];

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where to listen [default: 127.0.0.1:8000]; another address than this machine's own needs a key
    #[arg(long, env = "ADDR", value_name = "ADDRESS:PORT")]
    addr: Option<String>,
    /// The port on 127.0.0.1, where --addr is not set
    #[arg(long, env = "PORT", value_name = "PORT")]
    port: Option<String>,
    /// The profile for jobs that name none
    #[arg(long, env = "TALKIE_MODEL", value_name = "NAME")]
    model: Option<String>,
    /// A models.toml in place of the built-in one
    #[arg(long, env = "TALKIE_MODELS_FILE", value_name = "FILE")]
    models_file: Option<PathBuf>,
    /// Where the networks run
    #[arg(long, env = "TALKIE_DEVICE", value_enum, default_value_t)]
    device: DeviceChoice,
    /// Folder of jobs, media and videos [default: $XDG_DATA_HOME/talkie, else ~/.local/share/talkie]
    #[arg(long, env = "DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The name of the endpoint that the routes without /v2/… stand for [default: talkie]
    #[arg(long, env = "ENDPOINT", value_name = "NAME")]
    endpoint: Option<String>,
    /// How clients reach this gateway, for links [default: http:// and the address]
    #[arg(long, env = "PUBLIC_URL", value_name = "URL")]
    public_url: Option<String>,
    /// Origins of web pages that may call, separated by commas, or *
    #[arg(long, env = "ALLOWED_ORIGINS", value_name = "ORIGINS")]
    allowed_origins: Option<String>,
    /// A key that clients need, besides those of `handler keys`
    #[arg(long, env = "API_KEY", value_name = "KEY", hide_env_values = true, value_parser = secret)]
    api_key: Option<Secret>,
    /// Signs webhooks, as Standard Webhooks have it: whsec_ and base64
    #[arg(long, env = "WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true, value_parser = secret)]
    webhook_secret: Option<Secret>,
    /// Seconds between the tries of a webhook, separated by commas
    /// [default: 10,10,280,1500,5400,10800,18000,14400,21600,14400]
    #[arg(long, env = "WEBHOOK_PAUSES", value_name = "SECONDS,…")]
    webhook_pauses: Option<String>,
    /// Seconds that the receiver of a webhook may take [default: 20]
    #[arg(long, env = "WEBHOOK_TIMEOUT_SECONDS", value_name = "SECONDS")]
    webhook_timeout_seconds: Option<String>,
    /// Seconds that an idle worker is kept [default: 5]
    #[arg(long, env = "IDLE_TIMEOUT", value_name = "SECONDS")]
    idle_timeout: Option<String>,
    /// Workers that are kept without work [default: 0]
    #[arg(long, env = "MIN_WORKERS", value_name = "N")]
    min_workers: Option<String>,
    /// Workers at most [default: 1, or one per GPU]; 0 where only attached workers are to work
    #[arg(long, env = "MAX_WORKERS", value_name = "N")]
    max_workers: Option<String>,
    /// Seconds that a worker may take to start [default: 420]
    #[arg(long, env = "START_TIMEOUT", value_name = "SECONDS")]
    start_timeout: Option<String>,
    /// Seconds after which a worker is killed that does not stop a cancelled job [default: 15]
    #[arg(long, env = "CANCEL_GRACE_SECONDS", value_name = "SECONDS")]
    cancel_grace_seconds: Option<String>,
    /// Seconds that a job may still run in a worker that is told to end [default: 25]
    #[arg(long, env = "STOP_GRACE_SECONDS", value_name = "SECONDS")]
    stop_grace_seconds: Option<String>,
    /// Seconds between two starts of workers that end at once; doubles each time [default: 1]
    #[arg(long, env = "RESTART_PAUSE", value_name = "SECONDS")]
    restart_pause: Option<String>,
    /// Seconds that a job may run where it does not say itself [default: 600]
    #[arg(long, env = "JOB_TIMEOUT_SECONDS", value_name = "SECONDS")]
    job_timeout_seconds: Option<String>,
    /// Times that a job is started before it fails, when its workers die [default: 3]
    #[arg(long, env = "MAX_ATTEMPTS", value_name = "N")]
    max_attempts: Option<String>,
    /// Jobs that may wait; more are refused [default: 100000]
    #[arg(long, env = "MAX_QUEUED", value_name = "N")]
    max_queued: Option<String>,
    /// Seconds of silence after which an attached worker's jobs are given to another [default: 30]
    #[arg(long, env = "LEASE_SECONDS", value_name = "SECONDS")]
    lease_seconds: Option<String>,
    /// Hours that a finished job is kept [default: 24]
    #[arg(long, env = "JOB_RETENTION_HOURS", value_name = "HOURS")]
    job_retention_hours: Option<String>,
    /// Bytes of a request to /run [default: 10485760]
    #[arg(long, env = "MAX_RUN_BYTES", value_name = "BYTES")]
    max_run_bytes: Option<String>,
    /// Bytes of a request to /runsync [default: 20971520]
    #[arg(long, env = "MAX_RUNSYNC_BYTES", value_name = "BYTES")]
    max_runsync_bytes: Option<String>,
    /// Bytes of disk that have to be free for a job to be accepted [default: 2147483648]
    #[arg(long, env = "MIN_FREE_BYTES", value_name = "BYTES")]
    min_free_bytes: Option<String>,
    /// Connections at once; further ones wait [default: 2048]
    #[arg(long, env = "MAX_CONNECTIONS", value_name = "N")]
    max_connections: Option<String>,
    /// Connections at once from one address of another machine; further ones are closed [default: 64]
    #[arg(long, env = "MAX_CONNECTIONS_PER_ADDRESS", value_name = "N")]
    max_connections_per_address: Option<String>,
    /// Bytes of a worker's result [default: 20971520]
    #[arg(long, env = "MAX_RESULT_BYTES", value_name = "BYTES")]
    max_result_bytes: Option<String>,
    #[command(flatten)]
    storage: StorageArgs,
}

fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_string()))
}

impl Args {
    /// Where to listen.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming flag, variable, value and expectation.
    pub fn addr(&self) -> Result<SocketAddr, JobError> {
        let port = number("PORT", &self.port, "a port from 0 to 65535", 8000)?;
        let default = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        number("ADDR", &self.addr, "an address and a port, such as 127.0.0.1:8000", default)
    }

    /// The settings of a gateway that listens on `addr`. Its folder is made where it is missing.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] naming flag, variable, value and expectation.
    pub fn setup(&self, config: &Config, addr: SocketAddr) -> Result<Setup, JobError> {
        let data_dir = data_dir(self.data_dir.as_deref(), |name| std::env::var_os(name).map(PathBuf::from))?;
        make_private(&data_dir)?;
        let base_url = format!("http://{}", reachable(addr));
        let public_url = text(&self.public_url).unwrap_or(&base_url).trim_end_matches('/').to_string();
        let endpoint = text(&self.endpoint).unwrap_or("talkie").to_string();
        let (bucket, embedded) = match self.storage.settings()? {
            Some(bucket) => (bucket, None),
            None => {
                let embedded = Embedded::open(&data_dir, Rules::default())?;
                let lifetimes = self.storage.lifetimes()?;
                let (base, public) = (url(&base_url)?, url(&public_url)?);
                (embedded.settings(base, public, lifetimes), Some(embedded))
            }
        };
        let gpus = gpus(self.device, |name| std::env::var(name).ok(), Path::new("/"));
        let launch = Launch {
            program: std::env::current_exe()
                .map_err(|e| JobError::new(Code::Internal, format!("this program cannot be found: {e}")))?,
            args: vec!["worker".into()],
            env: self.worker_env(config, &data_dir, &bucket),
            hidden: SECRETS.to_vec(),
            base_url,
            endpoint: endpoint.clone(),
            logs: data_dir.join("logs"),
            gpus: gpus.clone(),
        };
        let (pool, webhooks) = (self.pool(gpus.len().max(1))?, self.webhooks(config)?);
        let config = ServeConfig {
            addr,
            endpoint,
            model: text(&self.model).map(str::to_string),
            data_dir,
            public_url,
            allowed_origins: list(&self.allowed_origins),
            execution_timeout: seconds("JOB_TIMEOUT_SECONDS", &self.job_timeout_seconds, 600.0)?,
            max_body_bytes: (
                number("MAX_RUN_BYTES", &self.max_run_bytes, "bytes", 10 << 20)?,
                number("MAX_RUNSYNC_BYTES", &self.max_runsync_bytes, "bytes", 20 << 20)?,
            ),
            max_result_bytes: number("MAX_RESULT_BYTES", &self.max_result_bytes, "bytes", 20 << 20)?,
            api_key: self.api_key.clone().filter(|key| !key.expose().trim().is_empty()),
            min_free_bytes: number("MIN_FREE_BYTES", &self.min_free_bytes, "bytes", 2 << 30)?,
            connections: self.connections()?,
            service: config.clone(),
        };
        let storage = Storage::new(bucket);
        Ok(Setup { config, store: self.store()?, pool, launch, webhooks, storage, embedded })
    }

    fn connections(&self) -> Result<server::Limits, JobError> {
        let default = server::Limits::default();
        let count = |name, value, default| {
            Setting::new(name, value)
                .parse("a number from 1 to 1000000", default, |n| (1..=1_000_000).contains(n))
        };
        Ok(server::Limits {
            connections: count("MAX_CONNECTIONS", &self.max_connections, default.connections)?,
            per_address: count(
                "MAX_CONNECTIONS_PER_ADDRESS",
                &self.max_connections_per_address,
                default.per_address,
            )?,
            ..default
        })
    }

    fn store(&self) -> Result<store::Options, JobError> {
        Ok(store::Options {
            max_queued: number("MAX_QUEUED", &self.max_queued, "a number of jobs", 100_000)?,
            max_attempts: number("MAX_ATTEMPTS", &self.max_attempts, "a number of attempts", 3)?,
            lease: seconds("LEASE_SECONDS", &self.lease_seconds, 30.0)?,
            retention: 3600 * seconds("JOB_RETENTION_HOURS", &self.job_retention_hours, 24.0)?,
        })
    }

    fn pool(&self, workers: usize) -> Result<pool::Settings, JobError> {
        Ok(pool::Settings {
            idle_timeout: seconds("IDLE_TIMEOUT", &self.idle_timeout, 5.0)?,
            min_workers: number("MIN_WORKERS", &self.min_workers, "a number of workers", 0)?,
            max_workers: number("MAX_WORKERS", &self.max_workers, "a number of workers", workers)?,
            start_timeout: seconds("START_TIMEOUT", &self.start_timeout, 420.0)?,
            stop_grace: seconds("CANCEL_GRACE_SECONDS", &self.cancel_grace_seconds, 15.0)?,
            drain_grace: self.stop_grace()? + LAST_DELIVERY,
            restart_pause: seconds("RESTART_PAUSE", &self.restart_pause, 1.0)?,
            ping_interval: PING_INTERVAL,
            silence: SILENCE,
        })
    }

    fn stop_grace(&self) -> Result<Duration, JobError> {
        seconds("STOP_GRACE_SECONDS", &self.stop_grace_seconds, 25.0)
    }

    fn webhooks(&self, config: &Config) -> Result<webhook::Settings, JobError> {
        let pauses = match text(&self.webhook_pauses) {
            None => webhook::PAUSE_SECONDS.map(Duration::from_secs).to_vec(),
            Some(list) => {
                let one = |pause: &str| seconds("WEBHOOK_PAUSES", &Some(pause.to_string()), 0.0);
                list.split(',').map(one).collect::<Result<_, _>>()?
            }
        };
        let secret = self.webhook_secret.clone().filter(|secret| !secret.expose().trim().is_empty());
        if let Some(secret) = &secret {
            webhook::check_secret(secret)?;
        }
        let timeout = seconds("WEBHOOK_TIMEOUT_SECONDS", &self.webhook_timeout_seconds, 20.0)?;
        Ok(webhook::Settings { secret, timeout, allow_private_urls: config.allow_private_urls, pauses })
    }

    /// What the workers get besides this process' own variables: the settings that may have come by flags, and
    /// the bucket.
    fn worker_env(
        &self,
        config: &Config,
        data_dir: &Path,
        bucket: &StorageSettings,
    ) -> Vec<(OsString, OsString)> {
        let mut env: Vec<(OsString, OsString)> = Vec::new();
        let mut set = |name: &str, value: OsString| env.push((name.into(), value));
        set("SPOOL_PATH", spool(data_dir).into());
        set("MODEL_STORAGE_PATH", config.hub.storage().root().into());
        set("MAX_AUDIO_SECONDS", config.max_audio_seconds.unwrap_or(0).to_string().into());
        set("MAX_IMAGE_BYTES", config.limits.image_bytes.to_string().into());
        set("MAX_AUDIO_BYTES", config.limits.audio_bytes.to_string().into());
        set("ALLOW_PRIVATE_URLS", config.allow_private_urls.to_string().into());
        set("LOG_LEVEL", config.log_level.to_string().to_lowercase().into());
        if let Some(limit) = config.memory_limit {
            set("TALKIE_MEMORY_LIMIT", limit.to_string().into());
        }
        if let Some(device) = self.device.to_possible_value() {
            set("TALKIE_DEVICE", device.get_name().into());
        }
        if let Some(model) = text(&self.model) {
            set("TALKIE_MODEL", model.into());
        }
        if let Some(file) = &self.models_file {
            set("TALKIE_MODELS_FILE", file.into());
        }
        if let Some(grace) = text(&self.stop_grace_seconds) {
            set("STOP_GRACE_SECONDS", grace.into());
        }
        for (name, value) in bucket.to_env() {
            set(name, value.expose().into());
        }
        env
    }
}

/// Where a gateway keeps everything: `given`, else the user's data folder, which is found with `env`.
///
/// # Errors
/// [`Code::InvalidInput`] where there is neither.
pub fn data_dir(given: Option<&Path>, env: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, JobError> {
    let is_set = |path: &PathBuf| !path.as_os_str().is_empty();
    if let Some(dir) = given.map(Path::to_path_buf).filter(is_set) {
        return Ok(dir);
    }
    let data = env("XDG_DATA_HOME").filter(is_set);
    let data = data.or_else(|| Some(env("HOME").filter(is_set)?.join(".local/share")));
    data.map(|data| data.join("talkie")).ok_or_else(|| {
        JobError::new(Code::InvalidInput, "`DATA_DIR` (--data-dir) is not set, and neither is `HOME`")
            .with_reason("CONFIG")
    })
}

/// Makes `dir` where it is missing, for this user alone: there are keys and people's faces in it.
///
/// # Errors
/// [`Code::InvalidInput`] when it cannot be made.
pub fn make_private(dir: &Path) -> Result<(), JobError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
        let message = format!("`DATA_DIR` (--data-dir) is {}, which cannot be made: {e}", dir.display());
        JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
    })
}

/// Where this machine reaches a server that listens on `addr`.
fn reachable(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), addr.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), addr.port()),
        _ => addr,
    }
}

/// The GPUs to share out among workers, as `CUDA_VISIBLE_DEVICES` names them; none where that is not this
/// process' business.
fn gpus(device: DeviceChoice, env: impl Fn(&str) -> Option<String>, root: &Path) -> Vec<String> {
    if device == DeviceChoice::Cpu {
        return Vec::new();
    }
    if let Some(visible) = env("CUDA_VISIBLE_DEVICES") {
        return visible.split(',').map(str::trim).filter(|gpu| !gpu.is_empty()).map(str::to_string).collect();
    }
    let driver = std::fs::read_dir(root.join("proc/driver/nvidia/gpus"));
    let count = driver.map_or(0, Iterator::count);
    (0..count).map(|gpu| gpu.to_string()).collect()
}

/// An empty variable is one that is not set: compose files pass those on.
fn text(value: &Option<String>) -> Option<&str> {
    value.as_deref().map(str::trim).filter(|value| !value.is_empty())
}

fn list(value: &Option<String>) -> Vec<String> {
    let parts = text(value).unwrap_or_default().split(',').map(str::trim);
    parts.filter(|part| !part.is_empty()).map(str::to_string).collect()
}

fn number<T: FromStr>(
    name: &'static str,
    value: &Option<String>,
    expected: &str,
    default: T,
) -> Result<T, JobError> {
    Setting::new(name, value).parse(expected, default, |_| true)
}

fn seconds(name: &'static str, value: &Option<String>, default: f64) -> Result<Duration, JobError> {
    let expected = "a number from 0 to 10000000";
    let n = Setting::new(name, value).parse(expected, default, |n| (0.0..=10_000_000.0).contains(n))?;
    Ok(Duration::from_secs_f64(n))
}

fn url(text: &str) -> Result<Url, JobError> {
    Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https")).ok_or_else(|| {
        let message =
            format!("`PUBLIC_URL` (--public-url) is {text:?}, expected such as https://talk.example");
        JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_folder_is_the_users() {
        let dir = |given: Option<&str>, env: &[(&str, &str)]| {
            let find = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v));
            data_dir(given.map(Path::new), find).ok()
        };
        assert_eq!(dir(Some("/x"), &[("HOME", "/h")]), Some("/x".into()));
        assert_eq!(dir(Some(""), &[("HOME", "/h")]), Some("/h/.local/share/talkie".into()));
        assert_eq!(dir(None, &[("HOME", "/h"), ("XDG_DATA_HOME", "/d")]), Some("/d/talkie".into()));
        assert_eq!(dir(None, &[]), None);
    }

    #[test]
    fn gpus_are_those_of_the_driver_or_those_that_are_left_to_us() {
        let root = tempfile::tempdir().unwrap();
        let gpus = |device, visible: Option<&str>| {
            gpus(device, |_| visible.map(str::to_string), root.path()).join(" ")
        };
        assert_eq!(gpus(DeviceChoice::Auto, None), "");
        for pci in ["0000:01:00.0", "0000:02:00.0"] {
            std::fs::create_dir_all(root.path().join("proc/driver/nvidia/gpus").join(pci)).unwrap();
        }
        assert_eq!(gpus(DeviceChoice::Auto, None), "0 1");
        assert_eq!(gpus(DeviceChoice::Cuda, Some("3, GPU-7f")), "3 GPU-7f");
        assert_eq!(gpus(DeviceChoice::Auto, Some("")), "");
        assert_eq!(gpus(DeviceChoice::Cpu, None), "");
    }

    #[test]
    fn workers_reach_a_gateway_that_listens_everywhere() {
        let said = |addr: &str| reachable(addr.parse().unwrap()).to_string();
        assert_eq!(said("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(said("[::]:80"), "[::1]:80");
        assert_eq!(said("10.0.0.1:80"), "10.0.0.1:80");
    }
}
