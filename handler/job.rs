//! What a job comes to: an output, or an error that its sender can act on. The types here are the wire types
//! of every transport, and this is the one place that turns an [`ErrorKind`] into a code.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use talkie::ErrorKind;

/// What went wrong, in the words of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each name is its own description; the contract explains them")]
pub enum Code {
    InvalidInput,
    UnknownField,
    MissingField,
    InvalidImageFormat,
    ImageTooLarge,
    InvalidAudioFormat,
    AudioTooLarge,
    AudioTooLong,
    EmptyAudio,
    UrlNotAllowed,
    DownloadFailed,
    ModelNotFound,
    ModelDownloadFailed,
    ModelCorrupt,
    InsufficientDisk,
    GpuUnavailable,
    GpuOutOfMemory,
    NumericFailure,
    EncodeFailed,
    UploadFailed,
    PresignFailed,
    WorkerLost,
    Timeout,
    Cancelled,
    QueueFull,
    StoreFull,
    IdempotencyConflict,
    Unauthorized,
    RateLimited,
    NotFound,
    Internal,
}

impl Code {
    /// As it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidInput => "INVALID_INPUT",
            Self::UnknownField => "UNKNOWN_FIELD",
            Self::MissingField => "MISSING_FIELD",
            Self::InvalidImageFormat => "INVALID_IMAGE_FORMAT",
            Self::ImageTooLarge => "IMAGE_TOO_LARGE",
            Self::InvalidAudioFormat => "INVALID_AUDIO_FORMAT",
            Self::AudioTooLarge => "AUDIO_TOO_LARGE",
            Self::AudioTooLong => "AUDIO_TOO_LONG",
            Self::EmptyAudio => "EMPTY_AUDIO",
            Self::UrlNotAllowed => "URL_NOT_ALLOWED",
            Self::DownloadFailed => "DOWNLOAD_FAILED",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::ModelDownloadFailed => "MODEL_DOWNLOAD_FAILED",
            Self::ModelCorrupt => "MODEL_CORRUPT",
            Self::InsufficientDisk => "INSUFFICIENT_DISK",
            Self::GpuUnavailable => "GPU_UNAVAILABLE",
            Self::GpuOutOfMemory => "GPU_OUT_OF_MEMORY",
            Self::NumericFailure => "NUMERIC_FAILURE",
            Self::EncodeFailed => "ENCODE_FAILED",
            Self::UploadFailed => "UPLOAD_FAILED",
            Self::PresignFailed => "PRESIGN_FAILED",
            Self::WorkerLost => "WORKER_LOST",
            Self::Timeout => "TIMEOUT",
            Self::Cancelled => "CANCELLED",
            Self::QueueFull => "QUEUE_FULL",
            Self::StoreFull => "STORE_FULL",
            Self::IdempotencyConflict => "IDEMPOTENCY_CONFLICT",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::RateLimited => "RATE_LIMITED",
            Self::NotFound => "NOT_FOUND",
            Self::Internal => "INTERNAL",
        }
    }

    /// Whether another request would have to be sent for another outcome. A download that failed counts:
    /// the address is part of the request.
    pub fn is_bad_input(self) -> bool {
        matches!(
            self,
            Self::InvalidInput
                | Self::UnknownField
                | Self::MissingField
                | Self::InvalidImageFormat
                | Self::ImageTooLarge
                | Self::InvalidAudioFormat
                | Self::AudioTooLarge
                | Self::AudioTooLong
                | Self::EmptyAudio
                | Self::UrlNotAllowed
                | Self::DownloadFailed
                | Self::ModelNotFound
        )
    }

    /// The HTTP status of an answer that says so.
    pub fn http_status(self) -> u16 {
        match self {
            Self::ImageTooLarge | Self::AudioTooLarge => 413,
            code if code.is_bad_input() => 400,
            Self::Unauthorized => 401,
            Self::NotFound => 404,
            Self::IdempotencyConflict => 409,
            Self::RateLimited => 429,
            Self::QueueFull => 503,
            Self::StoreFull | Self::InsufficientDisk => 507,
            _ => 500,
        }
    }

    /// Whether the same request may succeed later or on another machine.
    fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::ModelDownloadFailed
                | Self::InsufficientDisk
                | Self::GpuUnavailable
                | Self::GpuOutOfMemory
                | Self::UploadFailed
                | Self::WorkerLost
                | Self::QueueFull
                | Self::StoreFull
                | Self::RateLimited
        )
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidInput => Self::InvalidInput,
            ErrorKind::UnknownField => Self::UnknownField,
            ErrorKind::MissingField => Self::MissingField,
            ErrorKind::InvalidImage => Self::InvalidImageFormat,
            ErrorKind::ImageTooLarge => Self::ImageTooLarge,
            ErrorKind::InvalidAudio => Self::InvalidAudioFormat,
            ErrorKind::AudioTooLarge => Self::AudioTooLarge,
            ErrorKind::AudioTooLong => Self::AudioTooLong,
            ErrorKind::EmptyAudio => Self::EmptyAudio,
            ErrorKind::ModelNotFound => Self::ModelNotFound,
            ErrorKind::ModelCorrupt => Self::ModelCorrupt,
            ErrorKind::DeviceUnavailable => Self::GpuUnavailable,
            ErrorKind::OutOfMemory => Self::GpuOutOfMemory,
            ErrorKind::Numeric => Self::NumericFailure,
            ErrorKind::InsufficientDisk => Self::InsufficientDisk,
            ErrorKind::Inference | ErrorKind::Unwritable => Self::Internal,
            ErrorKind::Encode => Self::EncodeFailed,
            ErrorKind::Cancelled => Self::Cancelled,
        }
    }
}

