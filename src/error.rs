//! The library's one error type: a kind that a caller can act on, a message that names the thing, and
//! the cause.

use std::fmt;

/// Shorthand for results of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in terms a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A field of the request has a value that is not allowed.
    InvalidInput,
    /// The request has a field that does not exist.
    UnknownField,
    /// The request lacks a field that is needed.
    MissingField,
    /// The image cannot be decoded or has a form that is not supported.
    InvalidImage,
    /// The image has too many bytes or pixels.
    ImageTooLarge,
    /// The audio cannot be decoded or has a form that is not supported.
    InvalidAudio,
    /// The audio has too many bytes.
    AudioTooLarge,
    /// The audio lasts too long.
    AudioTooLong,
    /// The audio holds no samples.
    EmptyAudio,
    /// No model of that name, or its files are not there.
    ModelNotFound,
    /// A weight file is damaged or does not fit its network.
    ModelCorrupt,
    /// The device that was asked for is not there.
    DeviceUnavailable,
    /// Host or device memory is exhausted.
    OutOfMemory,
    /// A network produced values that are not finite.
    Numeric,
    /// A network failed to run.
    Inference,
    /// The video could not be encoded or written.
    Encode,
    /// The disk has too little space for a file.
    InsufficientDisk,
    /// A file that is not a video could not be written.
    Unwritable,
    /// The caller cancelled the generation.
    Cancelled,
}

/// A kind, a message that says what was found and what was expected, and the cause where there is one.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    reason: Option<&'static str>,
    received_format: Option<&'static str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `message` names the thing, what it was and what was expected.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, reason: None, received_format: None, source: None }
    }

    /// Adds what the caller can do about it.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a finer word than the kind, such as `IMAGE_DIMENSIONS`.
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.reason = Some(reason);
        self
    }

    /// Adds what a medium was found to be, such as `gif`, where it is not of a supported form.
    pub fn with_received_format(mut self, format: &'static str) -> Self {
        self.received_format = Some(format);
        self
    }

    /// Adds the cause.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What went wrong, in terms a caller can act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the caller can do about it.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// A finer word than the kind.
    pub fn reason(&self) -> Option<&'static str> {
        self.reason
    }

    /// What a medium was found to be.
    pub fn received_format(&self) -> Option<&'static str> {
        self.received_format
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::new(ErrorKind::Inference, e.to_string()).with_source(e)
    }
}
