//! Settings of whatever runs jobs: the worker, the Lambda function, a local test.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::{Config, Setting};
use crate::executor::Patience;
use crate::generate::DeviceChoice;
use crate::job::JobError;
use crate::storage::spool::default_spool;
use crate::storage::{Lifetimes, Storage, StorageArgs};

/// Base64 of this much fits into a result of RunPod's and of Lambda's.
const DEFAULT_INLINE_BYTES: u64 = 4_000_000;

/// Flags of every verb that runs jobs.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Jobs")]
pub struct RunnerArgs {
    /// The profile of jobs that name none [default: the first that is installed, else tiny]
    #[arg(long, env = "TALKIE_MODEL", value_name = "NAME")]
    pub model: Option<String>,
    /// A models.toml in place of the built-in one
    #[arg(long, env = "TALKIE_MODELS_FILE", value_name = "FILE")]
    pub models_file: Option<PathBuf>,
    /// Where the networks run
    #[arg(long, env = "TALKIE_DEVICE", value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Folder of videos and results that are not delivered yet [default: /runpod-volume/spool, else
    /// /workspace/spool, else the user's cache folder]
    #[arg(long, env = "SPOOL_PATH", value_name = "DIR")]
    pub spool_path: Option<PathBuf>,
    /// Bytes that a video may have to be handed out as base64 [default: 4000000]
    #[arg(long, env = "MAX_INLINE_BYTES", value_name = "BYTES")]
    pub max_inline_bytes: Option<String>,
    /// Seconds without a sign of life after which a generation counts as hung, or ten steps' time if that is
    /// longer [default: 60 on a GPU, 1800 on a processor]
    #[arg(long, env = "HANG_SECONDS", value_name = "SECONDS")]
    pub hang_seconds: Option<String>,
    /// The same while a model is read [default: 1800]
    #[arg(long, env = "LOAD_HANG_SECONDS", value_name = "SECONDS")]
    pub load_hang_seconds: Option<String>,
    /// Seconds in which a cancelled generation has to end, else it counts as hung [default: 15]
    #[arg(long, env = "CANCEL_HANG_SECONDS", value_name = "SECONDS")]
    pub cancel_hang_seconds: Option<String>,
}

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct RunnerSettings {
    /// Models and the limits of inputs.
    pub config: Config,
    /// The profile of jobs that name none.
    pub model: Option<String>,
    /// A models.toml in place of the built-in one.
    pub models_file: Option<PathBuf>,
    /// Where the networks run.
    pub device: DeviceChoice,
    /// Folder of videos and results that are not delivered yet.
    pub spool: PathBuf,
    /// The bucket of jobs that bring none.
    pub storage: Option<Storage>,
    /// How long videos and links last in a job's own bucket.
    pub lifetimes: Lifetimes,
    /// The folder of videos for which there is no bucket; for development.
    pub folder: Option<PathBuf>,
    /// Bytes that a video may have to be handed out as base64.
    pub max_inline_bytes: u64,
    /// How long a sign of life is waited for.
    pub patience: Patience,
    /// When the process began.
    pub started: Instant,
}

impl RunnerArgs {
    /// Checks the flags; what they leave open is looked up in the environment. `started` is when the process began.
    ///
    /// # Errors
    /// [`Code::InvalidInput`](crate::job::Code::InvalidInput) naming flag, variable, value and expectation.
    pub fn settings(
        &self,
        config: &Config,
        storage: &StorageArgs,
        started: Instant,
    ) -> Result<RunnerSettings, JobError> {
        let seconds = |name, value| {
            let seconds =
                Setting::new(name, value)
                    .parse("seconds from 0.1 to 86400", f64::NAN, |s: &f64| (0.1..=86_400.0).contains(s))?;
            Ok::<_, JobError>((!seconds.is_nan()).then(|| Duration::from_secs_f64(seconds)))
        };
        let default = Patience::default();
        let given = self.spool_path.clone().filter(|path| !path.as_os_str().is_empty());
        Ok(RunnerSettings {
            config: config.clone(),
            model: self.model.clone().filter(|name| !name.is_empty()),
            models_file: self.models_file.clone().filter(|path| !path.as_os_str().is_empty()),
            device: self.device,
            spool: given.unwrap_or_else(|| {
                default_spool(|name| std::env::var_os(name).map(PathBuf::from), Path::new("/"))
            }),
            storage: storage.settings()?.map(Storage::new),
            lifetimes: storage.lifetimes()?,
            folder: None,
            max_inline_bytes: Setting::new("MAX_INLINE_BYTES", &self.max_inline_bytes).parse(
                "bytes from 0 to 1000000000",
                DEFAULT_INLINE_BYTES,
                |n| *n <= 1_000_000_000,
            )?,
            patience: Patience {
                step: seconds("HANG_SECONDS", &self.hang_seconds)?,
                load: seconds("LOAD_HANG_SECONDS", &self.load_hang_seconds)?.unwrap_or(default.load),
                cancel: seconds("CANCEL_HANG_SECONDS", &self.cancel_hang_seconds)?.unwrap_or(default.cancel),
            },
            started,
        })
    }
}
