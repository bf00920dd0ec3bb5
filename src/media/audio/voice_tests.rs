use super::*;
use crate::media::audio::decode::Decoder;

/// The bytes of a file in tests/media, made by scripts/make-media-fixtures.sh.
macro_rules! fixture {
    ($name:literal) => {
        &include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/media/", $name))[..]
    };
}

/// What the fixtures hold: half a second, a sweep from 0.1 s on.
fn sweep(rate: u32) -> Vec<f32> {
    let value = |i: u32| {
        let t = f64::from(i) / f64::from(rate);
        let sweep = 0.5 * (std::f64::consts::TAU * (150.0 + 2000.0 * t) * t).sin();
        if t < 0.1 { 0.0 } else { sweep as f32 }
    };
    (0..rate / 2).map(value).collect()
}

/// A WAV file; `data_len` is what its header says.
pub(in crate::media::audio) fn wav(
    tag: u16,
    rate: u32,
    channels: u16,
    bits: u16,
    data: &[u8],
    data_len: u32,
) -> Vec<u8> {
    let frame = channels * bits / 8;
    [
        &b"RIFF"[..],
        &data_len.saturating_add(36).to_le_bytes(),
        b"WAVEfmt \x10\0\0\0",
        &tag.to_le_bytes(),
        &channels.to_le_bytes(),
        &rate.to_le_bytes(),
        &rate.wrapping_mul(u32::from(frame)).to_le_bytes(),
        &frame.to_le_bytes(),
        &bits.to_le_bytes(),
        b"data",
        &data_len.to_le_bytes(),
        data,
    ]
    .concat()
}

/// A WAV file of 16 bits that repeats `signal` on every channel.
pub(in crate::media::audio) fn wav16(rate: u32, channels: u16, signal: &[f32]) -> Vec<u8> {
    let sample = |x: &f32| ((x * 32767.0).round() as i16).to_le_bytes().repeat(usize::from(channels));
    let data: Vec<u8> = signal.iter().flat_map(sample).collect();
    wav(1, rate, channels, 16, &data, data.len() as u32)
}

fn wav_float(rate: u32, samples: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = samples.iter().flat_map(|x| x.to_le_bytes()).collect();
    wav(3, rate, 1, 32, &data, data.len() as u32)
}

fn open(bytes: &[u8]) -> Result<Voice> {
    Voice::open(bytes.into(), &Limits::default())
}

fn refused(bytes: &[u8]) -> (ErrorKind, &'static str) {
    let error = open(bytes).expect_err("this audio must be refused");
    (error.kind(), error.reason().unwrap_or_default())
}

const CORRUPT: (ErrorKind, &str) = (ErrorKind::InvalidAudio, "AUDIO_CORRUPT");

/// Mean of the channels at the file's own rate.
fn decoded(bytes: &[u8]) -> (Vec<f32>, u32) {
    let mut decoder = Decoder::open(bytes.into()).unwrap();
    let (mut all, mut block) = (Vec::new(), Vec::new());
    while decoder.next_block(&mut block).unwrap() {
        let channels = decoder.format().unwrap().channels;
        all.extend(block.chunks(channels).map(|x| x.iter().sum::<f32>() / channels as f32));
    }
    (all, decoder.format().unwrap().sample_rate_hz)
}

/// By how many samples `signal` comes later than `expected`.
fn lag(signal: &[f32], expected: &[f32]) -> i64 {
    const REACH: i64 = 4000;
    let correlation = |lag: &i64| -> f64 {
        let at = |i: usize| {
            usize::try_from(i as i64 + lag).ok().and_then(|i| signal.get(i)).copied().unwrap_or(0.0)
        };
        expected.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(at(i))).sum()
    };
    (-REACH..=REACH).max_by(|a, b| correlation(a).total_cmp(&correlation(b))).unwrap()
}

