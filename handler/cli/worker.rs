//! `handler worker`: the RunPod job loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::level_filters::LevelFilter;

use crate::config::{Config, Setting};
use crate::generate;
use crate::hub::{Control, Meter};
use crate::job::{Code, JobError};
use crate::runner::{Runner, RunnerArgs, RunnerSettings};
use crate::runpod::platform::{Endpoints, Platform};
use crate::runpod::spool::Spool;
use crate::runpod::worker::{Ending, Settings, Worker};
use crate::runpod::{fitness, logs};
use crate::storage::StorageArgs;

/// Progress is sent this often at most.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// A worker on another machine is dead when its spool has not changed for this long.
const SPOOL_STALE: Duration = Duration::from_secs(120);
/// Between two log lines about a download.
const INSTALL_REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// The exit code after a second signal, less the signal's number.
const EXIT_SIGNALLED: i32 = 128;

/// Flags of the verb. Addresses, ids and the key come from `RUNPOD_*` alone.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    runner: RunnerArgs,
    #[command(flatten)]
    storage: StorageArgs,
    /// Ask to be replaced after each job, and end
    #[arg(long, env = "REFRESH_WORKER")]
    refresh_worker: bool,
    /// Jobs that are prepared and delivered side by side; the device runs one at a time [default: 1]
    #[arg(long, env = "WORKER_CONCURRENCY", value_name = "JOBS")]
    worker_concurrency: Option<String>,
    /// How long a running job may take after SIGTERM [default: 25]
    #[arg(long, env = "STOP_GRACE_SECONDS", value_name = "SECONDS")]
    stop_grace_seconds: Option<String>,
    /// How long an undelivered result is sent again [default: 86400]
    #[arg(long, env = "RESULT_TTL_SECONDS", value_name = "SECONDS")]
    result_ttl_seconds: Option<String>,
    /// The largest result [default: 20000000]
    #[arg(long, env = "MAX_RESULT_BYTES", value_name = "BYTES")]
    max_result_bytes: Option<String>,
    /// Space that the spool must have [default: 2147483648]
    #[arg(long, env = "MIN_FREE_BYTES", value_name = "BYTES")]
    min_free_bytes: Option<String>,
    /// The unit of pauses after failures: 1 at first, 5 after a 429, 30 at most [default: 1]
    #[arg(long, env = "BACKOFF_SECONDS", value_name = "SECONDS")]
    backoff_seconds: Option<String>,
    /// How long a poll may be held before it is begun again [default: 90]
    #[arg(long, env = "POLL_SECONDS", value_name = "SECONDS")]
    poll_seconds: Option<String>,
}

impl Args {
    fn settings(&self) -> Result<Settings, JobError> {
        let max_result_bytes = Setting::new("MAX_RESULT_BYTES", &self.max_result_bytes).parse(
            "bytes from 1000 to 1000000000",
            20_000_000,
            |n| (1_000..=1_000_000_000).contains(n),
        )?;
        let slots = Setting::new("WORKER_CONCURRENCY", &self.worker_concurrency).parse(
            "jobs from 1 to 16",
            1,
            |n| (1..=16).contains(n),
        )?;
        Ok(Settings {
            slots,
            refresh: self.refresh_worker,
            grace: seconds("STOP_GRACE_SECONDS", &self.stop_grace_seconds, 25.0)?,
            result_ttl: seconds("RESULT_TTL_SECONDS", &self.result_ttl_seconds, 86_400.0)?,
            max_result_bytes,
            unit: seconds("BACKOFF_SECONDS", &self.backoff_seconds, 1.0)?,
            progress_interval: PROGRESS_INTERVAL,
            spool_interval: SPOOL_STALE / 4,
        })
    }

    fn min_free_bytes(&self) -> Result<u64, JobError> {
        Setting::new("MIN_FREE_BYTES", &self.min_free_bytes).parse("bytes", 2 << 30, |_| true)
    }
}

