//! Colour matching: each frame is given the mean and the spread of the reference frame's colours in CIELAB,
//! so that windows which follow one another do not drift.
//!
//! Equal to the reference (`wan/multitalk.py` of MeiGen-AI/InfiniteTalk at 0107cd9), which uses
//! scikit-image's conversions in `f32`: sRGB primaries, D65, the 2 degree observer, and scikit-image's own
//! rounded thresholds. Means are summed in NumPy's order, because on a frame of one colour the deviation is
//! nothing but the rounding error of that sum, and the frame is stretched by its inverse.

use candle_core::{Result, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Linear sRGB → CIE XYZ.
pub const XYZ_FROM_RGB: [[f64; 3]; 3] =
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]];

/// CIE XYZ → linear sRGB: the inverse of [`XYZ_FROM_RGB`].
pub const RGB_FROM_XYZ: [[f64; 3]; 3] = inverse(XYZ_FROM_RGB);

/// XYZ of the white point D65, 2 degree observer.
const WHITE: [f32; 3] = [0.95047, 1.0, 1.08883];

const TO_XYZ: [[f32; 3]; 3] = narrow(XYZ_FROM_RGB);
const TO_RGB: [[f32; 3]; 3] = narrow(RGB_FROM_XYZ);

/// sRGB in 0…1, interleaved, → CIELAB, interleaved (L in 0…100).
pub fn rgb_to_lab(rgb: &[f32]) -> Vec<f32> {
    rgb.as_chunks::<3>().0.iter().flat_map(|&pixel| lab_of(pixel)).collect()
}

/// CIELAB, interleaved, → sRGB, interleaved and clipped to 0…1.
pub fn lab_to_rgb(lab: &[f32]) -> Vec<f32> {
    lab.as_chunks::<3>().0.iter().flat_map(|&pixel| rgb_of(pixel)).collect()
}

/// Moves the colours of every frame of `video` (3, F, H, W) towards those of `reference` (3, 1, H', W'),
/// both `f32` RGB in [-1, 1]; `strength` in 0…1 blends the clipped original (0) with the matched frame (1).
///
/// # Errors
/// When `strength` is outside 0…1 or a shape is not as above.
pub fn match_colors(video: &Tensor, reference: &Tensor, strength: f64) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&strength) {
        bail!("the strength of colour matching is {strength}, expected 0 to 1")
    }
    let (3, frames, height, width) = video.dims4()? else {
        bail!("a video to colour-match has shape {:?}, expected (3, frames, height, width)", video.dims())
    };
    let (3, 1, ..) = reference.dims4()? else {
        bail!("a colour reference has shape {:?}, expected (3, 1, height, width)", reference.dims())
    };
    let area = height * width;
    let reference = unit(reference)?;
    let target = Stats::of(&lab_planes(&reference, 0, 1, reference.len() / 3));

    let mut values = unit(video)?;
    let matched: Vec<_> = (0..frames)
        .into_par_iter()
        .map(|frame| {
            let mut lab = lab_planes(&values, frame, frames, area);
            let own = Stats::of(&lab);
            lab.iter_mut().zip(0..3).for_each(|(plane, c)| own.moved_to(&target, c, plane));
            blended(&values, &lab, (frame, frames, area), strength as f32)
        })
        .collect();
    for (frame, planes) in matched.into_iter().enumerate() {
        for (c, plane) in planes.into_iter().enumerate() {
            values[(c * frames + frame) * area..][..area].copy_from_slice(&plane);
        }
    }
    Tensor::from_vec(values, (3, frames, height, width), video.device())
}

/// [-1, 1] → 0…1, clipped, as planes.
fn unit(video: &Tensor) -> Result<Vec<f32>> {
    let mut values = video.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    values.par_iter_mut().with_min_len(1 << 14).for_each(|x| *x = ((*x + 1.0) / 2.0).clamp(0.0, 1.0));
    Ok(values)
}

/// The pixel `i` of a frame of `area` pixels in planes of `frames` frames.
#[inline(always)]
fn pixel(values: &[f32], (frame, frames, area): (usize, usize, usize), i: usize) -> [f32; 3] {
    std::array::from_fn(|c| values[(c * frames + frame) * area + i])
}

/// One frame as planes of L, a and b.
fn lab_planes(values: &[f32], frame: usize, frames: usize, area: usize) -> [Vec<f32>; 3] {
    Arch::new().dispatch(ToLab { values, at: (frame, frames, area) })
}

/// The planes of `lab` as RGB in [-1, 1], mixed with the frame they were made from.
fn blended(values: &[f32], lab: &[Vec<f32>; 3], at: (usize, usize, usize), strength: f32) -> [Vec<f32>; 3] {
    Arch::new().dispatch(Blend { values, lab, at, strength })
}

