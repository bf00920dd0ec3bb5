//! Whole files: written by [`VideoWriter`], read back by an independent parser and decoders.

use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use re_mp4::TrackKind;

use super::recorder::Recorder;
use super::testing::{Movie, noise, solid};
use super::*;
use crate::{Error, ErrorKind, Result};

const WIDTH: usize = 64;
const HEIGHT: usize = 48;

type Blocks = Box<dyn Iterator<Item = Result<Vec<f32>>> + Send>;

fn track(sample_rate_hz: u32, channels: u16, samples: u64, blocks: Blocks) -> AudioTrack {
    AudioTrack { sample_rate_hz, channels, samples, blocks }
}

/// `samples` in blocks of `block` values.
fn blocks(samples: Vec<f32>, block: usize) -> Blocks {
    let blocks: Vec<_> = samples.chunks(block).map(|block| Ok(block.to_vec())).collect();
    Box::new(blocks.into_iter())
}

/// A quiet buzz, different at every moment.
fn buzz(values: usize) -> Vec<f32> {
    (0..values).map(|i| 0.2 * ((i * i) as f32 * 1e-3).sin()).collect()
}

fn options(frames: u64, audio: Option<AudioTrack>) -> VideoOptions {
    VideoOptions { width: WIDTH, height: HEIGHT, frames, quality: Quality::Standard, audio }
}

/// Frame `i` of a slow change of colour.
fn colour(i: u64) -> Vec<u8> {
    let level = (40 + (i * 7) % 180) as u8;
    solid(WIDTH, HEIGHT, [level, 200 - level / 2, 120])
}

fn write(path: &Path, frames: u64, audio: Option<AudioTrack>) -> VideoSummary {
    let mut writer = VideoWriter::create(path, options(frames, audio)).unwrap();
    for i in 0..frames {
        writer.push(colour(i)).unwrap();
    }
    writer.finish().unwrap()
}

/// A file of `frames` frames with `audio`, and its summary.
fn movie(frames: u64, audio: Option<AudioTrack>) -> (Movie, VideoSummary) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.mp4");
    let summary = write(&path, frames, audio);
    (Movie::read(std::fs::read(path).unwrap()), summary)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_file_is_what_players_expect() {
    let samples = 4 * 16_000 + 321;
    let (movie, summary) = movie(101, Some(track(16_000, 1, samples, blocks(buzz(samples as usize), 999))));
    assert_eq!(summary.frames, 101);
    assert_eq!(summary.size_bytes, movie.bytes.len() as u64);
    assert_eq!(summary.duration, Duration::from_millis(4040));
    assert_eq!(summary.coarsest_quantizer, 20);
    assert!(summary.faststart);
    let boxes: Vec<_> = movie.boxes().into_iter().map(|(name, _)| name).collect();
    assert_eq!(boxes, ["ftyp", "moov", "free", "mdat"]);
    movie.check_sample_tables();

    assert_eq!(movie.mp4.tracks().len(), 2);
    let header = &movie.mp4.moov.mvhd;
    assert_eq!((header.timescale, header.duration), (16_000, 101 * 640), "the picture is the longer track");

    let video = movie.video();
    assert_eq!((video.width, video.height), (WIDTH as u16, HEIGHT as u16));
    assert_eq!((video.timescale, video.duration, video.samples.len()), (12_800, 101 * 512, 101));
    assert!(video.samples.iter().all(|sample| sample.duration == 512));
    let times: Vec<_> = video.samples.iter().map(|sample| sample.composition_timestamp).collect();
    assert_eq!(times, (0..101).map(|i| i * 512).collect::<Vec<_>>());
    let sync: Vec<_> = (0..101).filter(|&i| video.samples[i].is_sync).collect();
    assert_eq!(sync, [0, 50, 100]);
    assert_eq!(movie.edit(video), (101 * 640, 0));
    let codec = video.codec_string(&movie.mp4).unwrap();
    assert!(codec.starts_with("avc1.64"), "High profile: {codec}");
    // nclx, primaries, transfer and matrix BT.709, limited range.
    assert_eq!(&movie.after(b"colr")[..11], b"nclx\0\x01\0\x01\0\x01\0");
    assert_eq!(&movie.after(b"pasp")[..8], [0, 0, 0, 1, 0, 0, 0, 1]);

    let audio = movie.audio();
    assert_eq!((audio.timescale, audio.duration), (16_000, 1024 + samples));
    assert_eq!(movie.edit(audio), (samples, 1024));
    // The AudioSpecificConfig: object type 2 (AAC-LC), rate 8 (16 kHz), 1 channel.
    let esds = movie.after(b"esds");
    assert!(esds[..40].windows(4).any(|w| w == [5, 2, 2 << 3 | 8 >> 1, 1 << 3]), "{:?}", &esds[..40]);
    assert_eq!(audio.samples.iter().map(|sample| sample.duration).sum::<u64>(), 1024 + samples);
    // Version 1, description of 2 bytes, one entry: start decoding one packet early.
    assert_eq!(&movie.after(b"sgpd")[..18], b"\x01\0\0\0roll\0\0\0\x02\0\0\0\x01\xff\xff");
}