fn seconds(name: &'static str, value: &Option<String>, default: f64) -> Result<Duration, JobError> {
    let seconds = Setting::new(name, value)
        .parse("seconds from 0.001 to 10000000", default, |s| (0.001..=10_000_000.0).contains(s))?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Works until it is told to end, or cannot go on. Never returns normally in the latter case: a device that
/// hangs would hold up an orderly exit.
pub(super) fn run(args: &Args, config: &Config, started: Instant) -> Result<(), JobError> {
    start_logging(config)?;
    let settings = args.settings()?;
    let poll_timeout = seconds("POLL_SECONDS", &args.poll_seconds, 90.0)?;
    let min_free_bytes = args.min_free_bytes()?;
    let jobs = args.runner.settings(config, &args.storage, started)?;
    if jobs.storage.is_none() {
        tracing::warn!(
            "no bucket is configured: only jobs that bring their own, or want base64, can be delivered"
        );
    }
    let endpoints = Arc::new(Endpoints::from_env(variable)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| JobError::new(Code::Internal, format!("the worker cannot be started: {e}")))?;
    let ending = runtime.block_on(async {
        let shutdown = listen()?;
        let platform = Platform::new(endpoints.clone(), poll_timeout)?;
        if let Err(unfit) = fitness::check(&jobs.spool, min_free_bytes, jobs.device) {
            platform.ping_unhealthy(unfit.check, &unfit.reason).await;
            let message =
                format!("this worker is not fit for work, by its check `{}`: {}", unfit.check, unfit.reason);
            return Err(JobError::new(unfit.code, message).with_reason("UNFIT"));
        }
        let spool = Spool::open(&jobs.spool, &endpoints.worker_id, SPOOL_STALE).map_err(|e| {
            let message = format!("{} cannot be written to: {e}", jobs.spool.display());
            JobError::new(Code::InsufficientDisk, message)
        })?;
        install(&jobs, &shutdown).await;
        tracing::info!(worker = endpoints.worker_id, ms = started.elapsed().as_millis(), "ready");
        Ok(Worker::new(Runner::new(jobs)?, platform, spool, settings).run(shutdown).await)
    })?;
    match ending {
        Ending::Stopped => {
            runtime.shutdown_background();
            Ok(())
        }
        Ending::Broken(code) => exit_now(i32::from(code)),
    }
}

/// Fetches the files of the profile that is set before the first job is taken, as far as there is time for it. A job
/// goes on from there, and is told what went wrong.
async fn install(jobs: &RunnerSettings, shutdown: &CancellationToken) {
    let hub = &jobs.config.hub;
    let files = || -> Result<Vec<_>, JobError> {
        let registry = generate::registry(jobs.models_file.as_deref())?;
        let Some(name) = &jobs.model else { return Ok(Vec::new()) };
        let spec = registry.model(name)?;
        Ok(generate::files_of(spec, hub, 1, &spec.generation(None, None)?.loras)?)
    };
    let mut meter = Meter::default();
    let mut told = Instant::now();
    let mut report = |progress| {
        let update = meter.update(progress, Instant::now());
        if told.elapsed() >= INSTALL_REPORT_INTERVAL {
            told = Instant::now();
            tracing::info!(percent = update.percent, eta_s = update.eta_s, "{}", update.message);
        }
    };
    let control = Control { deep: false, deadline: hub.ready_by(jobs.started), report: &mut report };
    let installed = async { hub.ensure(&files()?, control).await };
    tokio::select! {
        () = shutdown.cancelled() => {}
        installed = installed => if let Err(e) = installed {
            tracing::error!("{e}; {}", e.hint.as_deref().unwrap_or("the first job tries again"));
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// On RunPod its own form of log lines, elsewhere that of every verb.
fn start_logging(config: &Config) -> Result<(), JobError> {
    let level = logs::level(variable)?.unwrap_or_else(|| LevelFilter::from_level(config.log_level));
    match variable("RUNPOD_ENDPOINT_ID").is_some_and(|id| !id.is_empty()) {
        true => logs::start(level),
        false => super::start_logging(level),
    }
    Ok(())
}

/// The first SIGTERM or SIGINT asks the worker to end, the second ends it at once. Its spool is kept.
fn listen() -> Result<CancellationToken, JobError> {
    let refused = |e| JobError::new(Code::Internal, format!("signals cannot be handled: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    // Whoever closes the terminal does not end the jobs.
    let mut hangup = signal(SignalKind::hangup()).map_err(refused)?;
    let shutdown = CancellationToken::new();
    let asked = shutdown.clone();
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = terminate.recv() => libc::SIGTERM,
                _ = interrupt.recv() => libc::SIGINT,
                _ = hangup.recv() => continue,
            };
            if asked.is_cancelled() {
                exit_now(EXIT_SIGNALLED + number);
            }
            asked.cancel();
        }
    });
    Ok(shutdown)
}

/// Ends the process without the clean-up that libraries have registered: on a broken device it may never return.
fn exit_now(code: i32) -> ! {
    // SAFETY: the call takes a number and does not return. What must survive is on disk already.
    unsafe { libc::_exit(code) }
}
