//! AAC-LC by the Fraunhofer FDK: a safe wrapper with constant bitrate and an exactly known delay.
//!
//! Sources: `libAACenc/include/aacenc_lib.h` of the FDK. The `fdk-aac` crate is not used: it hides the
//! afterburner and the delay.
//!
//! **Delay.** What goes in comes out of a decoder [`InfoStruct::nDelay`](sys::AACENC_InfoStruct) samples
//! later, 1600 for AAC-LC. We prepend silence until the delay is a whole number of packets and drop all
//! of these but one. That one carries the overlap that the first audible packet needs, so the voice
//! is whole from its first sample, and the file's edit list skips [`PRIMING_SAMPLES`].

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use fdk_aac_sys as sys;

use super::encode_error;
use crate::Result;

/// Samples of each channel in one packet.
pub(super) const PACKET_SAMPLES: usize = 1024;

/// Samples that a player must skip: the one packet before the first audible one.
pub(super) const PRIMING_SAMPLES: u32 = PACKET_SAMPLES as u32;

/// The sample rates that AAC has, in Hz; audio of another rate must be resampled first.
pub const SAMPLE_RATES_HZ: [u32; 12] =
    [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000];

/// Target bits per second by number of channels; the FDK lowers them where the rate cannot use them.
const BITRATE_MONO: u32 = 96_000;
const BITRATE_STEREO: u32 = 128_000;

/// Encodes interleaved samples into packets of 1024 samples per channel.
pub struct AacEncoder {
    handle: Handle,
    channels: usize,
    config: Vec<u8>,
    bitrate: u32,
    /// Packets still to be dropped at the start.
    leading: usize,
    /// Values taken from the caller so far.
    values: u64,
    /// Packets handed to the caller so far.
    packets: u64,
    pending: Vec<i16>,
    packet: Vec<u8>,
}

impl AacEncoder {
    /// An encoder for one of [`SAMPLE_RATES_HZ`] and 1 or 2 channels: 96 kbit/s mono, 128 kbit/s stereo.
    ///
    /// # Errors
    /// Kind `Encode` for another rate or number of channels, and when the FDK fails.
    pub fn new(sample_rate_hz: u32, channels: u16) -> Result<Self> {
        if !SAMPLE_RATES_HZ.contains(&sample_rate_hz) {
            let message =
                format!("the audio track has {sample_rate_hz} Hz, expected one of {SAMPLE_RATES_HZ:?}");
            return Err(encode_error(message).with_reason("AUDIO_RATE"));
        }
        let bitrate = match channels {
            1 => BITRATE_MONO,
            2 => BITRATE_STEREO,
            _ => {
                let message = format!("the audio track has {channels} channels, expected 1 or 2");
                return Err(encode_error(message).with_reason("AUDIO_CHANNELS"));
            }
        };
        let handle = Handle::new(channels)?;
        for (name, param, value) in [
            ("object type AAC-LC", sys::AACENC_PARAM_AACENC_AOT, 2),
            ("sample rate", sys::AACENC_PARAM_AACENC_SAMPLERATE, sample_rate_hz),
            ("channel mode", sys::AACENC_PARAM_AACENC_CHANNELMODE, u32::from(channels)),
            ("constant bitrate", sys::AACENC_PARAM_AACENC_BITRATEMODE, 0),
            ("bitrate", sys::AACENC_PARAM_AACENC_BITRATE, bitrate),
            ("raw packets", sys::AACENC_PARAM_AACENC_TRANSMUX, 0),
            ("afterburner", sys::AACENC_PARAM_AACENC_AFTERBURNER, 1),
        ] {
            handle.set(name, param, value)?;
        }
        let info = handle.start()?;
        if info.frameLength as usize != PACKET_SAMPLES {
            return Err(encode_error(format!(
                "the AAC encoder makes packets of {} samples, expected {PACKET_SAMPLES}",
                info.frameLength
            )));
        }
        let config = info.confBuf.get(..info.confSize as usize).unwrap_or(&info.confBuf).to_vec();
        let delay = info.nDelay as usize;
        let leading = delay.div_ceil(PACKET_SAMPLES).max(1);
        let silence = leading * PACKET_SAMPLES - delay;
        let channels = usize::from(channels);
        Ok(Self {
            bitrate: handle.bitrate(),
            handle,
            channels,
            config,
            leading: leading - 1,
            values: 0,
            packets: 0,
            pending: vec![0; silence * channels],
            packet: vec![0; info.maxOutBufBytes as usize],
        })
    }

    /// The AudioSpecificConfig that a decoder needs.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Bits per second after what the FDK made of the target.
    pub fn bitrate(&self) -> u32 {
        self.bitrate
    }

    /// Takes the next interleaved `samples`, nominally in −1…1: what lies outside is clamped, and what
    /// is not a number is silence. Calls `sink` with each finished packet.
    ///
    /// # Errors
    /// Kind `Encode` when the FDK fails; else what `sink` returns.
    pub fn push(&mut self, samples: &[f32], mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        // Casting from float saturates and maps NaN to 0.
        self.pending.extend(samples.iter().map(|x| (x * 32768.0).round() as i16));
        self.values += samples.len() as u64;
        self.drain(&mut sink)
    }

