//! Weights in the order in which the kernel reads them.
//!
//! The kernel fills SIMD registers with consecutive floats of the output. In channels-last memory the channels
//! of one pixel are followed by those of the next, so where a pixel has fewer channels than a register has
//! lanes, several adjacent pixels share one register: they are computed as the channels of one *wide pixel*,
//! whose window is the union of theirs and whose weights are zero where a pixel does not look.
//!
//! A 3×3 convolution of an image whose rows and columns were doubled sees every source pixel up to four times.
//! It is computed from the source: each of the four pixels that take a source pixel's place has a 2×2 kernel of
//! its own, made of sums of the nine weights, which also takes 4/9 of the multiplications.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use pulp::Arch;

use super::Padding2d;
use super::kernel::{self, MAX_VECTORS, Panel};

/// Strides, padding and channel groups of a convolution.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct Geometry {
    /// In time, rows and columns.
    pub(in crate::nn) stride: (usize, usize, usize),
    pub(in crate::nn) padding: Padding2d,
    pub(in crate::nn) groups: usize,
    /// Whether rows and columns of the input are repeated before the convolution, which then is of 3×3 taps with
    /// stride and padding 1.
    pub(in crate::nn) doubled: bool,
}

impl Geometry {
    /// One group, nothing doubled.
    pub(super) fn new(stride: (usize, usize, usize), padding: Padding2d) -> Self {
        Self { stride, padding, groups: 1, doubled: false }
    }

    /// How often rows and columns of the input are repeated.
    pub(super) fn repeats(&self) -> usize {
        if self.doubled { 2 } else { 1 }
    }
}

/// A layer's weights, packed for the widest instruction set of this machine.
pub(super) struct Packed {
    /// The instruction set whose registers the weights are packed for.
    pub(super) arch: Arch,
    pub(super) geometry: Geometry,
    /// Frames, rows and columns of the input under a wide pixel.
    pub(super) window: (usize, usize, usize),
    /// Columns, in steps of the stride, that one wide pixel covers.
    pub(super) wide: usize,
    /// Consecutive output floats for each of them.
    pub(super) floats_per_column: usize,
    /// What together makes the output.
    pub(super) parts: Vec<Part>,
    channels: (usize, usize),
    kernel: (usize, usize, usize),
}

/// Some of the output's channels or, where the input is doubled, some of the pixels.
pub(super) struct Part {
    /// Row and column of the window, and channel, where this part's input begins.
    pub(super) input: Offset,
    /// Row and column among the repeated pixels, and channel, where its output begins.
    pub(super) output: Offset,
    /// Rows that it looks at.
    pub(super) rows: usize,
    /// Taps of a row that are not adjacent in memory, because other groups' channels lie between them.
    pub(super) taps: usize,
    /// Floats of a tap that are adjacent in memory.
    pub(super) run: usize,
    pub(super) panels: Vec<Panel>,
}

/// A place in a channels-last image.
#[derive(Clone, Copy, Default)]
pub(super) struct Offset {
    pub(super) row: usize,
    pub(super) col: usize,
    pub(super) channel: usize,
}

/// Which weights make a part.
struct Plan {
    input: Offset,
    output: Offset,
    /// Output channels.
    channels: Range<usize>,
    /// Row of the part's input that each row of the kernel falls on.
    rows: Vec<usize>,
    /// Column that each column of the kernel falls on, for each pixel of a wide pixel.
    columns: Vec<Vec<usize>>,
}

/// Where the three taps of a row fall in the source of a doubled image, for an even and an odd pixel: the windows
/// of pixels 2i and 2i + 1 begin at source pixels i − 1 and i.
const DOUBLED_TAPS: [[usize; 3]; 2] = [[0, 1, 1], [0, 0, 1]];

impl Packed {
    /// Packs `weight` (out, in / groups, kt, kh, kw) and `bias` (out).
    pub(super) fn new(weight: &Tensor, bias: Option<&Tensor>, geometry: Geometry) -> Result<Self> {
        Self::for_arch(weight, bias, geometry, Arch::new())
    }

