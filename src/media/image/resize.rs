//! Resizing that equals Pillow's `BILINEAR` to the last bit, and the cover-and-crop geometry around it.
//!
//! Pillow's filter is a triangle that widens when shrinking (so it antialiases), with coefficients of 22
//! fractional bits and a rounding to 8 bits after each of its two passes, the horizontal one first
//! (`libImaging/Resample.c`). Crates that resize differ from it by one step in 3 to 9 % of the pixels.

use rayon::prelude::*;

use super::Size;

/// Fractional bits of a coefficient: of 32 bits, 8 hold the pixel and 2 are kept free.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// How a picture is laid over a target: scaled to `scaled`, of which the part at `top`, `left` is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cover {
    pub scaled: Size,
    pub top: usize,
    pub left: usize,
}

impl Cover {
    /// The smallest scale at which `source` covers `target`, and the crop around the centre.
    pub fn new(source: Size, target: Size) -> Self {
        let scale =
            (target.height as f64 / source.height as f64).max(target.width as f64 / source.width as f64);
        let scaled = Size {
            height: (scale * source.height as f64).ceil() as usize,
            width: (scale * source.width as f64).ceil() as usize,
        };
        // Python's `round` takes halves to the even number.
        let offset =
            |all: usize, kept: usize| (all.saturating_sub(kept) as f64 / 2.0).round_ties_even() as usize;
        Self { scaled, top: offset(scaled.height, target.height), left: offset(scaled.width, target.width) }
    }
}

/// Scales `rgb` (H, W, 3) to cover `target` and cuts out the centre; only what is kept is computed.
pub(super) fn cover_rgb(rgb: &[u8], source: Size, target: Size) -> Vec<u8> {
    let cover = Cover::new(source, target);
    let columns = Kernel::new(source.width, cover.scaled.width, cover.left, target.width);
    let rows = Kernel::new(source.height, cover.scaled.height, cover.top, target.height);

    let stride = target.width * 3;
    let (first, last) = rows.reach();
    let mut narrowed = vec![0u8; (last - first) * stride];
    narrowed.par_chunks_exact_mut(stride).zip(first..last).for_each(|(out, y)| {
        let line = rgb[y * source.width * 3..][..source.width * 3].as_chunks::<3>().0;
        for (pixel, (start, weights)) in out.as_chunks_mut::<3>().0.iter_mut().zip(columns.entries()) {
            let mut sums = [1i32 << (PRECISION_BITS - 1); 3];
            for (p, &weight) in line[start..].iter().zip(weights) {
                (0..3).for_each(|c| sums[c] += i32::from(p[c]) * weight);
            }
            *pixel = sums.map(clip);
        }
    });

    let mut out = vec![0u8; target.height * stride];
    let entries: Vec<_> = rows.entries().collect();
    out.par_chunks_exact_mut(stride).zip(entries).for_each(|(line, (start, weights))| {
        let mut sums = vec![1i32 << (PRECISION_BITS - 1); stride];
        for (source, &weight) in narrowed[(start - first) * stride..].chunks_exact(stride).zip(weights) {
            sums.iter_mut().zip(source).for_each(|(sum, &v)| *sum += i32::from(v) * weight);
        }
        line.iter_mut().zip(sums).for_each(|(v, sum)| *v = clip(sum));
    });
    out
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// For each kept output position: the first input position and the weights from there on.
struct Kernel {
    entries: Vec<(usize, usize)>,
    weights: Vec<i32>,
    /// Weights stored per entry.
    width: usize,
}

impl Kernel {
    /// The triangle filter from `input` to `output` positions, of which `count` from `offset` on are kept.
    fn new(input: usize, output: usize, offset: usize, count: usize) -> Self {
        let scale = input as f64 / output as f64;
        let support = scale.max(1.0);
        let width = support.ceil() as usize * 2 + 1;
        let mut kernel = Self { entries: Vec::with_capacity(count), weights: vec![0; width * count], width };
        for (i, weights) in kernel.weights.chunks_exact_mut(width).enumerate() {
            let centre = ((offset + i) as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            let taps = (start..end).map(|x| (1.0 - ((x as f64 - centre + 0.5) / support).abs()).max(0.0));
            let total: f64 = taps.clone().sum();
            for (weight, tap) in weights.iter_mut().zip(taps) {
                *weight = (0.5 + tap / total * f64::from(1 << PRECISION_BITS)) as i32;
            }
            kernel.entries.push((start, end - start));
        }
        kernel
    }

    fn entries(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let rows = self.weights.chunks_exact(self.width);
        self.entries.iter().zip(rows).map(|(&(start, len), weights)| (start, &weights[..len]))
    }

    /// The input positions that are used at all: from, to.
    fn reach(&self) -> (usize, usize) {
        let first = self.entries.first().map_or(0, |e| e.0);
        (first, self.entries.last().map_or(first, |e| e.0 + e.1))
    }
}

/// For each of `output` positions the input position that torch's `nearest` takes, whose scale is an `f32`.
pub(super) fn nearest(input: usize, output: usize) -> impl Iterator<Item = usize> + Clone {
    let scale = input as f32 / output as f32;
    (0..output).map(move |i| ((i as f32 * scale) as usize).min(input.saturating_sub(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn the_crop_rounds_halves_to_even() {
        let cover = Cover::new(size(50, 70), size(64, 96));
        assert_eq!(cover, Cover { scaled: size(69, 96), top: 2, left: 0 });
        let cover = Cover::new(size(97, 131), size(40, 40));
        assert_eq!(cover, Cover { scaled: size(40, 55), top: 0, left: 8 });
    }

    #[test]
    fn the_same_size_is_the_same_picture() {
        let rgb: Vec<u8> = (0..9 * 7 * 3).map(|i| (i * 31 % 256) as u8).collect();
        assert_eq!(cover_rgb(&rgb, size(9, 7), size(9, 7)), rgb);
    }

    #[test]
    fn a_flat_picture_stays_flat_at_any_size() {
        for target in [size(3, 5), size(64, 20), size(200, 333)] {
            let out = cover_rgb(&[77; 41 * 29 * 3], size(41, 29), target);
            assert!(out.iter().all(|&v| v == 77) && out.len() == target.height * target.width * 3);
        }
    }

    #[test]
    fn shrinking_averages() {
        let stripes: Vec<u8> = (0..64 * 64).flat_map(|i| [if i % 2 == 0 { 0 } else { 200 }; 3]).collect();
        let out = cover_rgb(&stripes, size(64, 64), size(4, 4));
        assert!(out.iter().all(|v| (95..=105).contains(v)), "{out:?}");
    }

    #[test]
    fn nearest_takes_the_position_at_or_before() {
        assert_eq!(nearest(5, 3).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(nearest(2, 5).collect::<Vec<_>>(), [0, 0, 0, 1, 1]);
    }
}
