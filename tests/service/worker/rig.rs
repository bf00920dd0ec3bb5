//! The loop in this process, with a runner that does what its jobs say.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use handler::generate::DEVICE_BROKEN;
use handler::job::{Code, JobError, JobOutput};
use handler::progress::{Stage, Update};
use handler::runner::Task;
use handler::runpod::platform::Endpoints;
use handler::runpod::spool::Spool;
use handler::runpod::worker::{Ending, JobRunner, Settings, Worker};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::platform::Platform;

const STALE: Duration = Duration::from_secs(60);

/// Does what the prompt of a job says.
#[derive(Clone, Default)]
pub struct Script {
    /// The jobs that it ran, in order.
    pub ran: Arc<Mutex<Vec<String>>>,
    pub defect: Arc<Mutex<Option<String>>>,
    /// Why no result can be delivered.
    pub undeliverable: Arc<Mutex<Option<JobError>>>,
    /// How often that was asked for.
    pub asked: Arc<AtomicUsize>,
    released: Arc<Notify>,
}

impl Script {
    /// Lets the jobs end that do `hold`.
    pub fn release(&self) {
        self.released.notify_one();
    }
}

impl JobRunner for Script {
    async fn run(&self, task: Task) -> Result<JobOutput, JobError> {
        self.ran.lock().unwrap().push(task.id.clone());
        let prompt = task.input["prompt"].as_str().unwrap_or_default().to_string();
        let what = prompt.strip_prefix("fault: ").unwrap_or_default();
        let step = |step| {
            (task.progress)(Update {
                stage: Stage::Denoise,
                percent: 8,
                message: String::new(),
                window: 1,
                windows: 1,
                step,
                steps: 5,
                eta_s: None,
            });
        };
        let error = |code, message: &str| Err(JobError::new(code, message));
        match what {
            "hold" => {
                step(0);
                self.released.notified().await;
            }
            "wait" => {
                step(0);
                while task.cancel.check().is_ok() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                return error(Code::Cancelled, "the generation was cancelled");
            }
            "hang" => {
                step(0);
                std::future::pending::<()>().await;
            }
            "steps" => (0..5).for_each(step),
            "panic" => panic!("as the job wants it"),
            "oom" => return error(Code::GpuOutOfMemory, "out of memory"),
            "gone" => {
                let error = JobError::new(Code::UploadFailed, "the bucket is gone");
                *self.undeliverable.lock().unwrap() = Some(error.clone());
                return Err(error);
            }
            "bad" => return error(Code::EmptyAudio, "`audio` is empty"),
            "sticky" => {
                *self.defect.lock().unwrap() = Some("the device is broken".into());
                let error = JobError::new(Code::GpuUnavailable, "the device is broken");
                return Err(error.with_reason(DEVICE_BROKEN));
            }
            "stall" => {
                *self.defect.lock().unwrap() = Some("the generation hangs".into());
                std::future::pending::<()>().await;
            }
            "big" => {
                let warnings = vec!["x".repeat(25_000_000)];
                return Ok(JobOutput { warnings, ..JobOutput::default() });
            }
            _ => {}
        }
        Ok(JobOutput { video_url: format!("https://videos/{}", task.id), ..JobOutput::default() })
    }

    fn defect(&self) -> Option<String> {
        self.defect.lock().unwrap().clone()
    }

    async fn can_deliver(&self) -> Result<(), JobError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.undeliverable.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

/// A worker and its platform.
pub struct Rig {
    pub platform: Platform,
    pub script: Script,
    pub settings: Settings,
    pub spool: TempDir,
    pub variables: HashMap<&'static str, String>,
    pub poll_timeout: Duration,
    runtime: Runtime,
}

impl Rig {
    pub fn new() -> Self {
        let platform = Platform::start();
        Self {
            variables: platform.variables().into_iter().collect(),
            platform,
            script: Script::default(),
            settings: Settings {
                slots: 1,
                refresh: false,
                grace: Duration::from_secs(10),
                result_ttl: Duration::from_secs(3600),
                max_result_bytes: 20_000_000,
                unit: Duration::from_millis(10),
                progress_interval: Duration::from_millis(10),
                spool_interval: Duration::from_secs(10),
            },
            spool: tempfile::tempdir().unwrap(),
            poll_timeout: Duration::from_secs(90),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
        }
    }

    /// Starts the worker.
    pub fn work(&self) -> Working<'_> {
        let endpoints = Endpoints::from_env(|name| self.variables.get(name).cloned()).unwrap();
        let spool = Spool::open(self.spool.path(), &endpoints.worker_id, STALE).unwrap();
        let shutdown = CancellationToken::new();
        let _in_runtime = self.runtime.enter();
        let platform = handler::runpod::platform::Platform::new(endpoints.into(), self.poll_timeout).unwrap();
        let worker = Worker::new(self.script.clone(), platform, spool, self.settings.clone());
        let ending = self.runtime.spawn(worker.run(shutdown.clone()));
        Working { rig: self, shutdown, ending }
    }

    /// The files below the spool that hold results, by the folder they lie in.
    pub fn spooled(&self, folder: &str) -> usize {
        fn count(folder: &std::path::Path) -> usize {
            let entries = std::fs::read_dir(folder)
                .map(|entries| entries.flatten().collect())
                .unwrap_or_else(|_| Vec::new());
            let of = |entry: &std::fs::DirEntry| match entry.path() {
                path if path.is_dir() => count(&path),
                path => usize::from(!path.ends_with("owner.json")),
            };
            entries.iter().map(of).sum()
        }
        count(&self.spool.path().join(folder))
    }

    pub fn ran(&self) -> Vec<String> {
        self.script.ran.lock().unwrap().clone()
    }
}

/// A worker at work.
pub struct Working<'a> {
    rig: &'a Rig,
    shutdown: CancellationToken,
    ending: JoinHandle<Ending>,
}

impl Working<'_> {
    /// Asks it to end, as SIGTERM does.
    pub fn ask_to_end(&self) {
        self.shutdown.cancel();
    }

    /// How it ended.
    #[track_caller]
    pub fn ending(self) -> Ending {
        let ended = async { tokio::time::timeout(Duration::from_secs(30), self.ending).await };
        self.rig.runtime.block_on(ended).expect("the worker ends").expect("the worker does not panic")
    }

    /// Asks it to end, and waits until it has.
    #[track_caller]
    pub fn end(self) -> Ending {
        self.ask_to_end();
        self.ending()
    }

    /// Ends it as a loss of power would.
    pub fn kill(self) {
        self.ending.abort();
        let _ = self.rig.runtime.block_on(self.ending);
    }
}

/// Makes every folder in the spool one whose process has ended.
pub fn bury(spool: &TempDir) {
    for folder in std::fs::read_dir(spool.path().join("results")).unwrap() {
        let file = folder.unwrap().path().join("owner.json");
        let mut owner: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        owner["started"] = "1".into();
        std::fs::write(&file, owner.to_string()).unwrap();
    }
}
