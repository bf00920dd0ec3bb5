//! Splits a convolution into bands for threads and tiles for caches, and gives the kernel each tile's windows.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{Pixel, Run, Tile};
use super::packed::{Geometry, Packed};

/// Multiplications below which a band is not worth a thread: some 50 µs at the 8 · 10¹⁰ a second that layers of few
/// channels reach.
const MIN_BAND_COST: usize = 4_000_000;

/// Floats of the input under one tile: 256 KiB, so that they and a block of weights fit the second-level cache.
const TILE_FLOATS: usize = 64 << 10;

/// Output rows and columns of a tile at least, also where their window does not fit the cache: with fewer, too few
/// products would meet each weight that is loaded.
const MIN_TILE_SIDE: usize = 8;

/// The input of a convolution: f32 values of each frame (H, W, in), `None` for one of zeros.
pub(super) struct Clip<'a> {
    pub(super) frames: &'a [Option<&'a [f32]>],
    /// Frames of one item of the batch.
    pub(super) frames_per_item: usize,
    /// Rows and columns of a frame.
    pub(super) size: (usize, usize),
    /// Added to the output; as long as it.
    pub(super) residual: Option<&'a [f32]>,
}

/// Some rows of an output frame, or some columns of its only row; both are counted in steps of the stride, of which
/// each makes several rows and columns of the output where the input is doubled.
struct Band<'a> {
    frame: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    residual: Option<&'a [f32]>,
    out: &'a mut [f32],
}

/// Computes the output `out` (B, T', H', W', out), `size` = (T', H', W').
pub(super) fn run(packed: &Packed, clip: &Clip, size: (usize, usize, usize), out: &mut [f32]) {
    let worthwhile = out.len() * packed.cost() / MIN_BAND_COST;
    let wanted = worthwhile.clamp(1, 4 * rayon::current_num_threads());
    let bands = split(packed, clip, size, wanted, out);
    if wanted > 1 {
        bands.into_par_iter().for_each(|band| run_band(packed, clip, size, band));
    } else {
        bands.into_iter().for_each(|band| run_band(packed, clip, size, band));
    }
}

/// Splits the output into about `wanted` bands of equal work, at least one for each frame.
fn split<'a>(
    packed: &Packed,
    clip: &Clip<'a>,
    (_, height, width): (usize, usize, usize),
    wanted: usize,
    mut out: &'a mut [f32],
) -> Vec<Band<'a>> {
    let num_frames = out.len() / (height * width * packed.out_channels());
    let repeats = packed.geometry.repeats();
    let (height, width) = (height / repeats, width / repeats);
    let floats = repeats * repeats * packed.out_channels();
    let per_frame = wanted.div_ceil(num_frames.max(1));
    let (max_rows, max_cols) = match height {
        1 if repeats == 1 => (1, width.div_ceil(per_frame).next_multiple_of(packed.wide)),
        _ => (height.div_ceil(per_frame), width),
    };
    let mut residual = clip.residual;
    let mut bands = Vec::with_capacity(num_frames * height.div_ceil(max_rows) * width.div_ceil(max_cols));
    for frame in 0..num_frames {
        for rows in spans(0..height, max_rows) {
            for cols in spans(0..width, max_cols) {
                let (band, rest) = out.split_at_mut(rows.len() * cols.len() * floats);
                let split_residual = residual.map(|residual| residual.split_at(band.len()));
                bands.push(Band {
                    frame,
                    rows: rows.clone(),
                    cols,
                    residual: split_residual.map(|(band, _)| band),
                    out: band,
                });
                out = rest;
                residual = split_residual.map(|(_, rest)| rest);
            }
        }
    }
    bands
}

/// Cuts `range` into pieces of `len`, the last of which may be shorter.
fn spans(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..(start + len).min(range.end))
}

