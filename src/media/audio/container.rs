//! What the bytes are, and the facts of their container that the demuxer does not check or does not tell.

use crate::{Error, ErrorKind, Result};

/// Containers that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Container {
    Wav,
    Aiff,
    Flac,
    Ogg,
    /// Matroska and WebM; `open_ended` when its length was not known to its writer (a live recording).
    Matroska {
        open_ended: bool,
    },
    Mp4,
    /// MPEG audio frames, or AAC in ADTS frames.
    Frames,
}

/// What was found out before decoding.
pub(super) struct Probe {
    pub container: Container,
    /// Where the container starts: after ID3 tags, of any size.
    pub start: usize,
    /// Bytes to be read differently, by position after `start`.
    pub patches: Vec<(u64, [u8; 4])>,
    /// The part of the track that is to be heard, by its edit list.
    pub edit: Option<Edit>,
    /// Whether an MP3 has fewer bytes than its own header counts. Each of its frames stands for itself, so what is
    /// there is whole.
    pub cut_off: bool,
}

/// The one edit of an MP4 audio track, in seconds of the track.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Edit {
    pub start_s: f64,
    /// Absent where the edit lasts to the end.
    pub end_s: Option<f64>,
}

/// A length that stands for "unknown" in the header of a WAV that was written to a pipe. Writers use
/// 0xFFFFFFFF, 0x7FFFFFFF and numbers just below them.
const STREAMING: u32 = 0x7FFF_0000;

/// Finds out what `bytes` are.
///
/// # Errors
/// Of kind `InvalidAudio`, when they are nothing that is read, or evidently cut off.
pub(super) fn probe(bytes: &[u8]) -> Result<Probe> {
    let start = id3_len(bytes);
    let body = bytes.get(start..).unwrap_or_default();
    let container = sniff(body)?;
    let mut probe = Probe { container, start, patches: Vec::new(), edit: None, cut_off: false };
    match container {
        Container::Wav => probe.patches = check_wav(body)?,
        Container::Mp4 => probe.edit = mp4_edit(body),
        Container::Frames => probe.cut_off = mp3_len(body).is_some_and(|len| len > body.len() as u64),
        _ => {}
    }
    Ok(probe)
}

/// Bytes of the ID3v2 tags at the start; a picture in a tag may be larger than demuxers accept.
fn id3_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&[b'I', b'D', b'3', _, _, flags, a, b, c, d]) =
        bytes.get(at..).and_then(|b| b.first_chunk())
    {
        // Seven bits per byte.
        let len = [a, b, c, d].iter().fold(0usize, |len, &v| len << 7 | usize::from(v & 0x7F));
        let footer = if flags & 0x10 != 0 { 10 } else { 0 };
        let next = at + 10 + len + footer;
        // A tag that claims the whole file lies: what it hides may follow its header.
        at = if next < bytes.len() { next } else { at + 10 };
    }
    at
}

fn sniff(bytes: &[u8]) -> Result<Container> {
    Ok(match bytes {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => Container::Wav,
        [b'F', b'O', b'R', b'M', _, _, _, _, b'A', b'I', b'F', b'F' | b'C', ..] => Container::Aiff,
        [b'f', b'L', b'a', b'C', ..] => Container::Flac,
        [b'O', b'g', b'g', b'S', ..] => Container::Ogg,
        [0x1A, 0x45, 0xDF, 0xA3, ..] => check_matroska(bytes)?,
        [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] if !is_picture(brand) => Container::Mp4,
        _ if frame_sync(bytes) => Container::Frames,
        _ => return Err(unknown(bytes)),
    })
}

