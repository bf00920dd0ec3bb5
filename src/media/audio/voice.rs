//! A voice: checked once, kept as what wav2vec2 hears and as the bytes it came from.

use std::fmt;
use std::sync::Arc;

use super::VOICE_RATE_HZ;
use super::container::invalid;
use super::decode::{Decoder, Format};
use super::resample::Resampler;
use crate::{Error, ErrorKind, Result};

/// Shortest audio that is accepted, in seconds.
const MIN_SECONDS: f64 = 0.1;
/// Audio shorter than this is accepted with a warning, in seconds.
const SHORT_SECONDS: f64 = 1.0;
/// A peak below −60 dB of full scale is silence.
const SILENT_PEAK: f32 = 1e-3;

/// What a voice may be, at most.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: u64,
    /// Seconds of sound; `None` for any length (which costs 64 kB of memory per second).
    pub max_seconds: Option<f64>,
    /// Channels.
    pub max_channels: usize,
    /// Lowest sample rate, in Hz.
    pub min_sample_rate_hz: u32,
    /// Highest sample rate, in Hz.
    pub max_sample_rate_hz: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 50 * 1000 * 1000,
            max_seconds: Some(600.0),
            max_channels: 8,
            min_sample_rate_hz: 8_000,
            max_sample_rate_hz: 192_000,
        }
    }
}

impl Limits {
    /// These limits with a length in seconds, where 0 stands for any length.
    pub fn with_max_seconds(self, seconds: f64) -> Self {
        Self { max_seconds: (seconds > 0.0).then_some(seconds), ..self }
    }
}

/// Something about a voice that its sender should know, although it was accepted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warning {
    /// It is shorter than a second.
    Short {
        /// Its length in seconds.
        seconds: f64,
    },
    /// It is silent: the mouth will stay closed.
    Silent,
    /// Some of its packets could not be decoded and are silent.
    Damaged {
        /// How many.
        packets: u64,
    },
    /// The file ends too early, as after a broken download. What is there is heard.
    CutOff {
        /// Its length in seconds.
        seconds: f64,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { seconds } => write!(f, "the audio is short: {seconds:.2} s"),
            Self::Silent => write!(f, "the audio is silent, the mouth will stay closed"),
            Self::Damaged { packets } => {
                write!(f, "{packets} packets of the audio are damaged and stay silent")
            }
            Self::CutOff { seconds } => {
                write!(f, "the audio is cut off: its file ends after {seconds:.2} s")
            }
        }
    }
}

/// What was found out about a voice.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Its sample rate, in Hz.
    pub sample_rate_hz: u32,
    /// Its channels.
    pub channels: usize,
    /// Samples per channel.
    pub samples: u64,
    /// Its codec by a short name, such as `aac`.
    pub codec: &'static str,
    /// What its sender should know.
    pub warnings: Vec<Warning>,
}

/// A checked voice.
#[derive(Clone)]
pub struct Voice {
    original: Original,
    signal: Vec<f32>,
    facts: Facts,
}

/// What it takes to decode a voice once more, as it came.
#[derive(Clone)]
pub(super) struct Original {
    bytes: Arc<[u8]>,
    pub format: Format,
    /// Samples per channel.
    pub samples: u64,
}

impl Original {
    /// The samples, from the beginning.
    pub fn decode(&self) -> Result<Decoder> {
        Decoder::open(self.bytes.clone())
    }
}

impl Voice {
    /// Decodes `bytes` once from beginning to end, whatever audio they are, and keeps the mean of the
    /// channels at 16 kHz. The limits are checked before decoding where the header tells, and after every
    /// packet. Memory: what [`Voice::signal`] takes, and a few MB.
    ///
    /// # Errors
    /// Of kind `EmptyAudio` (reasons `AUDIO_EMPTY`, `AUDIO_TOO_SHORT`), `AudioTooLarge` (`AUDIO_TOO_LARGE`),
    /// `AudioTooLong` (`AUDIO_TOO_LONG`) or `InvalidAudio` (`INVALID_AUDIO_FORMAT`, `AUDIO_CORRUPT`,
    /// `AUDIO_NO_TRACK`, `UNSUPPORTED_AUDIO_CODEC`, `AUDIO_SAMPLE_RATE`, `AUDIO_CHANNELS`,
    /// `AUDIO_NON_FINITE`).
    pub fn open(bytes: Arc<[u8]>, limits: &Limits) -> Result<Self> {
        if bytes.is_empty() {
            return Err(empty("the audio is empty (0 bytes)"));
        }
        if bytes.len() as u64 > limits.max_bytes {
            let message =
                format!("the audio has {} bytes, expected at most {}", bytes.len(), limits.max_bytes);
            return Err(Error::new(ErrorKind::AudioTooLarge, message).with_reason("AUDIO_TOO_LARGE"));
        }
        let mut decoder = Decoder::open(bytes.clone())?;
        let mut intake = Intake::default();
        let mut block = Vec::new();
        while decoder.next_block(&mut block)? {
            if let Some(format) = decoder.format() {
                intake.take(&block, format, limits)?;
            }
        }
        let Some(format) = decoder.format().cloned().filter(|_| intake.samples > 0) else {
            return Err(empty("the audio holds no samples"));
        };
        let warnings = intake.warnings(&format, &decoder)?;
        let facts = Facts {
            sample_rate_hz: format.sample_rate_hz,
            channels: format.channels,
            samples: intake.samples,
            codec: decoder.codec_name(),
            warnings,
        };
        let original = Original { bytes, format, samples: intake.samples };
        Ok(Self { original, signal: intake.finish(), facts })
    }

