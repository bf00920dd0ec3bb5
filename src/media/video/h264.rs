//! H.264 by OpenH264: a safe wrapper that sets what talking heads need.
//!
//! Sources: `codec/api/wels/codec_app_def.h` of OpenH264 2.7.0 for the parameters; the choice of each is
//! beside it below. The `openh264` crate is not used: it hides CABAC and the constant quantiser, and by
//! default drops frames to hold a bitrate, which would pull picture and voice apart.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use openh264_sys2 as sys;
use openh264_sys2::API as _;

use super::bitrate::{BitrateGuard, MAX_QUANTIZER};
use super::color::check_size;
use super::{FPS, GOP_FRAMES, I420, encode_error};
use crate::{Error, Result};

/// How fine the picture is: a constant quantiser, so that no frame is worse than the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Quality {
    /// Quantiser 18: about 2.6 Mbit/s at 720p, 46 dB.
    High,
    /// Quantiser 20: about 1.7 Mbit/s at 720p, 45 dB; 1 Mbit/s at 480p.
    #[default]
    Standard,
    /// Quantiser 23: about 1.1 Mbit/s at 720p, 44 dB.
    Small,
}

impl Quality {
    /// The quantiser (0 finest … 51 coarsest).
    pub fn quantizer(self) -> u8 {
        match self {
            Self::High => 18,
            Self::Standard => 20,
            Self::Small => 23,
        }
    }
}

/// What a decoder must know before the first frame; NAL units without start codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSets {
    /// The sequence parameter set.
    pub sps: Vec<u8>,
    /// The picture parameter set.
    pub pps: Vec<u8>,
}

/// One encoded frame, borrowed from the encoder until the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodedFrame<'a> {
    /// The slices as NAL units, each after its length in 4 bytes (big-endian): a sample of an MP4 file.
    pub data: &'a [u8],
    /// Whether decoding can start here (IDR).
    pub is_sync: bool,
    /// The quantiser it was made with; above that of the [`Quality`] when the bitrate guard stepped in.
    pub quantizer: u8,
}

/// Encodes pictures in display order, one frame out for every picture in, without delay.
pub struct H264Encoder {
    handle: Handle,
    params: Box<sys::SEncParamExt>,
    info: Box<sys::SFrameBSInfo>,
    parameter_sets: ParameterSets,
    guard: BitrateGuard,
    width: c_int,
    height: c_int,
    frames: u64,
    sample: Vec<u8>,
}

// SAFETY: an OpenH264 encoder has no tie to the thread that made it. The object, and the buffers of it
// that `info` points at, are reached through this value alone, which is borrowed for each call.
unsafe impl Send for H264Encoder {}

impl H264Encoder {
    /// An encoder of `width` × `height` pixels (even, 16…4096) at 25 frames per second.
    ///
    /// # Errors
    /// Kind `Encode` when a side is odd or OpenH264 refuses the size, as it does above 9.4 megapixels.
    pub fn new(width: usize, height: usize, quality: Quality) -> Result<Self> {
        check_size(width, height, MIN_SIDE)?;
        let refused = |code: c_int| {
            encode_error(format!("OpenH264 refuses a video of {width}×{height} pixels (code {code})"))
                .with_reason("VIDEO_DIMENSIONS")
        };
        let (c_width, c_height) = (width as c_int, height as c_int);
        let handle = Handle::new()?;
        let params = Box::new(handle.params(c_width, c_height, quality)?);
        // SAFETY: the handle is live and `params` is a filled structure that the call only reads.
        let code = unsafe { handle.table(|t| t.InitializeExt)?(handle.as_ptr(), &*params) };
        if code != 0 {
            return Err(refused(code));
        }
        let mut info = Box::new(sys::SFrameBSInfo::default());
        // SAFETY: the encoder is initialised, and `info` outlives the call.
        let code = unsafe { handle.table(|t| t.EncodeParameterSets)?(handle.as_ptr(), &mut *info) };
        if code != 0 {
            return Err(failed("write its parameter sets", code));
        }
        let (mut sps, mut pps) = (None, None);
        for_each_nal(&info, |nal| {
            match nal_type(nal) {
                NAL_SPS => sps = Some(nal.to_vec()),
                NAL_PPS => pps = Some(nal.to_vec()),
                _ => {}
            }
            Ok(())
        })?;
        let (Some(sps), Some(pps)) = (sps, pps) else {
            return Err(encode_error("OpenH264 made no parameter sets"));
        };
        Ok(Self {
            handle,
            params,
            info,
            parameter_sets: ParameterSets { sps, pps },
            guard: BitrateGuard::new(quality.quantizer()),
            width: c_width,
            height: c_height,
            frames: 0,
            sample: Vec::new(),
        })
    }

