//! What encoder and decoder are made of. Activations are (1, T, H, W, C).

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::cache::{Cache, last_frames};
use crate::nn::{Conv2d, Conv3d, Mask, Padding2d, attention, unit_norm, unit_norm_silu};

/// Frames of the past that a kernel of three frames looks at.
const PAST_FRAMES: usize = 2;

/// A convolution over three frames, the current one being the last, with zeros around each frame.
#[derive(Clone, Debug)]
pub(super) struct CausalConv3d(Conv3d);

impl CausalConv3d {
    /// Loads `weight` (out, in, 3, 3, 3) and `bias` below `vb`; `channels` = (in, out).
    pub(super) fn new(channels: (usize, usize), vb: VarBuilder) -> Result<Self> {
        Ok(Self(Conv3d::new(channels, (3, 3, 3), (1, 1, 1), Padding2d::same(1), vb)?))
    }

    /// Loads `weight` (out, in, 3, 1, 1) and `bias` below `vb`.
    pub(super) fn temporal(channels: (usize, usize), vb: VarBuilder) -> Result<Self> {
        Ok(Self(Conv3d::new(channels, (3, 1, 1), (1, 1, 1), Padding2d::default(), vb)?))
    }

    /// Maps `xs` (1, T, H, W, in) to (1, T, H, W, out), plus `residual`; the chunk before is taken from the
    /// layer's slot of `cache`, and this one left there.
    pub(super) fn forward(&self, xs: Tensor, residual: Option<&Tensor>, cache: &mut Cache) -> Result<Tensor> {
        let past = cache.slot();
        let ys = self.0.forward_causal(&xs, past.as_ref(), residual)?;
        *past = Some(last_frames(past.take(), &xs, PAST_FRAMES)?);
        Ok(ys)
    }
}

/// x / max(‖x‖₂, 1e-12) · √C · gamma over the channels.
#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    scale: Tensor, // (C), √C · gamma
}

impl RmsNorm {
    /// Loads `gamma`, whose shape is (channels) and then `ones` ones, below `vb`.
    pub(super) fn new(channels: usize, ones: usize, vb: VarBuilder) -> Result<Self> {
        let mut shape = vec![1; 1 + ones];
        shape[0] = channels;
        let gamma = vb.get(shape, "gamma")?.flatten_all()?.to_dtype(DType::F32)?;
        Ok(Self { scale: (gamma * (channels as f64).sqrt())? })
    }

    /// Normalises `xs` (…, C).
    pub(super) fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        unit_norm(xs, &self.scale)
    }

    /// Normalises `xs` (…, C) and applies SiLU.
    pub(super) fn forward_silu(&self, xs: &Tensor) -> Result<Tensor> {
        unit_norm_silu(xs, &self.scale)
    }
}

/// Norm, SiLU, convolution, twice, around a shortcut.
#[derive(Clone, Debug)]
pub(super) struct ResidualBlock {
    norm1: RmsNorm,
    conv1: CausalConv3d,
    norm2: RmsNorm,
    conv2: CausalConv3d,
    shortcut: Option<Conv2d>,
}

impl ResidualBlock {
    /// Loads `residual.{0,3}` (norms), `residual.{2,6}` (convolutions) and, where `channels` = (in, out) differ,
    /// `shortcut` below `vb`.
    pub(super) fn new(channels: (usize, usize), vb: VarBuilder) -> Result<Self> {
        let residual = vb.pp("residual");
        let shortcut =
            if channels.0 == channels.1 { None } else { Some(pointwise(channels, vb.pp("shortcut"))?) };
        Ok(Self {
            norm1: RmsNorm::new(channels.0, 3, residual.pp(0))?,
            conv1: CausalConv3d::new(channels, residual.pp(2))?,
            norm2: RmsNorm::new(channels.1, 3, residual.pp(3))?,
            conv2: CausalConv3d::new((channels.1, channels.1), residual.pp(6))?,
            shortcut,
        })
    }

    /// Maps `xs` (1, T, H, W, in) to (1, T, H, W, out).
    pub(super) fn forward(&self, xs: Tensor, cache: &mut Cache) -> Result<Tensor> {
        let ys = self.norm1.forward_silu(&xs)?;
        let residual = match &self.shortcut {
            Some(shortcut) => shortcut.forward(&xs.squeeze(0)?)?.unsqueeze(0)?,
            None => xs.clone(),
        };
        drop(xs); // one full-size tensor less while the convolutions run
        let ys = {
            let ys = self.conv1.forward(ys, None, cache)?;
            self.norm2.forward_silu(&ys)?
        };
        self.conv2.forward(ys, Some(&residual), cache)
    }
}