#[test]
fn clicks_and_flashes_meet_to_the_sample() {
    for (rate, channels) in [(16_000, 1), (44_100, 2), (48_000, 1), (96_000, 2)] {
        let at = [0, 25, 60, 99];
        let samples = u64::from(rate) * 4;
        let mut sound = vec![0.0; samples as usize * usize::from(channels)];
        for frame in at {
            let start = frame * rate as usize / 25 * usize::from(channels);
            sound[start..start + usize::from(channels)].fill(0.9);
        }
        let mut recorder = Recorder::new(
            Cursor::new(vec![]),
            options(100, Some(track(rate, channels, samples, blocks(sound, 5000)))),
        )
        .unwrap();
        for i in 0..100 {
            let level = if at.contains(&i) { 255 } else { 0 };
            recorder.frame(&solid(WIDTH, HEIGHT, [level; 3])).unwrap();
        }
        let movie = Movie::read(recorder.finish().unwrap().file.sink.into_inner());

        let luma: Vec<u8> = movie.pictures().iter().map(|picture| picture.y[0]).collect();
        let flashes: Vec<_> = (0..100).filter(|&i| luma[i] > 125).collect();
        assert_eq!(flashes, at);

        let voice = movie.voice();
        assert_eq!(voice.len() as u64, samples * u64::from(channels));
        let heard: Vec<f32> = voice.chunks_exact(usize::from(channels)).map(|s| s[0]).collect();
        for frame in at {
            let start = frame * rate as usize / 25;
            let around = start.saturating_sub(1000)..(start + 1000).min(heard.len());
            let loudest = around.max_by(|&a, &b| heard[a].abs().total_cmp(&heard[b].abs()));
            assert_eq!(loudest, Some(start), "{rate} Hz, frame {frame}");
        }
    }
}

#[test]
fn colours_come_back_in_order_over_several_groups_of_pictures() {
    let frames = 430;
    let (movie, summary) = movie(frames, None);
    assert_eq!(summary.duration, Duration::from_millis(17_200));
    movie.check_sample_tables();
    let pictures = movie.pictures();
    assert_eq!(pictures.len(), 430);
    for (i, decoded) in (0..).zip(&pictures) {
        let mut expected = I420::new(WIDTH, HEIGHT).unwrap();
        expected.convert_from_rgb(&colour(i)).unwrap();
        for (a, b) in decoded.planes().into_iter().zip(expected.planes()) {
            let worst = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst <= Some(3), "frame {i}: off by {worst:?}");
        }
    }
}

#[test]
fn a_silent_video_has_one_track() {
    let silent = [None, Some(track(16_000, 1, 0, blocks(buzz(100), 10)))];
    let [a, b] = silent.map(|audio| movie(30, audio).0);
    assert_eq!(a.mp4.tracks().len(), 1);
    assert!(a.track(TrackKind::Audio).is_none());
    assert_eq!(a.edit(a.video()), (30 * 512, 0));
    assert_eq!((a.mp4.moov.mvhd.timescale, a.mp4.moov.mvhd.duration), (12_800, 30 * 512));
    assert_eq!(a.bytes, b.bytes, "a track of 0 samples is none");
}

#[test]
fn the_voice_may_be_shorter_or_longer_than_the_picture() {
    for samples in [1, 3_000, 16_000, 16_001, 90_000] {
        let sound = vec![0.5; samples as usize];
        let (movie, _) = movie(25, Some(track(16_000, 1, samples, blocks(sound, 700))));
        assert_eq!(movie.edit(movie.video()).0, 16_000);
        assert_eq!(movie.edit(movie.audio()).0, samples);
        assert_eq!(movie.mp4.moov.mvhd.duration, samples.max(16_000));
        assert_eq!(movie.voice().len() as u64, samples);
        movie.check_sample_tables();
    }
}