    /// The parameter sets, the same for the whole stream.
    pub fn parameter_sets(&self) -> &ParameterSets {
        &self.parameter_sets
    }

    /// Encodes the next `picture`.
    ///
    /// # Errors
    /// Kind `Encode` when the picture has another size than the encoder, when OpenH264 fails, or when it
    /// leaves the frame out: a frame short would shift the picture against the voice.
    pub fn encode(&mut self, picture: &I420) -> Result<EncodedFrame<'_>> {
        if (picture.width(), picture.height()) != (self.width as usize, self.height as usize) {
            return Err(encode_error(format!(
                "a picture is {}×{} pixels, expected {}×{}",
                picture.width(),
                picture.height(),
                self.width,
                self.height
            )));
        }
        let quantizer = self.guard.quantizer();
        self.set_quantizer(quantizer)?;
        let source = sys::SSourcePicture {
            iColorFormat: sys::videoFormatI420 as c_int,
            iStride: [self.width, self.width / 2, self.width / 2, 0],
            pData: [
                picture.y.as_ptr().cast_mut(),
                picture.u.as_ptr().cast_mut(),
                picture.v.as_ptr().cast_mut(),
                std::ptr::null_mut(),
            ],
            iPicWidth: self.width,
            iPicHeight: self.height,
            uiTimeStamp: (self.frames * 1000 / u64::from(FPS)) as i64,
            ..Default::default()
        };
        let encode = self.handle.table(|t| t.EncodeFrame)?;
        // SAFETY: the planes have the sizes and strides that `source` tells (held by `I420`), OpenH264
        // only reads them despite the `*mut`, and `info` lives as long as the encoder.
        let code = unsafe { encode(self.handle.as_ptr(), &source, &mut *self.info) };
        if code != 0 {
            return Err(failed(&format!("encode frame {}", self.frames), code));
        }
        let frame_type = self.info.eFrameType;
        if frame_type == sys::videoFrameTypeSkip || frame_type == sys::videoFrameTypeInvalid {
            return Err(encode_error(format!("OpenH264 left frame {} out", self.frames)));
        }
        self.collect_sample()?;
        self.guard.observe(self.sample.len());
        self.frames += 1;
        let is_sync = frame_type == sys::videoFrameTypeIDR;
        Ok(EncodedFrame { data: &self.sample, is_sync, quantizer })
    }

    /// Gathers the slices of the frame just encoded into `sample`.
    fn collect_sample(&mut self) -> Result<()> {
        let Self { info, sample, parameter_sets, frames, .. } = self;
        sample.clear();
        for_each_nal(info, |nal| {
            let known = match nal_type(nal) {
                NAL_SPS => &parameter_sets.sps,
                NAL_PPS => &parameter_sets.pps,
                NAL_DELIMITER => return Ok(()),
                _ => {
                    sample.extend((nal.len() as u32).to_be_bytes());
                    sample.extend_from_slice(nal);
                    return Ok(());
                }
            };
            // The file's header holds these once, so they may not change under way.
            if known != nal {
                return Err(encode_error(format!("OpenH264 changed its parameter sets at frame {frames}")));
            }
            Ok(())
        })?;
        if sample.is_empty() {
            return Err(encode_error(format!("OpenH264 made no slice for frame {frames}")));
        }
        Ok(())
    }

    fn set_quantizer(&mut self, quantizer: u8) -> Result<()> {
        let quantizer = c_int::from(quantizer);
        if self.params.sSpatialLayers[0].iDLayerQp == quantizer {
            return Ok(());
        }
        self.params.sSpatialLayers[0].iDLayerQp = quantizer;
        let params: *mut sys::SEncParamExt = &mut *self.params;
        // Only the quantiser differs, so OpenH264 neither resets nor starts a new GOP.
        self.handle.set_option(sys::ENCODER_OPTION_SVC_ENCODE_PARAM_EXT, params.cast())
    }
}

