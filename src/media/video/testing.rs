//! What several tests of this folder share: pictures, decoders, a reader of our files.

use std::ops::Range;
use std::ptr::{NonNull, null_mut};

use openh264_sys2 as sys;
use openh264_sys2::API as _;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use re_mp4::{Mp4, StsdBoxContent, Track, TrackKind};
use symphonia::core::audio::Channels;
use symphonia::core::audio::layouts::{CHANNEL_LAYOUT_MONO, CHANNEL_LAYOUT_STEREO};
use symphonia::core::codecs::audio::well_known::CODEC_ID_AAC;
use symphonia::core::codecs::audio::{AudioCodecParameters, AudioDecoderOptions};
use symphonia::core::packet::Packet;
use symphonia::core::units::{Duration, Timestamp};

use super::{I420, ParameterSets};

/// A frame of one colour, (H, W, 3).
pub(super) fn solid(width: usize, height: usize, colour: [u8; 3]) -> Vec<u8> {
    colour.repeat(width * height)
}

/// A frame of white noise, (H, W, 3).
pub(super) fn noise(width: usize, height: usize, seed: u64) -> Vec<u8> {
    let mut rgb = vec![0; width * height * 3];
    StdRng::seed_from_u64(seed).fill_bytes(&mut rgb);
    rgb
}

/// OpenH264's decoder.
pub(super) struct H264Decoder {
    decoder: NonNull<sys::ISVCDecoder>,
    head: Vec<u8>,
}

impl H264Decoder {
    pub(super) fn new(sets: &ParameterSets) -> Self {
        let mut decoder = null_mut();
        let mut params = sys::SDecodingParam::default();
        params.sVideoProperty.eVideoBsType = sys::VIDEO_BITSTREAM_AVC;
        // SAFETY: the calls create and initialise the object; `params` outlives the second.
        let decoder = unsafe {
            sys::DynamicAPI::from_source().WelsCreateDecoder(&mut decoder);
            let decoder = NonNull::new(decoder).unwrap();
            let table = &**decoder.as_ptr();
            assert_eq!(table.Initialize.unwrap()(decoder.as_ptr(), &params), 0);
            decoder
        };
        let head = [&[0, 0, 0, 1], &sets.sps[..], &[0, 0, 0, 1], &sets.pps[..]].concat();
        Self { decoder, head }
    }

    /// Decodes one sample of length-prefixed NAL units; the pictures that are due now.
    pub(super) fn decode(&mut self, sample: &[u8]) -> Option<I420> {
        let mut stream = std::mem::take(&mut self.head);
        let mut rest = sample;
        while let Some((length, nal)) = rest.split_first_chunk::<4>() {
            let (nal, tail) = nal.split_at(u32::from_be_bytes(*length) as usize);
            stream.extend([0, 0, 0, 1]);
            stream.extend(nal);
            rest = tail;
        }
        assert!(rest.is_empty());
        let mut planes = [null_mut(); 3];
        let mut info = sys::SBufferInfo::default();
        // SAFETY: `stream` is live and as long as told; the outputs are live.
        let state = unsafe {
            let decode = (**self.decoder.as_ptr()).DecodeFrameNoDelay.unwrap();
            decode(
                self.decoder.as_ptr(),
                stream.as_ptr(),
                stream.len() as i32,
                planes.as_mut_ptr(),
                &mut info,
            )
        };
        assert_eq!(state, sys::dsErrorFree);
        picture(&planes, &info)
    }

    /// The pictures that the decoder still holds.
    pub(super) fn finish(self) -> Vec<I420> {
        std::iter::from_fn(|| {
            let mut planes = [null_mut(); 3];
            let mut info = sys::SBufferInfo::default();
            // SAFETY: the outputs are live.
            unsafe {
                let flush = (**self.decoder.as_ptr()).FlushFrame.unwrap();
                flush(self.decoder.as_ptr(), planes.as_mut_ptr(), &mut info);
            }
            picture(&planes, &info)
        })
        .collect()
    }
}

