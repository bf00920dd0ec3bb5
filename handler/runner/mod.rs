//! One job, from its input to its output or error: the only place that decides an outcome.
//!
//! ```text
//!  input ─parse─► request ─► fetch ─► open ─► executor ─► spool ─► deliver ─► JobOutput
//!                    └► delivery, model, settings: what can fail does so before anything is fetched or loaded
//! ```

mod delivery;
mod manifest;
mod put;
mod settings;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use talkie::pipeline::{self, Cancel, Inputs, Settings, Video};
use talkie::request::{Draft, GenerateRequest, MediaSource};

pub use settings::{RunnerArgs, RunnerSettings};

use crate::cold_start::{COLD_START, LastColdStart};
use crate::downgrade;
use crate::executor::{Executor, Work};
use crate::generate::{self, Model, cancelled, cold_start, contained, ms};
use crate::hub::{self, Installed};
use crate::inputs::Fetcher;
use crate::job::{Code, JobError, JobOutput};
use crate::pace::{self, PACES, Paces};
use crate::progress::{Meter, Stage, Update};
use crate::storage::{SpooledVideo, VideoSpool, prune};
use delivery::{Delivery, Parcel};
use put::Put;

/// A job to run.
pub struct Task {
    /// Its id.
    pub id: String,
    /// Its `input`.
    pub input: Value,
    /// Its `s3Config`.
    pub s3_config: Option<Value>,
    /// Ends it at the next step.
    pub cancel: Cancel,
    /// Told how far it is, from any thread.
    pub progress: Arc<dyn Fn(Update) + Send + Sync>,
}

/// Runs jobs; clones share the executor and its warm model.
#[derive(Clone)]
pub struct Runner {
    shared: Arc<Shared>,
}

struct Shared {
    settings: RunnerSettings,
    executor: Executor,
    spool: VideoSpool,
    /// Made at the first use: it reads the system's certificates.
    fetcher: OnceLock<Result<Fetcher, JobError>>,
    put: Put,
    paces: Paces,
    /// Whether a job has begun: what the first one waited for is its own.
    began: AtomicBool,
    /// Whether an upload has failed for good since the bucket last answered, in this process or an earlier one.
    bucket_in_doubt: AtomicBool,
}

impl Runner {
    /// Starts the thread that computes, and tidies the spool.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] when the spool cannot be written to.
    pub fn new(settings: RunnerSettings) -> Result<Self, JobError> {
        let spool = VideoSpool::open(&settings.spool)?;
        prune(&settings.spool, settings.lifetimes.spool);
        let bucket_in_doubt = AtomicBool::new(spool.all_kept().is_ok_and(|kept| !kept.is_empty()));
        Ok(Self {
            shared: Arc::new(Shared {
                executor: Executor::start(settings.device, settings.config.memory_limit, settings.patience)?,
                spool,
                fetcher: OnceLock::new(),
                put: Put::new(settings.config.fetch_policy()),
                paces: Paces::at(settings.spool.join(PACES)),
                began: AtomicBool::new(false),
                bucket_in_doubt,
                settings,
            }),
        })
    }

    /// Runs one job to its end. When the returned future is dropped, the job is cancelled.
    ///
    /// # Errors
    /// Any [`Code`] of jobs; [`Code::Cancelled`] soon after the job's switch was set, at whatever stage it is.
    pub async fn run(&self, task: Task) -> Result<JobOutput, JobError> {
        let mut abandoned = CancelOnDrop(Some(task.cancel.clone()));
        let outcome = self.shared.run(task).await;
        abandoned.0 = None;
        if matches!(&outcome, Err(e) if e.code == Code::UploadFailed && !e.retryable) {
            self.shared.bucket_in_doubt.store(true, Ordering::Relaxed);
        }
        outcome
    }

    /// Whether there is somewhere for a further video to go. The bucket is asked where it is in doubt.
    ///
    /// # Errors
    /// [`Code::UploadFailed`] when the bucket is gone or refuses our keys.
    pub async fn can_deliver(&self) -> Result<(), JobError> {
        let Shared { settings, bucket_in_doubt, .. } = &*self.shared;
        if let Some(storage) = &settings.storage
            && bucket_in_doubt.load(Ordering::Relaxed)
        {
            match storage.check().await {
                Err(e) if !e.retryable => return Err(e),
                _ => bucket_in_doubt.store(false, Ordering::Relaxed),
            }
        }
        Ok(())
    }

