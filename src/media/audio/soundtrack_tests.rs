use std::sync::Arc;

use super::*;
use crate::media::audio::Limits;
use crate::media::audio::voice::tests::{wav, wav16};

fn voice(bytes: Vec<u8>) -> Voice {
    Voice::open(Arc::from(bytes), &Limits::default()).unwrap()
}

fn tone(rate: u32, seconds: f32, amplitude: f32) -> Vec<f32> {
    let step = 440.0 * std::f32::consts::TAU / rate as f32;
    (0..(seconds * rate as f32) as usize).map(|i| amplitude * (i as f32 * step).sin()).collect()
}

fn all(track: Soundtrack) -> Vec<f32> {
    let (samples, channels) = (track.samples() as usize, track.channels());
    let all: Vec<f32> = track.into_blocks().flat_map(Result::unwrap).collect();
    assert_eq!(all.len(), samples * channels);
    all
}

#[test]
fn one_voice_is_the_original() {
    let signal = tone(44_100, 1.5, 0.5);
    let track = Soundtrack::new(&voice(wav16(44_100, 1, &signal)), None, Speakers::Together);
    assert_eq!((track.sample_rate_hz(), track.channels(), track.samples()), (44_100, 1, signal.len() as u64));
    assert!(all(track).iter().zip(&signal).all(|(a, b)| (a - b).abs() < 1e-4));
}

#[test]
fn rates_that_aac_lacks_become_48_khz() {
    for (rate, expected) in [(37_800, 48_000), (192_000, 48_000), (96_000, 96_000), (8000, 8000)] {
        let track = Soundtrack::new(&voice(wav16(rate, 2, &tone(rate, 0.5, 0.5))), None, Speakers::Together);
        assert_eq!(
            (track.sample_rate_hz(), track.samples(), track.channels()),
            (expected, u64::from(expected / 2), 2)
        );
        let tone = tone(expected, 0.5, 0.5);
        let worst = all(track)
            .chunks(2)
            .zip(&tone)
            .skip(500)
            .take(3000)
            .fold(0f32, |worst, (frame, x)| worst.max((frame[0] - x).abs()));
        assert!(worst < 1e-3, "{rate} Hz: off by {worst}");
    }
}

#[test]
fn voices_together_are_added_and_padded() {
    let (long, short) = (tone(16_000, 2.0, 0.3), tone(16_000, 1.0, 0.2));
    let track = Soundtrack::new(
        &voice(wav16(16_000, 1, &short)),
        Some(&voice(wav16(16_000, 2, &long))),
        Speakers::Together,
    );
    assert_eq!((track.channels(), track.samples()), (2, 32_000));
    for (i, frame) in all(track).chunks(2).enumerate() {
        let expected = long[i] + short.get(i).copied().unwrap_or(0.0);
        assert!((frame[0] - expected).abs() < 1e-3 && frame[0] == frame[1], "{i}");
    }
}

#[test]
fn voices_in_turn_follow_one_another_at_the_higher_rate() {
    let track = Soundtrack::new(
        &voice(wav16(16_000, 1, &tone(16_000, 1.0, 0.3))),
        Some(&voice(wav16(48_000, 1, &tone(48_000, 0.5, 0.2)))),
        Speakers::InTurn,
    );
    assert_eq!((track.sample_rate_hz(), track.channels(), track.samples()), (48_000, 1, 72_000));
    let samples = all(track);
    let second = tone(48_000, 0.5, 0.2);
    assert!(samples[48_000..].iter().zip(&second).all(|(a, b)| (a - b).abs() < 1e-3));
    let first = tone(48_000, 1.0, 0.3);
    assert!(samples[1000..47_000].iter().zip(&first[1000..]).all(|(a, b)| (a - b).abs() < 1e-3));
}

#[test]
fn loud_voices_are_limited_to_full_scale() {
    let loud = || voice(wav16(16_000, 1, &tone(16_000, 0.5, 0.9)));
    let samples = all(Soundtrack::new(&loud(), Some(&loud()), Speakers::Together));
    assert!(samples.iter().all(|x| x.abs() <= 1.0) && samples.contains(&1.0));
}

#[test]
fn surround_keeps_its_sides() {
    // 5.1 in the order of WAV: front left, front right, centre, low, rear left, rear right.
    let frame = |channel: usize| -> Vec<u8> {
        (0..4000)
            .flat_map(|_| (0..6).map(|c| if c == channel { 16_384i16 } else { 0 }))
            .flat_map(i16::to_le_bytes)
            .collect()
    };
    let mixed = |channel| {
        let data = frame(channel);
        let samples = all(Soundtrack::new(
            &voice(wav(1, 16_000, 6, 16, &data, data.len() as u32)),
            None,
            Speakers::Together,
        ));
        (samples[2000], samples[2001])
    };
    let (left, right) = mixed(0);
    assert!(left > 0.2 && right == 0.0, "{left} {right}");
    let (left, right) = mixed(2);
    assert!(left > 0.1 && left == right);
    assert_eq!(mixed(3), (0.0, 0.0));
    let (left, right) = mixed(5);
    assert!(right > 0.1 && left == 0.0);
}
