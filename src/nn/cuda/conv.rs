//! Convolutions as implicit matrix products.

use std::ffi::c_int;

use candle_core::{DType, Result, Tensor};

use super::{Inputs, MAX_ROWS, check, code, device, ffi, output, tensor};
use crate::nn::conv::Geometry;

/// The kernel reads and writes channels in vectors of 16 bytes, eight of bf16.
const CHANNELS: usize = 8;

/// A layer's weights with the channels last, and filled up with zeros to whole vectors of channels.
#[derive(Clone)]
pub(in crate::nn) struct Weights {
    weight: Tensor, // (out', kt, kh, kw, in')
    bias: Tensor,   // (out')
    channels: (usize, usize),
    has_bias: bool,
}

impl Weights {
    /// Of `weight` (out, in, kt, kh, kw) and `bias` (out); `None` where the kernel does not know their kind.
    pub(in crate::nn) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        geometry: Geometry,
    ) -> Result<Option<Self>> {
        let (out, channels, ..) = weight.dims5()?;
        let known = matches!(weight.dtype(), DType::BF16 | DType::F32) && geometry.groups == 1;
        if !weight.device().is_cuda() || !known {
            return Ok(None);
        }
        let missing = |channels: usize| channels.next_multiple_of(CHANNELS) - channels;
        let last = weight.permute((0, 2, 3, 4, 1))?;
        let last = last.pad_with_zeros(0, 0, missing(out))?.pad_with_zeros(4, 0, missing(channels))?;
        let bias_row = match bias {
            Some(bias) => bias.to_dtype(weight.dtype())?,
            None => Tensor::zeros(out, weight.dtype(), weight.device())?,
        };
        Ok(Some(Self {
            weight: last.contiguous()?,
            bias: bias_row.pad_with_zeros(0, 0, missing(out))?.contiguous()?,
            channels: (channels, out),
            has_bias: bias.is_some(),
        }))
    }

    /// Weight (out, in, kt, kh, kw) and bias (out) as they came, for candle's operations.
    pub(in crate::nn) fn stock(&self) -> Result<(Tensor, Option<Tensor>)> {
        let (channels, out) = self.channels;
        let weight = self.weight.narrow(0, 0, out)?.narrow(4, 0, channels)?;
        let bias = if self.has_bias { Some(self.bias.narrow(0, 0, out)?) } else { None };
        Ok((weight.permute((0, 4, 1, 2, 3))?.contiguous()?, bias))
    }

    /// Convolves `xs` (B, T, H, W, in) with `zero_frames` frames of zeros before it: (B, T', H', W', out).
    pub(in crate::nn) fn convolve(
        &self,
        xs: &Tensor,
        zero_frames: usize,
        geometry: Geometry,
    ) -> Result<Option<Tensor>> {
        let Some(device) = device(&[xs]) else { return Ok(None) };
        let (batch, frames, height, width, channels) = xs.dims5()?;
        let (_, kt, kh, kw, _) = self.weight.dims5()?;
        let Geometry { stride: (st, sh, sw), padding, .. } = geometry;
        let (total, rows, cols) = (
            zero_frames + frames,
            height + padding.top + padding.bottom,
            width + padding.left + padding.right,
        );
        if xs.dtype() != self.weight.dtype()
            || channels != self.channels.0
            || total < kt
            || rows < kh
            || cols < kw
        {
            return Ok(None);
        }
        let size = [(total - kt) / st + 1, (rows - kh) / sh + 1, (cols - kw) / sw + 1];
        let (out, padded) = (self.weight.dim(0)?, self.weight.dim(4)?);
        let len = batch * size.iter().product::<usize>() * out;
        if xs.elem_count() == 0 || len > MAX_ROWS || batch * frames * height * width * padded > MAX_ROWS {
            return Ok(None);
        }
        let xs = xs.pad_with_zeros(4, 0, padded - channels)?.contiguous()?;
        let int = |sizes: [usize; 3]| sizes.map(|size| size as c_int);
        let inputs = Inputs::new([Some(&xs), Some(&self.weight), Some(&self.bias)]);
        let (ys, ()) = output(device, xs.dtype(), len, |stream, ys| {
            inputs.with(stream, |[xs_at, weight, bias]| {
                let args = ffi::Conv {
                    xs: xs_at,
                    weight,
                    bias,
                    out: ys,
                    batch: batch as c_int,
                    size: int([frames, height, width]),
                    in_channels: padded as c_int,
                    out_channels: out as c_int,
                    kernel: int([kt, kh, kw]),
                    stride: int([st, sh, sw]),
                    padding: int([zero_frames, padding.top, padding.left]),
                    out_size: int(size),
                    dtype: code(xs.dtype())?,
                };
                // SAFETY: the pointers are of contiguous tensors of these sizes, the bias of `out_channels`.
                check("convolution", unsafe { ffi::talkie_conv(&args, stream.cu_stream().cast()) })
            })
        })?;
        let ys = tensor(ys, &[batch, size[0], size[1], size[2], out]);
        Ok(Some(if out == self.channels.1 { ys } else { ys.narrow(4, 0, self.channels.1)?.contiguous()? }))
    }
}
