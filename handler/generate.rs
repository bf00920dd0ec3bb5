//! The seam to the inference library: which model, which inputs, and the one call that makes a video.

use std::fs::File;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::time::Duration;

use candle_core::Device;
use clap::ValueEnum;
use reqwest::Url;
use sha2::{Digest, Sha256};
use talkie::device::{self, Preference};
use talkie::media::audio::{self, Voice};
use talkie::media::image::{self, Portrait};
use talkie::pipeline::{Cancel, Control, Inputs, Job, Loading, MEMORY_PLAN, Pipeline, Video};
use talkie::prepared::Selection;
use talkie::registry::{ModelSpec, ModelStorage, Registry, RepoFiles};
use talkie::request::{FPS, GenerateRequest, MediaSource, Medium};
use talkie::{Error, ErrorKind, Result};

use crate::config::Config;
use crate::hub::Hub;
use crate::job::{Code, ColdStart, JobError, JobOutput, PeakMemory, Timings};
use crate::memory::peak_host_bytes;

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

/// Opens the device of `choice`; `say` is told where a free choice falls on the processor, and why.
///
/// # Errors
/// Those of [`device::select`].
pub fn open_device(choice: DeviceChoice, say: impl FnOnce(&str)) -> Result<Device> {
    device::select(choice.into(), |e| say(&format!("no GPU is used: {e}")))
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
    /// The model called `name`, else the first whose weights for `speakers` persons are on this machine, else the
    /// untrained one; from the models.toml at `file`, or the one that is built in.
    ///
    /// # Errors
    /// Those of [`Registry::open`] and [`Registry::model`].
    pub fn choose(name: Option<&str>, file: Option<&Path>, hub: &Hub, speakers: usize) -> Result<Self> {
        let registry = registry(file)?;
        if let Some(name) = name {
            return Ok(Self { spec: registry.model(name)?.clone(), stands_in: false });
        }
        match registry.models().find(|spec| hub.has(spec.files(speakers, &[]))) {
            Some(spec) => Ok(Self { spec: spec.clone(), stands_in: false }),
            None => Ok(Self { spec: registry.model(FALLBACK)?.clone(), stands_in: true }),
        }
    }
}

impl Model {
    /// Why a model that stands in shows no face; `storage` is where no weights are.
    pub fn stand_in_warning(&self, storage: &ModelStorage) -> String {
        let (storage, name) = (storage.root().display(), &self.spec.name);
        format!("no weights are installed in {storage}: using `{name}`, which is untrained and shows no face")
    }
}

/// The models.toml at `file`, in which `$NAME` is a variable of the environment, or the one that is built in.
///
/// # Errors
/// Those of [`Registry::open`].
pub fn registry(file: Option<&Path>) -> Result<Registry> {
    match file {
        Some(file) => Registry::open(file, &|name| std::env::var(name).ok()),
        None => Registry::built_in(),
    }
}

/// Decodes a portrait within the limits of `config`.
///
/// # Errors
/// The image kinds of [`ErrorKind`].
pub fn open_image(image: &[u8], config: &Config) -> Result<Portrait> {
    let limits = image::Limits { max_bytes: config.limits.image_bytes, ..image::Limits::default() };
    Portrait::open(image, &limits)
}

/// Decodes a voice within the limits of `config`.
///
/// # Errors
/// The audio kinds of [`ErrorKind`].
pub fn open_voice(voice: Vec<u8>, config: &Config) -> Result<Voice> {
    let limits = audio::Limits {
        max_bytes: config.limits.audio_bytes,
        max_seconds: config.max_audio_seconds.map(f64::from),
        ..audio::Limits::default()
    };
    Voice::open(voice.into(), &limits)
}

/// Decodes the image and one or two voices. Beside them there are warnings.
///
/// # Errors
/// The image and audio kinds of [`ErrorKind`].
pub fn open_inputs(image: &[u8], voices: Vec<Vec<u8>>, config: &Config) -> Result<(Inputs, Vec<String>)> {
    let portrait = open_image(image, config)?;
    let voices = voices.into_iter().map(|bytes| open_voice(bytes, config)).collect::<Result<Vec<_>>>()?;
    let blank = portrait.is_blank().then(|| "the image is of one colour: there is no face in it".to_string());
    let heard = voices.iter().flat_map(|voice| voice.facts().warnings.iter().map(ToString::to_string));
    let warnings = blank.into_iter().chain(heard).collect();
    let mut voices = voices.into_iter();
    let Some(voice) = voices.next() else {
        return Err(Error::new(ErrorKind::MissingField, "`audio` is missing"));
    };
    Ok((Inputs { portrait, voice, second_voice: voices.next() }, warnings))
}

