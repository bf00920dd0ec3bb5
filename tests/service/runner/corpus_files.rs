//! Files that are wrong on purpose, made on the spot.

use handler::job::Code;

use crate::media::{self, Samples, noise, wav};

/// What is expected of a file.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It is taken.
    Taken,
    /// It is refused with this code, and with one of these reasons.
    Refused(Code, &'static [&'static str]),
    /// Both are sound.
    Either(Code, &'static [&'static str]),
}

use Fate::{Either, Refused, Taken};

/// A name, a file and its fate.
pub type Case = (&'static str, Vec<u8>, Fate);

const NO_IMAGE: Fate = Refused(Code::InvalidImageFormat, &["INVALID_IMAGE_FORMAT"]);
const CORRUPT_IMAGE: Fate = Refused(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]);
const DIMENSIONS: Fate = Refused(Code::ImageTooLarge, &["IMAGE_DIMENSIONS"]);
const NO_AUDIO: Fate = Refused(Code::InvalidAudioFormat, &["INVALID_AUDIO_FORMAT"]);
const CORRUPT_AUDIO: Fate = Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "INVALID_AUDIO_FORMAT"]);
const EMPTY: Fate = Refused(Code::EmptyAudio, &["AUDIO_EMPTY", "AUDIO_TOO_SHORT"]);

/// A file of this repository's own media.
fn sample(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/media").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A baseline JPEG of a grey square.
fn jpeg() -> Vec<u8> {
    let rgb: Vec<u8> = (0..256 * 256 * 3).map(|i| (i % 251) as u8).collect();
    talkie::media::video::thumbnail_jpeg(&rgb, 256, 256).unwrap()
}

/// A PNG chunk.
fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let named = [name.as_slice(), data].concat();
    [&(data.len() as u32).to_be_bytes(), named.as_slice(), &media::crc32(&named).to_be_bytes()].concat()
}

/// A PNG of 8-bit RGB with these chunks between its head and its end.
fn png_with(width: u32, height: u32, chunks: &[Vec<u8>]) -> Vec<u8> {
    png_of_kind([8, 2], width, height, chunks)
}

/// The same for another depth and colour type.
fn png_of_kind(kind: [u8; 2], width: u32, height: u32, chunks: &[Vec<u8>]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend(kind);
    header.extend([0, 0, 0]);
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunks.concat(), chunk(b"IEND", b"")].concat()
}

/// An animated PNG of so many black frames.
fn apng(side: u32, frames: u32) -> Vec<u8> {
    let pixels = zlib_zeros(((side * 3 + 1) * side) as usize);
    let control = |sequence: u32| {
        let numbers = [sequence, side, side, 0, 0].map(u32::to_be_bytes).concat();
        chunk(b"fcTL", &[numbers.as_slice(), &[0, 1, 0, 10, 0, 0]].concat())
    };
    let mut chunks =
        vec![chunk(b"acTL", &[frames.to_be_bytes(), [0; 4]].concat()), control(0), chunk(b"IDAT", &pixels)];
    for frame in 1..frames {
        let data = [(2 * frame).to_be_bytes().as_slice(), &pixels].concat();
        chunks.extend([control(2 * frame - 1), chunk(b"fdAT", &data)]);
    }
    png_with(side, side, &chunks)
}

/// A zlib stream of `len` zeros and a few more, in a hundredth of the bytes: each 13 bits repeat the last byte
/// 258 times.
fn zlib_zeros(len: usize) -> Vec<u8> {
    let (mut out, mut bits, mut count) = (vec![0x78, 0x9c], 0u32, 0);
    let mut put = |value: u32, width: u32, out: &mut Vec<u8>| {
        bits |= value << count;
        count += width;
        while count >= 8 {
            out.push(bits as u8);
            bits >>= 8;
            count -= 8;
        }
    };
    put(0b011, 3, &mut out); // the last block, with the fixed codes
    put(0b0000_1100, 8, &mut out); // a literal 0; codes are written from their first bit on
    for _ in 0..len.div_ceil(258) {
        put(0b1010_0011, 8, &mut out); // a length of 258
        put(0, 5, &mut out); // from the byte before
    }
    put(0, 7 + 7, &mut out); // the end, filled up
    let zeros = (1 + len.div_ceil(258) * 258) as u32;
    out.extend(((zeros % 65_521) << 16 | 1).to_be_bytes());
    out
}

