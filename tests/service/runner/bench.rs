//! A runner in this process, with a spool of its own.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use clap::Parser;
use handler::config::{Config, ConfigArgs};
use handler::job::{JobError, JobOutput};
use handler::progress::Update;
use handler::runner::{Runner, RunnerArgs, RunnerSettings, Task};
use handler::storage::StorageArgs;
use serde_json::Value;
use talkie::pipeline::Cancel;
use tempfile::TempDir;

/// What a worker's command line has.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    runner: RunnerArgs,
    #[command(flatten)]
    storage: StorageArgs,
}

/// The default settings with a spool and a folder for videos in `dir`; loopback may be asked.
pub fn settings(dir: &TempDir) -> RunnerSettings {
    let flags = Flags::parse_from(["test", "--device", "cpu", "--allow-private-urls"]);
    let config = Config::new(&flags.config, |_| None, dir.path()).unwrap();
    let mut settings = flags.runner.settings(&config, &flags.storage, Instant::now()).unwrap();
    settings.spool = dir.path().join("spool");
    settings.folder = Some(dir.path().to_path_buf());
    settings
}

/// A runner, and what it was told.
pub struct Bench {
    pub dir: TempDir,
    pub runner: Runner,
}

/// A job under way, seen from outside.
#[derive(Clone, Default)]
pub struct Watcher {
    pub cancel: Cancel,
    pub updates: Arc<Mutex<Vec<Update>>>,
}

impl Watcher {
    pub fn task(&self, id: &str, input: Value) -> Task {
        self.task_with(id, input, |_, _| {})
    }

    /// A task that tells `seen`, too.
    pub fn task_with(
        &self,
        id: &str,
        input: Value,
        seen: impl Fn(&Update, &Cancel) + Send + Sync + 'static,
    ) -> Task {
        let (updates, cancel) = (self.updates.clone(), self.cancel.clone());
        Task {
            id: id.to_string(),
            input,
            s3_config: None,
            cancel: self.cancel.clone(),
            progress: Arc::new(move |update| {
                seen(&update, &cancel);
                updates.lock().unwrap().push(update);
            }),
        }
    }
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut RunnerSettings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(&dir);
        change(&mut settings);
        Self { runner: Runner::new(settings).unwrap(), dir }
    }

    /// Runs a job of this id.
    pub async fn run(&self, id: &str, input: Value) -> Result<JobOutput, JobError> {
        self.runner.run(Watcher::default().task(id, input)).await
    }

    /// What lies in the spool's folder of videos.
    pub fn spooled(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("spool/videos")).unwrap().count()
    }
}