/// One macroblock.
const MIN_SIDE: usize = 16;

const NAL_SPS: u8 = 7;
const NAL_PPS: u8 = 8;
const NAL_DELIMITER: u8 = 9;

fn nal_type(nal: &[u8]) -> u8 {
    nal.first().map_or(0, |header| header & 31)
}

fn failed(what: &str, code: c_int) -> Error {
    encode_error(format!("OpenH264 failed to {what} (code {code})"))
}

/// Calls `visit` with every NAL unit of the last call to the encoder, without its start code.
fn for_each_nal(info: &sys::SFrameBSInfo, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    for layer in info.sLayerInfo.iter().take(info.iLayerNum.max(0) as usize) {
        let mut start = 0;
        for i in 0..layer.iNalCount.max(0) as usize {
            // SAFETY: OpenH264 fills `pNalLengthInByte` with `iNalCount` lengths, which add up to the
            // bytes at `pBsBuf`; both belong to the encoder and stay until it is called again, which
            // the caller's borrow of it excludes.
            let nal = unsafe {
                let size = *layer.pNalLengthInByte.add(i);
                let nal = std::slice::from_raw_parts(layer.pBsBuf.add(start), size.max(0) as usize);
                start += nal.len();
                nal
            };
            let nal = nal.strip_prefix(&[0, 0, 0, 1]).or_else(|| nal.strip_prefix(&[0, 0, 1])).unwrap_or(nal);
            visit(nal)?;
        }
    }
    Ok(())
}

/// Owns the C++ object.
struct Handle {
    api: sys::DynamicAPI,
    encoder: NonNull<sys::ISVCEncoder>,
}

impl Handle {
    fn new() -> Result<Self> {
        let api = sys::DynamicAPI::from_source();
        let mut encoder = std::ptr::null_mut();
        // SAFETY: the call writes the pointer of the new object, or leaves null.
        let code = unsafe { api.WelsCreateSVCEncoder(&mut encoder) };
        match NonNull::new(encoder) {
            Some(encoder) if code == 0 => Ok(Self { api, encoder }),
            _ => Err(failed("start", code)),
        }
    }

    fn as_ptr(&self) -> *mut sys::ISVCEncoder {
        self.encoder.as_ptr()
    }

    /// A method of the object; an error where the binding has none.
    fn table<F>(&self, method: impl Fn(&sys::ISVCEncoderVtbl) -> Option<F>) -> Result<F> {
        // SAFETY: a live OpenH264 object starts with the pointer to its table of methods, which is
        // static data of the library.
        let table = unsafe { &**self.encoder.as_ptr() };
        method(table).ok_or_else(|| encode_error("this build of OpenH264 lacks a method"))
    }

    /// `value` points at what `option` takes.
    fn set_option(&self, option: sys::ENCODER_OPTION, value: *mut c_void) -> Result<()> {
        // SAFETY: the callers below pass the type that the option documents; it is only read.
        let code = unsafe { self.table(|t| t.SetOption)?(self.as_ptr(), option, value) };
        if code == 0 { Ok(()) } else { Err(failed(&format!("set option {option}"), code)) }
    }