/// How often waiting work looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// Takes the media out of `request`, since a second copy of them has no use: the image, then the voices.
pub fn take_media(request: &mut GenerateRequest) -> Vec<(&'static str, Medium, MediaSource)> {
    let take = |source: &mut MediaSource| std::mem::replace(source, MediaSource::Bytes(Vec::new()));
    let mut media = vec![
        ("image", Medium::Image, take(&mut request.image)),
        ("audio", Medium::Audio, take(&mut request.audio)),
    ];
    media.extend(request.audio_2.as_mut().map(|source| ("audio_2", Medium::Audio, take(source))));
    media
}

/// Ends when `cancel` was called.
pub async fn cancelled(cancel: &Cancel) -> JobError {
    let mut poll = tokio::time::interval(CANCEL_POLL);
    loop {
        if let Err(e) = cancel.check() {
            return e.into();
        }
        poll.tick().await;
    }
}

/// Runs code that reads what came from outside, or computes with it; a panic there is a failure of this job alone.
///
/// # Errors
/// Those of `work`; [`Code::Internal`] when it panics.
pub fn contained<T>(work: impl FnOnce() -> Result<T>) -> Result<T, JobError> {
    match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Ok(done?),
        Err(_) => Err(JobError::new(Code::Internal, "the generation failed in a way that was not foreseen")
            .with_hint("please report this with the lines above and the input")),
    }
}

/// Makes videos on one device, and keeps its networks warm.
pub struct Generator {
    pipeline: Pipeline,
}

impl Generator {
    /// A generator without networks, which uses no more than `memory_limit` bytes of `device`.
    pub fn new(device: Device, memory_limit: Option<u64>) -> Self {
        Self { pipeline: Pipeline::new(device, memory_limit) }
    }

    /// Whether it computes on a GPU.
    pub fn is_on_gpu(&self) -> bool {
        !self.pipeline.device().is_cpu()
    }

    /// Makes the video, on the calling thread. Networks of a device that ran out of memory or broke are not kept, and
    /// the next video gets less of a memory that ran out.
    ///
    /// # Errors
    /// Any [`ErrorKind`] but those of requests and media.
    pub fn run(&mut self, job: Job<'_>, control: Control<'_>) -> Result<Video> {
        let made = self.pipeline.generate(job, control).map_err(classify);
        match &made {
            // A plan that was refused has touched nothing.
            Err(e) if e.reason() == Some(MEMORY_PLAN) => {}
            Err(e) if e.kind() == ErrorKind::OutOfMemory => self.pipeline.step_down(),
            Err(e) if e.kind() == ErrorKind::DeviceUnavailable => self.pipeline.clear(),
            _ => {}
        }
        made
    }
}

/// [`Error::reason`] of a device that this process can use no more.
pub const DEVICE_BROKEN: &str = "DEVICE_BROKEN";

/// Errors of CUDA after which every further call in this process fails, as NVIDIA's manual of the driver says
/// of each: "the process must be terminated and relaunched".
const STICKY: [&str; 12] = [
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
];

/// What the driver, and cuBLAS, say where a GPU has too little memory.
const OUT_OF_MEMORY: [&str; 2] = ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"];

/// Tells the two errors of a GPU that are not the job's own from those that are, by the driver's names for them.
pub fn classify(e: Error) -> Error {
    if e.kind() != ErrorKind::Inference {
        return e;
    }
    let text = e.to_string();
    if OUT_OF_MEMORY.into_iter().any(|name| text.contains(name)) {
        let hint = "ask for 480p, or for fewer `frames_per_window`";
        return Error::new(ErrorKind::OutOfMemory, "the GPU has too little free memory for this video")
            .with_hint(hint)
            .with_source(e);
    }
    match STICKY.into_iter().find(|name| text.contains(name)) {
        Some(name) => {
            let message = format!("the GPU is in a state that only a new process mends ({name})");
            Error::new(ErrorKind::DeviceUnavailable, message).with_reason(DEVICE_BROKEN).with_source(e)
        }
        None => e,
    }
}