#[test]
fn every_container_is_heard_from_its_first_sample() {
    // File, codec, and samples by which it may be longer (what some containers do not tell).
    for (name, bytes, codec, longer) in [
        ("AIFF", fixture!("sweep-8000.aiff"), "pcm_s16be", 0),
        ("WAV, ADPCM", fixture!("sweep-8000-adpcm.wav"), "adpcm_ima_wav", 500),
        ("FLAC", fixture!("sweep-8000.flac"), "flac", 0),
        ("ALAC", fixture!("sweep-8000-alac.m4a"), "alac", 0),
        ("MP3", fixture!("sweep-44100.mp3"), "mp3", 0),
        ("M4A", fixture!("sweep-44100-aac.m4a"), "aac", 0),
        ("M4A in fragments", fixture!("sweep-44100-fragmented.m4a"), "aac", 1024),
        ("Ogg Vorbis", fixture!("sweep-44100-vorbis.ogg"), "vorbis", 0),
        ("Ogg Opus", fixture!("sweep-48000-opus.ogg"), "opus", 0),
        ("WebM", fixture!("sweep-48000-opus.webm"), "opus", 960),
        ("WebM, recorded live", fixture!("sweep-48000-opus-live.webm"), "opus", 960),
        ("Opus in MP4", fixture!("sweep-48000-opus.mp4"), "opus", 0),
    ] {
        let (signal, rate) = decoded(bytes);
        let expected = sweep(rate);
        assert_eq!(lag(&signal, &expected), 0, "{name}");
        let extra = signal.len() as i64 - expected.len() as i64;
        assert!((0..=longer).contains(&extra), "{name} is {extra} samples longer");
        let worst = signal.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        // ADPCM takes a few samples until it has adapted to the loud start of the sweep.
        let tolerance = if codec.starts_with("adpcm") { 0.5 } else { 0.15 };
        assert!(worst < tolerance, "{name} differs by {worst}");

        let voice = open(bytes).unwrap();
        assert_eq!((voice.facts().codec, voice.facts().channels), (codec, 1), "{name}");
        assert_eq!(voice.facts().samples as usize, signal.len(), "{name}");
        assert_eq!(lag(voice.signal(), &sweep(VOICE_RATE_HZ)), 0, "{name}");
    }
}

#[test]
fn chained_streams_follow_one_another() {
    let first = fixture!("sweep-48000-opus.ogg");
    // The second stream has a serial number of its own.
    let second = with_serial(first, 77);
    let voice = open(&[first, &second].concat()).unwrap();
    assert_eq!(voice.facts().samples, 48_000);
    let expected = sweep(VOICE_RATE_HZ).repeat(2);
    assert_eq!(lag(voice.signal(), &expected), 0);
    assert_eq!(lag(&voice.signal()[8000..], &expected[8000..]), 0);
}

/// An Ogg file under another serial number, with the checksums that go with it.
fn with_serial(ogg: &[u8], serial: u32) -> Vec<u8> {
    let mut out = ogg.to_vec();
    let mut at = 0;
    while let Some(&segments) = out.get(at + 26) {
        let header = at + 27 + usize::from(segments);
        let end = header + out[at + 27..header].iter().map(|&len| usize::from(len)).sum::<usize>();
        out[at + 14..at + 18].copy_from_slice(&serial.to_le_bytes());
        out[at + 22..at + 26].fill(0);
        let crc = out[at..end].iter().fold(0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte) << 24, |crc, _| {
                (crc << 1) ^ (0x04C1_1DB7 & 0u32.wrapping_sub(crc >> 31))
            })
        });
        out[at + 22..at + 26].copy_from_slice(&crc.to_le_bytes());
        at = end;
    }
    out
}

#[test]
fn a_click_stays_at_its_time_at_every_rate() {
    for rate in [8000, 11_025, 22_050, 44_100, 48_000, 192_000] {
        let mut signal = vec![0.0; rate as usize];
        signal[rate as usize / 2] = 0.9;
        let voice = open(&wav16(rate, 1, &signal)).unwrap();
        let loudest =
            voice.signal().iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap();
        // The middle of an odd number of samples lies half a sample earlier.
        let expected = (f64::from(rate / 2) / f64::from(rate) * 16_000.0).round() as usize;
        assert_eq!((voice.signal().len(), loudest.0), (16_000, expected), "{rate} Hz");
    }
}

#[test]
fn channels_are_averaged() {
    let data: Vec<u8> =
        (0..4000).flat_map(|_| [8192i16, 0, 0, 0, 0, 0, 0, 0]).flat_map(i16::to_le_bytes).collect();
    let voice = open(&wav(1, 16_000, 8, 16, &data, data.len() as u32)).unwrap();
    assert_eq!(voice.facts().channels, 8);
    assert!(voice.signal().iter().all(|x| (x - 0.03125).abs() < 1e-6));
}

