//! Rotary position embeddings on adjacent channel pairs (2i, 2i+1).

use std::mem::MaybeUninit;

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::cpu::{self, Values};

/// Positions that one axis of a video can have, as in the reference's tables.
const MAX_POSITIONS: usize = 1024;
/// The slowest pair turns by one radian in about this many positions.
const THETA: f64 = 10000.0;

/// The rotation of L tokens: cosine and sine of each channel pair's angle.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor, // (L, D / 2), f32
    sin: Tensor, // (L, D / 2), f32
}

impl Rope {
    /// The rotation of tokens on `grid` (frames, rows, columns), columns fastest, for heads of `head_dim`
    /// channels: of the channel pairs, the last two thirds (rounded down each) turn with row and column, the
    /// others with the frame. Angles are computed in f64.
    pub fn grid(grid: (usize, usize, usize), head_dim: usize, device: &Device) -> Result<Self> {
        let (frames, rows, cols) = grid;
        if frames.max(rows).max(cols) > MAX_POSITIONS {
            bail!("a grid of {frames} × {rows} × {cols} tokens, expected at most {MAX_POSITIONS} per axis")
        }
        let half = head_dim / 2;
        let axis_pairs = [half - 2 * (half / 3), half / 3, half / 3];
        let lengths = [frames, rows, cols];
        // Cosine and sine by axis, position and pair.
        let tables: Vec<Vec<(f32, f32)>> = (axis_pairs.iter().zip(lengths))
            .map(|(&pairs, len)| {
                let angle = |position: usize, pair: usize| {
                    position as f64 * THETA.powf(-(pair as f64) / pairs as f64)
                };
                (0..len * pairs)
                    .map(|i| angle(i / pairs, i % pairs))
                    .map(|a| (a.cos() as f32, a.sin() as f32))
                    .collect()
            })
            .collect();
        let mut cos = Vec::<f32>::with_capacity(frames * rows * cols * half);
        let mut sin = Vec::<f32>::with_capacity(frames * rows * cols * half);
        for token in 0..frames * rows * cols {
            let positions = [token / (rows * cols), token / cols % rows, token % cols];
            for ((table, pairs), position) in tables.iter().zip(axis_pairs).zip(positions) {
                let row = &table[position * pairs..][..pairs];
                cos.extend(row.iter().map(|(c, _)| c));
                sin.extend(row.iter().map(|(_, s)| s));
            }
        }
        let shape = (frames * rows * cols, half);
        Ok(Self { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// The rotation of tokens at `positions` (L), for heads of `head_dim` channels, in f32.
    pub fn positions(positions: &Tensor, head_dim: usize) -> Result<Self> {
        let frequency = |pair: usize| (1.0 / THETA.powf((2 * pair) as f64 / head_dim as f64)) as f32;
        let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
        let frequencies = Tensor::new(frequencies, positions.device())?.unsqueeze(0)?;
        let angles = positions.to_dtype(DType::F32)?.unsqueeze(1)?.broadcast_mul(&frequencies)?; // (L, D / 2)
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// Turns the channel pairs of `xs` (B, L, N, D), in f32, with the result in the dtype of `xs`.
    pub fn rotate(&self, xs: &Tensor) -> Result<Tensor> {
        let (_, len, _, dim) = xs.dims4()?;
        if dim % 2 != 0 || self.cos.dims2()? != (len, dim / 2) {
            bail!("{len} tokens with heads of {dim} do not fit a rotation of {:?} pairs", self.cos.shape())
        }
        if cpu::runs_on(&[xs, &self.cos]) {
            return self.rotate_cpu(xs);
        }
        #[cfg(feature = "cuda")]
        if let Some(turned) = super::cuda::rms_rope(&xs.flatten_from(2)?, None, Some((&self.cos, &self.sin)))?
        {
            return turned.reshape(xs.shape());
        }
        self.rotate_composed(xs)
    }

    /// Cosines and sines (L, D / 2), if the rotation is of `len` tokens and heads of `head_dim` channels.
    #[cfg(feature = "cuda")]
    pub(super) fn angles_of(&self, len: usize, head_dim: usize) -> Option<(&Tensor, &Tensor)> {
        (self.cos.dims() == [len, head_dim / 2]).then_some((&self.cos, &self.sin))
    }

    fn rotate_composed(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, len, heads, dim) = xs.dims4()?;
        let pairs = xs.to_dtype(DType::F32)?.reshape((batch, len, heads, dim / 2, 2))?;
        let (re, im) = (pairs.get_on_dim(4, 0)?, pairs.get_on_dim(4, 1)?); // (B, L, N, D / 2)
        let (cos, sin) = (self.cos.unsqueeze(1)?, self.sin.unsqueeze(1)?); // (L, 1, D / 2)
        let turned_re = (re.broadcast_mul(&cos)? - im.broadcast_mul(&sin)?)?;
        let turned_im = (re.broadcast_mul(&sin)? + im.broadcast_mul(&cos)?)?;
        let turned = Tensor::stack(&[turned_re, turned_im], D::Minus1)?;
        turned.reshape((batch, len, heads, dim))?.to_dtype(xs.dtype())
    }

    fn rotate_cpu(&self, xs: &Tensor) -> Result<Tensor> {
        let (_, len, heads, dim) = xs.dims4()?;
        let (xs, half, row_len) = (xs.contiguous()?, dim / 2, heads * dim);
        let (values, cos, sin) = (Values::new(&xs), Values::new(&self.cos), Values::new(&self.sin));
        let (values, cos, sin) = (values.contiguous()?, cos.contiguous()?, sin.contiguous()?);
        // SAFETY: the pairs of all heads of all rows are written; `dim` is even.
        unsafe {
            cpu::build(xs.shape(), |out| {
                cpu::for_rows(out, row_len, |first, out| {
                    let values = &values[first * row_len..][..out.len()];
                    cpu::vectorized(
                        #[inline(always)]
                        || {
                            let rows = values.chunks_exact(row_len).zip(out.chunks_exact_mut(row_len));
                            for (i, (xs, out)) in rows.enumerate() {
                                let token = (first + i) % len;
                                let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                                for (xs, out) in xs.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
                                    turn(xs, cos, sin, out);
                                }
                            }
                        },
                    );
                });
                Ok(())
            })
        }
    }
}

/// Turns the pairs of one head.
#[inline(always)]
fn turn(xs: &[f32], cos: &[f32], sin: &[f32], out: &mut [MaybeUninit<f32>]) {
    let (xs, out) = (xs.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
    for (([re, im], [out_re, out_im]), (c, s)) in xs.iter().zip(out).zip(cos.iter().zip(sin)) {
        out_re.write(re * c - im * s);
        out_im.write(re * s + im * c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(xs: &Tensor) -> Vec<f32> {
        xs.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_kernel_equals_the_composition() {
        for (grid, heads, dim) in [((3, 2, 4), 3, 20), ((1, 1, 1), 1, 2), ((5, 7, 9), 8, 32)] {
            let len = grid.0 * grid.1 * grid.2;
            let xs = Tensor::randn(0f32, 1., (2, len, heads, dim), &Device::Cpu).unwrap();
            let rope = Rope::grid(grid, dim, &Device::Cpu).unwrap();
            let (actual, expected) = (rope.rotate(&xs).unwrap(), rope.rotate_composed(&xs).unwrap());
            let worst =
                values(&actual).iter().zip(values(&expected)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-6, "{worst}");
        }
    }

    #[test]
    fn pairs_turn_with_frame_row_and_column_in_that_order() {
        // Ten pairs: four of the frame, three of the row, three of the column.
        let ones = Tensor::ones((1, 8, 1, 20), DType::F32, &Device::Cpu).unwrap();
        let turned = Rope::grid((2, 2, 2), 20, &Device::Cpu).unwrap().rotate(&ones).unwrap();
        let turned = values(&turned);
        let moved = |token: usize| {
            let pair = |i: usize| turned[token * 20 + 2 * i] != 1.0;
            [pair(0), pair(4), pair(7)]
        };
        assert_eq!(moved(1), [false, false, true]);
        assert_eq!(moved(2), [false, true, false]);
        assert_eq!(moved(4), [true, false, false]);
    }

    #[test]
    fn a_grid_of_one_axis_equals_positions() {
        // Two channels are one pair, which turns with the frame.
        let grid = Rope::grid((4, 1, 1), 2, &Device::Cpu).unwrap();
        let positions = Rope::positions(&Tensor::new(&[0f32, 1., 2., 3.], &Device::Cpu).unwrap(), 2).unwrap();
        let xs = Tensor::randn(0f32, 1., (1, 4, 1, 2), &Device::Cpu).unwrap();
        assert_eq!(values(&grid.rotate(&xs).unwrap()), values(&positions.rotate(&xs).unwrap()));
    }

    #[test]
    fn refuses_grids_and_rows_that_do_not_fit() {
        assert!(Rope::grid((1, 1025, 1), 8, &Device::Cpu).is_err());
        let rope = Rope::grid((1, 2, 3), 8, &Device::Cpu).unwrap();
        assert!(rope.rotate(&Tensor::zeros((1, 5, 1, 8), DType::F32, &Device::Cpu).unwrap()).is_err());
        assert!(rope.rotate(&Tensor::zeros((1, 6, 1, 6), DType::F32, &Device::Cpu).unwrap()).is_err());
        assert!(rope.rotate(&Tensor::zeros((1, 6, 1, 9), DType::F32, &Device::Cpu).unwrap()).is_err());
    }
}