/// Rows 1–33 of the corpus.
pub fn images() -> Vec<Case> {
    let (png, jpeg) = (media::png(512, 512), jpeg());
    let plain =
        |width: u32, height: u32| chunk(b"IDAT", &zlib_zeros((width as usize * 3 + 1) * height as usize));
    let size_at = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap() + 5;
    let mut huge_jpeg = jpeg.clone();
    huge_jpeg[size_at..size_at + 4].fill(0xff);
    let mut bad_chunk = png.clone();
    bad_chunk[40] = 0xff;
    let scan = jpeg.windows(2).position(|w| w == [0xff, 0xda]).unwrap() + 14;
    let with_marker = |marker: &[u8]| [&jpeg[..2], marker, &jpeg[2..]].concat();
    let progressive = sample("halves-progressive.jpg");
    let last_scan = progressive.windows(2).rposition(|w| w == [0xff, 0xda]).unwrap();
    let body = progressive.len() - 2;
    let scans = progressive[last_scan..body].repeat(20_000);
    let mut lossless = b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f".to_vec();
    lossless.extend((16_382u32 | 16_382 << 14).to_le_bytes());
    lossless.extend([0; 12]);
    let comment = chunk(b"tEXt", b"k\0v");
    vec![
        ("1 nothing", vec![0; 0], Refused(Code::InvalidImageFormat, &["IMAGE_EMPTY"])),
        ("2 HTML", b"<html><body>404</body></html>".to_vec(), NO_IMAGE),
        ("3 PDF", b"%PDF-1.7\n%...".to_vec(), NO_IMAGE),
        ("3 ELF", b"\x7fELF\x02\x01\x01\0".repeat(100), NO_IMAGE),
        ("3 ZIP", [b"PK\x03\x04".to_vec(), vec![0; 1000]].concat(), NO_IMAGE),
        ("3 zeros", vec![0; 1_000_000], NO_IMAGE),
        ("4 GIF", [b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(), vec![0; 99]].concat(), NO_IMAGE),
        ("4 BMP", [b"BM".to_vec(), vec![0; 99]].concat(), NO_IMAGE),
        ("4 TIFF", [b"II*\0".to_vec(), vec![0; 99]].concat(), NO_IMAGE),
        ("4 ICO", [b"\0\0\x01\0\x01\0".to_vec(), vec![0; 99]].concat(), NO_IMAGE),
        ("5 HEIC", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec(), vec![0; 1000]].concat(), NO_IMAGE),
        ("5 AVIF", [b"\0\0\0\x18ftypavif\0\0\0\0mif1avif".to_vec(), vec![0; 1000]].concat(), NO_IMAGE),
        (
            "6 SVG",
            br#"<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>"#
                .to_vec(),
            NO_IMAGE,
        ),
        ("7 too many bytes", [png.clone(), vec![0; 10_000_000]].concat(), Refused(Code::ImageTooLarge, &[])),
        ("8 19000x19000", png_with(19_000, 19_000, &[plain(19_000, 1000)]), DIMENSIONS),
        ("9 100000x20000", media::png_of(100_000, 20_000, &[0; 64]), DIMENSIONS),
        ("10 2^31-1 square", media::png_of(i32::MAX as u32, i32::MAX as u32, &[0; 64]), DIMENSIONS),
        ("11 0x0", media::png_of(0, 0, &[]), CORRUPT_IMAGE),
        ("12 8193x8193", png_with(8193, 8193, &[plain(8193, 8193)]), DIMENSIONS),
        ("13 1x1", media::png(1, 1), Refused(Code::InvalidImageFormat, &["IMAGE_TOO_SMALL"])),
        (
            "14 8192x64",
            png_with(8192, 64, &[plain(8192, 64)]),
            Refused(Code::InvalidImageFormat, &["IMAGE_ASPECT"]),
        ),
        (
            "15 IDAT of 512 MB",
            png_with(512, 512, &[chunk(b"IDAT", &zlib_zeros(1 << 29))]),
            Either(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]),
        ),
        (
            "16 iCCP of 512 MB",
            png_with(
                512,
                512,
                &[chunk(b"iCCP", &[b"x\0\0".to_vec(), zlib_zeros(1 << 29)].concat()), plain(512, 512)],
            ),
            Either(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]),
        ),
        (
            "17 zTXt of 512 MB",
            png_with(
                512,
                512,
                &[chunk(b"zTXt", &[b"k\0\0".to_vec(), zlib_zeros(1 << 29)].concat()), plain(512, 512)],
            ),
            Taken,
        ),
        (
            "18 300000 comments",
            png_with(512, 512, &[comment.repeat(300_000), plain(512, 512)]),
            Either(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]),
        ),
        ("19 half a PNG", png[..png.len() / 2].to_vec(), CORRUPT_IMAGE),
        ("20 a damaged chunk", bad_chunk, CORRUPT_IMAGE),
        (
            "21 a tail of HTML",
            [png.clone(), b"<script>alert(1)</script>".to_vec(), vec![b'X'; 100_000]].concat(),
            Taken,
        ),
        ("22 an animation", apng(512, 50), Taken),
        (
            "23 16 bits of grey",
            png_of_kind([16, 0], 512, 512, &[chunk(b"IDAT", &zlib_zeros((512 * 2 + 1) * 512))]),
            Taken,
        ),
        (
            "23 a palette",
            png_of_kind(
                [8, 3],
                512,
                512,
                &[chunk(b"PLTE", &[9, 9, 9]), chunk(b"IDAT", &zlib_zeros((512 + 1) * 512))],
            ),
            Taken,
        ),
        (
            "23 nothing but transparency",
            png_of_kind([8, 6], 512, 512, &[chunk(b"IDAT", &zlib_zeros((512 * 4 + 1) * 512))]),
            Taken,
        ),
        ("24 half a JPEG", jpeg[..jpeg.len() / 2].to_vec(), CORRUPT_IMAGE),
        ("25 20 bytes of a JPEG", jpeg[..20].to_vec(), CORRUPT_IMAGE),
        ("26 a garbled scan", [jpeg[..scan].to_vec(), noise(200_000)].concat(), CORRUPT_IMAGE),
        ("27 65535x65535", huge_jpeg, DIMENSIONS),
        ("28 CMYK", sample("halves-cmyk.jpg"), Taken),
        ("28 progressive", progressive.clone(), Taken),
        (
            "29 EXIF",
            with_marker(
                b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
            ),
            Taken,
        ),
        (
            "30 50000 markers",
            with_marker(&b"\xff\xe1\x00\x08junkXX".repeat(50_000)),
            Either(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]),
        ),
        (
            "31 20000 scans",
            [&progressive[..body], &scans, &progressive[body..]].concat(),
            Either(Code::InvalidImageFormat, &["IMAGE_CORRUPT"]),
        ),
        ("32 WebP of 16383 square", lossless.clone(), DIMENSIONS),
        ("32 half a WebP", lossless[..24].to_vec(), CORRUPT_IMAGE),
        ("33 black", png_with(512, 512, &[plain(512, 512)]), Taken),
    ]
}

