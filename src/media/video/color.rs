//! RGB to planar YCbCr 4:2:0, ITU-R BT.709, limited range.
//!
//! The matrix is spelled out and the file is tagged with it, because players guess for untagged
//! files: BT.601 below 720 lines, BT.709 from there on, and then reds and greens shift.

use pulp::Arch;

use super::encode_error;
use crate::Result;

/// Luma weights of red and blue in BT.709; green has the rest.
const KR: f64 = 0.2126;
const KB: f64 = 0.0722;
/// Limited range: luma spans 219 steps from 16, chroma 224 steps around 128.
const LUMA: f64 = 219.0 / 255.0;
const CHROMA: f64 = 224.0 / 255.0;

/// Fractional bits of the luma weights. Chroma adds up four pixels first, which is two bits more.
const BITS: u32 = 16;

const fn fixed(x: f64) -> i32 {
    let scaled = x * (1 << BITS) as f64;
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

// The weight of green is what the others leave, so that white is exactly 235 and grey has no chroma.
const Y_R: i32 = fixed(KR * LUMA);
const Y_B: i32 = fixed(KB * LUMA);
const Y_G: i32 = fixed(LUMA) - Y_R - Y_B;
const U_R: i32 = fixed(-0.5 * KR / (1.0 - KB) * CHROMA);
const U_B: i32 = fixed(0.5 * CHROMA);
const U_G: i32 = -(U_R + U_B);
const V_R: i32 = fixed(0.5 * CHROMA);
const V_B: i32 = fixed(-0.5 * KB / (1.0 - KR) * CHROMA);
const V_G: i32 = -(V_R + V_B);

/// One picture as three planes: `y` (H, W), `u` and `v` (H/2, W/2), row-major without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct I420 {
    width: usize,
    height: usize,
    pub(super) y: Vec<u8>,
    pub(super) u: Vec<u8>,
    pub(super) v: Vec<u8>,
}

