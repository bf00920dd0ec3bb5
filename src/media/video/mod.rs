//! Video out: RGB frames and a voice become an MP4 that every browser plays.
//!
//! ```text
//!  frames ──channel──► I420 BT.709 ──► H.264 ──┐
//!                                              ├──► MP4 (index first, exact edit lists)
//!  voice blocks, pulled as frames come ─► AAC ─┘
//! ```
//!
//! [`VideoWriter`] is the whole of it, on a thread of its own. Its parts are public where a benchmark
//! or a test wants them alone: [`I420`], [`H264Encoder`], [`AacEncoder`]. A poster frame comes from
//! [`thumbnail_jpeg`].
//!
//! Memory does not grow with the length of the video, apart from the sample tables: 4 bytes a frame
//! and 4 bytes an audio packet.

mod aac;
mod bitrate;
mod color;
mod h264;
mod mp4;
mod recorder;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod thumbnail;
mod writer;

use crate::{Error, ErrorKind};

pub use aac::{AacEncoder, SAMPLE_RATES_HZ};
pub use color::I420;
pub use h264::{EncodedFrame, H264Encoder, ParameterSets, Quality};
pub use thumbnail::{THUMBNAIL_MAX_SIDE, thumbnail_jpeg};
pub use writer::{AudioTrack, VideoOptions, VideoSummary, VideoWriter};

/// Frames per second of every video: what the networks were trained on.
pub const FPS: u32 = 25;

/// Frames from one sync sample to the next: players seek, and streams are cut, at every 2 s.
pub const GOP_FRAMES: u32 = 2 * FPS;

/// An error of kind [`ErrorKind::Encode`].
fn encode_error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Encode, message)
}