/// What is known of a video once its file at `path` is complete.
///
/// # Errors
/// [`Code::EncodeFailed`] when the file cannot be read back.
pub fn describe(request: &GenerateRequest, path: &Path, video: &Video) -> Result<JobOutput, JobError> {
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
        warnings: remade_warning(video.remade_windows).into_iter().collect(),
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

/// What is said about windows that had to be made again.
fn remade_warning(windows: usize) -> Option<String> {
    let were = if windows == 1 { "window was" } else { "windows were" };
    (windows > 0)
        .then(|| format!("{windows} {were} broken and made again without this machine's fast kernels"))
}

/// What a process did for `video` that a warm one does not do again, after `boot` and `fetch`.
pub fn cold_start(video: &Video, boot: Duration, fetch: Duration) -> ColdStart {
    let cold = ColdStart { boot_ms: ms(boot), fetch_ms: ms(fetch), ..ColdStart::default() };
    let Some(Loading { wall, stats, .. }) = &video.loading else { return cold };
    let seconds = stats.wall.as_secs_f64();
    let gb_per_s = if seconds > 0.0 { stats.bytes_read as f64 / 1e9 / seconds } else { 0.0 };
    ColdStart {
        load_ms: ms(*wall),
        read_ms: ms(stats.read),
        convert_ms: ms(stats.convert),
        to_device_ms: ms(stats.to_device),
        first_step_ms: ms(video.timings.first_step),
        bytes_read: stats.bytes_read,
        gb_per_s: (gb_per_s * 1000.0).round() / 1000.0,
        ..cold
    }
}

/// Length and SHA-256 of a file.
fn hash(path: &Path) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let len = io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok((len, hex::encode(hasher.finalize())))
}

/// Whole milliseconds.
pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The `file:` URL and the absolute path of a file that exists.
///
/// # Errors
/// [`Code::Internal`] for a path that no URL can hold.
pub fn file_url(path: &Path) -> Result<(String, String), JobError> {
    let absolute = std::path::absolute(path).map_err(|e| unwritable(path, &e))?;
    let url = Url::from_file_path(&absolute)
        .map_err(|()| JobError::new(Code::Internal, format!("{} has no URL", absolute.display())))?;
    Ok((url.into(), absolute.display().to_string()))
}

/// The files that are to be fetched for videos of `speakers` persons with these LoRAs: of networks that are prepared,
/// the sources are not.
///
/// # Errors
/// As [`Selection::needed`].
pub fn files_of(spec: &ModelSpec, hub: &Hub, speakers: usize, loras: &[String]) -> Result<Vec<RepoFiles>> {
    let selection = Selection { spec, storage: hub.storage(), speakers, loras };
    Ok(selection.needed()?.into_iter().cloned().collect())
}

/// Why the file at `path` could not be written.
pub fn unwritable(path: &Path, e: &io::Error) -> JobError {
    let code = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::InsufficientDisk,
        _ => Code::EncodeFailed,
    };
    JobError::new(code, format!("{} cannot be written: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpus_own_errors_are_told_from_the_jobs() {
        let inference = |text: &str| classify(Error::new(ErrorKind::Inference, text));
        for text in [
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "CublasError(CUBLAS_STATUS_ALLOC_FAILED)",
        ] {
            let oom = inference(text);
            assert_eq!((oom.kind(), oom.reason()), (ErrorKind::OutOfMemory, None));
        }
        let broken = inference("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")");
        assert_eq!((broken.kind(), broken.reason()), (ErrorKind::DeviceUnavailable, Some(DEVICE_BROKEN)));
        assert_eq!(inference("shape mismatch in matmul").kind(), ErrorKind::Inference);
        let other = classify(Error::new(ErrorKind::Encode, "CUDA_ERROR_ILLEGAL_ADDRESS"));
        assert_eq!(other.kind(), ErrorKind::Encode);
    }
}
