//! `handler generate`: one video from files or URLs.

use std::path::{Path, PathBuf};
use std::time::Instant;

use talkie::pipeline::{Cancel, Control, Inputs, Job, Progress, Settings};
use talkie::request::{GenerateRequest, MediaSource, Medium, OutputOptions};

use super::display::Display;
use super::flags::Args;
use super::install::install;
use crate::config::Config;
use crate::downgrade;
use crate::generate::{self, Generator, Model, cold_start, file_url, ms, unwritable};
use crate::inputs::Fetcher;
use crate::interrupt::Interrupt;
use crate::job::{Code, JobError, JobOutput};
use crate::part_file::PartFile;
use crate::progress::{Meter, Stage, Update};

/// Makes the video and says what came of it. `started` is when the process began.
pub fn run(args: &Args, config: &Config, started: Instant) -> Result<JobOutput, JobError> {
    let interrupt = Interrupt::listen(args.quiet)?;
    let mut screen = Screen::new(args.quiet, started);
    let made = Generation { args, config, interrupt: &interrupt }.make(&mut screen);
    screen.display.close();
    made
}

/// The progress display and what it shows.
pub(super) struct Screen {
    pub(super) display: Display,
    meter: Meter,
    started: Instant,
}

impl Screen {
    pub(super) fn new(quiet: bool, started: Instant) -> Self {
        Self { display: Display::new(quiet), meter: Meter::default(), started }
    }

    fn stage(&mut self, stage: Stage) {
        let update = self.meter.stage(stage);
        self.display.show(&update);
    }

    /// A model is fetched at the very beginning of a job's percents.
    fn fetch(&mut self, update: Update) {
        let percent = self.meter.stage(Stage::Fetch).percent;
        self.display.show(&Update { percent, ..update });
    }

    fn progress(&mut self, progress: Progress) {
        let update = self.meter.update(progress, self.started.elapsed());
        self.display.show(&update);
    }
}

pub(super) struct Generation<'a> {
    pub(super) args: &'a Args,
    pub(super) config: &'a Config,
    pub(super) interrupt: &'a Interrupt,
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
        let hub = &self.config.hub;
        let model = Model::choose(request.model.as_deref(), self.args.models_file.as_deref(), hub, speakers)?;
        if model.stands_in {
            let said = model.stand_in_warning(hub.storage());
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

        let mut settings = Settings::resolve(&request, &model.spec)?;

        let inputs_began = Instant::now();
        let (inputs, mut heard) = self.inputs(&mut request, screen)?;
        warnings.append(&mut heard);
        let inputs_time = inputs_began.elapsed();
        tracing::info!(?request, ms = ms(inputs_time), "the inputs are sound");
        self.interrupt.cancel().check()?;
        let display = &screen.display;
        let device =
            generate::contained(|| generate::open_device(self.args.device, |said| display.note(said)))?;
        let files = generate::files_of(&model.spec, hub, speakers, &settings.loras)?;
        let installed =
            install(hub, &files, false, self.interrupt.cancel(), &mut |update| screen.fetch(update))?;
        let mut generator = Generator::new(device, self.config.memory_limit);
        let mut run = |settings: &Settings, screen: &mut Screen| {
            generate::contained(|| {
                let (spec, storage, output) = (&model.spec, &installed.storage, video_file.path());
                let job = Job { spec, storage, settings, inputs: &inputs, output };
                let progress = &mut |progress| screen.progress(progress);
                generator.run(job, Control { cancel: self.interrupt.cancel(), progress })
            })
        };
        let mut downgrades = Vec::new();
        let video = match run(&settings, screen) {
            Ok(video) => video,
            Err(error) => match downgrade::lower(&error, &mut request, &mut settings, &model.spec)? {
                Some(downgrade) => {
                    screen.display.note(&format!("{error}; it is tried once more. {downgrade}"));
                    downgrades.push(downgrade.to_string());
                    run(&settings, screen)?
                }
                None => return Err(error),
            },
        };
        self.interrupt.cancel().check()?;
        tracing::info!(
            model = model.spec.name,
            frames = video.frames,
            seed = video.seed,
            "the video is complete"
        );

        let mut output = generate::describe(&request, video_file.path(), &video)?;
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
        output.downgrades = downgrades;
        output.timings.cold_start = cold_start(&video, boot, installed.duration);
        warnings.extend(video.loading.into_iter().flat_map(|loading| loading.notes));
        output.warnings.splice(0..0, warnings);
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

    /// The opened image and voices, and what is to be said about them.
    pub(super) fn inputs(
        &self,
        request: &mut GenerateRequest,
        screen: &mut Screen,
    ) -> Result<(Inputs, Vec<String>), JobError> {
        screen.stage(Stage::Fetch);
        let mut files = self.fetch(generate::take_media(request))?;
        screen.stage(Stage::Validate);
        let image = files.remove(0);
        generate::contained(|| generate::open_inputs(&image, files, self.config))
    }

    /// The bytes of the image and of one or two voices.
    fn fetch(&self, media: Vec<(&'static str, Medium, MediaSource)>) -> Result<Vec<Vec<u8>>, JobError> {
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
        media.into_iter().map(|(name, medium, source)| bytes(name, medium, source)).collect()
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
                error = generate::cancelled(cancel) => Err(error),
            }
        })
    }
}
