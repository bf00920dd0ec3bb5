//! `handler generate`: one video from files or URLs.

use std::fs::File;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::Url;
use sha2::{Digest, Sha256};
use talkie::pipeline::{Cancel, Inputs, Progress, Settings, Video};
use talkie::request::{FPS, GenerateRequest, MediaSource, Medium, OutputOptions};

use super::display::Display;
use super::flags::Args;
use crate::config::Config;
use crate::generate::{self, Job, Model};
use crate::inputs::Fetcher;
use crate::interrupt::Interrupt;
use crate::job::{Code, ColdStart, JobError, JobOutput, PeakMemory, Timings};
use crate::memory::peak_host_bytes;
use crate::part_file::PartFile;
use crate::progress::{Meter, Stage};

/// How often a download looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// Makes the video and says what came of it. `started` is when the process began.
pub fn run(args: &Args, config: &Config, started: Instant) -> Result<JobOutput, JobError> {
    let interrupt = Interrupt::listen(args.quiet)?;
    let mut screen = Screen { display: Display::new(args.quiet), meter: Meter::default(), started };
    let made = Generation { args, config, interrupt: &interrupt }.make(&mut screen);
    screen.display.close();
    made
}

/// The progress display and what it shows.
struct Screen {
    display: Display,
    meter: Meter,
    started: Instant,
}

impl Screen {
    fn stage(&mut self, stage: Stage) {
        let update = self.meter.stage(stage);
        self.display.show(&update);
    }

    fn progress(&mut self, progress: Progress) {
        let update = self.meter.update(progress, self.started.elapsed());
        self.display.show(&update);
    }
}

struct Generation<'a> {
    args: &'a Args,
    config: &'a Config,
    interrupt: &'a Interrupt,
}

impl Generation<'_> {
    /// From cheap to dear: the request, the names of model and files, the inputs, and only then the weights.
    fn make(&self, screen: &mut Screen) -> Result<JobOutput, JobError> {
        let boot = screen.started.elapsed();
        let (mut request, mut warnings) = self.args.request(self.config.limits, &screen.display)?;
        if (OutputOptions { thumbnail: false, ..request.output.clone() }) != OutputOptions::default() {
            warnings.push(
                "of `output` only `thumbnail` has an effect here: the video is a local file".to_string(),
            );
        }
        let speakers = if request.audio_2.is_some() { 2 } else { 1 };
        let storage = &self.config.model_storage;
        let model =
            Model::choose(request.model.as_deref(), self.args.models_file.as_deref(), storage, speakers)?;
        if model.stands_in {
            let said = format!(
                "no weights are installed in {}: using `{}`, which is untrained and shows no face",
                storage.display(),
                model.spec.name
            );
            screen.display.note(&said);
            warnings.push(said);
        }
        let video_file = self.part_file("output", &self.args.output)?;
        let thumbnail = self.thumbnail_path(&request);
        request.output.thumbnail = thumbnail.is_some();
        let thumbnail = match thumbnail {
            Some(path) => Some((self.part_file("thumbnail", &path)?, path)),
            None => None,
        };

        let settings = Settings::resolve(&request, &model.spec)?;

        let inputs_began = Instant::now();
        let (inputs, mut heard) = self.inputs(&mut request, screen)?;
        warnings.append(&mut heard);
        let inputs_time = inputs_began.elapsed();
        tracing::info!(?request, ms = ms(inputs_time), "the inputs are sound");
        self.interrupt.cancel().check()?;
        let (video, load_time) = contained(|| {
            generate::run(Job {
                spec: &model.spec,
                storage,
                device: self.args.device,
                settings: &settings,
                inputs,
                output: video_file.path(),
                cancel: self.interrupt.cancel(),
                progress: &mut |progress| screen.progress(progress),
            })
        })?;
        self.interrupt.cancel().check()?;
        tracing::info!(
            model = model.spec.name,
            frames = video.frames,
            seed = video.seed,
            "the video is complete"
        );

        let mut output = describe(&request, video_file.path(), &video)?;
        if let (Some((part, path)), Some(jpeg)) = (thumbnail, &video.thumbnail) {
            std::fs::write(part.path(), jpeg)
                .and_then(|()| part.publish())
                .map_err(|e| unwritable(&path, &e))?;
            output.thumbnail_url = Some(file_url(&path)?.0);
        }
        video_file.publish().map_err(|e| unwritable(&self.args.output, &e))?;
        let (video_url, video_path) = file_url(&self.args.output)?;
        screen.stage(Stage::Done);
        output.video_url = video_url;
        output.video_path = Some(video_path);
        output.model = model.spec.name;
        output.warnings = warnings;
        output.timings.cold_start = ColdStart { boot_ms: ms(boot), fetch_ms: 0, load_ms: ms(load_time) };
        output.timings.inputs_ms = ms(inputs_time);
        output.timings.total_ms = ms(screen.started.elapsed());
        Ok(output)
    }

    /// A part of the file at `path`, which a second Ctrl-C removes.
    fn part_file(&self, flag: &str, path: &Path) -> Result<PartFile, JobError> {
        if path.is_dir() {
            let message = format!("`--{flag}` is {}, which is a folder, expected a file", path.display());
            return Err(JobError::new(Code::InvalidInput, message));
        }
        let part = PartFile::create(path).map_err(|e| {
            let message = format!("`--{flag}` is {}, which cannot be written: {e}", path.display());
            JobError::new(Code::InvalidInput, message).with_reason("FILE_UNWRITABLE")
        })?;
        self.interrupt.guard(part.path());
        // The video writer makes a part of its own beside the file that it is given.
        let mut inner = part.path().as_os_str().to_owned();
        inner.push(".part");
        self.interrupt.guard(Path::new(&inner));
        Ok(part)
    }

    /// A request file that asks for a thumbnail without a flag for it gets one beside the video.
    fn thumbnail_path(&self, request: &GenerateRequest) -> Option<PathBuf> {
        let beside = request.output.thumbnail.then(|| self.args.output.with_extension("jpg"));
        self.args.thumbnail.clone().or(beside)
    }

    /// Takes the media out of the request, since a second copy of them has no use.
    fn inputs(
        &self,
        request: &mut GenerateRequest,
        screen: &mut Screen,
    ) -> Result<(Inputs, Vec<String>), JobError> {
        screen.stage(Stage::Fetch);
        let (image, voices) = self.fetch(request)?;
        screen.stage(Stage::Validate);
        contained(|| generate::open_inputs(&image, voices, self.config))
    }

    /// The bytes of the image and of one or two voices.
    fn fetch(&self, request: &mut GenerateRequest) -> Result<(Vec<u8>, Vec<Vec<u8>>), JobError> {
        let take = |source: &mut MediaSource| std::mem::replace(source, MediaSource::Bytes(Vec::new()));
        let mut download = None;
        let mut bytes = |name, medium, source| match source {
            MediaSource::Bytes(bytes) => Ok(bytes),
            MediaSource::Url(url) => {
                let download = match &mut download {
                    Some(download) => download,
                    none => none.insert(Download::new(self.config)?),
                };
                download.fetch(name, medium, &url, self.interrupt.cancel())
            }
        };
        let image = bytes("image", Medium::Image, take(&mut request.image))?;
        let mut voices = vec![bytes("audio", Medium::Audio, take(&mut request.audio))?];
        if let Some(source) = &mut request.audio_2 {
            voices.push(bytes("audio_2", Medium::Audio, take(source))?);
        }
        Ok((image, voices))
    }
}