    fn params(&self, width: c_int, height: c_int, quality: Quality) -> Result<sys::SEncParamExt> {
        let mut level: c_int = sys::WELS_LOG_QUIET as c_int;
        self.set_option(sys::ENCODER_OPTION_TRACE_LEVEL, (&raw mut level).cast())?;

        let mut params = sys::SEncParamExt::default();
        // SAFETY: the call fills the structure with defaults.
        let code = unsafe { self.table(|t| t.GetDefaultParams)?(self.as_ptr(), &mut params) };
        if code != 0 {
            return Err(failed("tell its defaults", code));
        }
        params.iUsageType = sys::CAMERA_VIDEO_REAL_TIME;
        params.iPicWidth = width;
        params.iPicHeight = height;
        params.fMaxFrameRate = FPS as f32;
        // Rate control starts with a visibly soft GOP and may leave frames out; a constant quantiser
        // does neither, and the guard holds the ceiling. The bitrate only chooses the level.
        params.iRCMode = sys::RC_OFF_MODE;
        params.iTargetBitrate = LEVEL_BITRATE;
        params.iMaxBitrate = sys::UNSPECIFIED_BIT_RATE as c_int;
        params.bEnableFrameSkip = false;
        params.iMinQp = 10;
        params.iMaxQp = c_int::from(MAX_QUANTIZER);
        // CABAC saves 12 % of the bits against CAVLC.
        params.iEntropyCodingModeFlag = 1;
        params.iComplexityMode = sys::HIGH_COMPLEXITY;
        params.uiIntraPeriod = GOP_FRAMES;
        params.iNumRefFrame = 1;
        // One set of parameter sets for the whole stream: the file's header holds it.
        params.eSpsPpsIdStrategy = sys::CONSTANT_ID;
        // One thread and one slice: the same frames always make the same bytes.
        params.iMultipleThreadIdc = 1;
        params.bEnableDenoise = false;
        // Background detection costs 1–2 dB; it takes slow movement for background.
        params.bEnableBackgroundDetection = false;
        // A scene change would start a GOP out of turn.
        params.bEnableSceneChangeDetect = false;

        let layer = &mut params.sSpatialLayers[0];
        layer.iVideoWidth = width;
        layer.iVideoHeight = height;
        layer.fFrameRate = FPS as f32;
        layer.iSpatialBitrate = LEVEL_BITRATE;
        layer.iMaxSpatialBitrate = sys::UNSPECIFIED_BIT_RATE as c_int;
        layer.uiProfileIdc = sys::PRO_HIGH;
        layer.iDLayerQp = c_int::from(quality.quantizer());
        layer.sSliceArgument.uiSliceMode = sys::SM_SINGLE_SLICE;
        // BT.709 (code 1 each), limited range, square pixels; 5 is "format unspecified" (not PAL, …).
        layer.bVideoSignalTypePresent = true;
        layer.uiVideoFormat = 5;
        layer.bFullRange = false;
        layer.bColorDescriptionPresent = true;
        layer.uiColorPrimaries = 1;
        layer.uiTransferCharacteristics = 1;
        layer.uiColorMatrix = 1;
        layer.bAspectRatioPresent = true;
        layer.eAspectRatio = 1;
        Ok(params)
    }
}