#[test]
fn a_source_that_ends_early_is_followed_by_silence_and_one_that_goes_on_is_cut() {
    let loud = |values: usize| vec![0.5; values];
    let (movie_short, _) = movie(50, Some(track(16_000, 2, 32_000, blocks(loud(20_001), 333))));
    let voice = movie_short.voice();
    assert_eq!(voice.len(), 64_000);
    assert!(voice[9_000..11_000].iter().all(|x| *x > 0.3));
    assert!(voice[30_000..].iter().all(|x| x.abs() < 1e-3));
    let (long, _) = movie(50, Some(track(16_000, 2, 32_000, blocks(loud(100_000), 333))));
    let (exact, _) = movie(50, Some(track(16_000, 2, 32_000, blocks(loud(64_000), 333))));
    assert_eq!(long.bytes, exact.bytes);
}

#[test]
fn the_same_frames_make_the_same_file_however_they_come() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = vec![];
    for (capacity, block, pace) in [(1, 64_000, 0), (2, 77, 1), (81, 4_096, 2), (3, 1, 0)] {
        let path = folder.path().join(format!("{capacity}.mp4"));
        // Stereo at 44.1 kHz, where a frame's share of the samples is no multiple of a packet.
        let sound = blocks(buzz(3 * 88_200), block).inspect(move |_| {
            if pace == 1 {
                std::thread::yield_now();
            }
        });
        let audio = track(44_100, 2, 3 * 44_100, Box::new(sound));
        let mut writer = VideoWriter::with_capacity(&path, options(75, Some(audio)), capacity).unwrap();
        for i in 0..75 {
            // Some noise, so that the bitrate guard and the entropy coder have something to do.
            writer.push(if i % 9 == 0 { noise(WIDTH, HEIGHT, i) } else { colour(i) }).unwrap();
            if pace == 2 {
                std::thread::yield_now();
            }
        }
        writer.finish().unwrap();
        files.push(std::fs::read(path).unwrap());
    }
    assert!(files.iter().all(|file| *file == files[0]));
}

#[test]
fn the_voice_is_pulled_only_as_far_as_the_picture_has_come() {
    let pulled = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&pulled);
    let source = std::iter::repeat_with(move || {
        counter.fetch_add(100, Ordering::Relaxed);
        Ok(vec![0.1; 100])
    });
    let audio = track(16_000, 1, 64_000, Box::new(source));
    let mut recorder = Recorder::new(Cursor::new(vec![]), options(100, Some(audio))).unwrap();
    for i in 1..=100 {
        recorder.frame(&colour(i)).unwrap();
        let pulled = pulled.load(Ordering::Relaxed);
        assert!((i * 640..i * 640 + 100).contains(&pulled), "{pulled} samples at frame {i}");
    }
}

#[test]
fn more_frames_than_announced_put_the_index_last() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.mp4");
    let mut writer = VideoWriter::create(&path, options(0, None)).unwrap();
    for i in 0..1200 {
        writer.push(colour(i)).unwrap();
    }
    let summary = writer.finish().unwrap();
    assert!(!summary.faststart);
    let movie = Movie::read(std::fs::read(&path).unwrap());
    assert_eq!(summary.size_bytes, movie.bytes.len() as u64);
    let boxes: Vec<_> = movie.boxes().into_iter().map(|(name, _)| name).collect();
    assert_eq!(boxes, ["ftyp", "free", "mdat", "moov"]);
    movie.check_sample_tables();
    assert_eq!(movie.pictures().len(), 1200);
}

#[test]
fn an_abandoned_video_leaves_nothing_and_a_finished_one_only_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.mp4");
    std::fs::write(&path, "an older file").unwrap();
    let endless = std::iter::repeat_with(|| Ok(vec![0.0; 100]));
    let audio = track(16_000, 1, 64_000, Box::new(endless));
    let mut writer = VideoWriter::create(&path, options(100, Some(audio))).unwrap();
    for i in 0..40 {
        writer.push(colour(i)).unwrap();
    }
    assert!(names(folder.path()).contains(&"out.mp4.part".to_owned()));
    drop(writer);
    assert_eq!(names(folder.path()), ["out.mp4"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"an older file");

    write(&path, 3, None);
    assert_eq!(names(folder.path()), ["out.mp4"]);
    assert_eq!(Movie::read(std::fs::read(&path).unwrap()).video().samples.len(), 3);
}