#[test]
fn a_tenth_of_a_second_is_accepted_with_a_warning() {
    let voice = open(&wav16(48_000, 2, &sweep(48_000)[9600..14_400])).unwrap();
    assert_eq!(voice.facts().warnings, [Warning::Short { seconds: 0.1 }]);
    assert!((voice.duration_s() - 0.1).abs() < 1e-9);
    assert_eq!(voice.signal().len(), 1600);
    assert_eq!(refused(&wav16(48_000, 1, &[0.1; 4799])), (ErrorKind::EmptyAudio, "AUDIO_TOO_SHORT"));
}

#[test]
fn silence_is_accepted_with_a_warning() {
    assert_eq!(open(&wav16(16_000, 1, &[0.0; 16_000])).unwrap().facts().warnings, [Warning::Silent]);
}

#[test]
fn headers_of_pipes_are_read_to_the_end_of_the_file() {
    let data: Vec<u8> = sweep(16_000).iter().flat_map(|x| ((x * 32767.0) as i16).to_le_bytes()).collect();
    for len in [0xFFFF_FFFF, 0x7FFF_FFFF, 0xFFFF_FFDB] {
        assert_eq!(open(&wav(1, 16_000, 1, 16, &data, len)).unwrap().facts().samples, 8000, "{len:x}");
    }
    let mut zeroed = wav(1, 16_000, 1, 16, &data, 0);
    zeroed[4..8].fill(0);
    assert_eq!(open(&zeroed).unwrap().facts().samples, 8000);
}

#[test]
fn a_tag_larger_than_the_sound_does_not_matter() {
    let len = (1usize << 21) + (0x40 << 14);
    let tagged = [b"ID3\x03\0\0\x01\x40\0\0", &vec![0; len][..], fixture!("sweep-44100.mp3")].concat();
    assert_eq!(open(&tagged).unwrap().facts().samples, 22_050);
}

#[test]
fn empty_audio_is_refused() {
    const EMPTY: (ErrorKind, &str) = (ErrorKind::EmptyAudio, "AUDIO_EMPTY");
    assert_eq!(refused(&[]), EMPTY);
    assert_eq!(refused(&wav16(16_000, 1, &[])), EMPTY);
    assert_eq!(refused(&wav16(16_000, 1, &[0.1; 100])[..44]), EMPTY, "a header alone");
}

#[test]
fn what_is_no_audio_is_refused() {
    const WRONG: (ErrorKind, &str) = (ErrorKind::InvalidAudio, "INVALID_AUDIO_FORMAT");
    for bytes in
        [&b"hello world "[..], b"<html>", &[0; 100_000], b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", &[0xFF; 5000]]
    {
        assert_eq!(refused(bytes), WRONG);
    }
    let noise: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(refused(&noise).0, ErrorKind::InvalidAudio);
    assert_eq!(refused(fixture!("video-only.mp4")), (ErrorKind::InvalidAudio, "AUDIO_NO_TRACK"));
}

#[test]
fn cut_off_audio_is_refused() {
    let long = wav16(16_000, 1, &sweep(16_000));
    assert_eq!(refused(&long[..long.len() / 2]), CORRUPT);
    for len in [4, 20, 43, 46] {
        assert_eq!(refused(&long[..len]).0, ErrorKind::InvalidAudio, "{len}");
    }
    for bytes in [
        fixture!("sweep-8000.flac"),
        fixture!("sweep-44100-aac.m4a"),
        fixture!("sweep-8000-alac.m4a"),
        fixture!("sweep-44100-vorbis.ogg"),
        fixture!("sweep-48000-opus.webm"),
        fixture!("sweep-48000-opus.mp4"),
        fixture!("sweep-8000.aiff"),
    ] {
        let (kind, reason) = refused(&bytes[..bytes.len() / 2]);
        assert_eq!(kind, ErrorKind::InvalidAudio);
        assert!(["AUDIO_CORRUPT", "INVALID_AUDIO_FORMAT"].contains(&reason), "{reason}");
    }
}

/// Each frame of an MP3 stands for itself: a download that broke off is heard up to there.
#[test]
fn an_mp3_that_is_cut_off_is_heard_with_a_warning() {
    let whole = fixture!("sweep-44100.mp3");
    for len in [whole.len() / 2, whole.len() * 2 / 3, whole.len() - 1000] {
        let voice = open(&whole[..len]).unwrap();
        let seconds = voice.duration_s();
        assert!((0.1..0.5).contains(&seconds), "{seconds} s of {len} bytes");
        assert!(voice.facts().warnings.contains(&Warning::CutOff { seconds }), "{:?}", voice.facts());
        let expected = sweep(VOICE_RATE_HZ);
        assert_eq!(lag(voice.signal(), &expected[..voice.signal().len()]), 0);
    }
    assert_eq!(open(whole).unwrap().facts().warnings, [Warning::Short { seconds: 0.5 }]);
}

#[test]
fn garbled_audio_never_panics() {
    for bytes in [
        fixture!("sweep-8000.flac"),
        fixture!("sweep-44100.mp3"),
        fixture!("sweep-44100-aac.m4a"),
        fixture!("sweep-44100-fragmented.m4a"),
        fixture!("sweep-44100-vorbis.ogg"),
        fixture!("sweep-48000-opus.ogg"),
        fixture!("sweep-48000-opus.webm"),
    ] {
        let mut state = 7u32;
        for _ in 0..40 {
            let mut garbled = bytes.to_vec();
            for _ in 0..8 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = (state >> 8) as usize % garbled.len();
                garbled[at] = state as u8;
            }
            if let Err(error) = open(&garbled) {
                let kinds = [ErrorKind::InvalidAudio, ErrorKind::EmptyAudio, ErrorKind::AudioTooLong];
                assert!(kinds.contains(&error.kind()) && error.reason().is_some(), "{error:?}");
            }
        }
        // All but the header overwritten is refused, not heard.
        let mut garbled = bytes.to_vec();
        let half = garbled.len() / 2;
        garbled[half / 4..].iter_mut().enumerate().for_each(|(i, b)| *b = (i * 97 + i / 5) as u8);
        assert!(open(&garbled).is_err());
    }
}