/// Bits per second from which OpenH264 derives the level of the stream.
const LEVEL_BITRATE: c_int = 8_000_000;

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the object is live and not used after; `Uninitialize` may be called in any state.
        unsafe {
            if let Ok(uninitialize) = self.table(|t| t.Uninitialize) {
                uninitialize(self.as_ptr());
            }
            self.api.WelsDestroySVCEncoder(self.as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{H264Decoder, noise, solid};
    use super::*;
    use crate::ErrorKind;

    fn picture(width: usize, height: usize, rgb: &[u8]) -> I420 {
        let mut picture = I420::new(width, height).unwrap();
        picture.convert_from_rgb(rgb).unwrap();
        picture
    }

    #[test]
    fn the_stream_is_high_profile_cabac_and_tagged() {
        let encoder = H264Encoder::new(64, 48, Quality::Standard).unwrap();
        let sets = encoder.parameter_sets();
        assert_eq!(sets.sps[0] & 31, 7);
        assert_eq!(sets.sps[1], 100, "profile_idc High");
        assert_eq!(sets.pps[0] & 31, 8);
        // The first bits of a PPS are ue(0) ue(0) and then entropy_coding_mode_flag.
        assert_eq!(sets.pps[1] >> 5, 0b111, "CABAC");
        // video_format 5, limited range, colours described: primaries, transfer and matrix BT.709. The
        // three ones have zeros enough for no emulation byte to come between them.
        let bits: String = sets.sps.iter().map(|byte| format!("{byte:08b}")).collect();
        assert!(bits.contains("10101000000010000000100000001"), "{bits}");
    }

    #[test]
    fn a_finer_quality_costs_more_and_is_closer() {
        let mut rgb = noise(128, 96, 3);
        // Grain on a gradient.
        for (i, x) in rgb.iter_mut().enumerate() {
            *x = 80 + (i / 3 % 128) as u8 + *x / 16;
        }
        let source = picture(128, 96, &rgb);
        let [high, standard, small] = [Quality::High, Quality::Standard, Quality::Small].map(|quality| {
            let mut encoder = H264Encoder::new(128, 96, quality).unwrap();
            let mut decoder = H264Decoder::new(encoder.parameter_sets());
            let sample = encoder.encode(&source).unwrap().data.to_vec();
            let decoded = decoder.decode(&sample).or_else(|| decoder.finish().pop()).unwrap();
            let errors = decoded.y.iter().zip(&source.y).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
            let mean = errors.sum::<f64>() / source.y.len() as f64;
            (sample.len(), 10.0 * (255.0 * 255.0 / mean).log10())
        });
        assert!(high.0 > standard.0 && standard.0 > small.0, "{high:?} {standard:?} {small:?}");
        assert!(high.1 > standard.1 && standard.1 > small.1, "{high:?} {standard:?} {small:?}");
        // Quantiser 20 has steps of 6.5, whose even rounding error alone makes 42.7 dB.
        assert!(standard.1 > 40.0, "{standard:?}");
    }

    #[test]
    fn colours_and_order_survive_a_decoder() {
        let levels: Vec<u8> = (0..55).map(|i| 20 + 4 * i).collect();
        let mut encoder = H264Encoder::new(64, 48, Quality::Standard).unwrap();
        let mut decoder = H264Decoder::new(encoder.parameter_sets());
        let mut pictures = vec![];
        for (i, &level) in levels.iter().enumerate() {
            let source = picture(64, 48, &solid(64, 48, [level, 255 - level, 90]));
            let frame = encoder.encode(&source).unwrap();
            assert_eq!(frame.is_sync, i % 50 == 0, "frame {i}");
            assert_eq!(frame.quantizer, 20);
            pictures.extend(decoder.decode(frame.data));
        }
        pictures.extend(decoder.finish());
        assert_eq!(pictures.len(), levels.len());
        for (decoded, &level) in pictures.iter().zip(&levels) {
            let source = picture(64, 48, &solid(64, 48, [level, 255 - level, 90]));
            for (ours, theirs) in decoded.planes().into_iter().zip(source.planes()) {
                let worst = ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b)).max();
                assert!(worst <= Some(3), "level {level}: off by {worst:?}");
            }
        }
    }

    #[test]
    fn noise_is_held_at_the_ceiling_without_extra_sync_frames_or_losses() {
        let mut encoder = H264Encoder::new(320, 240, Quality::High).unwrap();
        let mut decoder = H264Decoder::new(encoder.parameter_sets());
        let (mut sizes, mut coarsest, mut decoded) = (vec![], 0, 0);
        for i in 0..150 {
            let frame = encoder.encode(&picture(320, 240, &noise(320, 240, i))).unwrap();
            assert_eq!(frame.is_sync, i % 50 == 0, "frame {i}");
            sizes.push(frame.data.len());
            coarsest = coarsest.max(frame.quantizer);
            decoded += usize::from(decoder.decode(frame.data).is_some());
        }
        assert_eq!(decoded + decoder.finish().len(), 150);
        assert!(coarsest > 25, "{coarsest}");
        let two_seconds: usize = sizes[100..].iter().sum();
        assert!(two_seconds < 2_400_000, "{two_seconds} bytes");
    }

    #[test]
    fn sizes_that_cannot_be_are_errors() {
        for (width, height) in [(63, 48), (64, 47), (0, 0), (8, 8), (4096, 4096), (usize::MAX - 1, 2)] {
            let error = H264Encoder::new(width, height, Quality::Standard).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Encode, "{width}×{height}");
            assert_eq!(error.reason(), Some("VIDEO_DIMENSIONS"));
        }
        let mut encoder = H264Encoder::new(64, 48, Quality::Small).unwrap();
        let error = encoder.encode(&I420::new(48, 64).unwrap()).unwrap_err();
        assert!(error.to_string().contains("48×64 pixels, expected 64×48"), "{error}");
    }
}
