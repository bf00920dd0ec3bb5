//! Loudness after ITU-R BS.1770-4, as pyloudnorm 0.1.1 measures it, for one channel.
//!
//! Differences from the standard are pyloudnorm's own: the K-weighting filters are designed from their
//! analogue parameters rather than taken from the standard's table, each filter stage stores `f32`, and
//! the last block may be cut short by the end of the signal while it is divided by the full length.
//! We differ in one point: a signal shorter than one block of 0.4 s, which pyloudnorm refuses, is measured
//! as if silence followed.

/// Level that voices are brought to before wav2vec2, in LUFS.
pub const TARGET_LUFS: f64 = -23.0;

/// Length of a measuring block, in seconds; blocks overlap by three quarters.
const BLOCK_S: f64 = 0.4;
/// Share of a block by which the next one starts later.
const STEP: f64 = 0.25;
/// Blocks below this level count as silence, in LUFS.
const ABSOLUTE_GATE: f64 = -70.0;
/// A level this far from zero can only be silence (or no number), which is left as it is.
const UNUSABLE_LUFS: f64 = 100.0;

/// A second-order filter, `a[0]` = 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Biquad {
    /// Numerator.
    pub b: [f64; 3],
    /// Denominator.
    pub a: [f64; 3],
}

impl Biquad {
    /// High shelf after R. Bristow-Johnson's cookbook: `gain_db` above `hz`.
    fn high_shelf(gain_db: f64, q: f64, hz: f64, sample_rate_hz: u32) -> Self {
        let a = 10f64.powf(gain_db / 40.0);
        let (sin, cos) = (std::f64::consts::TAU * hz / f64::from(sample_rate_hz)).sin_cos();
        let alpha = sin / (2.0 * q);
        let root = 2.0 * a.sqrt() * alpha;
        Self::normalised(
            [
                a * ((a + 1.0) + (a - 1.0) * cos + root),
                -2.0 * a * ((a - 1.0) + (a + 1.0) * cos),
                a * ((a + 1.0) + (a - 1.0) * cos - root),
            ],
            [
                (a + 1.0) - (a - 1.0) * cos + root,
                2.0 * ((a - 1.0) - (a + 1.0) * cos),
                (a + 1.0) - (a - 1.0) * cos - root,
            ],
        )
    }

    /// High pass after R. Bristow-Johnson's cookbook.
    fn high_pass(q: f64, hz: f64, sample_rate_hz: u32) -> Self {
        let (sin, cos) = (std::f64::consts::TAU * hz / f64::from(sample_rate_hz)).sin_cos();
        let alpha = sin / (2.0 * q);
        Self::normalised(
            [(1.0 + cos) / 2.0, -(1.0 + cos), (1.0 + cos) / 2.0],
            [1.0 + alpha, -2.0 * cos, 1.0 - alpha],
        )
    }

    fn normalised(b: [f64; 3], a: [f64; 3]) -> Self {
        Self { b: b.map(|v| v / a[0]), a: a.map(|v| v / a[0]) }
    }

    /// Filters `signal` in place: `f64` arithmetic, `f32` results.
    fn apply(&self, signal: &mut [f32]) {
        let (b, a) = (self.b, self.a);
        let (mut s1, mut s2) = (0f64, 0f64);
        for sample in signal {
            let x = f64::from(*sample);
            let y = b[0] * x + s1;
            s1 = b[1] * x - a[1] * y + s2;
            s2 = b[2] * x - a[2] * y;
            *sample = y as f32;
        }
    }
}

/// The two stages of K-weighting: a shelf of 4 dB above 1500 Hz, then a high pass at 38 Hz.
pub fn k_weighting(sample_rate_hz: u32) -> [Biquad; 2] {
    [
        Biquad::high_shelf(4.0, std::f64::consts::FRAC_1_SQRT_2, 1500.0, sample_rate_hz),
        Biquad::high_pass(0.5, 38.0, sample_rate_hz),
    ]
}

