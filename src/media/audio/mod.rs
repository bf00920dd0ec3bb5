//! Audio in: a voice's bytes → checked, decoded, as the 16 kHz that wav2vec2 hears and as the soundtrack of
//! the finished video.
//!
//! ```text
//!  bytes ──Voice::open──► signal (mono, 16 kHz) ──normalize_to──► Speakers::assemble ──► wav2vec2
//!    └───────────────── decoded a second time, as the video is written ────────────────► Soundtrack
//! ```
//!
//! WAV (PCM, float, ADPCM), AIFF, FLAC, MP3, AAC, ALAC, Vorbis and Opus are read, in their own files, Ogg,
//! MP4 or Matroska/WebM. What is heard starts at the first real sample in all of them: run-up that an encoder
//! put before it is dropped. Loudness, mixing and (within its filter's tolerance) resampling equal the
//! reference.

mod container;
mod decode;
mod loudness;
mod resample;
mod soundtrack;
mod speakers;
mod voice;

pub use loudness::{Biquad, TARGET_LUFS, integrated_lufs, k_weighting, normalize_to};
pub use resample::{Resampler, resample};
pub use soundtrack::Soundtrack;
pub use speakers::Speakers;
pub use voice::{Facts, Limits, Voice, Warning};

/// Sample rate that wav2vec2 hears, in Hz.
pub const VOICE_RATE_HZ: u32 = 16_000;