fn picture(planes: &[*mut u8; 3], info: &sys::SBufferInfo) -> Option<I420> {
    if info.iBufferStatus != 1 {
        return None;
    }
    // SAFETY: with status 1 the decoder has filled the description and the planes are live until the
    // next call.
    unsafe {
        let buffer = info.UsrData.sSystemBuffer;
        let (width, height) = (buffer.iWidth as usize, buffer.iHeight as usize);
        let copy = |plane: *mut u8, stride: i32, width: usize, height: usize| -> Vec<u8> {
            (0..height)
                .flat_map(|row| {
                    std::slice::from_raw_parts(plane.add(row * stride as usize), width).iter().copied()
                })
                .collect()
        };
        let mut picture = I420::new(width, height).unwrap();
        picture.y = copy(planes[0], buffer.iStride[0], width, height);
        picture.u = copy(planes[1], buffer.iStride[1], width / 2, height / 2);
        picture.v = copy(planes[2], buffer.iStride[1], width / 2, height / 2);
        Some(picture)
    }
}

impl Drop for H264Decoder {
    fn drop(&mut self) {
        // SAFETY: the object is live and not used after.
        unsafe {
            (**self.decoder.as_ptr()).Uninitialize.unwrap()(self.decoder.as_ptr());
            sys::DynamicAPI::from_source().WelsDestroyDecoder(self.decoder.as_ptr());
        }
    }
}

/// Decodes AAC packets to interleaved samples with nothing trimmed.
pub(super) fn decode_aac(rate: u32, channels: u16, config: &[u8], packets: &[impl AsRef<[u8]>]) -> Vec<f32> {
    let layout: Channels = if channels == 1 { CHANNEL_LAYOUT_MONO } else { CHANNEL_LAYOUT_STEREO };
    let mut params = AudioCodecParameters::new();
    params
        .for_codec(CODEC_ID_AAC)
        .with_sample_rate(rate)
        .with_channels(layout)
        .with_extra_data(config.into());
    let codecs = symphonia::default::get_codecs();
    let mut decoder = codecs.make_audio_decoder(&params, &AudioDecoderOptions::default()).unwrap();
    let (mut samples, mut block) = (vec![], vec![]);
    for (i, packet) in packets.iter().enumerate() {
        let start = Timestamp::new(i as i64 * 1024);
        let packet = Packet::new(0, start, Duration::new(1024), packet.as_ref().to_vec());
        decoder.decode(&packet).unwrap().copy_to_vec_interleaved::<f32>(&mut block);
        samples.extend_from_slice(&block);
    }
    samples
}

/// One of our files, read by an independent parser.
pub(super) struct Movie {
    pub(super) bytes: Vec<u8>,
    pub(super) mp4: Mp4,
}

impl Movie {
    pub(super) fn read(bytes: Vec<u8>) -> Self {
        let mp4 = Mp4::read_bytes(&bytes).unwrap();
        Self { bytes, mp4 }
    }

    pub(super) fn track(&self, kind: TrackKind) -> Option<&Track> {
        self.mp4.tracks().values().find(|track| track.kind == Some(kind))
    }

    pub(super) fn video(&self) -> &Track {
        self.track(TrackKind::Video).unwrap()
    }

    pub(super) fn audio(&self) -> &Track {
        self.track(TrackKind::Audio).unwrap()
    }

    /// The edit list's one entry: (segment duration in the movie's timescale, media time).
    pub(super) fn edit(&self, track: &Track) -> (u64, u64) {
        let list = track.trak(&self.mp4).edts.as_ref().unwrap().elst.as_ref().unwrap();
        let [edit] = &list.entries[..] else { panic!("{} edits", list.entries.len()) };
        assert_eq!((edit.media_rate, edit.media_rate_fraction), (1, 0));
        (edit.segment_duration, edit.media_time)
    }