#[test]
fn an_error_of_the_voice_surfaces_once_with_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.mp4");
    let broken = || -> Blocks {
        let error = Error::new(ErrorKind::InvalidAudio, "packet 7 is garbled");
        Box::new([Ok(vec![0.0; 700]), Err(error)].into_iter())
    };
    let mut writer =
        VideoWriter::with_capacity(&path, options(100, Some(track(16_000, 1, 64_000, broken()))), 1).unwrap();
    let error = (0..100).find_map(|i| writer.push(colour(i)).err()).unwrap();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::InvalidAudio, "packet 7 is garbled"));
    let later = writer.push(colour(0)).unwrap_err();
    assert_eq!(
        (later.kind(), later.to_string().as_str()),
        (ErrorKind::Encode, "the video has failed before")
    );
    assert_eq!(writer.finish().unwrap_err().kind(), ErrorKind::Encode);

    let mut writer =
        VideoWriter::create(&path, options(100, Some(track(16_000, 1, 64_000, broken())))).unwrap();
    writer.push(colour(0)).unwrap();
    writer.push(colour(1)).ok();
    assert_eq!(writer.finish().unwrap_err().kind(), ErrorKind::InvalidAudio);
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn a_panic_of_the_voice_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.mp4");
    let source = std::iter::from_fn(|| -> Option<Result<Vec<f32>>> { panic!("a bug in a decoder") });
    let audio = track(16_000, 1, 64_000, Box::new(source));
    let mut writer = VideoWriter::create(&path, options(100, Some(audio))).unwrap();
    writer.push(colour(0)).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
    assert!(error.to_string().contains("a bug in a decoder"), "{error}");
    assert_eq!(names(folder.path()), [""; 0]);
}

/// A disk with room for `room` bytes.
struct SmallDisk {
    room: usize,
}

impl Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.room.min(bytes.len()) {
            0 if !bytes.is_empty() => Err(io::ErrorKind::StorageFull.into()),
            written => {
                self.room -= written;
                Ok(written)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for SmallDisk {
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Ok(0)
    }
}

#[test]
fn a_full_disk_is_told_as_such_wherever_it_strikes() {
    for room in [0, 100, 9_000, 30_000] {
        let audio = track(16_000, 1, 64_000, blocks(buzz(64_000), 1000));
        let result = Recorder::new(SmallDisk { room }, options(100, Some(audio))).and_then(|mut recorder| {
            (0..100).try_for_each(|i| recorder.frame(&colour(i)))?;
            recorder.finish().map(|_| ())
        });
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Encode, Some("DISK_FULL")), "{room}");
        let source = std::error::Error::source(&error).unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert!(error.hint().is_some());
    }
}

#[test]
fn what_cannot_become_a_video_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.mp4");
    let refuse = |options: VideoOptions| VideoWriter::create(&path, options).err().unwrap();
    let odd = refuse(VideoOptions { width: 65, ..options(1, None) });
    assert_eq!((odd.kind(), odd.reason()), (ErrorKind::Encode, Some("VIDEO_DIMENSIONS")));
    let rate = refuse(options(1, Some(track(11_000, 1, 10, blocks(vec![], 1)))));
    assert_eq!(rate.reason(), Some("AUDIO_RATE"));
    let long = refuse(options(1, Some(track(16_000, 1, u64::MAX, blocks(vec![], 1)))));
    assert!(long.to_string().contains("at most 6 hours"), "{long}");

    let mut writer = VideoWriter::create(&path, options(1, None)).unwrap();
    let error = writer.push(vec![0; 5]).unwrap_err();
    assert_eq!(error.to_string(), "a video frame has 5 bytes, expected 9216");
    assert_eq!(writer.finish().unwrap_err().to_string(), "the video has no frame");

    let nowhere = VideoWriter::create(&folder.path().join("no/such.mp4"), options(1, None)).err().unwrap();
    assert_eq!(nowhere.kind(), ErrorKind::Encode);
    assert!(std::error::Error::source(&nowhere).unwrap().is::<io::Error>());
    assert_eq!(names(folder.path()), [""; 0]);
}