/// Integrated loudness of one channel in LUFS; −∞ where every block is below the gate of −70 LUFS.
pub fn integrated_lufs(signal: &[f32], sample_rate_hz: u32) -> f64 {
    let rate = f64::from(sample_rate_hz);
    let mut weighted = signal.to_vec();
    if (weighted.len() as f64) < BLOCK_S * rate {
        weighted.resize((BLOCK_S * rate).ceil() as usize, 0.0);
    }
    k_weighting(sample_rate_hz).iter().for_each(|stage| stage.apply(&mut weighted));

    let seconds = weighted.len() as f64 / rate;
    let blocks = ((seconds - BLOCK_S) / (BLOCK_S * STEP)).round_ties_even() as usize + 1;
    let powers: Vec<f64> = (0..blocks)
        .map(|j| {
            // The bounds are computed in the reference's order of operations: truncation makes it matter.
            let end = (BLOCK_S * (j as f64 * STEP + 1.0) * rate) as usize;
            let end = end.min(weighted.len());
            let start = ((BLOCK_S * (j as f64 * STEP) * rate) as usize).min(end);
            weighted[start..end].iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / (BLOCK_S * rate)
        })
        .collect();
    let relative_gate = lufs(mean(powers.iter().copied().filter(|&z| lufs(z) >= ABSOLUTE_GATE))) - 10.0;
    lufs(mean(powers.iter().copied().filter(|&z| lufs(z) > relative_gate && lufs(z) > ABSOLUTE_GATE)))
}

/// Scales `signal` to `target_lufs`. Silence stays as it is. Nothing is clipped: peaks may pass ±1.
pub fn normalize_to(signal: &mut [f32], sample_rate_hz: u32, target_lufs: f64) {
    let loudness = integrated_lufs(signal, sample_rate_hz);
    if loudness.is_nan() || loudness.abs() > UNUSABLE_LUFS {
        return;
    }
    let gain = 10f64.powf((target_lufs - loudness) / 20.0) as f32;
    signal.iter_mut().for_each(|x| *x *= gain);
}

/// Loudness of a mean square.
fn lufs(power: f64) -> f64 {
    -0.691 + 10.0 * power.log10()
}

/// Mean, 0 where there is nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(amplitude: f32, samples: usize) -> Vec<f32> {
        (0..samples).map(|i| amplitude * (i as f32 * 997.0 * std::f32::consts::TAU / 16000.0).sin()).collect()
    }

    #[test]
    fn halving_the_amplitude_lowers_by_six_decibels() {
        let (loud, quiet) =
            (integrated_lufs(&tone(0.5, 32000), 16000), integrated_lufs(&tone(0.25, 32000), 16000));
        assert!((loud - quiet - 20.0 * 2f64.log10()).abs() < 1e-4, "{loud} {quiet}");
    }

    #[test]
    fn brings_any_usable_level_to_the_target() {
        for (amplitude, samples) in [(0.9, 16000), (0.01, 6400), (0.3, 47_111)] {
            let mut signal = tone(amplitude, samples);
            normalize_to(&mut signal, 16000, TARGET_LUFS);
            assert!((integrated_lufs(&signal, 16000) - TARGET_LUFS).abs() < 1e-4);
        }
    }

    #[test]
    fn silence_stays_silence() {
        let mut signal = vec![1e-6; 16000];
        normalize_to(&mut signal, 16000, TARGET_LUFS);
        assert_eq!(signal, vec![1e-6; 16000]);
        assert_eq!(integrated_lufs(&[], 16000), f64::NEG_INFINITY);
    }

    #[test]
    fn less_than_a_block_is_measured_with_silence_after_it() {
        let short = tone(0.5, 1600);
        let mut padded = short.clone();
        padded.resize(6400, 0.0);
        assert_eq!(integrated_lufs(&short, 16000), integrated_lufs(&padded, 16000));
        assert!(integrated_lufs(&short, 16000).is_finite());
    }
}