/// A connection to the outside for the few downloads of one command.
struct Download {
    runtime: tokio::runtime::Runtime,
    fetcher: Fetcher,
}

impl Download {
    fn new(config: &Config) -> Result<Self, JobError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| JobError::new(Code::Internal, format!("no download can be started: {e}")))?;
        Ok(Self { runtime, fetcher: Fetcher::new(config.fetch_policy())? })
    }

    fn fetch(&self, name: &str, medium: Medium, url: &str, cancel: &Cancel) -> Result<Vec<u8>, JobError> {
        self.runtime.block_on(async {
            tokio::select! {
                bytes = self.fetcher.fetch(name, medium, url) => bytes,
                error = cancelled(cancel) => Err(error),
            }
        })
    }
}

/// Ends when `cancel` was called.
async fn cancelled(cancel: &Cancel) -> JobError {
    let mut poll = tokio::time::interval(CANCEL_POLL);
    loop {
        poll.tick().await;
        if let Err(e) = cancel.check() {
            return e.into();
        }
    }
}

/// Runs code that reads what came from outside; a panic there is a failure of this job alone.
fn contained<T>(work: impl FnOnce() -> talkie::Result<T>) -> Result<T, JobError> {
    match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Ok(done?),
        Err(_) => Err(JobError::new(Code::Internal, "the generation failed in a way that was not foreseen")
            .with_hint("please report this with the lines above and the input")),
    }
}

/// What is known once the file at `path` is complete.
fn describe(request: &GenerateRequest, path: &Path, video: &Video) -> Result<JobOutput, JobError> {
    let (size_bytes, sha256) = hash(path)
        .map_err(|e| JobError::new(Code::EncodeFailed, format!("the video cannot be read back: {e}")))?;
    Ok(JobOutput {
        size_bytes,
        sha256,
        duration_s: video.frames as f64 / f64::from(FPS),
        frames: video.frames,
        fps: FPS,
        width: video.size.width,
        height: video.size.height,
        seed: video.seed,
        preset: request.preset.map(|preset| preset.as_str().to_string()),
        timings: Timings {
            audio_ms: ms(video.timings.audio),
            encode_ms: ms(video.timings.encode),
            denoise_ms: ms(video.timings.denoise),
            per_step_ms: ms(video.timings.per_step),
            decode_ms: ms(video.timings.decode),
            mux_ms: ms(video.timings.mux),
            ..Timings::default()
        },
        peak_memory: PeakMemory { host_bytes: peak_host_bytes(), device_bytes: None },
        ..JobOutput::default()
    })
}

/// Length and SHA-256 of a file.
fn hash(path: &Path) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let len = io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok((len, hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// The `file:` URL and the absolute path of a file that exists.
fn file_url(path: &Path) -> Result<(String, String), JobError> {
    let absolute = std::path::absolute(path).map_err(|e| unwritable(path, &e))?;
    let url = Url::from_file_path(&absolute)
        .map_err(|()| JobError::new(Code::Internal, format!("{} has no URL", absolute.display())))?;
    Ok((url.into(), absolute.display().to_string()))
}

fn unwritable(path: &Path, e: &io::Error) -> JobError {
    let code = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::InsufficientDisk,
        _ => Code::EncodeFailed,
    };
    JobError::new(code, format!("{} cannot be written: {e}", path.display()))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