/// A WAV whose head says what its fields say.
struct Wav {
    format: u16,
    channels: u16,
    rate_hz: u32,
    bits: u16,
    /// What the head says of the samples' bytes and of the file's.
    lens: Option<(u32, u32)>,
    /// Chunks before the samples.
    extra: Vec<u8>,
    samples: Vec<u8>,
}

impl Wav {
    fn new(samples: Vec<u8>) -> Self {
        Self { format: 1, channels: 1, rate_hz: 16_000, bits: 16, lens: None, extra: Vec::new(), samples }
    }

    fn file(self) -> Vec<u8> {
        let frame = u32::from(self.channels) * u32::from(self.bits) / 8;
        let fmt = [
            &self.format.to_le_bytes()[..],
            &self.channels.to_le_bytes(),
            &self.rate_hz.to_le_bytes(),
            &self.rate_hz.wrapping_mul(frame).to_le_bytes(),
            &(frame as u16).to_le_bytes(),
            &self.bits.to_le_bytes(),
        ]
        .concat();
        let (data_len, file_len) = self
            .lens
            .unwrap_or((self.samples.len() as u32, (36 + self.extra.len() + self.samples.len()) as u32));
        [
            b"RIFF",
            &file_len.to_le_bytes()[..],
            b"WAVEfmt \x10\0\0\0",
            &fmt,
            &self.extra,
            b"data",
            &data_len.to_le_bytes(),
            &self.samples,
        ]
        .concat()
    }
}