    /// Why no further job can run, if that is so: the thread hangs or its device is broken. It stays so.
    pub fn defect(&self) -> Option<String> {
        self.shared.executor.defect()
    }

    /// Resolves when no further job can run. With the reason.
    pub async fn broken(&self) -> String {
        self.shared.executor.broken().await
    }
}

/// Ends a generation that nobody waits for any more.
struct CancelOnDrop(Option<Cancel>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = &self.0 {
            cancel.cancel();
        }
    }
}

/// A request that was understood.
struct Order {
    /// Tells it from other requests.
    digest: String,
    request: GenerateRequest,
    delivery: Delivery,
    model: Model,
    settings: Settings,
    warnings: Vec<String>,
}

/// An order whose inputs are sound.
struct Plan {
    order: Order,
    /// Length and hash of each input, for the manifest.
    files: Map<String, Value>,
    inputs_time: Duration,
    /// The model's files, and what they cost.
    installed: Installed,
    downgrades: Vec<String>,
}

/// Tells how far a job is.
struct Reporter {
    meter: Mutex<Meter>,
    /// Windows of the video; 0 until it is known.
    windows: AtomicUsize,
    began: Instant,
    send: Arc<dyn Fn(Update) + Send + Sync>,
}

impl Reporter {
    fn stage(&self, stage: Stage) {
        (self.send)(self.meter.lock().unwrap_or_else(PoisonError::into_inner).stage(stage));
    }

    /// A model is fetched at the very beginning of a job's percents.
    fn fetch(&self, update: Update) {
        let percent = self.meter.lock().unwrap_or_else(PoisonError::into_inner).stage(Stage::Fetch).percent;
        (self.send)(Update { percent, ..update });
    }

    fn progress(&self, progress: pipeline::Progress) {
        self.windows.store(progress.windows, Ordering::Relaxed);
        // A video that is complete has still to be delivered.
        if progress.stage != pipeline::Stage::Done {
            let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
            (self.send)(meter.update(progress, self.began.elapsed()));
        }
    }

    fn expect(&self, per_window: Option<Duration>) {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).expect(per_window);
    }
}

impl Shared {
    async fn run(&self, task: Task) -> Result<JobOutput, JobError> {
        let began = Instant::now();
        let boot = match self.began.swap(true, Ordering::Relaxed) {
            true => Duration::ZERO,
            false => began.saturating_duration_since(self.settings.started),
        };
        let Task { id, input, s3_config, cancel, progress } = task;
        let reporter = Arc::new(Reporter {
            meter: Mutex::default(),
            windows: AtomicUsize::new(0),
            began,
            send: progress,
        });
        let order = unless_cancelled(&cancel, self.read(input, s3_config.as_ref())).await?;
        let kept = self.spool.kept(&id).filter(|kept| order.delivery.is_for(kept));
        let made =
            kept.and_then(|kept| Some((manifest::output_of(&kept.manifest().ok()?, &order.digest)?, kept)));
        let (mut output, uploading) = match made {
            Some((mut output, kept)) => {
                tracing::warn!(job = id, "an earlier attempt has made the video: its upload is finished");
                reporter.stage(Stage::Upload);
                let uploading = Instant::now();
                unless_cancelled(&cancel, order.delivery.resume(kept, &mut output)).await?;
                (output, uploading)
            }
            None => self.make(&id, order, (&cancel, &reporter), boot).await?,
        };
        output.timings.upload_ms = Some(ms(uploading.elapsed()));
        output.timings.total_ms = ms(began.elapsed());
        reporter.stage(Stage::Done);
        tracing::info!(
            job = id,
            frames = output.frames,
            ms = output.timings.total_ms,
            "the video is delivered"
        );
        Ok(output)
    }