    /// Flushes the encoder: afterwards the packets hold the priming, all samples, and nothing behind
    /// the packet with the last one.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let wanted = packets_for(self.values.div_ceil(self.channels as u64));
        while self.packets < wanted {
            // Silence behind the end pushes what the encoder still holds out.
            self.pending.resize(self.pending.len() + PACKET_SAMPLES * self.channels, 0);
            self.drain(&mut |packet: &[u8]| sink(packet))?;
        }
        Ok(())
    }

    fn drain(&mut self, sink: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let frame = PACKET_SAMPLES * self.channels;
        let mut start = 0;
        while let Some(samples) = self.pending.get(start..start + frame) {
            let size = self.handle.encode(samples, &mut self.packet)?;
            start += frame;
            match &self.packet[..size] {
                [] => {}
                _ if self.leading > 0 => self.leading -= 1,
                packet => {
                    self.packets += 1;
                    sink(packet)?;
                }
            }
        }
        self.pending.drain(..start);
        Ok(())
    }
}

/// Packets that hold the priming and `samples` samples of each channel.
pub(super) fn packets_for(samples: u64) -> u64 {
    (u64::from(PRIMING_SAMPLES) + samples).div_ceil(PACKET_SAMPLES as u64)
}

/// Owns the C object.
struct Handle(NonNull<sys::AACENCODER>);

// SAFETY: an FDK encoder has no tie to the thread that made it, and all calls go through the one
// `AacEncoder` that owns it.
unsafe impl Send for Handle {}

impl Handle {
    fn new(channels: u16) -> Result<Self> {
        const MODULE_AAC: u32 = 1;
        let mut encoder = std::ptr::null_mut();
        // SAFETY: the call writes the pointer of the new object, or leaves null.
        let code = unsafe { sys::aacEncOpen(&mut encoder, MODULE_AAC, u32::from(channels)) };
        check("start", code)?;
        NonNull::new(encoder).map(Self).ok_or_else(|| encode_error("the AAC encoder failed to start"))
    }

    fn set(&self, name: &str, param: sys::AACENC_PARAM, value: u32) -> Result<()> {
        // SAFETY: the object is live.
        let code = unsafe { sys::aacEncoder_SetParam(self.0.as_ptr(), param, value) };
        check(&format!("take {value} as {name}"), code)
    }

    /// Applies the parameters and tells what came of them.
    fn start(&self) -> Result<sys::AACENC_InfoStruct> {
        // SAFETY: a call without buffers applies the parameters, as the header documents; the
        // information structure consists of integers, for which zero is a value, and is then filled.
        unsafe {
            use std::ptr::{null, null_mut};
            let code = sys::aacEncEncode(self.0.as_ptr(), null(), null(), null(), null_mut());
            check("take its parameters", code)?;
            let mut info: sys::AACENC_InfoStruct = std::mem::zeroed();
            check("describe itself", sys::aacEncInfo(self.0.as_ptr(), &mut info))?;
            Ok(info)
        }
    }

    fn bitrate(&self) -> u32 {
        // SAFETY: the object is live.
        unsafe { sys::aacEncoder_GetParam(self.0.as_ptr(), sys::AACENC_PARAM_AACENC_BITRATE) }
    }

    /// Encodes one packet's `samples` into `out`; returns how many bytes came.
    fn encode(&mut self, samples: &[i16], out: &mut [u8]) -> Result<usize> {
        let mut input: *mut c_void = samples.as_ptr().cast_mut().cast();
        let mut input_id = sys::AACENC_BufferIdentifier_IN_AUDIO_DATA as c_int;
        let (mut input_size, mut input_unit) = (size_of_val(samples) as c_int, size_of::<i16>() as c_int);
        let input = sys::AACENC_BufDesc {
            numBufs: 1,
            bufs: &mut input,
            bufferIdentifiers: &mut input_id,
            bufSizes: &mut input_size,
            bufElSizes: &mut input_unit,
        };
        let mut output: *mut c_void = out.as_mut_ptr().cast();
        let mut output_id = sys::AACENC_BufferIdentifier_OUT_BITSTREAM_DATA as c_int;
        let (mut output_size, mut output_unit) = (out.len() as c_int, 1);
        let output = sys::AACENC_BufDesc {
            numBufs: 1,
            bufs: &mut output,
            bufferIdentifiers: &mut output_id,
            bufSizes: &mut output_size,
            bufElSizes: &mut output_unit,
        };
        let arguments = sys::AACENC_InArgs { numInSamples: samples.len() as c_int, numAncBytes: 0 };
        let mut taken =
            sys::AACENC_OutArgs { numOutBytes: 0, numInSamples: 0, numAncBytes: 0, bitResState: 0 };
        // SAFETY: the descriptors point at live buffers of the sizes they tell; the FDK reads the input
        // despite its `*mut` and writes at most `output_size` bytes.
        let code = unsafe { sys::aacEncEncode(self.0.as_ptr(), &input, &output, &arguments, &mut taken) };
        check("encode", code)?;
        if taken.numInSamples != arguments.numInSamples {
            let (taken, given) = (taken.numInSamples, arguments.numInSamples);
            return Err(encode_error(format!("the AAC encoder took {taken} of {given} samples")));
        }
        Ok((taken.numOutBytes.max(0) as usize).min(out.len()))
    }
}