#[test]
fn impossible_headers_are_refused() {
    let data = [0u8; 32_000];
    let header = |tag, rate, channels, bits| wav(tag, rate, channels, bits, &data, data.len() as u32);
    const CHANNELS: (ErrorKind, &str) = (ErrorKind::InvalidAudio, "AUDIO_CHANNELS");
    const RATE: (ErrorKind, &str) = (ErrorKind::InvalidAudio, "AUDIO_SAMPLE_RATE");
    assert_eq!(refused(&header(1, 16_000, 0, 16)), CORRUPT);
    assert_eq!(refused(&header(1, 16_000, 9, 16)), CHANNELS);
    assert_eq!(refused(&header(1, 16_000, 4096, 8)), CHANNELS);
    for rate in [1, 7999, 192_001, 4_000_000_000] {
        assert_eq!(refused(&header(1, rate, 1, 16)), RATE, "{rate} Hz");
    }
    assert_eq!(refused(&header(1, 0, 1, 16)).0, ErrorKind::InvalidAudio);
    assert_eq!(refused(&header(1, 16_000, 1, 0)).0, ErrorKind::InvalidAudio);
    assert_eq!(refused(&header(0x77, 16_000, 1, 16)), (ErrorKind::InvalidAudio, "UNSUPPORTED_AUDIO_CODEC"));
}

#[test]
fn samples_that_are_no_numbers_are_refused() {
    const NON_FINITE: (ErrorKind, &str) = (ErrorKind::InvalidAudio, "AUDIO_NON_FINITE");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut samples = vec![0.1; 16_000];
        samples[12_345] = bad;
        assert_eq!(refused(&wav_float(16_000, &samples)), NON_FINITE);
    }
    assert!(open(&wav_float(16_000, &[1.5; 16_000])).is_ok());
}

#[test]
fn limits_are_checked_while_decoding() {
    let bytes = wav16(16_000, 1, &[0.1; 16_000 * 3]);
    let with = |limits: Limits| Voice::open(bytes[..].into(), &limits).map(|voice| voice.facts().samples);
    let kind = |limits| with(limits).unwrap_err().kind();
    assert_eq!(kind(Limits::default().with_max_seconds(2.0)), ErrorKind::AudioTooLong);
    assert_eq!(with(Limits::default().with_max_seconds(3.0)).unwrap(), 48_000);
    assert_eq!(with(Limits::default().with_max_seconds(0.0)).unwrap(), 48_000);
    assert_eq!(kind(Limits { max_bytes: 1000, ..Limits::default() }), ErrorKind::AudioTooLarge);
}