/// Where a job is. The last four are final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "RunPod's own words")]
pub enum JobStatus {
    InQueue,
    InProgress,
    Completed,
    Failed,
    Cancelled,
    TimedOut,
}

impl JobStatus {
    /// Every status.
    pub const ALL: [Self; 6] =
        [Self::InQueue, Self::InProgress, Self::Completed, Self::Failed, Self::Cancelled, Self::TimedOut];

    /// As it stands in JSON and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InQueue => "IN_QUEUE",
            Self::InProgress => "IN_PROGRESS",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::TimedOut => "TIMED_OUT",
        }
    }

    /// The status called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }

    /// Whether the job ends here.
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::InQueue | Self::InProgress)
    }
}

/// Why a job has no output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobError {
    /// What went wrong.
    pub code: Code,
    /// What was found and what was expected. Holds no prompt, no key and no query string.
    pub message: String,
    /// What the sender can do about it.
    pub hint: Option<String>,
    /// Whether the same request may succeed later or on another machine.
    pub retryable: bool,
    /// Finer words, such as `reason`.
    pub details: BTreeMap<String, Value>,
}

impl JobError {
    /// An error of `code`, retryable as that code says.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            retryable: code.is_retryable(),
            details: BTreeMap::new(),
        }
    }

    /// Adds what the sender can do about it.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a finer word than the code, as `details.reason`.
    pub fn with_reason(self, reason: &str) -> Self {
        self.with_detail("reason", reason)
    }

    /// Adds `details.<name>`.
    pub fn with_detail(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_string(), value.into());
        self
    }

    /// Says whether trying again can help, where the code alone does not.
    pub fn with_retryable(mut self, retryable: bool) -> Self {
        self.retryable = retryable;
        self
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for JobError {}

impl From<talkie::Error> for JobError {
    fn from(e: talkie::Error) -> Self {
        let mut error = Self::new(e.kind().into(), e.to_string());
        error.hint = e.hint().map(str::to_string);
        let finer = [("reason", e.reason()), ("received_format", e.received_format())];
        let finer = finer.into_iter().filter_map(|(name, word)| Some((name.to_string(), word?.into())));
        error.details.extend(finer);
        error
    }
}

/// A video that was made. What does not apply is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobOutput {
    /// Where the video can be fetched.
    pub video_url: String,
    /// The video as a local file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video_path: Option<String>,
    /// When `video_url` ends, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// The bucket of the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// The key of the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Bytes of the file.
    pub size_bytes: u64,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Length of the video in seconds.
    pub duration_s: f64,
    /// Frames in the video.
    pub frames: usize,
    /// Frames per second, always 25.
    pub fps: u32,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// The seed that was used, given or drawn.
    pub seed: u64,
    /// The profile that was used.
    pub model: String,
    /// The preset that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Where the JPEG of the first frame can be fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thumbnail_url: Option<String>,
    /// What was lowered to make the video at all.
    pub downgrades: Vec<String>,
    /// What the sender should know.
    pub warnings: Vec<String>,
    /// Where the time went.
    pub timings: Timings,
    /// The most memory that was in use.
    pub peak_memory: PeakMemory,
    /// Where the manifest can be fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest_url: Option<String>,
}

