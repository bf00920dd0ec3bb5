//! Writes an MP4 file in one pass, index first.
//!
//! ```text
//!  ftyp │ moov (reserved, written last) │ free │ mdat: V V … V  A A … A  V V … V  A A … A
//! ```
//!
//! Numbers of frames and packets are known before the first frame, so the index (`moov`) gets a place of
//! a size that it cannot outgrow, the media follow, and one seek back at the end fills the place in:
//! a player starts while the file still downloads ("faststart"), and nothing is copied. Should the video
//! become longer than announced, the index goes to the end: the file is still valid.
//!
//! Sources: ISO/IEC 14496-12 (boxes), -14 (`mp4a`), -15 (`avc1`). No crate that we examined writes edit
//! lists, and without these the voice comes 1024 samples late.

mod boxes;

use std::io::{self, Seek, SeekFrom, Write};

use boxes::{Boxes, TrackHeader};

use super::aac::{PACKET_SAMPLES, PRIMING_SAMPLES};
use super::{EncodedFrame, FPS, GOP_FRAMES, ParameterSets};

/// Ticks per second of the video track; the customary multiple of 25.
const VIDEO_TIMESCALE: u32 = 12_800;
const FRAME_TICKS: u32 = VIDEO_TIMESCALE / FPS;

/// Frames of one chunk at most, where no audio chunk comes between.
const CHUNK_FRAMES: u32 = FPS;

/// All boxes of fixed size, the parameter sets, and a margin; 1.5 kB are usual.
const RESERVE_FIXED: u64 = 4096;
/// An entry each in the tables of chunk offsets (64 bit) and of samples per chunk.
const CHUNK_ENTRY_BYTES: u64 = 8 + 12;

/// The picture track.
pub(super) struct VideoConfig {
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) parameter_sets: ParameterSets,
}

/// The voice track.
pub(super) struct AudioConfig {
    pub(super) sample_rate_hz: u32,
    pub(super) channels: u16,
    /// The AudioSpecificConfig.
    pub(super) config: Vec<u8>,
    /// Bits per second.
    pub(super) bitrate: u32,
    /// Samples per channel that are heard, without priming and padding.
    pub(super) samples: u64,
}

impl AudioConfig {
    /// Packets in half a second: one chunk. Finer interleaving makes the index three times larger.
    fn packets_per_chunk(&self) -> u32 {
        (self.sample_rate_hz / 2 / PACKET_SAMPLES as u32).max(1)
    }

    /// Samples per channel in the track: the heard ones after the priming.
    fn media_samples(&self) -> u64 {
        u64::from(PRIMING_SAMPLES) + self.samples
    }
}

/// Samples of one track as the index wants them.
#[derive(Default)]
struct SampleTable {
    sizes: Vec<u32>,
    /// Offset and number of samples of each chunk.
    chunks: Vec<(u64, u32)>,
}

/// Writes frames and packets as they come; memory grows only by the sample tables.
pub(super) struct Mp4Writer<W> {
    sink: W,
    video: VideoConfig,
    audio: Option<AudioConfig>,
    /// Where the place of the index starts and how long it is.
    moov_start: u64,
    reserved: u64,
    position: u64,
    frames: SampleTable,
    /// Numbers of the sync frames, from 1.
    sync_frames: Vec<u32>,
    packets: SampleTable,
    /// The chunk of frames being written: its offset and how many it has.
    open_chunk: (u64, u32),
    /// Packets of the next audio chunk.
    queue: Vec<u8>,
    queued_packets: u32,
}

/// A finished file.
pub(super) struct Finished<W> {
    pub(super) sink: W,
    pub(super) size_bytes: u64,
    /// Whether the index comes before the media.
    pub(super) faststart: bool,
}

impl<W: Write + Seek> Mp4Writer<W> {
    /// Starts a file of about `expected_frames` frames; the number only sizes the place of the index.
    pub(super) fn new(
        mut sink: W,
        video: VideoConfig,
        audio: Option<AudioConfig>,
        expected_frames: u64,
    ) -> io::Result<Self> {
        let mut head = Boxes::default();
        head.put(b"ftyp", |b| {
            b.bytes(b"isom");
            b.u32(0x200);
            b.bytes(b"isomiso2avc1mp41");
        });
        let moov_start = head.as_bytes().len() as u64;
        let reserved = reserve(expected_frames, audio.as_ref());
        head.u32(reserved as u32);
        head.bytes(b"free");
        sink.write_all(head.as_bytes())?;
        io::copy(&mut io::Read::take(io::repeat(0), reserved - 8), &mut sink)?;
        sink.write_all(&mdat_header(MDAT_HEADER_BYTES))?;
        Ok(Self {
            sink,
            video,
            audio,
            moov_start,
            reserved,
            position: moov_start + reserved + MDAT_HEADER_BYTES,
            frames: SampleTable::default(),
            sync_frames: Vec::new(),
            packets: SampleTable::default(),
            open_chunk: (0, 0),
            queue: Vec::new(),
            queued_packets: 0,
        })
    }

