//! The thread that computes: one job at a time, its model kept warm between jobs.
//!
//! ```text
//!  generate(work) ──channel──► thread: Generator::run ──oneshot──► Video | JobError
//!                                │ each progress
//!                                ▼
//!                              Watch ──► broken(): it hangs, obeys no cancel, or its device is gone
//! ```

mod watch;

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use talkie::pipeline::{Cancel, Control, Inputs, Job, Progress, Settings, Stage, Video};
use talkie::registry::{ModelSpec, ModelStorage};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

pub use watch::Patience;

use crate::faults::kill_point;
use crate::generate::{DEVICE_BROKEN, DeviceChoice, Generator, cancelled, contained, open_device};
use crate::job::{Code, JobError};
use watch::Watch;

/// The networks recurse little, but codecs written in C are used to the main thread's stack.
const STACK_BYTES: usize = 16 << 20;
/// How long a thread that was found broken may still take to answer.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// Between two looks at whether the thread still moves.
const WATCH_EVERY: Duration = Duration::from_millis(100);

/// All that a video is made of.
pub struct Work {
    /// The model.
    pub spec: ModelSpec,
    /// Where the weights lie.
    pub storage: ModelStorage,
    /// What is asked for.
    pub settings: Settings,
    /// The opened image and voices.
    pub inputs: Arc<Inputs>,
    /// The file to write.
    pub output: PathBuf,
    /// Ends the generation at the next step.
    pub cancel: Cancel,
    /// Told where the generation stands, on the thread that computes.
    pub progress: Box<dyn FnMut(Progress) + Send>,
}

/// The thread; clones share it. It ends with the last of them.
#[derive(Clone)]
pub struct Executor {
    commands: mpsc::Sender<Command>,
    /// One permit: who has it may send, so that a job that waits can still be cancelled.
    turn: Arc<Semaphore>,
    watch: Arc<Watch>,
}

struct Command {
    work: Work,
    answer: oneshot::Sender<Result<Video, JobError>>,
    turn: OwnedSemaphorePermit,
    span: tracing::Span,
}

impl Executor {
    /// Starts the thread. It uses no more than `memory_limit` bytes of the device.
    ///
    /// # Errors
    /// [`Code::Internal`] when the system allows no further thread.
    pub fn start(
        device: DeviceChoice,
        memory_limit: Option<u64>,
        patience: Patience,
    ) -> Result<Self, JobError> {
        let (commands, received) = mpsc::channel();
        let watch = Arc::new(Watch::new(patience));
        let watched = watch.clone();
        thread::Builder::new()
            .name("executor".to_string())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&received, device, memory_limit, &watched))
            .map_err(|e| JobError::new(Code::Internal, format!("no thread can be started: {e}")))?;
        Ok(Self { commands, turn: Arc::new(Semaphore::new(1)), watch })
    }

    /// Makes a video as soon as those that were asked for before are made.
    ///
    /// # Errors
    /// Those of [`Generator::run`], a panic as [`Code::Internal`], and [`Code::WorkerLost`] where the thread or
    /// its device is broken.
    pub async fn generate(&self, work: Work) -> Result<Video, JobError> {
        let cancel = work.cancel.clone();
        let turn = tokio::select! {
            turn = self.turn.clone().acquire_owned() => turn.map_err(|_| ended())?,
            error = cancelled(&cancel) => return Err(error),
            reason = self.broken() => return Err(lost(reason)),
        };
        let (answer, mut answered) = oneshot::channel();
        let command = Command { work, answer, turn, span: tracing::Span::current() };
        self.commands.send(command).map_err(|_| ended())?;
        let reason = tokio::select! {
            biased;
            made = &mut answered => return made.unwrap_or_else(|_| Err(ended())),
            reason = self.broken() => reason,
        };
        // A job that broke the device has its own answer, a moment later.
        match tokio::time::timeout(LAST_WORDS, answered).await {
            Ok(made) => made.unwrap_or_else(|_| Err(ended())),
            Err(_) => Err(match cancel.check() {
                Err(e) => e.into(),
                Ok(()) => lost(reason),
            }),
        }
    }

    /// Why no further job can run, if that is so: the thread hangs or its device is broken. It stays so.
    pub fn defect(&self) -> Option<String> {
        self.watch.defect(Instant::now())
    }

    /// Resolves when no further job can run. With the reason.
    pub async fn broken(&self) -> String {
        let mut poll = tokio::time::interval(WATCH_EVERY);
        loop {
            if let Some(reason) = self.defect() {
                return reason;
            }
            poll.tick().await;
        }
    }
}

/// The thread's whole life.
fn serve(commands: &mpsc::Receiver<Command>, choice: DeviceChoice, memory_limit: Option<u64>, watch: &Watch) {
    let mut generator = None;
    while let Ok(Command { work, answer, turn, span }) = commands.recv() {
        let result = span.in_scope(|| {
            // Only a job needs the device, so that a machine without it can say so to the sender.
            let generator = match &mut generator {
                Some(generator) => generator,
                none => {
                    let device = contained(|| open_device(choice, |said| tracing::warn!("{said}")))?;
                    none.insert(Generator::new(device, memory_limit))
                }
            };
            watch.begin(work.cancel.clone(), generator.is_on_gpu(), Instant::now());
            let made = contained(|| compute(generator, work, watch));
            watch.end();
            made
        });
        if let Err(e) = &result
            && e.details.get("reason").is_some_and(|reason| reason == DEVICE_BROKEN)
        {
            watch.fail(e.message.clone());
        }
        drop(turn);
        // Nobody waits where the job was given up meanwhile.
        let _ = answer.send(result);
    }
}

fn compute(generator: &mut Generator, mut work: Work, watch: &Watch) -> talkie::Result<Video> {
    work.cancel.check()?;
    let mut progress = |progress: Progress| {
        watch.moved(progress, Instant::now());
        pass_kill_points(progress);
        (work.progress)(progress);
    };
    #[cfg(feature = "faults")]
    if let Some(directive) = crate::faults::Directive::read(&work.settings.prompt) {
        let video = directive.obey(&work.settings, &work.output, &work.cancel, &mut progress);
        return video.map_err(crate::generate::classify);
    }
    let job = Job {
        spec: &work.spec,
        storage: &work.storage,
        settings: &work.settings,
        inputs: &work.inputs,
        output: &work.output,
    };
    generator.run(job, Control { cancel: &work.cancel, progress: &mut progress })
}

/// The points of a generation at which tests kill the process.
fn pass_kill_points(progress: Progress) {
    match progress.stage {
        Stage::Denoise => {
            if progress.window == 1 && progress.step == 0 {
                // The frames of the first window are in the file, those of the second are not.
                kill_point("K18");
            }
            kill_point("K16");
        }
        Stage::Decode => kill_point("K17"),
        _ => {}
    }
}

fn lost(reason: String) -> JobError {
    JobError::new(Code::WorkerLost, reason).with_reason("EXECUTOR_BROKEN")
}

fn ended() -> JobError {
    lost("the thread that computes has ended".to_string())
}