/// An MPEG audio or ADTS header within the first bytes. Some files have zeros or the rest of a cut frame
/// before it; the demuxer looks for two frames in a row.
fn frame_sync(bytes: &[u8]) -> bool {
    const SEARCH: usize = 4096;
    let header = |h: &[u8]| {
        let adts = h[1] & 0xF6 == 0xF0 && (h[2] >> 2) & 0xF < 13;
        let mpeg = h[1] & 0xE0 == 0xE0 && h[1] & 0x18 != 0x08 && h[1] & 0x06 != 0;
        h[0] == 0xFF && (adts || (mpeg && h[2] & 0xF0 != 0xF0 && h[2] & 0x0C != 0x0C))
    };
    let zeros = bytes.iter().take(SEARCH).take_while(|&&b| b == 0).count();
    bytes[zeros..].windows(4).next().is_some_and(header)
}

/// The bytes of an MP3 by the Xing or Info tag in its first frame.
fn mp3_len(bytes: &[u8]) -> Option<u64> {
    /// The tag follows the header and at most 32 bytes of side information.
    const SEARCH: usize = 64;
    let frame = &bytes[bytes.iter().take_while(|&&b| b == 0).count()..];
    let tag = frame.windows(4).take(SEARCH).position(|w| matches!(w, b"Xing" | b"Info"))?;
    let flags = u32_be(frame, tag + 4)?;
    // The number of frames comes first, where it is told.
    let at = tag + 8 + if flags & 1 != 0 { 4 } else { 0 };
    (flags & 2 != 0).then(|| u32_be(frame, at)).flatten().map(u64::from)
}

/// Whether the brand of an ISO file is that of a picture (HEIF, AVIF).
fn is_picture(brand: &[u8]) -> bool {
    matches!(brand.first_chunk(), Some(b"heic" | b"heix" | b"mif1" | b"msf1" | b"avif" | b"avis"))
}

fn unknown(bytes: &[u8]) -> Error {
    let (what, format) = match bytes {
        [b'R', b'F', b'6', b'4', ..] | [b'r', b'i', b'f', b'f', ..] => ("RF64 or W64", "rf64"),
        [b'c', b'a', b'f', b'f', ..] => ("CAF", "caf"),
        [0x30, 0x26, 0xB2, 0x75, ..] => ("WMA", "wma"),
        [b'#', b'!', b'A', b'M', b'R', ..] => ("AMR", "amr"),
        [0x89, b'P', b'N', b'G', ..] | [0xFF, 0xD8, 0xFF, ..] => ("a picture", "image"),
        _ if bytes.trim_ascii_start().starts_with(b"<") => ("HTML or XML", "xml"),
        _ => ("of no known form", "unknown"),
    };
    let message = format!("the audio is {what}, expected WAV, MP3, FLAC, Ogg, M4A, WebM or AIFF");
    let error = invalid("INVALID_AUDIO_FORMAT", message).with_received_format(format);
    error.with_hint("convert the audio to WAV or MP3")
}

