//! The operations that have kernels, at shapes that the kernels run on: heads of 128 channels, channels of the VAE,
//! lengths beside the tile sizes.

use candle_core::{DType, Device, Tensor};
use talkie::Result;
use talkie::nn::rope::Rope;
use talkie::nn::{
    Conv2d, Conv3d, LayerNorm, Linear, Mask, Padding2d, RmsNorm, Sum, attention, layer_norm_modulated,
    residual_gate, sum_and_layer_norm_modulated, unit_norm, unit_norm_silu,
};

use super::{Bench, EXACT, Report, drawn, input, weights};
use crate::job::JobError;

/// Width and heads of the tokens.
const DIM: usize = 512;
const HEADS: usize = DIM / 128;
const EPS: f64 = 1e-6;

pub(super) fn run(bench: &Bench, report: &mut Report) -> Result<(), JobError> {
    // Batch, queries, keys: self-attention, image rows, audio tokens of each frame, fewer keys than a tile.
    for (batch, q_len, k_len) in [(1, 384, 384), (1, 333, 257), (5, 96, 32), (2, 70, 3)] {
        let name = format!("attention {batch} × {q_len} over {k_len}");
        let compute = |dtype, device: &Device| {
            let q = input(1, &[batch, q_len, HEADS, 128], dtype, device)?;
            let kv = |seed| input(seed, &[batch, k_len, HEADS, 128], dtype, device);
            Ok(attention(&q, &kv(2)?, &kv(3)?, 128f64.powf(-0.5), &Mask::None)?)
        };
        bench.compare(&name, &bench.ways(), EXACT, compute, report)?;
    }
    for (name, compute) in TOKENS {
        bench.compare(name, &bench.ways(), EXACT, compute, report)?;
    }
    for (name, compute) in PIXELS {
        bench.compare(name, &bench.ways(), bench.with_convolutions(), compute, report)?;
    }
    Ok(())
}

type Compute = fn(DType, &Device) -> Result<Tensor>;

const TOKENS: [(&str, Compute); 10] = [
    ("linear", |dtype, device| {
        let linear = Linear::new(DIM, 768, weights(dtype, device))?;
        Ok(linear.forward(&tokens(1, dtype, device)?)?)
    }),
    ("linear and GELU", |dtype, device| {
        let linear = Linear::new(DIM, 768, weights(dtype, device))?;
        Ok(linear.forward_gelu_tanh(&tokens(1, dtype, device)?)?)
    }),
    ("layer norm", |dtype, device| {
        let norm = LayerNorm::new(DIM, EPS, weights(dtype, device))?;
        Ok(norm.forward(&tokens(1, dtype, device)?)?)
    }),
    ("sum and layer norm", |dtype, device| {
        let norm = LayerNorm::new(DIM, EPS, weights(dtype, device))?;
        let (xs, ys, gate) = (tokens(1, dtype, device)?, tokens(2, dtype, device)?, row(3, device)?);
        let (sum, normed) = norm.forward_sum(Sum { xs, ys, gate: Some(&gate) })?;
        Ok(Tensor::cat(&[sum, normed], 1)?)
    }),
    ("modulated layer norm", |dtype, device| {
        let xs = tokens(1, dtype, device)?;
        Ok(layer_norm_modulated(&xs, &row(2, device)?, &row(3, device)?, EPS)?)
    }),
    ("sum and modulated layer norm", |dtype, device| {
        let (xs, ys) = (tokens(1, dtype, device)?, tokens(2, dtype, device)?);
        let sum = Sum { xs, ys, gate: None };
        let (sum, normed) = sum_and_layer_norm_modulated(sum, &row(3, device)?, &row(4, device)?, EPS)?;
        Ok(Tensor::cat(&[sum, normed], 1)?)
    }),
    ("gate", |dtype, device| {
        let (xs, ys) = (tokens(1, dtype, device)?, tokens(2, dtype, device)?);
        Ok(residual_gate(&xs, &ys, &row(3, device)?)?)
    }),
    ("RMS norm", |dtype, device| {
        Ok(RmsNorm::new(DIM, EPS, weights(dtype, device))?.forward(&tokens(1, dtype, device)?)?)
    }),
    ("RMS norm and rotation", |dtype, device| {
        let norm = RmsNorm::new(DIM, EPS, weights(dtype, device))?;
        Ok(norm.forward_rotated(&tokens(1, dtype, device)?, HEADS, &rope(device)?)?)
    }),
    ("rotation", |dtype, device| {
        let heads = tokens(1, dtype, device)?.reshape((1, TOKEN_GRID, HEADS, 128))?;
        Ok(rope(device)?.rotate(&heads)?)
    }),
];

