//! The boxes of the index, each written field by field as its specification lists them.

use super::{AudioConfig, SampleTable, VideoConfig};

/// The identity as nine fixed-point numbers: the picture is shown as it is.
const MATRIX: [u32; 9] = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x4000_0000];
/// Version 1.0 and volume 1.0 as fixed-point numbers.
const RATE_ONE: u32 = 0x10000;
const VOLUME_ONE: u16 = 0x100;
/// "und", three letters of 5 bits: the language is not known.
const LANGUAGE_UNDETERMINED: u16 = 0x55c4;

/// What the header of a track depends on.
#[derive(Clone, Copy)]
pub(super) enum TrackHeader {
    Video { width: u16, height: u16 },
    Audio,
}

/// Bytes under construction. Numbers are big-endian.
#[derive(Default)]
pub(super) struct Boxes(Vec<u8>);

impl Boxes {
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// A box of type `name` around what `content` writes.
    pub(super) fn put(&mut self, name: &[u8; 4], content: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.u32(0);
        self.bytes(name);
        content(self);
        let size = (self.0.len() - start) as u32;
        self.0[start..start + 4].copy_from_slice(&size.to_be_bytes());
    }

    /// A box with version and flags.
    pub(super) fn full(&mut self, name: &[u8; 4], version: u8, flags: u32, content: impl FnOnce(&mut Self)) {
        self.put(name, |b| {
            b.u32(u32::from(version) << 24 | flags);
            content(b);
        });
    }

    /// A count and the numbers.
    pub(super) fn list(&mut self, values: &[u32]) {
        self.u32(values.len() as u32);
        values.iter().for_each(|value| self.u32(*value));
    }

    /// A count and (repetitions, value) pairs, without those that repeat 0 times.
    pub(super) fn runs(&mut self, runs: &[(u32, u32)]) {
        let runs = runs.iter().filter(|(count, _)| *count > 0);
        self.u32(runs.clone().count() as u32);
        for (count, value) in runs {
            self.u32(*count);
            self.u32(*value);
        }
    }

    pub(super) fn movie_header(&mut self, timescale: u32, duration: u32, next_track: u32) {
        self.full(b"mvhd", 0, 0, |b| {
            // No time of creation and change, so that the same frames make the same file.
            b.zeros(8);
            b.u32(timescale);
            b.u32(duration);
            b.u32(RATE_ONE);
            b.u16(VOLUME_ONE);
            b.zeros(10);
            MATRIX.iter().for_each(|value| b.u32(*value));
            b.zeros(24);
            b.u32(next_track);
        });
    }

    /// A track whose edit list plays `length` (in the movie's timescale) from `start` (in the track's)
    /// on; `media` is the track's timescale and duration, `table` writes the boxes of the sample table.
    pub(super) fn track(
        &mut self,
        header: TrackHeader,
        length: u32,
        start: u32,
        (timescale, duration): (u32, u32),
        table: impl FnOnce(&mut Self),
    ) {
        self.put(b"trak", |b| {
            b.track_header(header, length);
            b.put(b"edts", |b| {
                b.full(b"elst", 0, 0, |b| {
                    b.u32(1);
                    b.u32(length);
                    b.u32(start);
                    b.u32(RATE_ONE);
                });
            });
            b.put(b"mdia", |b| {
                b.full(b"mdhd", 0, 0, |b| {
                    b.zeros(8);
                    b.u32(timescale);
                    b.u32(duration);
                    b.u16(LANGUAGE_UNDETERMINED);
                    b.u16(0);
                });
                let (handler, name): (_, &[u8]) = match header {
                    TrackHeader::Video { .. } => (b"vide", b"VideoHandler\0"),
                    TrackHeader::Audio => (b"soun", b"SoundHandler\0"),
                };
                b.full(b"hdlr", 0, 0, |b| {
                    b.u32(0);
                    b.bytes(handler);
                    b.zeros(12);
                    b.bytes(name);
                });
                b.put(b"minf", |b| {
                    match header {
                        TrackHeader::Video { .. } => b.full(b"vmhd", 0, 1, |b| b.zeros(8)),
                        TrackHeader::Audio => b.full(b"smhd", 0, 0, |b| b.zeros(4)),
                    }
                    // The media are in this very file: flag 1.
                    b.put(b"dinf", |b| {
                        b.full(b"dref", 0, 0, |b| {
                            b.u32(1);
                            b.full(b"url ", 0, 1, |_| {});
                        });
                    });
                    b.put(b"stbl", table);
                });
            });
        });
    }

    fn track_header(&mut self, header: TrackHeader, length: u32) {
        let (id, group, volume, width, height) = match header {
            TrackHeader::Video { width, height } => (1, 0, 0, width, height),
            TrackHeader::Audio => (2, 1, VOLUME_ONE, 0, 0),
        };
        const ENABLED_AND_IN_MOVIE: u32 = 3;
        self.full(b"tkhd", 0, ENABLED_AND_IN_MOVIE, |b| {
            b.zeros(8);
            b.u32(id);
            b.u32(0);
            b.u32(length);
            b.zeros(8);
            b.u16(0);
            b.u16(group);
            b.u16(volume);
            b.u16(0);
            MATRIX.iter().for_each(|value| b.u32(*value));
            b.u32(u32::from(width) << 16);
            b.u32(u32::from(height) << 16);
        });
    }