/// The loop of [`lab_planes`]. A type, because a closure would not be inlined into the function that is
/// compiled with the processor's fused multiply-add, and would call one in software.
struct ToLab<'a> {
    values: &'a [f32],
    at: (usize, usize, usize),
}

impl WithSimd for ToLab<'_> {
    type Output = [Vec<f32>; 3];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let area = self.at.2;
        let mut planes = [(); 3].map(|()| vec![0.0; area]);
        let [l, a, b] = &mut planes;
        for i in 0..area {
            [l[i], a[i], b[i]] = lab_of(pixel(self.values, self.at, i));
        }
        planes
    }
}

/// The loop of [`blended`].
struct Blend<'a> {
    values: &'a [f32],
    lab: &'a [Vec<f32>; 3],
    at: (usize, usize, usize),
    strength: f32,
}

impl WithSimd for Blend<'_> {
    type Output = [Vec<f32>; 3];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { values, lab, at, strength } = self;
        let mut planes = [(); 3].map(|()| vec![0.0; at.2]);
        for i in 0..at.2 {
            let corrected = rgb_of([lab[0][i], lab[1][i], lab[2][i]]);
            let original = pixel(values, at, i);
            for c in 0..3 {
                planes[c][i] = ((1.0 - strength) * original[c] + strength * corrected[c]) * 2.0 - 1.0;
            }
        }
        planes
    }
}

/// Mean and population standard deviation of each CIELAB channel.
struct Stats {
    mean: [f32; 3],
    deviation: [f32; 3],
}

impl Stats {
    fn of(planes: &[Vec<f32>; 3]) -> Self {
        let stats = planes.each_ref().map(|plane| {
            let count = plane.len() as f32;
            let mean = pairwise_sum(plane) / count;
            let squares: Vec<f32> = plane.iter().map(|v| (v - mean) * (v - mean)).collect();
            (mean, (pairwise_sum(&squares) / count).sqrt())
        });
        Self { mean: stats.map(|s| s.0), deviation: stats.map(|s| s.1) }
    }

    /// Gives the channel `c` in `plane`, whose statistics these are, the statistics of `target`.
    fn moved_to(&self, target: &Self, c: usize, plane: &mut [f32]) {
        let (mean, deviation) = (self.mean[c], self.deviation[c]);
        if deviation == 0.0 {
            plane.fill(target.mean[c]);
            return;
        }
        let gain = target.deviation[c] / deviation;
        plane.iter_mut().for_each(|v| *v = (*v - mean) * gain + target.mean[c]);
    }
}

/// Sum in the order of NumPy's `add.reduce`: halves down to 128 values, which eight partial sums share.
fn pairwise_sum(values: &[f32]) -> f32 {
    const BLOCK: usize = 128;
    let (eights, rest) = values.as_chunks::<8>();
    match eights.split_first() {
        None => rest.iter().sum(),
        Some((first, others)) if values.len() <= BLOCK => {
            let mut r = *first;
            others.iter().for_each(|eight| r.iter_mut().zip(eight).for_each(|(sum, v)| *sum += v));
            let sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
            rest.iter().fold(sum, |sum, v| sum + v)
        }
        Some(_) => {
            let half = values.len() / 2;
            let (a, b) = values.split_at(half - half % 8);
            pairwise_sum(a) + pairwise_sum(b)
        }
    }
}