    /// Appends the next frame.
    pub(super) fn frame(&mut self, frame: EncodedFrame<'_>) -> io::Result<()> {
        if self.open_chunk.1 == 0 {
            self.open_chunk.0 = self.position;
        }
        self.write(frame.data)?;
        self.open_chunk.1 += 1;
        self.frames.sizes.push(frame.data.len() as u32);
        if frame.is_sync {
            self.sync_frames.push(self.frames.sizes.len() as u32);
        }
        if self.open_chunk.1 == CHUNK_FRAMES {
            self.close_frame_chunk();
        }
        Ok(())
    }

    /// Appends the next audio packet; ignored in a file without an audio track.
    pub(super) fn packet(&mut self, packet: &[u8]) -> io::Result<()> {
        let Some(audio) = &self.audio else { return Ok(()) };
        let full = audio.packets_per_chunk();
        self.queue.extend_from_slice(packet);
        self.queued_packets += 1;
        self.packets.sizes.push(packet.len() as u32);
        if self.queued_packets == full { self.write_queue() } else { Ok(()) }
    }

    /// Completes the file.
    pub(super) fn finish(mut self) -> io::Result<Finished<W>> {
        self.write_queue()?;
        self.close_frame_chunk();
        let mdat_start = self.moov_start + self.reserved;
        let mdat = mdat_header(self.position - mdat_start);
        let moov = self.moov();
        // What the index leaves of its place becomes a `free` box, which is 8 bytes long at least.
        let rest = self.reserved.checked_sub(moov.len() as u64).filter(|&rest| rest == 0 || rest >= 8);
        match rest {
            Some(rest) => {
                self.sink.seek(SeekFrom::Start(self.moov_start))?;
                self.sink.write_all(&moov)?;
                if rest > 0 {
                    self.sink.write_all(&(rest as u32).to_be_bytes())?;
                    self.sink.write_all(b"free")?;
                    self.sink.seek(SeekFrom::Start(mdat_start))?;
                }
                self.sink.write_all(&mdat)?;
            }
            None => {
                self.write(&moov)?;
                self.sink.seek(SeekFrom::Start(mdat_start))?;
                self.sink.write_all(&mdat)?;
            }
        }
        self.sink.flush()?;
        Ok(Finished { sink: self.sink, size_bytes: self.position, faststart: rest.is_some() })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sink.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn close_frame_chunk(&mut self) {
        if self.open_chunk.1 > 0 {
            self.frames.chunks.push(std::mem::take(&mut self.open_chunk));
        }
    }

    fn write_queue(&mut self) -> io::Result<()> {
        if self.queued_packets > 0 {
            self.close_frame_chunk();
            self.packets.chunks.push((self.position, self.queued_packets));
            let queue = std::mem::take(&mut self.queue);
            self.write(&queue)?;
            self.queue = queue;
            self.queue.clear();
            self.queued_packets = 0;
        }
        Ok(())
    }

    /// The index of all that was written so far.
    fn moov(&self) -> Vec<u8> {
        let frames = self.frames.sizes.len() as u32;
        // In the sample rate as movie timescale both tracks' lengths are whole numbers, as every rate
        // that AAC has is a multiple of 25: the edit lists are exact to the sample.
        let timescale = self.audio.as_ref().map_or(VIDEO_TIMESCALE, |audio| audio.sample_rate_hz);
        let video_length = frames * (timescale / FPS);
        let audio_length = self.audio.as_ref().map_or(0, |audio| audio.samples as u32);
        let wide_offsets = self.position > u64::from(u32::MAX);

        let mut b = Boxes::default();
        b.put(b"moov", |b| {
            let tracks = 1 + u32::from(self.audio.is_some());
            b.movie_header(timescale, video_length.max(audio_length), tracks + 1);
            let header = TrackHeader::Video { width: self.video.width, height: self.video.height };
            b.track(header, video_length, 0, (VIDEO_TIMESCALE, frames * FRAME_TICKS), |b| {
                b.full(b"stsd", 0, 0, |b| {
                    b.u32(1);
                    b.avc1(&self.video);
                });
                b.full(b"stts", 0, 0, |b| b.runs(&[(frames, FRAME_TICKS)]));
                b.full(b"stss", 0, 0, |b| b.list(&self.sync_frames));
                b.sample_table(&self.frames, wide_offsets);
            });
            if let Some(audio) = &self.audio {
                let media = audio.media_samples() as u32;
                let packets = self.packets.sizes.len() as u32;
                let media_time = (audio.sample_rate_hz, media);
                b.track(TrackHeader::Audio, audio_length, PRIMING_SAMPLES, media_time, |b| {
                    b.full(b"stsd", 0, 0, |b| {
                        b.u32(1);
                        b.mp4a(audio);
                    });
                    // The last packet counts only as far as the audio goes; the rest is padding.
                    let whole = media / PACKET_SAMPLES as u32;
                    let tail = media % PACKET_SAMPLES as u32;
                    b.full(b"stts", 0, 0, |b| {
                        b.runs(&[(whole, PACKET_SAMPLES as u32), (packets - whole, tail)])
                    });
                    b.sample_table(&self.packets, wide_offsets);
                    b.audio_roll(packets);
                });
            }
        });
        b.into_bytes()
    }
}

/// A `mdat` header with a 64-bit size: a long video may pass 4 GiB.
const MDAT_HEADER_BYTES: u64 = 16;

fn mdat_header(size: u64) -> [u8; MDAT_HEADER_BYTES as usize] {
    let mut header = [0; MDAT_HEADER_BYTES as usize];
    header[..4].copy_from_slice(&1u32.to_be_bytes());
    header[4..8].copy_from_slice(b"mdat");
    header[8..].copy_from_slice(&size.to_be_bytes());
    header
}

/// An upper bound of the index's size, which the tables' entries make up.
fn reserve(frames: u64, audio: Option<&AudioConfig>) -> u64 {
    let (packets, audio_chunks) = audio.map_or((0, 0), |audio| {
        let packets = audio.media_samples().div_ceil(PACKET_SAMPLES as u64);
        (packets, packets / u64::from(audio.packets_per_chunk()) + 1)
    });
    // Every audio chunk ends a video chunk.
    let video_chunks = frames / u64::from(CHUNK_FRAMES) + 1 + audio_chunks;
    let sync_frames = frames / u64::from(GOP_FRAMES) + 1;
    let bound = RESERVE_FIXED
        + 4 * (frames + sync_frames + packets)
        + CHUNK_ENTRY_BYTES * (video_chunks + audio_chunks);
    // A `free` box with a 32-bit size holds the place; beyond it the index would go to the end.
    bound.min(u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::SAMPLE_RATES_HZ;
    use super::super::aac::packets_for;
    use super::super::testing::Movie;
    use super::*;

    fn video() -> VideoConfig {
        let parameter_sets = ParameterSets { sps: vec![0x67, 100, 0, 30, 1, 2, 3], pps: vec![0x68, 1, 2] };
        VideoConfig { width: 704, height: 1280, parameter_sets }
    }

    fn audio(sample_rate_hz: u32, samples: u64) -> AudioConfig {
        AudioConfig { sample_rate_hz, channels: 2, config: vec![0x11, 0x90], bitrate: 128_000, samples }
    }

    /// A file of `frames` frames of 5 bytes and the packets, of 3 bytes, for as long.
    fn write(frames: u64, audio: Option<AudioConfig>) -> (Movie, bool) {
        let packets = audio.as_ref().map_or(0, |audio| packets_for(audio.samples));
        let mut writer = Mp4Writer::new(Cursor::new(vec![]), video(), audio, frames).unwrap();
        let mut written = 0;
        for i in 0..frames {
            let is_sync = i % u64::from(GOP_FRAMES) == 0;
            writer.frame(EncodedFrame { data: b"frame", is_sync, quantizer: 20 }).unwrap();
            while written * frames < packets * (i + 1) {
                writer.packet(b"aac").unwrap();
                written += 1;
            }
        }
        let Finished { sink, size_bytes, faststart } = writer.finish().unwrap();
        assert_eq!(size_bytes, sink.get_ref().len() as u64);
        (Movie::read(sink.into_inner()), faststart)
    }

    #[test]
    fn half_an_hour_fits_the_place_of_its_index_at_every_rate() {
        let frames = 30 * 60 * 25;
        for rate in SAMPLE_RATES_HZ {
            let (movie, faststart) = write(frames, Some(audio(rate, 30 * 60 * u64::from(rate))));
            assert!(faststart, "{rate} Hz");
            movie.check_sample_tables();
            assert_eq!(movie.mp4.moov.mvhd.duration, 30 * 60 * u64::from(rate));
            assert_eq!(movie.video().samples.len() as u64, frames);
        }
        assert!(write(frames, None).1);
    }

    #[test]
    fn lengths_around_every_boundary_fit_too() {
        for frames in [1, 2, 24, 25, 26, 50, 51, 99, 100, 101] {
            for samples in [1, 1023, 1024, 1025, 8191, 8192, 8193, 63_999, 64_000] {
                let (movie, faststart) = write(frames, Some(audio(16_000, samples)));
                assert!(faststart, "{frames} frames, {samples} samples");
                movie.check_sample_tables();
                assert_eq!(movie.audio().duration, 1024 + samples);
            }
        }
    }

    #[test]
    fn beyond_four_gigabytes_offsets_have_64_bits() {
        let mut writer = Mp4Writer::new(Cursor::new(vec![]), video(), None, 2).unwrap();
        // As if that much media had come before.
        writer.position = 5 << 30;
        writer.frame(EncodedFrame { data: b"frame", is_sync: true, quantizer: 20 }).unwrap();
        writer.close_frame_chunk();
        let moov = writer.moov();
        let at = moov.windows(4).position(|window| window == b"co64").unwrap();
        assert_eq!(moov[at + 8..at + 20], [&[0, 0, 0, 1][..], &(5u64 << 30).to_be_bytes()].concat());
        assert!(!moov.windows(4).any(|window| window == b"stco"));
    }
}