    /// Packs for one instruction set.
    pub(super) fn for_arch(
        weight: &Tensor,
        bias: Option<&Tensor>,
        geometry: Geometry,
        arch: Arch,
    ) -> Result<Self> {
        let lanes = kernel::lanes(arch);
        let (out, in_per_group, kt, kh, kw) = weight.dims5()?;
        let groups = geometry.groups;
        let (st, sh, sw) = geometry.stride;
        let is_square = (kh, kw, sh, sw, geometry.padding, groups) == (3, 3, 1, 1, Padding2d::same(1), 1);
        if groups == 0 || out % groups != 0 || weight.elem_count() == 0 || st * sh * sw == 0 {
            candle_core::bail!("no convolution has weights {:?} and {geometry:?}", weight.shape());
        }
        if geometry.doubled && !is_square {
            candle_core::bail!("a doubled input meets 3x3 taps, not {:?} and {geometry:?}", weight.shape());
        }
        let values: Vec<f32> = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let bias = match bias {
            Some(bias) if bias.dims() == [out] => bias.to_dtype(DType::F32)?.to_vec1()?,
            Some(bias) => candle_core::bail!("the bias is {:?}, expected ({out})", bias.shape()),
            None => vec![0f32; out],
        };

        let (wide, plans) = match (geometry.doubled, groups) {
            (true, _) => doubled_plans(out, lanes),
            (false, 1) => {
                let wide = cheapest_width(out, (kw, sw), lanes).0;
                let columns = (0..wide).map(|pixel| (pixel * sw..pixel * sw + kw).collect()).collect();
                (wide, vec![Plan::all(0..out, kh, columns)])
            }
            // The pixels of a wide pixel must be adjacent in memory, which those of one channel group are not.
            (false, _) => {
                let plan = |group: usize| Plan {
                    input: Offset { channel: group * in_per_group, ..Offset::default() },
                    output: Offset { channel: group * out / groups, ..Offset::default() },
                    ..Plan::all(group * out / groups..(group + 1) * out / groups, kh, vec![(0..kw).collect()])
                };
                (1, (0..groups).map(plan).collect())
            }
        };
        let columns = plans.iter().map(|plan| plan.input.col + plan.num_columns()).max().unwrap_or(0);
        let floats_per_column = plans.first().map_or(0, |plan| plan.floats() / wide);
        let weights = Weights { values: &values, bias: &bias, in_per_group, kernel: (kt, kh, kw), lanes };
        let part = |plan: &Plan| {
            let (taps, run) = match groups {
                1 => (1, plan.num_columns() * in_per_group),
                _ => (plan.num_columns(), in_per_group),
            };
            let panels = weights.pack(plan);
            Part { input: plan.input, output: plan.output, rows: plan.num_rows(), taps, run, panels }
        };
        Ok(Self {
            arch,
            geometry,
            window: (kt, kh, columns),
            wide,
            floats_per_column,
            parts: plans.iter().map(part).collect(),
            channels: (in_per_group * groups, out),
            kernel: (kt, kh, kw),
        })
    }

    /// Channels of the input.
    pub(super) fn in_channels(&self) -> usize {
        self.channels.0
    }

    /// Channels of the output.
    pub(super) fn out_channels(&self) -> usize {
        self.channels.1
    }

    /// Multiplications per output float, with those by the zeros of wide pixels.
    pub(super) fn cost(&self) -> usize {
        self.parts.first().map_or(0, |part| self.window.0 * part.rows * part.taps * part.run)
    }

    /// Frames, rows and columns of the result for those of the input.
    pub(super) fn output_size(
        &self,
        (frames, height, width): (usize, usize, usize),
    ) -> Result<(usize, usize, usize)> {
        let Padding2d { top, bottom, left, right } = self.geometry.padding;
        let (kt, kh, kw) = self.kernel;
        let (st, sh, sw) = self.geometry.stride;
        let repeats = self.geometry.repeats();
        let (height, width) = (repeats * height + top + bottom, repeats * width + left + right);
        if frames < kt || height < kh || width < kw {
            candle_core::bail!(
                "an input of {frames} frames of {height}x{width}, padding included, is smaller than the kernel, {kt} frames of {kh}x{kw}"
            );
        }
        Ok(((frames - kt) / st + 1, (height - kh) / sh + 1, (width - kw) / sw + 1))
    }
}

impl Plan {
    /// Output `channels` from the whole window.
    fn all(channels: Range<usize>, rows: usize, columns: Vec<Vec<usize>>) -> Self {
        let (input, output) = (Offset::default(), Offset::default());
        Self { input, output, channels, rows: (0..rows).collect(), columns }
    }

    fn num_rows(&self) -> usize {
        self.rows.iter().max().map_or(0, |row| row + 1)
    }

    fn num_columns(&self) -> usize {
        self.columns.iter().flatten().max().map_or(0, |column| column + 1)
    }

    /// Output floats of a wide pixel.
    fn floats(&self) -> usize {
        self.columns.len() * self.channels.len()
    }
}

/// The weights as the checkpoint has them.
struct Weights<'a> {
    values: &'a [f32], // (out, in_per_group, kt, kh, kw)
    bias: &'a [f32],   // (out)
    in_per_group: usize,
    kernel: (usize, usize, usize),
    lanes: usize,
}

