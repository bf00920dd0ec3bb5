//! The inner loop: a block of output pixels × registers of output channels, accumulated in registers.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

/// Registers that one pixel of a panel fills at most: with 8 pixels (24 accumulators) and the weights' 3 they
/// just fit AVX-512's 32.
pub(super) const MAX_VECTORS: usize = 3;

/// Bytes of weights that are applied to a whole tile before the next ones: they stay in the second-level cache
/// (1 MiB on recent servers) beside the tile's activations.
const WEIGHT_BLOCK_BYTES: usize = 192 << 10;

/// The weights of some registers of the output.
pub(super) struct Panel {
    /// Output float of a pixel that lane 0 of the first register computes.
    pub(super) first: usize,
    /// Registers, 1…[`MAX_VECTORS`].
    pub(super) vectors: usize,
    /// (window positions, vectors · lanes)
    pub(super) weights: Vec<f32>,
    /// (vectors · lanes)
    pub(super) bias: Vec<f32>,
}

/// `len` consecutive floats of each pixel's window: those of pixel `p` begin at `x[p.x]` and meet the weights of
/// window positions `weights…`.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) x: &'a [f32],
    pub(super) weights: usize,
    pub(super) len: usize,
}

/// One output pixel: its input begins at offset `x` of each run, its output is `out[y..y + len]`.
#[derive(Clone, Copy)]
pub(super) struct Pixel {
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) len: usize,
}

/// Output pixels that are computed from the same runs.
pub(super) struct Tile<'a> {
    pub(super) panels: &'a [Panel],
    pub(super) runs: &'a [Run<'a>],
    pub(super) pixels: &'a [Pixel],
    /// Added to the output; as long as `out`.
    pub(super) residual: Option<&'a [f32]>,
    pub(super) out: &'a mut [f32],
}

/// Floats in a register of `arch`.
pub(super) fn lanes(arch: Arch) -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    arch.dispatch(Lanes)
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let longest = self.pixels.iter().map(|p| p.x).max().unwrap_or(0);
        for run in self.runs {
            assert!(longest + run.len <= run.x.len(), "a run ends before a pixel's window does");
        }
        for panel in self.panels {
            // Accumulators, weights and one broadcast value fit the registers of the instruction set.
            match (S::REGISTER_COUNT >= 32, panel.vectors) {
                (true, 1) => run_panel::<S, 8, 1>(simd, panel, &mut self),
                (true, 2) => run_panel::<S, 8, 2>(simd, panel, &mut self),
                (true, _) => run_panel::<S, 8, 3>(simd, panel, &mut self),
                (false, 1) => run_panel::<S, 8, 1>(simd, panel, &mut self),
                (false, 2) => run_panel::<S, 6, 2>(simd, panel, &mut self),
                (false, _) => run_panel::<S, 4, 3>(simd, panel, &mut self),
            }
        }
    }
}

/// Computes `V` registers of every pixel, `P` pixels at a time.
#[inline(always)]
fn run_panel<S: Simd, const P: usize, const V: usize>(simd: S, panel: &Panel, tile: &mut Tile) {
    let width = V * S::F32_LANES;
    assert!(panel.vectors == V && panel.bias.len() == width);
    let (bias, _) = S::as_simd_f32s(&panel.bias);
    let mut rest = tile.runs;
    let mut done = 0;
    let mut block = Vec::with_capacity(rest.len());
    let mut is_first = true;
    // At least once: without any run, the output is the bias.
    while is_first || !rest.is_empty() {
        next_block(&mut rest, &mut done, WEIGHT_BLOCK_BYTES / (4 * width), &mut block);
        for pixels in tile.pixels.chunks(P) {
            let mut acc = [[simd.splat_f32s(0.0); V]; P];
            for (acc, pixel) in acc.iter_mut().zip(pixels) {
                for (v, acc) in acc.iter_mut().enumerate() {
                    let range = lane_range::<S>(pixel, panel.first + v * S::F32_LANES);
                    *acc = if !is_first {
                        simd.partial_load_f32s(&tile.out[range])
                    } else if let Some(residual) = tile.residual {
                        simd.add_f32s(bias[v], simd.partial_load_f32s(&residual[range]))
                    } else {
                        bias[v]
                    };
                }
            }
            // Past the last pixel the block computes it again, and does not store it.
            let mut offsets = [0; P];
            for (p, offset) in offsets.iter_mut().enumerate() {
                *offset = pixels[p.min(pixels.len() - 1)].x;
            }
            for run in &block {
                // SAFETY: `with_simd` has checked every run against the largest offset; blocks only split runs.
                unsafe { accumulate::<S, P, V>(simd, run, &panel.weights, &offsets, &mut acc) };
            }
            for (acc, pixel) in acc.iter().zip(pixels) {
                for (v, acc) in acc.iter().enumerate() {
                    let range = lane_range::<S>(pixel, panel.first + v * S::F32_LANES);
                    simd.partial_store_f32s(&mut tile.out[range], *acc);
                }
            }
        }
        is_first = false;
    }
}

/// Where the floats `first…` of `pixel`, one register of them, lie in the output.
#[inline(always)]
fn lane_range<S: Simd>(pixel: &Pixel, first: usize) -> Range<usize> {
    pixel.y + first.min(pixel.len)..pixel.y + (first + S::F32_LANES).min(pixel.len)
}

/// Moves runs of together at most `positions` window positions from the front of `rest`, of whose first run
/// `done` positions are already taken, into `block`.
fn next_block<'a>(rest: &mut &[Run<'a>], done: &mut usize, positions: usize, block: &mut Vec<Run<'a>>) {
    block.clear();
    let mut room = positions.max(1);
    while let Some((run, tail)) = rest.split_first() {
        let len = (run.len - *done).min(room);
        block.push(Run { x: &run.x[*done..], weights: run.weights + *done, len });
        room -= len;
        *done += len;
        if *done == run.len {
            (*rest, *done) = (tail, 0);
        }
        if room == 0 {
            break;
        }
    }
}

/// Adds the products of one run to the accumulators.
///
/// # Safety
/// `offsets[p] + run.len <= run.x.len()` for every p.
#[inline(always)]
unsafe fn accumulate<S: Simd, const P: usize, const V: usize>(
    simd: S,
    run: &Run,
    weights: &[f32],
    offsets: &[usize; P],
    acc: &mut [[S::f32s; V]; P],
) {
    let (weights, _) = S::as_simd_f32s(weights);
    let weights = &weights[run.weights * V..(run.weights + run.len) * V];
    let mut xs = [run.x.as_ptr(); P];
    for p in 0..P {
        // SAFETY: the caller says that the offset lies inside of the slice.
        xs[p] = unsafe { run.x.as_ptr().add(offsets[p]) };
    }
    let mut sums = *acc;
    for (k, weights) in weights.chunks_exact(V).enumerate() {
        for p in 0..P {
            // SAFETY: k < run.len, and the caller says that so many floats follow the offset. Checked slices
            // would cost P comparisons in a loop of P broadcasts.
            let x = simd.splat_f32s(unsafe { *xs[p].add(k) });
            for v in 0..V {
                sums[p][v] = simd.mul_add_e_f32s(x, weights[v], sums[p][v]);
            }
        }
    }
    *acc = sums;
}
