//! Sample-rate conversion by a polyphase windowed sinc, block by block.
//!
//! The reference resamples with soxr HQ (`librosa.load(sr=16000)`). This filter has the same pass band
//! (91.4 % of the lower Nyquist frequency), the same stop band (from the lower Nyquist frequency on) and,
//! like soxr, linear phase without any shift; the two agree to about 1e-4 of full scale. Outside the signal
//! both see zeros, but where soxr works in two stages its second one has not heard the first one's run-up:
//! its first two samples are up to 2 % off. Crates for this were tried and shift the signal by up to half
//! an output sample, which changes what wav2vec2 hears.

use pulp::{Arch, Simd, WithSimd};

/// Edge of the pass band as a part of the lower of the two Nyquist frequencies (soxr HQ).
const PASS_BAND: f64 = 0.91363;
/// Edge of the stop band as a part of the lower of the two Nyquist frequencies.
const STOP_BAND: f64 = 1.0;
/// Attenuation in dB that shapes the window: the 20 bits of soxr HQ.
const WINDOW_DB: f64 = 20.0 * 6.0206;
/// Attenuation in dB that the filter is long enough for: one bit more.
const LENGTH_DB: f64 = 21.0 * 6.0206;
/// Most phases that are tabulated. Every usual rate needs fewer (22 050 → 16 000 Hz needs 320); for odd
/// ratios neighbouring phases of a table this fine are interpolated, with an error below −110 dB.
const MAX_PHASES: u64 = 1024;

/// Converts one channel from one rate to another; samples go in and come out in blocks of any size.
///
/// Output sample `n` lies at the time of `n / to` seconds exactly, and there are
/// `ceil(samples × to / from)` of them.
pub struct Resampler {
    /// Output and input rate without their common divisor.
    up: u64,
    down: u64,
    filter: Filter,
    /// The input from sample `start − reach` on, as far as it is still needed.
    history: Vec<f32>,
    /// Index of `history[0]` in the input, plus `reach` (which keeps it from being negative).
    start: u64,
    received: u64,
    produced: u64,
}

/// Rows of taps, one per phase, each centred on an input sample.
struct Filter {
    /// Taps on either side of the centre.
    reach: usize,
    /// Phases tabulated over one input sample.
    phases: u64,
    /// `phases + 1` rows of `2 × reach + 1` taps; the last row is the first, one sample later.
    rows: Vec<f32>,
}

impl Resampler {
    /// A converter from `from` Hz to `to` Hz; both must be above 0.
    pub fn new(from: u32, to: u32) -> Self {
        let (from, to) = (u64::from(from.max(1)), u64::from(to.max(1)));
        let divisor = gcd(from, to);
        let (up, down) = (to / divisor, from / divisor);
        let filter = if up == down { Filter::identity() } else { Filter::new(up, down) };
        let history = vec![0.0; filter.reach];
        Self { up, down, filter, history, start: 0, received: 0, produced: 0 }
    }

    /// Samples that come out in all when `samples` go in.
    pub fn output_len(from: u32, to: u32, samples: u64) -> u64 {
        let out = (u128::from(samples) * u128::from(to)).div_ceil(u128::from(from.max(1)));
        u64::try_from(out).unwrap_or(u64::MAX)
    }

    /// Takes a block of input and appends to `out` what can be computed so far.
    pub fn push(&mut self, block: &[f32], out: &mut Vec<f32>) {
        self.received += block.len() as u64;
        if self.up == self.down {
            out.extend_from_slice(block);
            return;
        }
        self.history.extend_from_slice(block);
        self.produce(u64::MAX, out);
        self.forget();
    }

    /// Ends the input and appends the rest of the output.
    pub fn finish(mut self, out: &mut Vec<f32>) {
        if self.up == self.down {
            return;
        }
        let total = (u128::from(self.received) * u128::from(self.up)).div_ceil(u128::from(self.down)) as u64;
        self.history.resize(self.history.len() + self.filter.reach + 1, 0.0);
        self.produce(total, out);
    }

    /// Appends output samples up to number `end`, as long as their input is there.
    fn produce(&mut self, end: u64, out: &mut Vec<f32>) {
        Arch::new().dispatch(Produce { resampler: self, end, out });
    }

    /// Drops input that no later output sample reaches back to.
    fn forget(&mut self) {
        let centre = (u128::from(self.produced) * u128::from(self.down) / u128::from(self.up)) as u64;
        let unused = ((centre - self.start) as usize).min(self.history.len());
        // Moving the rest down costs as much as it is long, so it waits until enough has gathered.
        if unused > 4 * self.filter.width() {
            self.history.drain(..unused);
            self.start += unused as u64;
        }
    }
}

/// The loop over output samples, compiled for each of the processor's vector widths. A closure in its place
/// would not be inlined, and so be compiled for the narrowest only.
struct Produce<'a> {
    resampler: &'a mut Resampler,
    end: u64,
    out: &'a mut Vec<f32>,
}

impl WithSimd for Produce<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Resampler { up, down, filter, history, start, produced, .. } = self.resampler;
        let width = filter.width();
        while *produced < self.end {
            let position = u128::from(*produced) * u128::from(*down);
            let centre = (position / u128::from(*up)) as u64;
            let remainder = (position % u128::from(*up)) as u64;
            let first = (centre - *start) as usize;
            let Some(window) = history.get(first..first + width) else { break };
            self.out.push(filter.apply(window, remainder, *up));
            *produced += 1;
        }
    }
}