fn u32_le(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_be(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Walks the chunks up to the samples: refuses lengths beyond the end, and says how to read the lengths that
/// a pipe left at 0.
fn check_wav(bytes: &[u8]) -> Result<Vec<(u64, [u8; 4])>> {
    let truncated = |what: &str| invalid("AUDIO_CORRUPT", format!("the WAV is cut off: {what}"));
    let riff_len = u32_le(bytes, 4).ok_or_else(|| truncated("its header is not complete"))?;
    // The demuxer knows one value for "unknown".
    let mut patches = Vec::new();
    if riff_len == 0 || riff_len >= STREAMING {
        patches.push((4, [0xFF; 4]));
    }
    let mut at = 12;
    loop {
        let id = bytes.get(at..at + 4).ok_or_else(|| truncated("it has no samples"))?;
        let len = u32_le(bytes, at + 4).ok_or_else(|| truncated("it has no samples"))?;
        let body = at + 8;
        let left = bytes.len() - body;
        match id {
            b"data" if len >= STREAMING || (len == 0 && riff_len == 0) => {
                patches.push((at as u64 + 4, [0xFF; 4]));
                return Ok(patches);
            }
            b"data" if len > 0 && left == 0 => {
                let message = "the WAV is a header without samples";
                return Err(Error::new(ErrorKind::EmptyAudio, message).with_reason("AUDIO_EMPTY"));
            }
            b"data" if len as usize > left => {
                return Err(truncated(&format!("it has {left} of {len} bytes of samples")));
            }
            b"data" => return Ok(patches),
            _ => {}
        }
        if id == b"fmt " {
            let channels =
                bytes.get(body + 2..).and_then(|b| b.first_chunk()).map(|&b| u16::from_le_bytes(b));
            // The demuxer computes with them before anyone can look at them.
            if channels.is_some_and(|n| n == 0) {
                return Err(invalid("AUDIO_CORRUPT", "the WAV has 0 channels"));
            }
            if channels.is_some_and(|n| n > 255) {
                return Err(invalid(
                    "AUDIO_CHANNELS",
                    format!("the WAV has {} channels", channels.unwrap_or(0)),
                ));
            }
        }
        let padded = (len as usize).saturating_add(len as usize % 2);
        if padded > left {
            return Err(truncated("a chunk of its header is longer than the file"));
        }
        at = body + padded;
    }
}

/// Reads the lengths of the header and of the segment: a file shorter than its segment says is cut off.
fn check_matroska(bytes: &[u8]) -> Result<Container> {
    const SEGMENT: [u8; 4] = [0x18, 0x53, 0x80, 0x67];
    let damaged =
        || invalid("AUDIO_CORRUPT", "the WebM or Matroska file is damaged: its header is not complete");
    let (header_len, at) = ebml_size(bytes, 4).ok_or_else(damaged)?;
    let segment =
        header_len.and_then(|len| at.checked_add(usize::try_from(len).ok()?)).ok_or_else(damaged)?;
    if bytes.get(segment..).and_then(|b| b.first_chunk()) != Some(&SEGMENT) {
        // Void or unusual elements before the segment: the demuxer decides.
        return Ok(Container::Matroska { open_ended: true });
    }
    let (len, body) = ebml_size(bytes, segment + 4).ok_or_else(damaged)?;
    match len {
        Some(len) if len > (bytes.len() - body) as u64 => Err(invalid(
            "AUDIO_CORRUPT",
            format!("the WebM or Matroska file is cut off: it has {} of {len} bytes", bytes.len() - body),
        )),
        len => Ok(Container::Matroska { open_ended: len.is_none() }),
    }
}

/// The size field at `at`, `None` for "unknown", and the position after it.
fn ebml_size(bytes: &[u8], at: usize) -> Option<(Option<u64>, usize)> {
    let first = *bytes.get(at)?;
    let len = first.leading_zeros() as usize + 1;
    if len > 8 {
        return None;
    }
    let field = bytes.get(at..at + len)?;
    let all_ones = (1u64 << (7 * len)) - 1;
    let value = field.iter().fold(0u64, |value, &b| value << 8 | u64::from(b)) & all_ones;
    Some(((value != all_ones).then_some(value), at + len))
}

/// The edit list of the first audio track.
///
/// Encoders put 1024 to 3840 samples of run-up before the sound, and say so only here; the demuxer does not
/// tell. Empty edits (a later start) are skipped: there is nothing but this very track to be in time with.
/// Of several edits only the start of the first one is kept.
fn mp4_edit(bytes: &[u8]) -> Option<Edit> {
    let moov = boxes(bytes).find(|b| b.0 == *b"moov")?.1;
    let movie_scale = timescale(child(moov, b"mvhd")?)?;
    let is_audio = |trak: &[u8]| {
        let handler = child(trak, b"mdia").and_then(|mdia| child(mdia, b"hdlr"));
        handler.and_then(|h| h.get(8..12)) == Some(b"soun")
    };
    let trak = boxes(moov).filter(|b| b.0 == *b"trak").map(|b| b.1).find(|trak| is_audio(trak))?;
    let mdhd = child(child(trak, b"mdia")?, b"mdhd")?;
    let media_scale = timescale(mdhd)?;
    let elst = child(child(trak, b"edts")?, b"elst")?;

    let version = *elst.first()?;
    let count = u32_be(elst, 4)? as usize;
    let mut edits =
        elst.get(8..)?.chunks_exact(if version == 1 { 20 } else { 12 }).take(count).filter_map(|entry| {
            let (duration, media_time) = if version == 1 {
                (
                    u64::from_be_bytes(*entry.first_chunk()?),
                    i64::from_be_bytes(*entry.get(8..)?.first_chunk()?),
                )
            } else {
                (u64::from(u32_be(entry, 0)?), i64::from(u32_be(entry, 4)? as i32))
            };
            (media_time >= 0).then_some((duration, media_time))
        });
    let (duration, media_time) = edits.next()?;
    let start_s = media_time as f64 / media_scale;
    let whole = duration == 0 || edits.next().is_some();
    let mut end_s = (!whole).then_some(start_s + duration as f64 / movie_scale);
    // The movie's clock is coarse (often milliseconds). An end within one tick of the track's is the track's.
    if let (Some(end), Some(track)) = (end_s, media_duration(mdhd))
        && (end - track / media_scale).abs() <= 1.0 / movie_scale
    {
        end_s = Some(track / media_scale);
    }
    Some(Edit { start_s, end_s })
}

/// The boxes of an ISO file, one after the other: type and content.
fn boxes(bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let kind = *rest.get(4..)?.first_chunk::<4>()?;
        let (header, len) = match u32_be(rest, 0)? {
            0 => (8, rest.len()),
            1 => (16, usize::try_from(u64::from_be_bytes(*rest.get(8..)?.first_chunk()?)).ok()?),
            len => (8, len as usize),
        };
        let content = rest.get(header..len.min(rest.len()))?;
        rest = rest.get(len..).unwrap_or_default();
        Some((kind, content))
    })
}