fn check(what: &str, code: sys::AACENC_ERROR) -> Result<()> {
    match code {
        sys::AACENC_ERROR_AACENC_OK => Ok(()),
        _ => Err(encode_error(format!("the AAC encoder failed to {what} (code {code:#x})"))),
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut encoder = self.0.as_ptr();
        // SAFETY: the object is live and not used after.
        unsafe { sys::aacEncClose(&mut encoder) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::decode_aac;
    use super::*;
    use crate::ErrorKind;

    fn encode(rate: u32, channels: u16, blocks: &[&[f32]]) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut encoder = AacEncoder::new(rate, channels).unwrap();
        let config = encoder.config().to_vec();
        let mut packets = vec![];
        let mut sink = |packet: &[u8]| {
            packets.push(packet.to_vec());
            Ok(())
        };
        for block in blocks {
            encoder.push(block, &mut sink).unwrap();
        }
        encoder.finish(&mut sink).unwrap();
        (config, packets)
    }

    /// A tone of a fourteenth of the rate from the very first sample: the same shape at every rate.
    fn tone(samples: usize, channels: u16) -> Vec<f32> {
        let wave = |i: usize| 0.5 * (std::f32::consts::TAU * i as f32 / 14.0).cos();
        (0..samples).flat_map(|i| std::iter::repeat_n(wave(i), usize::from(channels))).collect()
    }

    #[test]
    fn every_rate_and_channel_count_comes_back_in_place_from_the_first_sample_on() {
        for rate in SAMPLE_RATES_HZ {
            for channels in [1, 2] {
                let samples = 5000;
                let sent = tone(samples, channels);
                let (config, packets) = encode(rate, channels, &[&sent]);
                assert_eq!(packets.len() as u64, packets_for(samples as u64), "{rate} Hz × {channels}");
                let heard = decode_aac(rate, channels, &config, &packets);
                let start = PRIMING_SAMPLES as usize * usize::from(channels);
                let heard = &heard[start..start + sent.len()];
                let (mut noise, mut power) = (0.0, 0.0);
                for (a, b) in heard.iter().zip(&sent) {
                    noise += (a - b).powi(2);
                    power += b.powi(2);
                }
                assert!(noise < 0.02 * power, "{rate} Hz × {channels}: noise {}", noise / power);
                // The overlap packet before the first audible one is what keeps this part whole.
                let (first, sent) = (&heard[..300], &sent[..300]);
                let worst = first.iter().zip(sent).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 0.25, "{rate} Hz × {channels}: {worst} at the start");
            }
        }
    }

    #[test]
    fn any_grouping_of_samples_makes_the_same_packets() {
        let sent = tone(7001, 2);
        let whole = encode(48_000, 2, &[&sent]);
        let (head, tail) = sent.split_at(3333);
        assert_eq!(encode(48_000, 2, &[head, &[], tail]), whole);
        assert_eq!(encode(48_000, 2, &sent.chunks(1).collect::<Vec<_>>()), whole);
    }

    #[test]
    fn the_bitrate_is_told_as_it_is() {
        assert_eq!(AacEncoder::new(44_100, 1).unwrap().bitrate(), BITRATE_MONO);
        assert_eq!(AacEncoder::new(48_000, 2).unwrap().bitrate(), BITRATE_STEREO);
        let narrow = AacEncoder::new(8000, 1).unwrap().bitrate();
        assert!((16_000..BITRATE_MONO).contains(&narrow), "8 kHz cannot use 96 kbit/s: {narrow}");
    }

    #[test]
    fn wild_samples_are_clamped_and_do_no_harm() {
        let wild = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 7.0, -7.0, 1.0, -1.0, f32::MIN_POSITIVE];
        let tame = [0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0];
        let (wild, tame) = (wild.repeat(500), tame.repeat(500));
        assert_eq!(encode(16_000, 1, &[&wild]), encode(16_000, 1, &[&tame]));
    }

    #[test]
    fn other_rates_and_channel_counts_are_errors_that_say_which_exist() {
        let error = AacEncoder::new(37_800, 1).err().unwrap();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Encode, Some("AUDIO_RATE")));
        assert!(error.to_string().contains("37800 Hz") && error.to_string().contains("44100"), "{error}");
        for channels in [0, 3] {
            assert_eq!(AacEncoder::new(16_000, channels).err().unwrap().reason(), Some("AUDIO_CHANNELS"));
        }
    }
}