    /// The sample entry of H.264: size, parameter sets, colour, square pixels.
    pub(super) fn avc1(&mut self, video: &VideoConfig) {
        let (sps, pps) = (&video.parameter_sets.sps, &video.parameter_sets.pps);
        // Profile, compatibility and level are the bytes after the header of the SPS.
        let profile: [u8; 3] = std::array::from_fn(|i| sps.get(i + 1).copied().unwrap_or(0));
        self.put(b"avc1", |b| {
            b.zeros(6);
            b.u16(1);
            b.zeros(16);
            b.u16(video.width);
            b.u16(video.height);
            // 72 dots per inch, one frame a sample, no name, 24 bits deep, no colour table.
            b.u32(72 << 16);
            b.u32(72 << 16);
            b.u32(0);
            b.u16(1);
            b.zeros(32);
            b.u16(24);
            b.u16(0xffff);
            b.put(b"avcC", |b| {
                b.bytes(&[1, profile[0], profile[1], profile[2]]);
                // Lengths take 4 bytes; one SPS; one PPS; the upper bits are reserved ones.
                b.bytes(&[0xfc | 3, 0xe0 | 1]);
                b.u16(sps.len() as u16);
                b.bytes(sps);
                b.bytes(&[1]);
                b.u16(pps.len() as u16);
                b.bytes(pps);
                // High profile adds: 4:2:0, 8 bits of luma and chroma, no SPS extension.
                b.bytes(&[0xfc | 1, 0xf8, 0xf8, 0]);
            });
            b.put(b"colr", |b| {
                // BT.709 primaries, transfer and matrix; limited range.
                b.bytes(b"nclx");
                b.u16(1);
                b.u16(1);
                b.u16(1);
                b.bytes(&[0]);
            });
            b.put(b"pasp", |b| {
                b.u32(1);
                b.u32(1);
            });
        });
    }

    /// The sample entry of AAC.
    pub(super) fn mp4a(&mut self, audio: &AudioConfig) {
        self.put(b"mp4a", |b| {
            b.zeros(6);
            b.u16(1);
            b.zeros(8);
            b.u16(audio.channels);
            b.u16(16);
            b.u32(0);
            // The rate as 16.16 fixed point; 0 where it does not fit (the AudioSpecificConfig has it).
            b.u16(u16::try_from(audio.sample_rate_hz).unwrap_or(0));
            b.u16(0);
            b.full(b"esds", 0, 0, |b| {
                let config = audio.config.len() as u8;
                let decoder = 13 + 2 + config;
                // ES descriptor: id 0 (inside MP4), no flags.
                b.bytes(&[3, 3 + 2 + decoder + 3]);
                b.bytes(&[0, 0, 0]);
                // Decoder configuration: MPEG-4 audio (0x40) of stream type audio (5 << 2 | 1), a buffer
                // of 6144 bytes (768 a channel is the most of AAC-LC), the largest and mean bitrate.
                b.bytes(&[4, decoder, 0x40, 5 << 2 | 1, 0, 0x18, 0]);
                b.u32(audio.bitrate);
                b.u32(audio.bitrate);
                b.bytes(&[5, config]);
                b.bytes(&audio.config);
                // Sync layer: predefined for MP4.
                b.bytes(&[6, 1, 2]);
            });
        });
    }

    /// Samples per chunk, sizes and chunk offsets.
    pub(super) fn sample_table(&mut self, table: &SampleTable, wide_offsets: bool) {
        self.full(b"stsc", 0, 0, |b| {
            let mut runs: Vec<(u32, u32)> = Vec::new();
            for (number, &(_, samples)) in (1..).zip(&table.chunks) {
                if runs.last().is_none_or(|run| run.1 != samples) {
                    runs.push((number, samples));
                }
            }
            b.u32(runs.len() as u32);
            for (first_chunk, samples) in runs {
                b.u32(first_chunk);
                b.u32(samples);
                b.u32(1);
            }
        });
        self.full(b"stsz", 0, 0, |b| {
            b.u32(0);
            b.list(&table.sizes);
        });
        let name = if wide_offsets { b"co64" } else { b"stco" };
        self.full(name, 0, 0, |b| {
            b.u32(table.chunks.len() as u32);
            for &(offset, _) in &table.chunks {
                match wide_offsets {
                    true => b.bytes(&offset.to_be_bytes()),
                    false => b.u32(offset as u32),
                }
            }
        });
    }

    /// Tells that decoding must start one packet early to be right: AAC overlaps its packets.
    pub(super) fn audio_roll(&mut self, packets: u32) {
        const ROLL_DISTANCE: i16 = -1;
        self.full(b"sgpd", 1, 0, |b| {
            b.bytes(b"roll");
            b.u32(2);
            b.u32(1);
            b.bytes(&ROLL_DISTANCE.to_be_bytes());
        });
        self.full(b"sbgp", 0, 0, |b| {
            b.bytes(b"roll");
            b.u32(1);
            b.u32(packets);
            b.u32(1);
        });
    }
}