#[inline(always)]
fn lab_of(rgb: [f32; 3]) -> [f32; 3] {
    let linear = rgb.map(|v| if v > 0.04045 { ((v + 0.055) / 1.055).powf(2.4) } else { v / 12.92 });
    let xyz = product(&TO_XYZ, linear);
    let [x, y, z]: [f32; 3] = std::array::from_fn(|i| {
        let v = xyz[i] / WHITE[i];
        if v > 0.008856 { v.cbrt() } else { 7.787 * v + 16.0 / 116.0 }
    });
    [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
}

#[inline(always)]
fn rgb_of([l, a, b]: [f32; 3]) -> [f32; 3] {
    let y = (l + 16.0) / 116.0;
    let f = [a / 500.0 + y, y, (y - b / 200.0).max(0.0)];
    let xyz = std::array::from_fn(|i| {
        let v = if f[i] > 0.2068966 { f[i] * f[i] * f[i] } else { (f[i] - 16.0 / 116.0) / 7.787 };
        v * WHITE[i]
    });
    product(&TO_RGB, xyz).map(|v| {
        let encoded = if v > 0.0031308 { 1.055 * v.powf(1.0 / 2.4) - 0.055 } else { v * 12.92 };
        encoded.clamp(0.0, 1.0)
    })
}

#[inline(always)]
fn product(matrix: &[[f32; 3]; 3], v: [f32; 3]) -> [f32; 3] {
    // One rounding per term, in this order, as the reference's matrix product has it.
    matrix.map(|row| v[2].mul_add(row[2], v[1].mul_add(row[1], v[0] * row[0])))
}

/// Inverse by cofactors.
const fn inverse(m: [[f64; 3]; 3]) -> [[f64; 3]; 3] {
    let mut cofactors = [[0.0; 3]; 3];
    let mut i = 0;
    while i < 9 {
        let (row, column) = (i / 3, i % 3);
        let (r1, r2, c1, c2) = ((row + 1) % 3, (row + 2) % 3, (column + 1) % 3, (column + 2) % 3);
        cofactors[column][row] = m[r1][c1] * m[r2][c2] - m[r1][c2] * m[r2][c1];
        i += 1;
    }
    let determinant = m[0][0] * cofactors[0][0] + m[0][1] * cofactors[1][0] + m[0][2] * cofactors[2][0];
    let mut i = 0;
    while i < 9 {
        cofactors[i / 3][i % 3] /= determinant;
        i += 1;
    }
    cofactors
}

const fn narrow(m: [[f64; 3]; 3]) -> [[f32; 3]; 3] {
    let mut out = [[0.0; 3]; 3];
    let mut i = 0;
    while i < 9 {
        out[i / 3][i % 3] = m[i / 3][i % 3] as f32;
        i += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn picture(frames: usize, side: usize, seed: usize) -> Tensor {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 1000) as f32 / 600.0 - 0.8;
        let values: Vec<f32> = (0..3 * frames * side * side).map(value).collect();
        Tensor::from_vec(values, (3, frames, side, side), &Device::Cpu).unwrap()
    }

    fn values(xs: &Tensor) -> Vec<f32> {
        xs.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn known_colours() {
        let lab = rgb_to_lab(&[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        // CIELAB of sRGB white and red (Lindbloom).
        for (got, expected) in lab.iter().zip([100.0, 0.0, 0.0, 53.24, 80.09, 67.2]) {
            assert!((got - expected).abs() < 0.02, "{lab:?}");
        }
    }

    #[test]
    fn there_and_back() {
        let rgb: Vec<f32> = (0..300).map(|i| (i * 37 % 256) as f32 / 255.0).collect();
        let back = lab_to_rgb(&rgb_to_lab(&rgb));
        assert!(rgb.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn a_frame_matched_to_itself_stays() {
        let frame = picture(1, 16, 1);
        let matched = match_colors(&frame, &frame, 1.0).unwrap();
        assert!(values(&frame).iter().zip(values(&matched)).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    #[test]
    fn frames_do_not_influence_one_another() {
        let (video, reference) = (picture(3, 12, 2), picture(1, 9, 3));
        let whole = match_colors(&video, &reference, 0.7).unwrap();
        for i in 0..3 {
            let alone = match_colors(&video.narrow(1, i, 1).unwrap(), &reference, 0.7).unwrap();
            assert_eq!(values(&whole.narrow(1, i, 1).unwrap()), values(&alone));
        }
    }

    #[test]
    fn a_frame_of_one_colour_takes_the_mean() {
        // Black, whose sums have no rounding error in any order.
        let flat = Tensor::full(-1f32, (3, 1, 8, 8), &Device::Cpu).unwrap();
        let reference = picture(1, 8, 4);
        let matched = values(&match_colors(&flat, &reference, 1.0).unwrap());
        let target = Stats::of(&lab_planes(&unit(&reference).unwrap(), 0, 1, 64));
        let expected = rgb_of(target.mean).map(|v| v * 2.0 - 1.0);
        for (c, plane) in matched.chunks(64).enumerate() {
            assert!(plane.iter().all(|v| (v - expected[c]).abs() < 1e-6));
        }
    }

    #[test]
    fn sums_are_exact_where_they_can_be() {
        for count in [0usize, 1, 7, 8, 9, 127, 128, 129, 1000, 4097] {
            let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            assert_eq!(pairwise_sum(&values), (count * count.saturating_sub(1) / 2) as f32, "{count}");
        }
    }

    #[test]
    fn strength_zero_clips_and_more_than_one_is_refused() {
        let video = Tensor::new(&[1.5f32, -1.5, 0.25], &Device::Cpu).unwrap().reshape((3, 1, 1, 1)).unwrap();
        assert_eq!(values(&match_colors(&video, &video, 0.0).unwrap()), [1.0, -1.0, 0.25]);
        assert!(match_colors(&video, &video, 1.1).unwrap_err().to_string().contains("1.1"));
        assert!(match_colors(&video, &video, f64::NAN).is_err());
    }
}
