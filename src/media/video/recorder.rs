//! From RGB frames and blocks of audio to an MP4 file, step by step on the caller's thread.

use std::io::{self, Seek, Write};

use super::aac::AacEncoder;
use super::mp4::{AudioConfig, Finished, Mp4Writer, VideoConfig};
use super::writer::{AudioTrack, VideoOptions};
use super::{FPS, H264Encoder, I420, encode_error};
use crate::{Error, Result};

/// The longest video, 6 hours. Durations in the file have 32 bits, which 96 kHz fill in 12 hours.
const MAX_SECONDS: u64 = 6 * 3600;

/// Encodes frames and audio and interleaves them into `W`.
pub(super) struct Recorder<W> {
    picture: I420,
    h264: H264Encoder,
    audio: Option<AudioFeed>,
    mp4: Mp4Writer<W>,
    frames: u64,
    coarsest_quantizer: u8,
}

/// A finished recording.
pub(super) struct Recording<W> {
    pub(super) file: Finished<W>,
    pub(super) frames: u64,
    pub(super) coarsest_quantizer: u8,
}

impl<W: Write + Seek> Recorder<W> {
    pub(super) fn new(sink: W, options: VideoOptions) -> Result<Self> {
        let VideoOptions { width, height, frames, quality, audio } = options;
        let picture = I420::new(width, height)?;
        let h264 = H264Encoder::new(width, height, quality)?;
        let video = VideoConfig {
            // OpenH264 has refused what has more.
            width: width as u16,
            height: height as u16,
            parameter_sets: h264.parameter_sets().clone(),
        };
        let audio = audio.filter(|track| track.samples > 0).map(AudioFeed::new).transpose()?;
        let config = audio.as_ref().map(AudioFeed::config);
        let mp4 = Mp4Writer::new(sink, video, config, frames).map_err(write_error)?;
        Ok(Self { picture, h264, audio, mp4, frames: 0, coarsest_quantizer: 0 })
    }

    /// Takes the next frame, (H, W, 3) RGB, and the audio that is heard while it is seen.
    pub(super) fn frame(&mut self, rgb: &[u8]) -> Result<()> {
        if self.frames >= MAX_SECONDS * u64::from(FPS) {
            return Err(too_long("picture"));
        }
        self.picture.convert_from_rgb(rgb)?;
        let frame = self.h264.encode(&self.picture)?;
        self.coarsest_quantizer = self.coarsest_quantizer.max(frame.quantizer);
        self.mp4.frame(frame).map_err(write_error)?;
        self.frames += 1;
        if let Some(audio) = &mut self.audio {
            let until = self.frames * u64::from(audio.rate / FPS);
            audio.feed(until, &mut self.mp4)?;
        }
        Ok(())
    }

    /// Writes the rest of the audio and the index.
    pub(super) fn finish(mut self) -> Result<Recording<W>> {
        if self.frames == 0 {
            return Err(encode_error("the video has no frame"));
        }
        if let Some(audio) = self.audio {
            audio.finish(&mut self.mp4)?;
        }
        let file = self.mp4.finish().map_err(write_error)?;
        Ok(Recording { file, frames: self.frames, coarsest_quantizer: self.coarsest_quantizer })
    }
}

/// Pulls blocks of the voice as the picture gets along, so that no more than one block waits.
struct AudioFeed {
    encoder: AacEncoder,
    blocks: std::iter::Fuse<Box<dyn Iterator<Item = Result<Vec<f32>>> + Send>>,
    block: Vec<f32>,
    /// Values of `block` that are encoded already.
    used: usize,
    rate: u32,
    channels: u16,
    /// Samples per channel: encoded so far, and in all.
    fed: u64,
    samples: u64,
}

impl AudioFeed {
    fn new(track: AudioTrack) -> Result<Self> {
        let AudioTrack { sample_rate_hz, channels, samples, blocks } = track;
        let encoder = AacEncoder::new(sample_rate_hz, channels)?;
        if samples > MAX_SECONDS * u64::from(sample_rate_hz) {
            return Err(too_long("voice"));
        }
        Ok(Self {
            encoder,
            blocks: blocks.fuse(),
            block: Vec::new(),
            used: 0,
            rate: sample_rate_hz,
            channels,
            fed: 0,
            samples,
        })
    }

    fn config(&self) -> AudioConfig {
        AudioConfig {
            sample_rate_hz: self.rate,
            channels: self.channels,
            config: self.encoder.config().to_vec(),
            bitrate: self.encoder.bitrate(),
            samples: self.samples,
        }
    }

    /// Encodes up to sample `until` of the track, or up to its end.
    fn feed<W: Write + Seek>(&mut self, until: u64, mp4: &mut Mp4Writer<W>) -> Result<()> {
        let until = until.min(self.samples);
        let mut missing = until.saturating_sub(self.fed) as usize * usize::from(self.channels);
        self.fed = self.fed.max(until);
        while missing > 0 {
            if self.used == self.block.len() {
                self.block = match self.blocks.next() {
                    Some(block) => block?,
                    // A source that ends early is followed by silence.
                    None => vec![0.0; missing],
                };
                self.used = 0;
            }
            let take = missing.min(self.block.len() - self.used);
            let values = &self.block[self.used..self.used + take];
            self.encoder.push(values, |packet| mp4.packet(packet).map_err(write_error))?;
            self.used += take;
            missing -= take;
        }
        Ok(())
    }

    fn finish<W: Write + Seek>(mut self, mp4: &mut Mp4Writer<W>) -> Result<()> {
        // A second at a time: the silence after a source that ends early is not made at once.
        while self.fed < self.samples {
            self.feed(self.fed + u64::from(self.rate), mp4)?;
        }
        self.encoder.finish(|packet| mp4.packet(packet).map_err(write_error))
    }
}

fn too_long(what: &str) -> Error {
    encode_error(format!(
        "the {what} is too long for one file, expected at most {} hours",
        MAX_SECONDS / 3600
    ))
}

/// An error of kind `Encode` that keeps `e` as its source.
pub(super) fn write_error(e: io::Error) -> Error {
    let error = encode_error(format!("the video could not be written: {e}"));
    let error = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            error.with_hint("free space on the disk that takes the video").with_reason("DISK_FULL")
        }
        _ => error,
    };
    error.with_source(e)
}
