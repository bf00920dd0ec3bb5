//! Audio files → blocks of interleaved samples, in constant memory.
//!
//! symphonia demuxes and decodes, rusty-opus decodes Opus. Added here: the run-up that an MP4 edit list or
//! an Opus header tells to skip, silence in place of packets that cannot be decoded (so that what follows
//! stays in time), an end to input that would decode to nothing for ever, and panics of a decoder as errors.

use std::io::{self, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use symphonia::core::audio::Channels;
use symphonia::core::codecs::audio::well_known::CODEC_ID_OPUS;
use symphonia::core::codecs::audio::{AudioCodecParameters, AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error as SymphoniaError;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::{MediaSource, MediaSourceStream};
use symphonia::core::meta::MetadataOptions;
use symphonia::core::packet::Packet;
use symphonia::core::units::TimeBase;

use super::container::{self, Container, Edit, Probe, invalid};
use crate::Result;

/// Packets read in all, an end for files that have packets without samples: enough for 10 hours of the
/// shortest Opus packets.
const MAX_PACKETS: u64 = 16_000_000;
/// Packets in a row that may hold no samples of the track.
const MAX_IDLE_PACKETS: u32 = 100_000;
/// Packets that cannot be decoded, beyond which the file counts as damaged: this many, and one in
/// `TOLERATED_SHARE` of all.
const TOLERATED_PACKETS: u64 = 4;
const TOLERATED_SHARE: u64 = 50;
/// Most samples per channel in an Opus packet: 120 ms at 48 kHz.
const OPUS_PACKET: usize = 5760;
/// Rate that Opus decodes at, in Hz.
const OPUS_RATE_HZ: u32 = 48_000;

/// Rate and channels of a decoded stream; they do not change within it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Format {
    pub sample_rate_hz: u32,
    pub channels: usize,
    pub layout: Channels,
}

/// A file being decoded.
pub(super) struct Decoder {
    reader: Box<dyn FormatReader>,
    container: Container,
    codec: Codec,
    codec_name: &'static str,
    track_id: u32,
    time_base: Option<TimeBase>,
    /// Samples per channel that the file says it has, where that can be relied on.
    expected_samples: Option<u64>,
    edit: Option<Edit>,
    cut_off: bool,
    format: Option<Format>,
    /// Samples per channel still to be dropped, and still to be delivered.
    skip: u64,
    keep: u64,
    packets: u64,
    bad_packets: u64,
    /// Samples per channel decoded, before anything is dropped.
    decoded: u64,
    ended: bool,
}

enum Codec {
    Symphonia(Box<dyn AudioDecoder>),
    Opus { decoder: Box<rusty_opus::OpusDecoder>, channels: usize, pre_skip: u64 },
}

impl Decoder {
    /// Reads the headers.
    ///
    /// # Errors
    /// Of kind `InvalidAudio`.
    pub fn open(bytes: Arc<[u8]>) -> Result<Self> {
        guarded(|| Self::open_unguarded(bytes))
    }

    fn open_unguarded(bytes: Arc<[u8]>) -> Result<Self> {
        let Probe { container, start, patches, edit, cut_off } = container::probe(&bytes)?;
        let source = Source { bytes, start, position: 0, patches };
        let stream = MediaSourceStream::new(Box::new(source), Default::default());
        let reader = symphonia::default::get_probe()
            .probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default())
            .map_err(|e| match e {
                // Of other containers this says no more than that they are damaged.
                SymphoniaError::Unsupported(_) if container == Container::Wav => unsupported(e),
                e => corrupt("its header cannot be read", e),
            })?;
        let track = reader
            .default_track(TrackType::Audio)
            .ok_or_else(|| invalid("AUDIO_NO_TRACK", "the file has no audio track"))?;
        let parameters =
            track.codec_params.as_ref().and_then(|parameters| parameters.audio()).ok_or_else(|| {
                invalid("UNSUPPORTED_AUDIO_CODEC", "the audio track has a codec that is not known")
            })?;
        let (codec, codec_name) = Codec::new(parameters)?;
        let reliable = match container {
            Container::Flac | Container::Aiff | Container::Mp4 => true,
            // A LAME tag counts the frames; without one the number is an estimate.
            Container::Frames => track.delay.is_some(),
            _ => false,
        };
        let (track_id, time_base) = (track.id, track.time_base);
        let expected_samples = track.num_frames.filter(|_| reliable);
        Ok(Self {
            reader,
            container,
            codec,
            codec_name,
            track_id,
            time_base,
            expected_samples,
            edit,
            cut_off,
            format: None,
            skip: 0,
            keep: u64::MAX,
            packets: 0,
            bad_packets: 0,
            decoded: 0,
            ended: false,
        })
    }

    /// Short name of the codec, such as `aac`.
    pub fn codec_name(&self) -> &'static str {
        self.codec_name
    }

    /// Rate and channels; known after the first block.
    pub fn format(&self) -> Option<&Format> {
        self.format.as_ref()
    }

    /// Packets that could not be decoded and are silent instead.
    pub fn bad_packets(&self) -> u64 {
        self.bad_packets
    }

    /// Whether the file ends before the end that it tells of, and is heard up to there.
    pub fn is_cut_off(&self) -> bool {
        self.cut_off
    }

    /// Replaces `block` by the next samples, interleaved; false at the end.
    ///
    /// # Errors
    /// Of kind `InvalidAudio`, when the file is damaged or cut off. After an error there is nothing more.
    pub fn next_block(&mut self, block: &mut Vec<f32>) -> Result<bool> {
        block.clear();
        let mut idle = 0;
        while !self.ended && block.is_empty() {
            idle += 1;
            let step = guarded(|| self.step(block));
            // Whatever state an error left behind is not touched again.
            self.ended |= step.is_err();
            step?;
            if idle > MAX_IDLE_PACKETS || self.packets > MAX_PACKETS {
                self.ended = true;
                return Err(invalid("AUDIO_CORRUPT", "the audio is damaged: its packets hold no samples"));
            }
        }
        Ok(!block.is_empty())
    }

    /// Reads one packet.
    fn step(&mut self, block: &mut Vec<f32>) -> Result<()> {
        let packet = match self.reader.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => return self.end(),
            Err(SymphoniaError::IoError(e)) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return match self.container {
                    // The length of a WAV was checked before; where it is not known the file ends it.
                    Container::Wav | Container::Matroska { open_ended: true } => self.end(),
                    Container::Frames if self.cut_off => self.end(),
                    _ => Err(corrupt("it is cut off", SymphoniaError::IoError(e))),
                };
            }
            Err(SymphoniaError::ResetRequired) => return self.next_stream(),
            Err(e) => return Err(corrupt("it cannot be read to its end", e)),
        };
        self.packets += 1;
        if packet.track_id != self.track_id {
            return Ok(());
        }
        let (format, delay) = match self.codec.decode(&packet, block) {
            Ok(decoded) => decoded,
            Err(e) => return self.replace(&packet, block, e),
        };
        self.start_with(format, delay)?;
        self.deliver(block);
        Ok(())
    }

    /// Checks that the stream goes on as it began; at its beginning, decides what is dropped.
    fn start_with(&mut self, format: Format, delay: u64) -> Result<()> {
        match &self.format {
            Some(known) if *known == format || format.channels == 0 => return Ok(()),
            Some(known) => {
                let message = format!(
                    "the audio changes from {} Hz and {} channels to {} Hz and {} within the file",
                    known.sample_rate_hz, known.channels, format.sample_rate_hz, format.channels
                );
                return Err(invalid("AUDIO_CORRUPT", message));
            }
            None => {}
        }
        let rate = f64::from(format.sample_rate_hz);
        let samples = |seconds: f64| (seconds * rate).round().max(0.0) as u64;
        self.skip = delay;
        if let Some(edit) = self.edit {
            // An Opus header states the same run-up as the edit list: the larger one is all of it.
            self.skip = delay.max(samples(edit.start_s));
            self.keep = edit.end_s.map_or(u64::MAX, |end| samples(end).saturating_sub(samples(edit.start_s)));
        }
        self.format = Some(format);
        Ok(())
    }

    /// Counts a packet that cannot be decoded, and lets silence take its time.
    fn replace(&mut self, packet: &Packet, block: &mut Vec<f32>, error: Bad) -> Result<()> {
        self.bad_packets += 1;
        if self.bad_packets > TOLERATED_PACKETS + self.packets / TOLERATED_SHARE {
            return Err(corrupt("too many of its packets cannot be decoded", error.0));
        }
        block.clear();
        if let Some(format) = &self.format {
            let seconds = packet.dur.get() as f64 * self.time_base.map_or(0.0, seconds_per_tick);
            // No codec has packets of a second; a header that says so lies.
            let samples = (seconds.min(1.0) * f64::from(format.sample_rate_hz)).round() as usize;
            block.resize(samples * format.channels, 0.0);
            self.deliver(block);
        }
        Ok(())
    }

    /// Drops from `block` what is not to be heard.
    fn deliver(&mut self, block: &mut Vec<f32>) {
        let channels = self.format.as_ref().map_or(1, |format| format.channels.max(1));
        let samples = (block.len() / channels) as u64;
        self.decoded += samples;
        let skipped = self.skip.min(samples);
        self.skip -= skipped;
        block.drain(..skipped as usize * channels);
        let kept = self.keep.min(samples - skipped);
        self.keep = self.keep.saturating_sub(kept);
        block.truncate(kept as usize * channels);
        // What lies after the end of an edit is not decoded at all.
        self.ended |= self.keep == 0;
    }

    /// Goes on with the next of several streams that are chained in one Ogg file.
    fn next_stream(&mut self) -> Result<()> {
        let track = self.reader.default_track(TrackType::Audio);
        let parameters = track.and_then(|track| Some((track.id, track.codec_params.as_ref()?.audio()?)));
        let (id, parameters) =
            parameters.ok_or_else(|| invalid("AUDIO_NO_TRACK", "a part of the file has no audio track"))?;
        let (codec, _) = Codec::new(parameters)?;
        self.skip = codec.pre_skip();
        (self.track_id, self.codec) = (id, codec);
        Ok(())
    }

    /// The end: there must be as much as the file said, unless it is known to be cut off.
    fn end(&mut self) -> Result<()> {
        self.ended = true;
        // Encoders count their last, partly filled packets differently: two of the longest are tolerated.
        const SLACK: u64 = 2 * 4096;
        match self.expected_samples {
            Some(_) if self.cut_off => Ok(()),
            Some(expected) if self.decoded.saturating_add(SLACK.min(expected / 4)) < expected => {
                Err(invalid(
                    "AUDIO_CORRUPT",
                    format!("the audio is cut off: it has {} of {expected} samples", self.decoded),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Why a packet could not be decoded.
struct Bad(SymphoniaError);

impl Codec {
    fn new(parameters: &AudioCodecParameters) -> Result<(Self, &'static str)> {
        if parameters.codec == CODEC_ID_OPUS {
            return Ok((Self::opus(parameters)?, "opus"));
        }
        let codecs = symphonia::default::get_codecs();
        let decoder =
            codecs.make_audio_decoder(parameters, &AudioDecoderOptions::default()).map_err(unsupported)?;
        let name = decoder.codec_info().short_name;
        Ok((Self::Symphonia(decoder), name))
    }

    /// The header is `OpusHead` (RFC 7845) in Ogg and WebM, little-endian with version 1. From MP4 comes the
    /// body of the `dOps` box after the same magic: big-endian with version 0.
    fn opus(parameters: &AudioCodecParameters) -> Result<Self> {
        let head = parameters.extra_data.as_deref().unwrap_or_default();
        let stated = parameters.channels.as_ref().map_or(2, Channels::count);
        let channels = head.get(9).map_or(stated, |&n| usize::from(n));
        let pre_skip = match head {
            [_, _, _, _, _, _, _, _, 0, _, high, low, ..] => u16::from_be_bytes([*high, *low]),
            [_, _, _, _, _, _, _, _, _, _, low, high, ..] => u16::from_le_bytes([*low, *high]),
            _ => 0,
        };
        if !(1..=2).contains(&channels) {
            let message = format!("the Opus audio has {channels} channels, expected 1 or 2");
            return Err(invalid("UNSUPPORTED_AUDIO_CODEC", message));
        }
        let decoder = rusty_opus::OpusDecoder::new(OPUS_RATE_HZ as i32, channels).map_err(|e| {
            invalid("UNSUPPORTED_AUDIO_CODEC", format!("the Opus audio is not supported: {e:?}"))
        })?;
        Ok(Self::Opus { decoder: Box::new(decoder), channels, pre_skip: u64::from(pre_skip) })
    }

    fn pre_skip(&self) -> u64 {
        match self {
            Self::Symphonia(_) => 0,
            Self::Opus { pre_skip, .. } => *pre_skip,
        }
    }

    /// Replaces `block` by the samples of `packet`; gives their format and the run-up the codec states.
    fn decode(&mut self, packet: &Packet, block: &mut Vec<f32>) -> Result<(Format, u64), Bad> {
        match self {
            Self::Symphonia(decoder) => {
                let buffer = decoder.decode(packet).map_err(Bad)?;
                block.resize(buffer.samples_interleaved(), 0.0);
                buffer.copy_to_slice_interleaved(&mut block[..]);
                let (sample_rate_hz, layout) = (buffer.spec().rate(), buffer.spec().channels().clone());
                Ok((Format { sample_rate_hz, channels: layout.count(), layout }, 0))
            }
            Self::Opus { decoder, channels, pre_skip } => {
                block.resize(OPUS_PACKET * *channels, 0.0);
                let decoded = decoder.decode(&packet.data, OPUS_PACKET, block);
                let samples =
                    decoded.map_err(|_| Bad(SymphoniaError::DecodeError("opus: invalid packet")))?;
                let padding = usize::try_from(packet.trim_end.get()).unwrap_or(usize::MAX);
                block.truncate(samples.saturating_sub(padding) * *channels);
                let layout = Channels::Discrete(*channels as u16);
                Ok((Format { sample_rate_hz: OPUS_RATE_HZ, channels: *channels, layout }, *pre_skip))
            }
        }
    }
}

fn seconds_per_tick(base: TimeBase) -> f64 {
    f64::from(base.numer.get()) / f64::from(base.denom.get())
}

/// Runs foreign code whose panics become errors.
fn guarded<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    // After a panic nothing that `run` touched is used again.
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(invalid("AUDIO_CORRUPT", "the audio is damaged: its decoder gave up")))
}

fn unsupported(error: SymphoniaError) -> crate::Error {
    let message = format!("the codec of the audio is not supported: {error}");
    invalid("UNSUPPORTED_AUDIO_CODEC", message)
        .with_source(error)
        .with_hint("convert the audio to WAV or MP3")
}

fn corrupt(what: &str, error: SymphoniaError) -> crate::Error {
    invalid("AUDIO_CORRUPT", format!("the audio is damaged: {what} ({error})")).with_source(error)
}

/// Bytes in memory, shared by all who decode them.
struct Source {
    bytes: Arc<[u8]>,
    start: usize,
    position: u64,
    patches: Vec<(u64, [u8; 4])>,
}

impl Source {
    fn len(&self) -> u64 {
        (self.bytes.len() - self.start) as u64
    }
}

impl Read for Source {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let from = self.position.min(self.len());
        let mut rest = &self.bytes[self.start + from as usize..];
        let count = rest.read(out)?;
        for (at, patch) in &self.patches {
            for (i, &byte) in patch.iter().enumerate() {
                let target = (at + i as u64)
                    .checked_sub(from)
                    .and_then(|offset| out[..count].get_mut(offset as usize));
                if let Some(target) = target {
                    *target = byte;
                }
            }
        }
        self.position = from + count as u64;
        Ok(count)
    }
}

impl Seek for Source {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

impl MediaSource for Source {
    fn is_seekable(&self) -> bool {
        true
    }

    fn byte_len(&self) -> Option<u64> {
        Some(self.len())
    }
}