impl Weights<'_> {
    fn pack(&self, plan: &Plan) -> Vec<Panel> {
        let widths = panel_widths(plan.floats(), self.lanes).into_iter();
        widths.map(|(first, vectors)| self.pack_panel(plan, first, vectors)).collect()
    }

    /// Packs output floats `first…` of a wide pixel, `vectors` registers of them.
    fn pack_panel(&self, plan: &Plan, first: usize, vectors: usize) -> Panel {
        let (kt, kh, kw) = self.kernel;
        let (rows, columns, taps) = (plan.num_rows(), plan.num_columns(), kt * kh * kw);
        let width = vectors * self.lanes;
        let mut weights = vec![0f32; kt * rows * columns * self.in_per_group * width];
        let mut bias = vec![0f32; width];
        for n in first..(first + width).min(plan.floats()) {
            let channel = plan.channels.start + n % plan.channels.len();
            let falls_on = &plan.columns[n / plan.channels.len()];
            bias[n - first] = self.bias[channel];
            let kernel = &self.values[channel * self.in_per_group * taps..][..self.in_per_group * taps];
            for (i, kernel) in kernel.chunks_exact(taps).enumerate() {
                for (tap, &value) in kernel.iter().enumerate() {
                    let (a, b, c) = (tap / (kh * kw), tap / kw % kh, tap % kw);
                    let position = (a * rows + plan.rows[b]) * columns + falls_on[c];
                    weights[(position * self.in_per_group + i) * width + n - first] += value;
                }
            }
        }
        Panel { first, vectors, weights, bias }
    }
}

/// How many adjacent pixels of `floats` output floats each to compute as one, and what that costs: the number with
/// the fewest register-wide multiplications per pixel and input channel, in one row of `columns` taps.
fn cheapest_width(floats: usize, (columns, stride): (usize, usize), lanes: usize) -> (usize, f64) {
    let cost = |wide: usize| {
        let registers = (wide * floats).div_ceil(lanes);
        (wide, (registers * (columns + (wide - 1) * stride)) as f64 / wide as f64)
    };
    (2..=lanes).map(cost).fold(cost(1), |best, next| if next.1 < best.1 { next } else { best })
}

/// The parts of a convolution of a doubled image, and the source columns of a wide pixel: even and odd rows, and
/// of each either even and odd columns, with two taps in a row, or both together, with three.
fn doubled_plans(out: usize, lanes: usize) -> (usize, Vec<Plan>) {
    let apart = (2 * 2 * out.div_ceil(lanes)) as f64; // two phases of two taps
    let (wide, together) = cheapest_width(2 * out, (3, 1), lanes);
    let plan = |row: usize, col: usize, columns: Vec<Vec<usize>>| Plan {
        input: Offset { row, col, channel: 0 },
        output: Offset { row, col, channel: 0 },
        channels: 0..out,
        rows: DOUBLED_TAPS[row].to_vec(),
        columns,
    };
    if together < apart {
        let columns = |pixel: usize| DOUBLED_TAPS[pixel % 2].map(|tap| pixel / 2 + pixel % 2 + tap).to_vec();
        return (wide, (0..2).map(|row| plan(row, 0, (0..2 * wide).map(columns).collect())).collect());
    }
    let phases = (0..2).flat_map(|row| (0..2).map(move |col| (row, col)));
    (1, phases.map(|(row, col)| plan(row, col, vec![DOUBLED_TAPS[col].to_vec()])).collect())
}

/// Splits `floats` output floats into panels of 1…[`MAX_VECTORS`] registers, as even as can be: (first float,
/// registers) of each.
fn panel_widths(floats: usize, lanes: usize) -> Vec<(usize, usize)> {
    let vectors = floats.div_ceil(lanes);
    let panels = vectors.div_ceil(MAX_VECTORS);
    (0..panels)
        .map(|i| (i * vectors / panels, (i + 1) * vectors / panels))
        .map(|(start, end)| (start * lanes, end - start))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_every_float_once_and_are_at_most_three_registers_wide() {
        for floats in [1, 3, 16, 17, 48, 49, 64, 96, 128, 384, 512] {
            let mut covered = 0;
            for (first, vectors) in panel_widths(floats, 16) {
                assert_eq!(first, covered);
                assert!((1..=MAX_VECTORS).contains(&vectors));
                covered += vectors * 16;
            }
            assert_eq!(covered, floats.div_ceil(16) * 16);
        }
    }

    #[test]
    fn narrow_pixels_share_a_register_and_wide_ones_do_not() {
        assert_eq!(cheapest_width(8, (3, 1), 16).0, 2);
        assert_eq!(cheapest_width(4, (3, 1), 16).0, 4);
        assert_eq!(cheapest_width(16, (3, 1), 16).0, 1);
        assert_eq!(cheapest_width(96, (3, 1), 16).0, 1);
        assert_eq!(cheapest_width(8, (1, 1), 16).0, 1); // nothing is shared between the windows of 1x1 pixels
    }

    #[test]
    fn doubled_pixels_are_computed_together_where_that_fills_a_register() {
        let shape = |out| {
            let (wide, plans) = doubled_plans(out, 16);
            (wide, plans.len())
        };
        assert_eq!(shape(4), (2, 2));
        assert_eq!(shape(8), (1, 2));
        assert_eq!(shape(16), (1, 4));
        assert_eq!(shape(192), (1, 4));
    }
}
