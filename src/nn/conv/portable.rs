//! The same convolutions as sums of stock 2D convolutions, for devices other than the CPU; the CPU kernel's
//! tests compare with it.

use candle_core::{Result, Tensor};

use super::packed::Geometry;

/// Convolves `xs` (B, T, H, W, in) with `weight` (out, in / groups, kt, kh, kw) and adds `bias` (out), in the
/// dtype of `xs`: (B, T', H', W', out).
pub(super) fn conv(
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: Geometry,
) -> Result<Tensor> {
    let Geometry { stride: (st, sh, sw), padding, groups, doubled } = geometry;
    let xs = if doubled { double(xs)? } else { xs.clone() };
    let (batch, frames, _, _, _) = xs.dims5()?;
    let kt = weight.dim(2)?;
    if frames < kt {
        candle_core::bail!("an input of {frames} frames is shorter than the kernel, {kt} frames");
    }
    let frames_out = (frames - kt) / st + 1;
    let weight = weight.to_dtype(xs.dtype())?;
    let xs = xs.permute((0, 1, 4, 2, 3))?.contiguous()?; // (B, T, in, H, W)
    let xs =
        xs.pad_with_zeros(3, padding.top, padding.bottom)?.pad_with_zeros(4, padding.left, padding.right)?;
    let mut sum: Option<Tensor> = None;
    for a in 0..kt {
        let times: Vec<u32> = (0..frames_out).map(|t| (t * st + a) as u32).collect();
        let taken = xs.index_select(&Tensor::new(times, xs.device())?, 1)?.flatten(0, 1)?; // (B T', in, H, W)
        let ys = conv2d(&taken, &weight.narrow(2, a, 1)?.squeeze(2)?.contiguous()?, (sh, sw), groups)?;
        sum = Some(match sum {
            Some(sum) => (sum + ys)?,
            None => ys,
        });
    }
    let Some(ys) = sum else { candle_core::bail!("the kernel has no taps") };
    let ys = ys.permute((0, 2, 3, 1))?.contiguous()?; // (B T', H', W', out)
    let ys = match bias {
        Some(bias) => ys.broadcast_add(&bias.to_dtype(xs.dtype())?)?,
        None => ys,
    };
    let (_, height, width, out) = ys.dims4()?;
    ys.reshape((batch, frames_out, height, width, out))
}

/// A 2D convolution without padding; the stock one knows one stride for both axes.
fn conv2d(xs: &Tensor, weight: &Tensor, (sh, sw): (usize, usize), groups: usize) -> Result<Tensor> {
    if sh == sw || weight.dim(2)? == xs.dim(2)? {
        return xs.contiguous()?.conv2d(weight, 0, sw, 1, groups);
    }
    candle_core::bail!("strides ({sh}, {sw}) differ between rows and columns");
}

/// Repeats every row and column of `xs` (B, T, H, W, C): (B, T, 2 H, 2 W, C).
pub(super) fn double(xs: &Tensor) -> Result<Tensor> {
    let (batch, frames, height, width, channels) = xs.dims5()?;
    let rows = batch * frames * height;
    let xs = xs.reshape((rows, 1, width, 1, channels))?.broadcast_as((rows, 2, width, 2, channels))?;
    xs.contiguous()?.reshape((batch, frames, 2 * height, 2 * width, channels))
}