/// Single-head attention among the pixels of each frame.
#[derive(Clone, Debug)]
pub(super) struct AttentionBlock {
    norm: RmsNorm,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    /// Loads `norm`, `to_qkv` (rows q, k, v) and `proj` below `vb`.
    pub(super) fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        let conv = |out, vb| Conv2d::new((channels, out), (1, 1), 1, Padding2d::default(), vb);
        Ok(Self {
            norm: RmsNorm::new(channels, 2, vb.pp("norm"))?,
            to_qkv: conv(3 * channels, vb.pp("to_qkv"))?,
            proj: conv(channels, vb.pp("proj"))?,
        })
    }

    /// Maps `xs` (1, T, H, W, C) to the same shape.
    pub(super) fn forward(&self, xs: Tensor) -> Result<Tensor> {
        let xs = xs.squeeze(0)?;
        let (frames, height, width, channels) = xs.dims4()?;
        let qkv = self.to_qkv.forward(&self.norm.forward(&xs)?)?;
        let qkv = qkv.reshape((frames, height * width, 3, channels))?;
        let (q, k, v) = (qkv.narrow(2, 0, 1)?, qkv.narrow(2, 1, 1)?, qkv.narrow(2, 2, 1)?); // (T, H W, 1, C)
        let ys = attention(&q, &k, &v, 1.0 / (channels as f64).sqrt(), &Mask::None)?;
        let ys = ys.reshape((frames, height, width, channels))?;
        self.proj.forward_add(&ys, Some(&xs))?.unsqueeze(0)
    }
}

/// Residual block, attention, residual block, at the lowest resolution.
#[derive(Clone, Debug)]
pub(super) struct MiddleBlock {
    before: ResidualBlock,
    attention: AttentionBlock,
    after: ResidualBlock,
}

impl MiddleBlock {
    /// Loads `0`, `1` and `2` below `vb`.
    pub(super) fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            before: ResidualBlock::new((channels, channels), vb.pp(0))?,
            attention: AttentionBlock::new(channels, vb.pp(1))?,
            after: ResidualBlock::new((channels, channels), vb.pp(2))?,
        })
    }

    /// Maps `xs` (1, T, H, W, C) to the same shape; `record` sees each block's output.
    pub(super) fn forward(
        &self,
        xs: Tensor,
        cache: &mut Cache,
        record: impl Fn(usize, &Tensor),
    ) -> Result<Tensor> {
        let xs = self.before.forward(xs, cache)?;
        record(0, &xs);
        let xs = self.attention.forward(xs)?;
        record(1, &xs);
        let xs = self.after.forward(xs, cache)?;
        record(2, &xs);
        Ok(xs)
    }
}

/// Norm, SiLU and the convolution to the output channels.
#[derive(Clone, Debug)]
pub(super) struct Head {
    norm: RmsNorm,
    conv: CausalConv3d,
}

impl Head {
    /// Loads `0` (norm) and `2` (convolution) below `vb`; `channels` = (in, out).
    pub(super) fn new(channels: (usize, usize), vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: RmsNorm::new(channels.0, 3, vb.pp(0))?,
            conv: CausalConv3d::new(channels, vb.pp(2))?,
        })
    }

    /// Maps `xs` (1, T, H, W, in) to (1, T, H, W, out).
    pub(super) fn forward(&self, xs: Tensor, cache: &mut Cache) -> Result<Tensor> {
        let ys = self.norm.forward_silu(&xs)?;
        drop(xs);
        self.conv.forward(ys, None, cache)
    }
}

/// A 1×1×1 convolution of `channels` = (in, out), which needs no past.
fn pointwise((in_channels, out_channels): (usize, usize), vb: VarBuilder) -> Result<Conv2d> {
    let weight = vb.get((out_channels, in_channels, 1, 1, 1), "weight")?.squeeze(2)?;
    Conv2d::from_parts(weight, Some(vb.get(out_channels, "bias")?), 1, Padding2d::default())
}
