//! Latents to video.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::Config;
use super::blocks::{CausalConv3d, Head, MiddleBlock, ResidualBlock};
use super::cache::Cache;
use super::resample::Upsample;
use crate::nn::trace;

/// `Decoder3d`: latents to pixels.
#[derive(Clone, Debug)]
pub(super) struct Decoder {
    conv1: CausalConv3d,
    middle: MiddleBlock,
    upsamples: Vec<Stage>,
    head: Head,
}

/// An entry of `upsamples`.
#[derive(Clone, Debug)]
enum Stage {
    Residual(ResidualBlock),
    Upsample(Upsample),
}

impl Decoder {
    /// Loads `conv1`, `middle`, `upsamples.N` and `head` below `vb`.
    pub(super) fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let lowest = cfg.dim * cfg.dim_mult.last().copied().unwrap_or(1);
        let mut upsamples = Vec::new();
        let mut channels = lowest;
        for (level, mult) in cfg.dim_mult.iter().enumerate().rev() {
            for _ in 0..=cfg.num_res_blocks {
                let vb = vb.pp("upsamples").pp(upsamples.len());
                upsamples.push(Stage::Residual(ResidualBlock::new((channels, cfg.dim * mult), vb)?));
                channels = cfg.dim * mult;
            }
            if level > 0 {
                let vb = vb.pp("upsamples").pp(upsamples.len());
                upsamples.push(Stage::Upsample(Upsample::new(
                    channels,
                    cfg.temperal_downsample[level - 1],
                    vb,
                )?));
                channels /= 2;
            }
        }
        Ok(Self {
            conv1: CausalConv3d::new((cfg.z_dim, lowest), vb.pp("conv1"))?,
            middle: MiddleBlock::new(lowest, vb.pp("middle"))?,
            upsamples,
            head: Head::new((channels, 3), vb.pp("head"))?,
        })
    }

    /// Maps the `chunk`-th latent frame `xs` (1, 1, h, w, z_dim) to (1, f, 8 h, 8 w, 3).
    pub(super) fn forward(&self, xs: Tensor, chunk: usize, cache: &mut Cache) -> Result<Tensor> {
        let xs = self.conv1.forward(xs, None, cache)?;
        trace::record(|| format!("dec.chunk{chunk}.conv1"), &xs);
        let record = |i: usize, xs: &Tensor| trace::record(|| format!("dec.chunk{chunk}.middle.{i}"), xs);
        let mut xs = self.middle.forward(xs, cache, record)?;
        for (i, stage) in self.upsamples.iter().enumerate() {
            xs = match stage {
                Stage::Residual(block) => block.forward(xs, cache)?,
                Stage::Upsample(step) => step.forward(xs, cache)?,
            };
            trace::record(|| format!("dec.chunk{chunk}.upsamples.{i}"), &xs);
        }
        let xs = self.head.forward(xs, cache)?;
        trace::record(|| format!("dec.chunk{chunk}.head"), &xs);
        Ok(xs)
    }
}