const PIXELS: [(&str, Compute); 10] = [
    ("unit norm", |dtype, device| {
        Ok(unit_norm(&input(1, &[1, 3, 5, 7, 96], dtype, device)?, &scale(96, device)?)?)
    }),
    ("unit norm and SiLU", |dtype, device| {
        Ok(unit_norm_silu(&input(1, &[1, 3, 5, 7, 384], dtype, device)?, &scale(384, device)?)?)
    }),
    ("convolution 3×3×3, first chunk", |dtype, device| {
        let xs = input(1, &[1, 1, 9, 11, 96], dtype, device)?;
        Ok(causal((96, 192), dtype, device)?.forward_causal(&xs, None, None)?)
    }),
    ("convolution 3×3×3, later chunk and residual", |dtype, device| {
        let video = |seed, frames| input(seed, &[1, frames, 9, 11, 96], dtype, device);
        let conv = causal((96, 96), dtype, device)?;
        Ok(conv.forward_causal(&video(1, 4)?, Some(&video(2, 2)?), Some(&video(3, 4)?))?)
    }),
    ("convolution of 3 channels to 96", |dtype, device| {
        let xs = input(1, &[1, 4, 8, 8, 3], dtype, device)?;
        Ok(causal((3, 96), dtype, device)?.forward_causal(&xs, None, None)?)
    }),
    ("convolution of 384 channels to 3", |dtype, device| {
        let xs = input(1, &[1, 2, 8, 8, 384], dtype, device)?;
        Ok(causal((384, 3), dtype, device)?.forward_causal(&xs, None, None)?)
    }),
    ("convolution 3×1×1, stride 2", |dtype, device| {
        let vb = weights(dtype, device);
        let conv = Conv3d::new((96, 96), (3, 1, 1), (2, 1, 1), Padding2d::default(), vb)?;
        let video = |seed, frames| input(seed, &[1, frames, 6, 5, 96], dtype, device);
        Ok(conv.forward_causal(&video(1, 4)?, Some(&video(2, 1)?), None)?)
    }),
    ("convolution 3×3, stride 2, zeros right and below", |dtype, device| {
        let padding = Padding2d { top: 0, bottom: 1, left: 0, right: 1 };
        let conv = Conv2d::new((96, 96), (3, 3), 2, padding, weights(dtype, device))?;
        Ok(conv.forward(&input(1, &[3, 8, 12, 96], dtype, device)?)?)
    }),
    ("convolution 3×3 of a doubled image", |dtype, device| {
        let conv = Conv2d::of_doubled((192, 96), weights(dtype, device))?;
        Ok(conv.forward(&input(1, &[2, 7, 9, 192], dtype, device)?)?)
    }),
    ("convolution 1×1", |dtype, device| {
        let conv = Conv2d::new((384, 1152), (1, 1), 1, Padding2d::default(), weights(dtype, device))?;
        Ok(conv.forward(&input(1, &[2, 5, 6, 384], dtype, device)?)?)
    }),
];

/// Frames, rows and columns of the tokens.
const GRID: (usize, usize, usize) = (3, 5, 7);
const TOKEN_GRID: usize = GRID.0 * GRID.1 * GRID.2;

fn tokens(seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    input(seed, &[1, TOKEN_GRID, DIM], dtype, device)
}

/// Modulations and gates are f32 whatever the tokens are.
fn row(seed: u64, device: &Device) -> Result<Tensor> {
    Ok(drawn(seed, &[1, 1, DIM])?.to_device(device)?)
}

fn scale(channels: usize, device: &Device) -> Result<Tensor> {
    Ok(drawn(7, &[channels])?.to_device(device)?)
}

fn rope(device: &Device) -> Result<Rope> {
    Ok(Rope::grid(GRID, 128, device)?)
}

fn causal(channels: (usize, usize), dtype: DType, device: &Device) -> Result<Conv3d> {
    Ok(Conv3d::new(channels, (3, 3, 3), (1, 1, 1), Padding2d::same(1), weights(dtype, device))?)
}