/// Where the time of a job went, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// What a warm worker does not do again.
    pub cold_start: ColdStart,
    /// Fetching and opening image and voices.
    pub inputs_ms: u64,
    /// Embedding the voices.
    pub audio_ms: u64,
    /// Encoding prompt and portrait.
    pub encode_ms: u64,
    /// All denoising steps.
    pub denoise_ms: u64,
    /// One denoising step, on average.
    pub per_step_ms: u64,
    /// Latents to frames.
    pub decode_ms: u64,
    /// Waiting for the encoder and closing the file.
    pub mux_ms: u64,
    /// Uploading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload_ms: Option<u64>,
    /// From taking the job to its output.
    pub total_ms: u64,
}

/// What a warm worker does not do again, times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ColdStart {
    /// From the start of the process to the start of the job.
    pub boot_ms: u64,
    /// Downloading weights.
    pub fetch_ms: u64,
    /// From the first network's begin to the last one's end; voices, prompts and portrait are encoded meanwhile.
    pub load_ms: u64,
    /// Of that, waiting for the file system.
    pub read_ms: u64,
    /// Of that, decoding, merging and rounding weights.
    pub convert_ms: u64,
    /// Of that, copying to the GPU.
    pub to_device_ms: u64,
    /// The first denoising step, which also compiles kernels.
    pub first_step_ms: u64,
    /// Bytes of weight files that were read.
    pub bytes_read: u64,
    /// How fast they were loaded, in 10⁹ bytes a second.
    pub gb_per_s: f64,
}

/// The most memory that was in use, in bytes; absent where it cannot be measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeakMemory {
    /// Resident memory of the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_bytes: Option<u64>,
    /// Memory of the GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_have_the_shape_of_the_contract() {
        let cause = talkie::Error::new(ErrorKind::ImageTooLarge, "`image` has 3 bytes, expected at most 2")
            .with_hint("send a smaller one")
            .with_reason("IMAGE_DIMENSIONS");
        assert_eq!(
            serde_json::to_value(JobError::from(cause)).unwrap(),
            json!({
                "code": "IMAGE_TOO_LARGE", "message": "`image` has 3 bytes, expected at most 2",
                "hint": "send a smaller one", "retryable": false, "details": {"reason": "IMAGE_DIMENSIONS"},
            })
        );
        let bare = JobError::new(Code::GpuUnavailable, "no GPU");
        assert_eq!(
            serde_json::to_value(bare).unwrap(),
            json!({"code": "GPU_UNAVAILABLE", "message": "no GPU", "hint": null, "retryable": true, "details": {}})
        );
    }

    #[test]
    fn only_the_senders_own_faults_are_bad_input() {
        for kind in [ErrorKind::InvalidInput, ErrorKind::EmptyAudio, ErrorKind::InvalidImage] {
            assert!(Code::from(kind).is_bad_input(), "{kind:?}");
        }
        for kind in [ErrorKind::ModelCorrupt, ErrorKind::Cancelled, ErrorKind::Inference, ErrorKind::Encode] {
            assert!(!Code::from(kind).is_bad_input(), "{kind:?}");
        }
    }
}