/// Silent frames of 32 kbit/s: a header, 17 zero bytes that say "nothing follows", and as many as a frame has.
fn silent_mp3(seconds: usize) -> Vec<u8> {
    let frame = [&[0xff, 0xfb, 0x10, 0xc0][..], &[0; 100]].concat();
    frame.repeat(seconds * 44_100 / 1152)
}

/// The same at 8 kbit/s, where ten hours fit into the bytes that are allowed.
fn long_silent_mp3() -> Vec<u8> {
    let frame = [&[0xff, 0xf3, 0x10, 0xc0][..], &[0; 22]].concat();
    frame.repeat(36_000 * 22_050 / 576)
}

/// Rows 34–53 of the corpus.
pub fn audios() -> Vec<Case> {
    let tone: Vec<u8> = media::tone(16_000, 1, 0.5)[44..].to_vec();
    let wav_of = |change: &dyn Fn(&mut Wav)| {
        let mut wav = Wav::new(tone.clone());
        change(&mut wav);
        wav.file()
    };
    let floats = |value: f32| wav(16_000, 1, Samples::Float32, &value.to_le_bytes().repeat(16_000));
    let (mp3, flac) = (sample("sweep-44100.mp3"), sample("sweep-8000.flac"));
    let (m4a, ogg) = (sample("sweep-44100-aac.m4a"), sample("sweep-44100-vorbis.ogg"));
    let at = |bytes: &[u8], name: &[u8; 4]| bytes.windows(4).position(|w| w == name).unwrap();
    let mut lying_flac = flac.clone();
    lying_flac[18..26].fill(0xff);
    let mut many_samples = m4a.clone();
    let stsz = at(&m4a, b"stsz");
    many_samples[stsz + 12..stsz + 16].fill(0xff);
    let mut bad_page = ogg.clone();
    bad_page[200..700].fill(0xff);
    let tag = |len: u32| {
        let seven = |shift: u32| (len >> shift & 127) as u8;
        [b"ID3\x04\0\0".as_slice(), &[seven(21), seven(14), seven(7), seven(0)]].concat()
    };
    let list = [b"LIST".as_slice(), &4u32.to_le_bytes(), b"INFO"].concat();
    vec![
        ("34 nothing", vec![], Refused(Code::EmptyAudio, &["AUDIO_EMPTY"])),
        ("34 a head alone", wav_of(&|_| {})[..44].to_vec(), EMPTY),
        ("34 no samples", wav_of(&|wav| wav.samples.clear()), EMPTY),
        ("35 text", b"hello world ".repeat(1000), NO_AUDIO),
        ("35 HTML", [b"<html>".to_vec(), vec![b'x'; 5000]].concat(), NO_AUDIO),
        ("35 noise", noise(300_000), NO_AUDIO),
        ("35 zeros", vec![0; 2_000_000], NO_AUDIO),
        (
            "36 too many bytes",
            wav_of(&|wav| wav.samples = vec![1; 50_000_001]),
            Refused(Code::AudioTooLarge, &[]),
        ),
        (
            "37 11 minutes",
            wav_of(&|wav| (wav.rate_hz, wav.samples) = (8000, vec![0; 8000 * 2 * 660])),
            Refused(Code::AudioTooLong, &["AUDIO_TOO_LONG"]),
        ),
        ("38 11 minutes of MP3", silent_mp3(11 * 60), Refused(Code::AudioTooLong, &["AUDIO_TOO_LONG"])),
        ("38 10 hours of MP3", long_silent_mp3(), Refused(Code::AudioTooLong, &["AUDIO_TOO_LONG"])),
        ("39 1 sample", wav_of(&|wav| wav.samples.truncate(2)), EMPTY),
        ("39 half a second", wav_of(&|_| {}), Taken),
        ("40 lengths of a pipe", wav_of(&|wav| wav.lens = Some((u32::MAX, u32::MAX))), Taken),
        ("41 length 100", wav_of(&|wav| wav.lens = Some((100, 136))), EMPTY),
        ("42 20 bytes of a head", wav_of(&|_| {})[..20].to_vec(), CORRUPT_AUDIO),
        (
            "43 0 channels",
            wav_of(&|wav| wav.channels = 0),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_CHANNELS", "INVALID_AUDIO_FORMAT"]),
        ),
        (
            "44 65535 channels",
            wav_of(&|wav| wav.channels = u16::MAX),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_CHANNELS"]),
        ),
        (
            "45 0 Hz",
            wav_of(&|wav| wav.rate_hz = 0),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_SAMPLE_RATE"]),
        ),
        (
            "45 1 Hz",
            wav_of(&|wav| wav.rate_hz = 1),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_SAMPLE_RATE"]),
        ),
        (
            "45 2^32-1 Hz",
            wav_of(&|wav| wav.rate_hz = u32::MAX),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_SAMPLE_RATE"]),
        ),
        (
            "46 0 bits",
            wav_of(&|wav| wav.bits = 0),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "UNSUPPORTED_AUDIO_CODEC"]),
        ),
        (
            "46 an unknown codec",
            wav_of(&|wav| wav.format = 0x77),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "UNSUPPORTED_AUDIO_CODEC"]),
        ),
        (
            "46 a bad ADPCM",
            wav_of(&|wav| (wav.format, wav.bits) = (2, 4)),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "UNSUPPORTED_AUDIO_CODEC"]),
        ),
        ("47 NaN", floats(f32::NAN), Refused(Code::InvalidAudioFormat, &["AUDIO_NON_FINITE"])),
        ("47 infinity", floats(f32::INFINITY), Refused(Code::InvalidAudioFormat, &["AUDIO_NON_FINITE"])),
        (
            "48 200000 chunks",
            wav_of(&|wav| wav.extra = list.repeat(200_000)),
            Either(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "INVALID_AUDIO_FORMAT"]),
        ),
        (
            "48 a chunk of 4 GB",
            wav_of(&|wav| wav.extra = b"LIST\xf0\xff\xff\xff".to_vec()),
            Either(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "INVALID_AUDIO_FORMAT"]),
        ),
        ("49 silence", wav_of(&|wav| wav.samples.fill(0)), Taken),
        ("50 half an MP3", mp3[..mp3.len() / 2].to_vec(), Taken),
        ("50 a tag that lies", [tag(0x0fff_ffff), mp3.clone()].concat(), Taken),
        ("50 a tag of 20 MB", [tag(20 << 20), vec![0; 20 << 20], mp3.clone()].concat(), Taken),
        (
            "51 half a FLAC",
            flac[..flac.len() / 2].to_vec(),
            Either(Code::InvalidAudioFormat, &["AUDIO_CORRUPT"]),
        ),
        (
            "51 a FLAC that lies",
            lying_flac,
            Either(
                Code::InvalidAudioFormat,
                &["AUDIO_CORRUPT", "AUDIO_CHANNELS", "AUDIO_SAMPLE_RATE", "INVALID_AUDIO_FORMAT"],
            ),
        ),
        (
            "52 half an Ogg",
            ogg[..ogg.len() / 2].to_vec(),
            Either(Code::InvalidAudioFormat, &["AUDIO_CORRUPT"]),
        ),
        ("52 a bad page", bad_page, Either(Code::InvalidAudioFormat, &["AUDIO_CORRUPT"])),
        ("52 Opus", sample("sweep-48000-opus.ogg"), Taken),
        (
            "53 an M4A without its index",
            m4a[..at(&m4a, b"moov") - 4].to_vec(),
            Refused(Code::InvalidAudioFormat, &["AUDIO_CORRUPT", "AUDIO_NO_TRACK", "INVALID_AUDIO_FORMAT"]),
        ),
        ("53 4 G samples", many_samples, CORRUPT_AUDIO),
        (
            "53 pictures alone",
            sample("video-only.mp4"),
            Refused(Code::InvalidAudioFormat, &["AUDIO_NO_TRACK"]),
        ),
    ]
}