impl I420 {
    /// A black picture of `width` × `height` pixels to convert into.
    ///
    /// # Errors
    /// Kind `Encode` when a side is odd, as chroma has half the resolution, or not in 2…4096.
    pub fn new(width: usize, height: usize) -> Result<Self> {
        check_size(width, height, 2)?;
        let (luma, chroma) = (width * height, width * height / 4);
        Ok(Self { width, height, y: vec![16; luma], u: vec![128; chroma], v: vec![128; chroma] })
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The planes `[y, u, v]`: (H, W) luma in 16…235, (H/2, W/2) chroma in 16…240.
    pub fn planes(&self) -> [&[u8]; 3] {
        [&self.y, &self.u, &self.v]
    }

    /// Replaces the picture by `rgb`, 8-bit RGB, row-major (H, W, 3). Chroma is the mean of 2×2 pixels;
    /// every value is within 1 of the exactly rounded one.
    ///
    /// # Errors
    /// Kind `Encode` when `rgb` is not H·W·3 bytes long.
    pub fn convert_from_rgb(&mut self, rgb: &[u8]) -> Result<()> {
        let expected = self.width * self.height * 3;
        if rgb.len() != expected {
            return Err(encode_error(format!(
                "a video frame has {} bytes, expected {expected} ({}×{} RGB)",
                rgb.len(),
                self.width,
                self.height
            )));
        }
        // The closure is compiled for each instruction set and the best one is chosen at run time.
        Arch::new().dispatch(|| convert(rgb, self));
        Ok(())
    }
}

/// The longest side of a picture; beyond it OpenH264 has no level.
const MAX_SIDE: usize = 4096;

/// Refuses sides that are odd or not in `min_side`…[`MAX_SIDE`].
pub(super) fn check_size(width: usize, height: usize, min_side: usize) -> Result<()> {
    let fits = |side: usize| side.is_multiple_of(2) && (min_side..=MAX_SIDE).contains(&side);
    if fits(width) && fits(height) {
        return Ok(());
    }
    let message =
        format!("the video is {width}×{height} pixels, expected even sides in {min_side}…{MAX_SIDE}");
    Err(encode_error(message).with_reason("VIDEO_DIMENSIONS"))
}

#[inline(always)]
fn convert(rgb: &[u8], out: &mut I420) {
    let width = out.width;
    let rows = rgb.chunks_exact(2 * 3 * width);
    let chroma = out.u.chunks_exact_mut(width / 2).zip(out.v.chunks_exact_mut(width / 2));
    for ((rgb, y), (u, v)) in rows.zip(out.y.chunks_exact_mut(2 * width)).zip(chroma) {
        luma_rows(rgb, y);
        let (top, bottom) = rgb.split_at(3 * width);
        chroma_row(top, bottom, u, v);
    }
}

#[inline(always)]
fn luma_rows(rgb: &[u8], y: &mut [u8]) {
    const OFFSET: i32 = (16 << BITS) + (1 << (BITS - 1));
    for (pixel, y) in rgb.chunks_exact(3).zip(y) {
        let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(i32::from);
        *y = ((Y_R * r + Y_G * g + Y_B * b + OFFSET) >> BITS) as u8;
    }
}

#[inline(always)]
fn chroma_row(top: &[u8], bottom: &[u8], u: &mut [u8], v: &mut [u8]) {
    const SHIFT: u32 = BITS + 2;
    const OFFSET: i32 = (128 << SHIFT) + (1 << (SHIFT - 1));
    let squares = top.chunks_exact(6).zip(bottom.chunks_exact(6));
    for (((top, bottom), u), v) in squares.zip(u).zip(v) {
        let sum = |c: usize| {
            i32::from(top[c]) + i32::from(top[c + 3]) + i32::from(bottom[c]) + i32::from(bottom[c + 3])
        };
        let [r, g, b] = [sum(0), sum(1), sum(2)];
        *u = ((U_R * r + U_G * g + U_B * b + OFFSET) >> SHIFT) as u8;
        *v = ((V_R * r + V_G * g + V_B * b + OFFSET) >> SHIFT) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// The definition, in f64, rounded once.
    fn reference(rgb: &[u8], width: usize, height: usize) -> [Vec<u8>; 3] {
        let pixel = |x: usize, y: usize| -> [f64; 3] {
            std::array::from_fn(|c| f64::from(rgb[(y * width + x) * 3 + c]))
        };
        let weigh = |[r, g, b]: [f64; 3]| KR * r + (1.0 - KR - KB) * g + KB * b;
        let (mut luma, mut u, mut v) = (vec![], vec![], vec![]);
        for y in 0..height {
            luma.extend((0..width).map(|x| (16.0 + LUMA * weigh(pixel(x, y))).round() as u8));
        }
        for y in (0..height).step_by(2) {
            for x in (0..width).step_by(2) {
                let square = [pixel(x, y), pixel(x + 1, y), pixel(x, y + 1), pixel(x + 1, y + 1)];
                let mean: [f64; 3] = std::array::from_fn(|c| square.iter().map(|p| p[c]).sum::<f64>() / 4.0);
                let grey = weigh(mean);
                u.push((128.0 + CHROMA * (mean[2] - grey) * 0.5 / (1.0 - KB)).round() as u8);
                v.push((128.0 + CHROMA * (mean[0] - grey) * 0.5 / (1.0 - KR)).round() as u8);
            }
        }
        [luma, u, v]
    }

    #[test]
    fn fixed_point_is_within_one_of_the_definition() {
        let mut rng = StdRng::seed_from_u64(7);
        // Widths that are and are not multiples of a vector register.
        for (width, height) in [(2, 2), (66, 34), (128, 64), (350, 130)] {
            let rgb: Vec<u8> = (0..width * height * 3).map(|_| rng.random()).collect();
            let mut picture = I420::new(width, height).unwrap();
            picture.convert_from_rgb(&rgb).unwrap();
            for (ours, exact) in picture.planes().into_iter().zip(reference(&rgb, width, height)) {
                assert_eq!(ours.len(), exact.len());
                let worst = ours.iter().zip(&exact).map(|(a, b)| a.abs_diff(*b)).max();
                assert!(worst <= Some(1), "{width}×{height}: off by {worst:?}");
                let off = ours.iter().zip(&exact).filter(|(a, b)| a != b).count();
                assert!(off * 500 <= ours.len().max(500), "{off} of {} samples are off", ours.len());
            }
        }
    }

    #[test]
    fn greys_have_no_chroma_and_the_ends_are_the_limited_range() {
        for (level, luma) in [(0, 16), (255, 235), (128, 126)] {
            let mut picture = I420::new(4, 2).unwrap();
            picture.convert_from_rgb(&[level; 4 * 2 * 3]).unwrap();
            assert_eq!(picture.planes(), [&[luma; 8][..], &[128; 2], &[128; 2]]);
        }
    }

    #[test]
    fn odd_empty_and_huge_sides_are_refused_by_name() {
        for (width, height) in [(5, 4), (4, 5), (0, 4), (4, 0), (4, 4098), (usize::MAX - 1, 2)] {
            let error = I420::new(width, height).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Encode);
            assert_eq!(error.reason(), Some("VIDEO_DIMENSIONS"));
            assert!(error.to_string().contains(&format!("{width}×{height}")), "{error}");
        }
        let error = I420::new(4, 2).unwrap().convert_from_rgb(&[0; 23]).unwrap_err();
        assert!(error.to_string().contains("23 bytes, expected 24"), "{error}");
    }
}