    /// From the request to the delivered video. Beside its description there is when its delivery began.
    async fn make(
        &self,
        id: &str,
        order: Order,
        (cancel, reporter): (&Cancel, &Arc<Reporter>),
        boot: Duration,
    ) -> Result<(JobOutput, Instant), JobError> {
        let (mut plan, inputs) = unless_cancelled(cancel, self.prepare(order, reporter)).await?;
        let video = self.spool.job(id)?;
        reporter.expect(self.paces.of(&plan.kind(&self.settings)));
        let made = self.compute(&mut plan, inputs.into(), &video, (cancel, reporter)).await?;
        if let Some(per_window) = per_window(&made, reporter.windows.load(Ordering::Relaxed)) {
            self.paces.record(&plan.kind(&self.settings), per_window);
        }

        reporter.stage(Stage::Upload);
        let mut output = describe(&plan, &made, &video).await?;
        output.timings.cold_start = cold_start(&made, boot, plan.installed.duration);
        if made.loading.is_some() {
            let cold = LastColdStart::new(&plan.order.model.spec.name, &output.timings.cold_start);
            cold.record(&self.settings.spool.join(COLD_START));
        }
        let uploading = Instant::now();
        let parcel = Parcel { manifest: plan.manifest(id, &output), thumbnail: made.thumbnail, video };
        let delivered = plan.order.delivery.deliver(parcel, &self.settings.spool, &self.put, &mut output);
        unless_cancelled(cancel, delivered).await?;
        Ok((output, uploading))
    }

    /// The request, and what it names: where the video goes, the model, the settings.
    async fn read(&self, input: Value, s3_config: Option<&Value>) -> Result<Order, JobError> {
        let (config, limits) = (&self.settings.config, self.settings.config.limits);
        let (digest, (request, mut warnings)) =
            blocking(move || Ok((manifest::digest(&input), Draft::parse(&input, &limits)?.finish()?)))
                .await?;
        let delivery = Delivery::choose(&request.output, s3_config, &self.settings)?;
        let speakers = if request.audio_2.is_some() { 2 } else { 1 };
        let name = request.model.as_deref().or(self.settings.model.as_deref());
        let models_file = self.settings.models_file.as_deref();
        let model = Model::choose(name, models_file, &config.hub, speakers)?;
        warnings.extend(model.stands_in.then(|| model.stand_in_warning(config.hub.storage())));
        let settings = Settings::resolve(&request, &model.spec)?;
        Ok(Order { digest, request, delivery, model, settings, warnings })
    }

    /// The inputs, fetched and opened.
    async fn prepare(&self, mut order: Order, reporter: &Arc<Reporter>) -> Result<(Plan, Inputs), JobError> {
        reporter.stage(Stage::Fetch);
        let fetching = Instant::now();
        let files = self.fetch(&mut order.request).await?;
        reporter.stage(Stage::Validate);
        let (span, config) = (tracing::Span::current(), self.settings.config.clone());
        let (files, inputs, mut heard) = blocking(move || {
            span.in_scope(|| {
                let described = manifest::files(files.iter().map(|(name, bytes)| (*name, bytes.as_slice())));
                let mut files = files.into_iter().map(|(_, bytes)| bytes);
                let image = files.next().unwrap_or_default();
                let (inputs, heard) = generate::open_inputs(&image, files.collect(), &config)?;
                Ok((described, inputs, heard))
            })
        })
        .await?;
        order.warnings.append(&mut heard);
        let inputs_time = fetching.elapsed();
        let installed = self.install(&order, reporter).await?;
        Ok((Plan { order, files, inputs_time, installed, downgrades: Vec::new() }, inputs))
    }

    /// The files of the model, which are fetched where they are missing.
    async fn install(&self, order: &Order, reporter: &Reporter) -> Result<Installed, JobError> {
        let speakers = if order.request.audio_2.is_some() { 2 } else { 1 };
        let hub = &self.settings.config.hub;
        let files = generate::files_of(&order.model.spec, hub, speakers, &order.settings.loras)?;
        let mut meter = hub::Meter::default();
        let mut report = |progress| reporter.fetch(meter.update(progress, Instant::now()));
        let control = hub::Control { deep: false, deadline: None, report: &mut report };
        hub.ensure(&files, control).await
    }

    /// The bytes of the image and of one or two voices, under their fields' names.
    async fn fetch(&self, request: &mut GenerateRequest) -> Result<Vec<(&'static str, Vec<u8>)>, JobError> {
        let mut files = Vec::new();
        for (name, medium, source) in generate::take_media(request) {
            let bytes = match source {
                MediaSource::Bytes(bytes) => bytes,
                MediaSource::Url(url) => {
                    let policy = self.settings.config.fetch_policy();
                    let fetcher = self.fetcher.get_or_init(|| Fetcher::new(policy));
                    fetcher.as_ref().map_err(Clone::clone)?.fetch(name, medium, &url).await?
                }
            };
            files.push((name, bytes));
        }
        Ok(files)
    }