thread_local! {
    /// Padded windows of the tile at hand; kept, because fresh pages cost more than the copy into them.
    static WINDOWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes one band, tile by tile.
fn run_band(packed: &Packed, clip: &Clip, size: (usize, usize, usize), mut band: Band) {
    let (tile_rows, tile_cols) = tile_size(packed, (band.rows.len(), band.cols.len()));
    let mut windows = WINDOWS.take();
    for rows in spans(band.rows.clone(), tile_rows) {
        for cols in spans(band.cols.clone(), tile_cols) {
            run_tile(packed, clip, size.0, (rows.clone(), cols), &mut band, &mut windows);
        }
    }
    WINDOWS.set(windows);
}

/// Rows and columns of a tile in a band of `rows` × `cols`: a square window of the cache's size, or
/// a wider one where the band is low.
fn tile_size(packed: &Packed, (rows, cols): (usize, usize)) -> (usize, usize) {
    let (_, sh, sw) = packed.geometry.stride;
    let (_, window_rows, window_cols) = packed.window;
    let pixels = TILE_FLOATS / packed.in_channels();
    let outputs = |window: usize, taps: usize, stride: usize| {
        (window.saturating_sub(taps) / stride + 1).max(MIN_TILE_SIDE)
    };
    let side = pixels.isqrt().max(1);
    let tile_rows = outputs(side, window_rows, sh).min(rows);
    let height = (tile_rows - 1) * sh + window_rows;
    let tile_cols = outputs(pixels / height, window_cols, sw).next_multiple_of(packed.wide).min(cols);
    let width = (tile_cols - 1) * sw + window_cols;
    (outputs(pixels / width, window_rows, sh).clamp(tile_rows, rows), tile_cols)
}

/// Computes `rows` × `cols` of a band.
fn run_tile(
    packed: &Packed,
    clip: &Clip,
    frames_out: usize,
    (rows, cols): (Range<usize>, Range<usize>),
    band: &mut Band,
    windows: &mut Vec<f32>,
) {
    let Geometry { stride: (st, sh, sw), padding, .. } = packed.geometry;
    let (kt, kh, columns) = packed.window;
    let channels = packed.in_channels();
    let wide_pixels = cols.len().div_ceil(packed.wide);
    let window = Window {
        top: (rows.start * sh).cast_signed() - padding.top.cast_signed(),
        left: (cols.start * sw).cast_signed() - padding.left.cast_signed(),
        height: (rows.len() - 1) * sh + kh,
        width: (wide_pixels - 1) * packed.wide * sw + columns,
        channels,
    };
    let first_frame = band.frame / frames_out * clip.frames_per_item + band.frame % frames_out * st;
    let frames = &clip.frames[first_frame..first_frame + kt];

    // A window that lies inside of the frames is read where it is; another is copied with zeros around it.
    let origin = window.origin_inside(clip.size);
    let pitch = if origin.is_some() { clip.size.1 } else { window.width };
    if origin.is_none() {
        windows.clear();
        frames.iter().flatten().for_each(|frame| window.copy(frame, clip.size, windows));
    }
    let mut copies = windows.chunks_exact(window.len());
    let views: Vec<Option<&[f32]>> = frames
        .iter()
        .map(|frame| match (frame, origin) {
            (Some(frame), Some(origin)) => Some(&frame[origin..]),
            (Some(_), None) => copies.next(),
            (None, _) => None,
        })
        .collect();

    let repeats = packed.geometry.repeats();
    let pixel_floats = packed.out_channels();
    let row_floats = repeats * band.cols.len() * pixel_floats;
    let mut pixels = Vec::with_capacity(rows.len() * wide_pixels);
    for row in 0..rows.len() {
        for col in (0..cols.len()).step_by(packed.wide) {
            let (y_row, y_col) = (rows.start - band.rows.start + row, cols.start - band.cols.start + col);
            pixels.push(Pixel {
                x: (row * sh * pitch + col * sw) * channels,
                y: repeats * (y_row * row_floats + y_col * pixel_floats),
                len: packed.wide.min(cols.len() - col) * packed.floats_per_column,
            });
        }
    }
    let mut runs = Vec::with_capacity(kt * kh * columns);
    for part in &packed.parts {
        runs.clear();
        for (a, view) in views.iter().enumerate() {
            let Some(view) = view else { continue };
            for (b, tap) in (0..part.rows).flat_map(|b| (0..part.taps).map(move |tap| (b, tap))) {
                let (row, col) = (part.input.row + b, part.input.col + tap);
                runs.push(Run {
                    x: &view[(row * pitch + col) * channels + part.input.channel..],
                    weights: ((a * part.rows + b) * part.taps + tap) * part.run,
                    len: part.run,
                });
            }
        }
        let first = part.output.row * row_floats + part.output.col * pixel_floats + part.output.channel;
        packed.arch.dispatch(Tile {
            panels: &part.panels,
            runs: &runs,
            pixels: &pixels,
            residual: band.residual.map(|residual| &residual[first..]),
            out: &mut band.out[first..],
        });
    }
}

/// The part of a frame that a tile looks at; it may reach over the edges.
struct Window {
    top: isize,
    left: isize,
    height: usize,
    width: usize,
    channels: usize,
}

impl Window {
    fn len(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Offset of the window's first float in a frame of `size`, where it lies wholly inside.
    fn origin_inside(&self, (height, width): (usize, usize)) -> Option<usize> {
        let (top, left) = (usize::try_from(self.top).ok()?, usize::try_from(self.left).ok()?);
        let inside = top + self.height <= height && left + self.width <= width;
        inside.then_some((top * width + left) * self.channels)
    }

    /// Appends the window of `frame` to `out`, with zeros where it reaches over the edges.
    fn copy(&self, frame: &[f32], (height, width): (usize, usize), out: &mut Vec<f32>) {
        let clamp = |x: isize, max: usize| x.clamp(0, max.cast_signed()).cast_unsigned();
        let right = self.left + self.width.cast_signed();
        let (from, to) = (clamp(self.left, width), clamp(right, width));
        let before = clamp(-self.left, self.width);
        for row in 0..self.height {
            let end = out.len() + self.width * self.channels;
            let y = self.top + row.cast_signed();
            if let Some(y) = usize::try_from(y).ok().filter(|&y| y < height) {
                out.resize(out.len() + before * self.channels, 0.0);
                out.extend_from_slice(
                    &frame[(y * width + from) * self.channels..(y * width + to) * self.channels],
                );
            }
            out.resize(end, 0.0);
        }
    }
}
