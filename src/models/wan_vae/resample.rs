//! Steps between the levels. Activations are (1, T, H, W, C).

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::blocks::CausalConv3d;
use super::cache::{Cache, last_frames};
use crate::nn::{Conv2d, Conv3d, Padding2d};

/// Halves rows and columns, and after the first chunk frames too where it has a temporal convolution.
#[derive(Clone, Debug)]
pub(super) struct Downsample {
    conv: Conv2d,
    time_conv: Option<Conv3d>,
}

impl Downsample {
    /// Loads `resample.1` and, with `temporal`, `time_conv` below `vb`.
    pub(super) fn new(channels: usize, temporal: bool, vb: VarBuilder) -> Result<Self> {
        let right_and_bottom = Padding2d { top: 0, bottom: 1, left: 0, right: 1 };
        let conv = Conv2d::new((channels, channels), (3, 3), 2, right_and_bottom, vb.pp("resample").pp(1))?;
        let time_conv = || {
            Conv3d::new((channels, channels), (3, 1, 1), (2, 1, 1), Padding2d::default(), vb.pp("time_conv"))
        };
        Ok(Self { conv, time_conv: temporal.then(time_conv).transpose()? })
    }

    /// Maps `xs` (1, T, H, W, C) to (1, T', H/2, W/2, C): T' = T / 2 with a temporal convolution after the first
    /// chunk, which passes unchanged in time, else T' = T.
    pub(super) fn forward(&self, xs: Tensor, cache: &mut Cache) -> Result<Tensor> {
        let ys = self.conv.forward(&xs.squeeze(0)?)?.unsqueeze(0)?;
        drop(xs);
        let Some(time_conv) = &self.time_conv else { return Ok(ys) };
        let is_first_chunk = cache.is_first_chunk();
        let past = cache.slot();
        // Kernel 3 at stride 2: each chunk begins with the last frame of the one before.
        let last = last_frames(None, &ys, 1)?;
        let ys = if is_first_chunk { ys } else { time_conv.forward_causal(&ys, past.as_ref(), None)? };
        *past = Some(last);
        Ok(ys)
    }
}

/// Doubles rows and columns and halves the channels; after the first chunk it doubles frames too where it has
/// a temporal convolution.
#[derive(Clone, Debug)]
pub(super) struct Upsample {
    conv: Conv2d,
    time_conv: Option<CausalConv3d>,
}

impl Upsample {
    /// Loads `resample.1` and, with `temporal`, `time_conv` below `vb`.
    pub(super) fn new(channels: usize, temporal: bool, vb: VarBuilder) -> Result<Self> {
        let conv = Conv2d::of_doubled((channels, channels / 2), vb.pp("resample").pp(1))?;
        let time_conv = || CausalConv3d::temporal((channels, 2 * channels), vb.pp("time_conv"));
        Ok(Self { conv, time_conv: temporal.then(time_conv).transpose()? })
    }

    /// Maps `xs` (1, T, H, W, C) to (1, T', 2 H, 2 W, C / 2): T' = 2 T with a temporal convolution after the first
    /// chunk, which passes unchanged in time, else T' = T.
    pub(super) fn forward(&self, xs: Tensor, cache: &mut Cache) -> Result<Tensor> {
        let xs = match &self.time_conv {
            Some(_) if cache.is_first_chunk() => {
                // The slot stays empty: to the chunks that follow, the first one is zeros.
                cache.slot();
                xs
            }
            Some(time_conv) => interleave(&time_conv.forward(xs, None, cache)?)?,
            None => xs,
        };
        self.conv.forward(&xs.squeeze(0)?)?.unsqueeze(0)
    }
}

/// Makes two frames of each: `xs` (1, T, H, W, 2 C) to (1, 2 T, H, W, C), the first half of the channels
/// becoming the earlier frame.
fn interleave(xs: &Tensor) -> Result<Tensor> {
    let (_, frames, height, width, channels) = xs.dims5()?;
    let halves = xs.reshape((frames, height * width, 2, channels / 2))?;
    halves.transpose(1, 2)?.contiguous()?.reshape((1, 2 * frames, height, width, channels / 2))
}