    /// Makes the video; where there is too little memory, once more with less. The plan then says so.
    async fn compute(
        &self,
        plan: &mut Plan,
        inputs: Arc<Inputs>,
        video: &SpooledVideo,
        control: (&Cancel, &Arc<Reporter>),
    ) -> Result<Video, JobError> {
        let made = self.executor.generate(self.work(plan, &inputs, video, control)).await;
        let Err(error) = made else { return made };
        let Order { request, settings, model, .. } = &mut plan.order;
        let Some(downgrade) = downgrade::lower(&error, request, settings, &model.spec)? else {
            return Err(error);
        };
        tracing::warn!("{error}; it is tried once more. {downgrade}");
        plan.downgrades.push(downgrade.into());
        self.executor.generate(self.work(plan, &inputs, video, control)).await
    }

    fn work(
        &self,
        plan: &Plan,
        inputs: &Arc<Inputs>,
        video: &SpooledVideo,
        (cancel, reporter): (&Cancel, &Arc<Reporter>),
    ) -> Work {
        let reporter = reporter.clone();
        Work {
            spec: plan.order.model.spec.clone(),
            storage: plan.installed.storage.clone(),
            settings: plan.order.settings.clone(),
            inputs: inputs.clone(),
            output: video.path(),
            cancel: cancel.clone(),
            progress: Box::new(move |progress| reporter.progress(progress)),
        }
    }
}

/// How long a window took. A stand-in has none.
fn per_window(made: &Video, windows: usize) -> Option<Duration> {
    let timings = &made.timings;
    let all = timings.denoise + timings.decode + timings.mux;
    u32::try_from(windows).ok().and_then(|windows| all.checked_div(windows)).filter(|time| !time.is_zero())
}

impl Plan {
    /// What decides how long a window takes.
    fn kind(&self, settings: &RunnerSettings) -> String {
        let Order { request, model, settings: Settings { sampling, .. }, .. } = &self.order;
        pace::kind(settings.device, &model.spec.name, request, sampling)
    }

    fn manifest(&self, job_id: &str, output: &JobOutput) -> Value {
        let origin = manifest::Origin {
            job_id,
            digest: &self.order.digest,
            files: &self.files,
            request: &self.order.request,
            settings: &self.order.settings,
            spec: &self.order.model.spec,
        };
        manifest::manifest(&origin, output)
    }
}

/// What is known of the video before it is delivered.
async fn describe(plan: &Plan, made: &Video, video: &SpooledVideo) -> Result<JobOutput, JobError> {
    let (request, path, video) = (plan.order.request.clone(), video.path(), made.clone());
    // Reading it back takes a while, where it is long.
    let described = tokio::task::spawn_blocking(move || generate::describe(&request, &path, &video)).await;
    let mut output = described.map_err(|e| ended_early(&e))??;
    output.model = plan.order.model.spec.name.clone();
    output.downgrades = plan.downgrades.clone();
    let notes = made.loading.iter().flat_map(|loading| loading.notes.iter().cloned());
    output.warnings.splice(0..0, plan.order.warnings.iter().cloned().chain(notes));
    output.timings.inputs_ms = ms(plan.inputs_time);
    Ok(output)
}

/// `work`, given up when the job is cancelled.
async fn unless_cancelled<T>(
    cancel: &Cancel,
    work: impl Future<Output = Result<T, JobError>>,
) -> Result<T, JobError> {
    tokio::select! {
        // What was cancelled before it began does not begin.
        biased;
        error = cancelled(cancel) => Err(error),
        done = work => done,
    }
}

/// Runs what takes long and waits for nobody beside the tasks that wait. A panic in it is contained.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> talkie::Result<T> + Send + 'static,
) -> Result<T, JobError> {
    let done = tokio::task::spawn_blocking(move || contained(work)).await;
    done.unwrap_or_else(|e| Err(ended_early(&e)))
}

fn ended_early(e: &tokio::task::JoinError) -> JobError {
    JobError::new(Code::Internal, format!("a part of the job has ended early: {e}"))
}
