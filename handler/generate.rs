//! The seam to the inference library: which model, which inputs, and the one call that makes a video.

use std::path::Path;
use std::time::Instant;

use clap::ValueEnum;
use talkie::device::{self, Preference};
use talkie::media::audio::{self, Voice};
use talkie::media::image::{self, Portrait};
use talkie::pipeline::{
    Cancel, Control, Inputs, LoadOptions, Pipeline, Progress, Settings, Video, stored_files,
};
use talkie::registry::{ModelSpec, Registry};
use talkie::{Error, ErrorKind, Result};

use crate::config::Config;

/// The model that runs where no weights are installed.
const FALLBACK: &str = "tiny";

/// Where the networks run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A GPU where there is one.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The first GPU, or an error.
    Cuda,
}

impl From<DeviceChoice> for Preference {
    fn from(choice: DeviceChoice) -> Self {
        match choice {
            DeviceChoice::Auto => Self::Auto,
            DeviceChoice::Cpu => Self::Cpu,
            DeviceChoice::Cuda => Self::Cuda,
        }
    }
}

/// A model that was chosen.
#[derive(Clone, Debug)]
pub struct Model {
    /// What it consists of.
    pub spec: ModelSpec,
    /// Whether it stands in because no weights are installed.
    pub stands_in: bool,
}

impl Model {
    /// The model called `name`, else the first whose weights for `speakers` persons lie in `storage`, else the
    /// untrained one; from the models.toml at `file`, or the one that is built in.
    ///
    /// # Errors
    /// Those of [`Registry::open`] and [`Registry::model`].
    pub fn choose(name: Option<&str>, file: Option<&Path>, storage: &Path, speakers: usize) -> Result<Self> {
        let registry = match file {
            Some(file) => Registry::open(file)?,
            None => Registry::built_in()?,
        };
        if let Some(name) = name {
            return Ok(Self { spec: registry.model(name)?.clone(), stands_in: false });
        }
        match registry.models().find(|spec| is_installed(spec, storage, speakers)) {
            Some(spec) => Ok(Self { spec: spec.clone(), stands_in: false }),
            None => Ok(Self { spec: registry.model(FALLBACK)?.clone(), stands_in: true }),
        }
    }
}

/// Whether every file of `spec` lies in `storage`. A model without files is no one's installed model.
fn is_installed(spec: &ModelSpec, storage: &Path, speakers: usize) -> bool {
    let mut files = stored_files(storage, spec.files(speakers, &[])).peekable();
    files.peek().is_some() && files.all(|file| file.is_file())
}

/// Decodes the image and one or two voices. Beside them there are warnings.
///
/// # Errors
/// The image and audio kinds of [`ErrorKind`].
pub fn open_inputs(image: &[u8], voices: Vec<Vec<u8>>, config: &Config) -> Result<(Inputs, Vec<String>)> {
    let image_limits = image::Limits { max_bytes: config.limits.image_bytes, ..image::Limits::default() };
    let audio_limits = audio::Limits {
        max_bytes: config.limits.audio_bytes,
        max_seconds: config.max_audio_seconds.map(f64::from),
        ..audio::Limits::default()
    };
    let portrait = Portrait::open(image, &image_limits)?;
    let voices = voices.into_iter().map(|bytes| Voice::open(bytes.into(), &audio_limits));
    let voices = voices.collect::<Result<Vec<_>>>()?;
    let warnings =
        voices.iter().flat_map(|voice| voice.facts().warnings.iter().map(ToString::to_string)).collect();
    let mut voices = voices.into_iter();
    let Some(voice) = voices.next() else {
        return Err(Error::new(ErrorKind::MissingField, "`audio` is missing"));
    };
    Ok((Inputs { portrait, voice, second_voice: voices.next() }, warnings))
}

/// All that a video is made of.
pub struct Job<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Folder of the weights.
    pub storage: &'a Path,
    /// Where the networks run.
    pub device: DeviceChoice,
    /// What is asked for.
    pub settings: &'a Settings,
    /// The opened image and voices.
    pub inputs: Inputs,
    /// The file to write.
    pub output: &'a Path,
    /// Ends the generation at the next step.
    pub cancel: &'a Cancel,
    /// Told where the generation stands.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// Loads the model and makes the video, on the calling thread. Beside it there is the time that loading took.
///
/// # Errors
/// Any [`ErrorKind`] but those of requests and media.
pub fn run(job: Job<'_>) -> Result<(Video, std::time::Duration)> {
    let began = Instant::now();
    let device = device::select(job.device.into())?;
    let options = LoadOptions {
        storage: job.storage,
        speakers: if job.inputs.second_voice.is_some() { 2 } else { 1 },
        loras: &job.settings.loras,
        device: &device,
    };
    let pipeline = Pipeline::load(job.spec, options, job.cancel, job.progress)?;
    let loaded = began.elapsed();
    let control = Control { cancel: job.cancel, progress: job.progress };
    Ok((pipeline.generate(job.settings, job.inputs, job.output, control)?, loaded))
}