    /// Mean of the channels at 16 kHz, as loud as it came.
    pub fn signal(&self) -> &[f32] {
        &self.signal
    }

    /// What was found out about it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// How long it lasts, in seconds.
    pub fn duration_s(&self) -> f64 {
        self.facts.samples as f64 / f64::from(self.facts.sample_rate_hz)
    }

    pub(super) fn original(&self) -> &Original {
        &self.original
    }
}

impl fmt::Debug for Voice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Voice").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// The signal as it grows.
#[derive(Default)]
struct Intake {
    resampler: Option<Resampler>,
    mono: Vec<f32>,
    signal: Vec<f32>,
    samples: u64,
    peak: f32,
}

impl Intake {
    fn take(&mut self, block: &[f32], format: &Format, limits: &Limits) -> Result<()> {
        if self.resampler.is_none() {
            check_format(format, limits)?;
        }
        let channels = format.channels;
        self.samples += (block.len() / channels) as u64;
        let seconds = self.samples as f64 / f64::from(format.sample_rate_hz);
        if let Some(max) = limits.max_seconds.filter(|max| seconds > *max) {
            let message = format!("the audio lasts longer than {max} s, the limit");
            return Err(Error::new(ErrorKind::AudioTooLong, message).with_reason("AUDIO_TOO_LONG"));
        }
        if block.iter().any(|x| !x.is_finite()) {
            return Err(invalid("AUDIO_NON_FINITE", "the audio has samples that are no finite numbers"));
        }
        self.peak = block.iter().fold(self.peak, |peak, x| peak.max(x.abs()));
        self.mono.clear();
        match channels {
            1 => self.mono.extend_from_slice(block),
            _ => self
                .mono
                .extend(block.chunks_exact(channels).map(|x| x.iter().sum::<f32>() / channels as f32)),
        }
        let resampler =
            self.resampler.get_or_insert_with(|| Resampler::new(format.sample_rate_hz, VOICE_RATE_HZ));
        resampler.push(&self.mono, &mut self.signal);
        Ok(())
    }

    fn warnings(&self, format: &Format, decoder: &Decoder) -> Result<Vec<Warning>> {
        let seconds = self.samples as f64 / f64::from(format.sample_rate_hz);
        if seconds < MIN_SECONDS {
            let message = format!(
                "the audio lasts {:.1} ms, expected at least {} ms",
                seconds * 1e3,
                MIN_SECONDS * 1e3
            );
            return Err(Error::new(ErrorKind::EmptyAudio, message).with_reason("AUDIO_TOO_SHORT"));
        }
        let short = (seconds < SHORT_SECONDS).then_some(Warning::Short { seconds });
        let silent = (self.peak < SILENT_PEAK).then_some(Warning::Silent);
        let packets = decoder.bad_packets();
        let damaged = (packets > 0).then_some(Warning::Damaged { packets });
        let cut_off = decoder.is_cut_off().then_some(Warning::CutOff { seconds });
        Ok([short, silent, damaged, cut_off].into_iter().flatten().collect())
    }

    fn finish(mut self) -> Vec<f32> {
        if let Some(resampler) = self.resampler {
            resampler.finish(&mut self.signal);
        }
        self.signal.shrink_to_fit();
        self.signal
    }
}

fn check_format(format: &Format, limits: &Limits) -> Result<()> {
    let (rate, channels) = (format.sample_rate_hz, format.channels);
    if !(limits.min_sample_rate_hz..=limits.max_sample_rate_hz).contains(&rate) {
        let (min, max) = (limits.min_sample_rate_hz, limits.max_sample_rate_hz);
        let message = format!("the audio has a sample rate of {rate} Hz, expected {min} to {max}");
        return Err(invalid("AUDIO_SAMPLE_RATE", message));
    }
    if channels == 0 || channels > limits.max_channels {
        let message = format!("the audio has {channels} channels, expected 1 to {}", limits.max_channels);
        return Err(invalid("AUDIO_CHANNELS", message).with_hint("mix the audio down to mono or stereo"));
    }
    Ok(())
}

fn empty(message: &str) -> Error {
    Error::new(ErrorKind::EmptyAudio, message).with_reason("AUDIO_EMPTY")
}

#[cfg(test)]
#[path = "voice_tests.rs"]
pub(super) mod tests;