    /// Types and byte ranges of the boxes at the top.
    pub(super) fn boxes(&self) -> Vec<(String, Range<usize>)> {
        let (mut start, mut found) = (0, vec![]);
        while let Some(header) = self.bytes.get(start..start + 8) {
            let size = match u32::from_be_bytes(header[..4].try_into().unwrap()) {
                1 => u64::from_be_bytes(self.bytes[start + 8..start + 16].try_into().unwrap()) as usize,
                size => size as usize,
            };
            found.push((String::from_utf8(header[4..].to_vec()).unwrap(), start..start + size));
            start += size;
        }
        assert_eq!(start, self.bytes.len());
        found
    }

    /// What follows the first box of type `name` inside the index.
    pub(super) fn after(&self, name: &[u8; 4]) -> &[u8] {
        let (_, moov) = self.boxes().into_iter().find(|(name, _)| name == "moov").unwrap();
        let moov = &self.bytes[moov];
        let at = moov.windows(4).position(|window| window == name).unwrap();
        &moov[at + 4..]
    }

    /// Every sample lies in the media box, none over another, and they fill it.
    pub(super) fn check_sample_tables(&self) {
        let (_, mdat) = self.boxes().into_iter().find(|(name, _)| name == "mdat").unwrap();
        let tracks = self.mp4.tracks().values();
        let mut ranges: Vec<_> = tracks.flat_map(|t| t.samples.iter().map(|s| s.byte_range())).collect();
        ranges.sort_by_key(|range| range.start);
        let mut end = mdat.start + 16;
        for range in ranges {
            assert_eq!(range.start, end);
            end = range.end;
        }
        assert_eq!(end, mdat.end);
    }

    pub(super) fn parameter_sets(&self) -> ParameterSets {
        let StsdBoxContent::Avc1(entry) = &self.video().trak(&self.mp4).mdia.minf.stbl.stsd.contents else {
            panic!("no avc1");
        };
        let sets = &entry.avcc.contents;
        let (sps, pps) = (&sets.sequence_parameter_sets[..], &sets.picture_parameter_sets[..]);
        let ([sps], [pps]) = (sps, pps) else { panic!("{} and {} parameter sets", sps.len(), pps.len()) };
        ParameterSets { sps: sps.bytes.clone(), pps: pps.bytes.clone() }
    }

    /// All pictures, decoded.
    pub(super) fn pictures(&self) -> Vec<I420> {
        let mut decoder = H264Decoder::new(&self.parameter_sets());
        let samples = self.video().samples.iter().map(|sample| &self.bytes[sample.byte_range()]);
        let mut pictures: Vec<_> = samples.filter_map(|sample| decoder.decode(sample)).collect();
        pictures.extend(decoder.finish());
        pictures
    }

    /// The voice as a player hears it: decoded and cut by the edit list.
    pub(super) fn voice(&self) -> Vec<f32> {
        let track = self.audio();
        let StsdBoxContent::Mp4a(entry) = &track.trak(&self.mp4).mdia.minf.stbl.stsd.contents else {
            panic!("no mp4a");
        };
        let packets: Vec<_> = track.samples.iter().map(|s| &self.bytes[s.byte_range()]).collect();
        let rate = track.timescale as u32;
        // The tag and length of the AudioSpecificConfig inside `esds`, which has 2 bytes for AAC-LC.
        let esds = self.after(b"esds");
        let at = esds.windows(2).position(|window| window == [5, 2]).unwrap();
        let heard = decode_aac(rate, entry.channelcount, &esds[at + 2..at + 4], &packets);
        let (length, start) = self.edit(track);
        assert_eq!(self.mp4.moov.mvhd.timescale, rate, "the edit list counts samples");
        let channels = u64::from(entry.channelcount);
        heard[(start * channels) as usize..((start + length) * channels) as usize].to_vec()
    }
}