fn child<'a>(bytes: &'a [u8], kind: &[u8; 4]) -> Option<&'a [u8]> {
    boxes(bytes).find(|b| b.0 == *kind).map(|b| b.1)
}

/// Ticks per second of an `mvhd` or `mdhd` box.
fn timescale(bytes: &[u8]) -> Option<f64> {
    let ticks = u32_be(bytes, if *bytes.first()? == 1 { 20 } else { 12 })?;
    (ticks > 0).then_some(f64::from(ticks))
}

/// The duration in an `mdhd` box, in its ticks; 0 (unknown) is none.
fn media_duration(bytes: &[u8]) -> Option<f64> {
    let ticks = match *bytes.first()? {
        1 => u64::from_be_bytes(*bytes.get(24..)?.first_chunk()?),
        _ => u64::from(u32_be(bytes, 16)?),
    };
    (ticks > 0).then_some(ticks as f64)
}

pub(super) fn invalid(reason: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidAudio, message).with_reason(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(bytes: &[u8]) -> Option<&'static str> {
        probe(bytes).err().and_then(|e| e.reason())
    }

    #[test]
    fn tells_what_it_is_not() {
        for (bytes, word) in [
            (&b"<html><body>404"[..], "HTML"),
            (b"caff\0\0", "CAF"),
            (b"\x89PNG\r\n", "picture"),
            (b"hello world hello world", "no known form"),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "no known form"),
            (&[0; 5000], "no known form"),
        ] {
            let error = probe(bytes).err().unwrap();
            assert_eq!(error.reason(), Some("INVALID_AUDIO_FORMAT"));
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn skips_tags_of_any_size() {
        let tag = |len: usize| {
            let size = [len >> 21, len >> 14, len >> 7, len].map(|v| (v & 0x7F) as u8);
            [b"ID3\x03\0\0", &size[..], &vec![0; len]].concat()
        };
        let file = [tag(3_000_000), tag(5), b"fLaC".to_vec()].concat();
        let found = probe(&file).unwrap();
        assert_eq!((found.container, found.start), (Container::Flac, file.len() - 4));
        // A tag that claims more than there is hides nothing.
        let liar = [b"ID3\x04\0\0\x7f\x7f\x7f\x7f", &tag(5)[..], &[0xFF, 0xFB, 0x90, 0x00]].concat();
        assert_eq!(probe(&liar).unwrap().container, Container::Frames);
    }

    #[test]
    fn matroska_that_ends_early_is_cut_off_unless_open_ended() {
        let head = |size: &[u8]| [&[0x1A, 0x45, 0xDF, 0xA3, 0x80, 0x18, 0x53, 0x80, 0x67][..], size].concat();
        assert_eq!(reason(&head(&[0x90, 1, 2])), Some("AUDIO_CORRUPT"));
        assert_eq!(probe(&head(&[0x82, 1, 2])).unwrap().container, Container::Matroska { open_ended: false });
        assert_eq!(
            probe(&head(&[0x01, 255, 255, 255, 255, 255, 255, 255])).unwrap().container,
            Container::Matroska { open_ended: true }
        );
        assert_eq!(reason(&[0x1A, 0x45, 0xDF, 0xA3]), Some("AUDIO_CORRUPT"));
    }

    fn make_box(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32 + 8).to_be_bytes()[..], kind, content].concat()
    }

    fn mp4(edits: &[(u32, i32)], media_duration: u32) -> Vec<u8> {
        let clock = |scale: u32, duration: u32| {
            [[0; 12].as_slice(), &scale.to_be_bytes(), &duration.to_be_bytes()].concat()
        };
        let entries: Vec<u8> = edits
            .iter()
            .flat_map(|(d, t)| [d.to_be_bytes(), t.to_be_bytes(), [0, 1, 0, 0]].concat())
            .collect();
        let elst = make_box(b"elst", &[&[0; 4][..], &(edits.len() as u32).to_be_bytes(), &entries].concat());
        let mdia =
            [make_box(b"mdhd", &clock(48000, media_duration)), make_box(b"hdlr", b"\0\0\0\0\0\0\0\0soun")]
                .concat();
        let video = make_box(b"trak", &make_box(b"mdia", &make_box(b"hdlr", b"\0\0\0\0\0\0\0\0vide")));
        let trak = make_box(b"trak", &[make_box(b"edts", &elst), make_box(b"mdia", &mdia)].concat());
        let moov = make_box(b"moov", &[make_box(b"mvhd", &clock(1000, 0)), video, trak].concat());
        [make_box(b"ftyp", b"M4A \0\0\0\0"), moov].concat()
    }

    #[test]
    fn reads_the_edit_of_the_audio_track() {
        let edit = |edits: &[(u32, i32)], duration| probe(&mp4(edits, duration)).unwrap().edit;
        assert_eq!(
            edit(&[(500, 1024)], 48000),
            Some(Edit { start_s: 1024.0 / 48000.0, end_s: Some(1024.0 / 48000.0 + 0.5) })
        );
        // 0.5 s after sample 1024 is within a millisecond of the end of the track, which is exact.
        assert_eq!(edit(&[(500, 1024)], 25_000).unwrap().end_s, Some(25_000.0 / 48000.0));
        assert_eq!(edit(&[(100, -1), (0, 2112)], 48000), Some(Edit { start_s: 0.044, end_s: None }));
        assert_eq!(edit(&[(100, 48), (100, 9600)], 48000), Some(Edit { start_s: 0.001, end_s: None }));
        assert_eq!(edit(&[], 48000), None);
    }

    #[test]
    fn boxes_that_lie_about_their_length_end_the_walk() {
        let too_short = [make_box(b"free", &[]), b"\0\0\0\x04xxxx".to_vec()].concat();
        assert_eq!(boxes(&too_short).count(), 1);
        let too_long = b"\0\0\0\x01mdat\xff\xff\xff\xff\xff\xff\xff\xffab";
        assert_eq!(boxes(too_long).map(|b| b.1.len()).collect::<Vec<_>>(), [2]);
    }
}