/// Converts a whole signal of one channel; see [`Resampler`].
pub fn resample(signal: &[f32], from: u32, to: u32) -> Vec<f32> {
    let mut out = Vec::with_capacity(Resampler::output_len(from, to, signal.len() as u64) as usize);
    let mut resampler = Resampler::new(from, to);
    resampler.push(signal, &mut out);
    resampler.finish(&mut out);
    out
}

impl Filter {
    fn identity() -> Self {
        Self { reach: 0, phases: 1, rows: vec![1.0, 1.0] }
    }

    /// The taps for a rate change by `up / down`, with frequencies in cycles per input sample.
    fn new(up: u64, down: u64) -> Self {
        let nyquist = 0.5 * (up as f64 / down as f64).min(1.0);
        let cutoff = nyquist * (PASS_BAND + STOP_BAND) / 2.0;
        let transition = nyquist * (STOP_BAND - PASS_BAND);
        // Kaiser's own formulas for the window's shape and length.
        let beta = 0.1102 * (WINDOW_DB - 8.7);
        let half = (LENGTH_DB - 7.95) / (14.36 * transition) / 2.0;
        let reach = half.floor() as usize + 1;
        let phases = up.min(MAX_PHASES);
        let width = 2 * reach + 1;
        let scale = 1.0 / bessel_i0(beta);
        let mut rows = Vec::with_capacity(width * (phases as usize + 1));
        for phase in 0..=phases {
            let offset = phase as f64 / phases as f64;
            for tap in 0..width {
                let t = tap as f64 - reach as f64 - offset;
                let shape = 1.0 - (t / half) * (t / half);
                let tap =
                    if shape < 0.0 { 0.0 } else { sinc(t, cutoff) * bessel_i0(beta * shape.sqrt()) * scale };
                rows.push(tap as f32);
            }
        }
        Self { reach, phases, rows }
    }

    fn width(&self) -> usize {
        2 * self.reach + 1
    }

    fn row(&self, phase: usize) -> &[f32] {
        &self.rows[phase * self.width()..][..self.width()]
    }

    /// The output sample `remainder / up` of an input sample after the centre of `window`.
    #[inline(always)]
    fn apply(&self, window: &[f32], remainder: u64, up: u64) -> f32 {
        if self.phases == up {
            return dot(self.row(remainder as usize), window);
        }
        let position = remainder as f64 * self.phases as f64 / up as f64;
        let phase = position as usize;
        let weight = (position - phase as f64) as f32;
        let (a, b) = (dot(self.row(phase), window), dot(self.row(phase + 1), window));
        a + (b - a) * weight
    }
}

/// Sum of products, over enough partial sums that the compiler fills its vector registers.
#[inline(always)]
fn dot(taps: &[f32], window: &[f32]) -> f32 {
    const LANES: usize = 64;
    let mut sums = [0f32; LANES];
    let (a, b) = (taps.chunks_exact(LANES), window.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a.zip(b) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    rest + sums.iter().sum::<f32>()
}

/// Ideal low pass: `sin(2π·cutoff·t) / (π·t)`.
fn sinc(t: f64, cutoff: f64) -> f64 {
    if t == 0.0 {
        2.0 * cutoff
    } else {
        (2.0 * std::f64::consts::PI * cutoff * t).sin() / (std::f64::consts::PI * t)
    }
}

/// Modified Bessel function of the first kind, order 0, by its power series.
fn bessel_i0(x: f64) -> f64 {
    let (mut sum, mut term, mut k) = (1.0, 1.0, 1.0);
    while term > 1e-18 * sum {
        term *= (x / (2.0 * k)) * (x / (2.0 * k));
        sum += term;
        k += 1.0;
    }
    sum
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(hz: f64, rate: u32, samples: usize) -> Vec<f32> {
        let step = 2.0 * std::f64::consts::PI * hz / f64::from(rate);
        (0..samples).map(|i| (step * i as f64).sin() as f32).collect()
    }

    #[test]
    fn keeps_a_tone_in_place_at_every_usual_and_at_odd_rates() {
        for from in [8000, 11025, 22050, 24000, 37800, 44100, 44101, 48000, 96000, 191_999, 192_000] {
            let out = resample(&tone(440.0, from, from as usize / 2), from, 16000);
            assert_eq!(out.len() as u64, Resampler::output_len(from, 16000, u64::from(from) / 2));
            let expected = tone(440.0, 16000, out.len());
            // The ends see the silence outside the signal, so the middle is compared.
            let worst = (1000..out.len() - 1000).map(|i| (out[i] - expected[i]).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-5, "{from} Hz: off by {worst}");
        }
    }

    #[test]
    fn blocks_of_any_size_give_the_same_as_the_whole() {
        let signal = tone(1234.5, 44100, 20_000);
        let whole = resample(&signal, 44100, 16000);
        for size in [1, 7, 1024, 4096] {
            let mut resampler = Resampler::new(44100, 16000);
            let mut out = Vec::new();
            signal.chunks(size).for_each(|block| resampler.push(block, &mut out));
            resampler.finish(&mut out);
            assert_eq!(out, whole, "blocks of {size}");
        }
    }

    #[test]
    fn removes_what_the_lower_rate_cannot_hold() {
        let out = resample(&tone(9000.0, 48000, 48000), 48000, 16000);
        assert!(out[500..15_500].iter().all(|x| x.abs() < 1e-5));
    }

    #[test]
    fn equal_rates_and_empty_input_pass_through() {
        let signal = tone(100.0, 16000, 321);
        assert_eq!(resample(&signal, 16000, 16000), signal);
        assert!(resample(&[], 44100, 16000).is_empty());
        assert_eq!(resample(&[0.0], 8000, 16000).len(), 2);
    }
}
