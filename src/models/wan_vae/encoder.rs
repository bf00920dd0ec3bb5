//! Video to latents.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::Config;
use super::blocks::{CausalConv3d, Head, MiddleBlock, ResidualBlock};
use super::cache::Cache;
use super::resample::Downsample;
use crate::nn::trace;

/// `Encoder3d`: pixels to mean and log-variance of the latents.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    conv1: CausalConv3d,
    downsamples: Vec<Stage>,
    middle: MiddleBlock,
    head: Head,
}

/// An entry of `downsamples`.
#[derive(Clone, Debug)]
enum Stage {
    Residual(ResidualBlock),
    Downsample(Downsample),
}

impl Encoder {
    /// Loads `conv1`, `downsamples.N`, `middle` and `head` below `vb`.
    pub(super) fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let mut downsamples = Vec::new();
        let mut channels = cfg.dim;
        for (level, mult) in cfg.dim_mult.iter().enumerate() {
            for _ in 0..cfg.num_res_blocks {
                let vb = vb.pp("downsamples").pp(downsamples.len());
                downsamples.push(Stage::Residual(ResidualBlock::new((channels, cfg.dim * mult), vb)?));
                channels = cfg.dim * mult;
            }
            if let Some(&temporal) = cfg.temperal_downsample.get(level) {
                let vb = vb.pp("downsamples").pp(downsamples.len());
                downsamples.push(Stage::Downsample(Downsample::new(channels, temporal, vb)?));
            }
        }
        Ok(Self {
            conv1: CausalConv3d::new((3, cfg.dim), vb.pp("conv1"))?,
            downsamples,
            middle: MiddleBlock::new(channels, vb.pp("middle"))?,
            head: Head::new((channels, 2 * cfg.z_dim), vb.pp("head"))?,
        })
    }

    /// Maps the `chunk`-th chunk `xs` (1, f, H, W, 3) to (1, t, H/8, W/8, 2 · z_dim).
    pub(super) fn forward(&self, xs: Tensor, chunk: usize, cache: &mut Cache) -> Result<Tensor> {
        let mut xs = self.conv1.forward(xs, None, cache)?;
        trace::record(|| format!("enc.chunk{chunk}.conv1"), &xs);
        for (i, stage) in self.downsamples.iter().enumerate() {
            xs = match stage {
                Stage::Residual(block) => block.forward(xs, cache)?,
                Stage::Downsample(step) => step.forward(xs, cache)?,
            };
            trace::record(|| format!("enc.chunk{chunk}.downsamples.{i}"), &xs);
        }
        let record = |i: usize, xs: &Tensor| trace::record(|| format!("enc.chunk{chunk}.middle.{i}"), xs);
        let xs = self.middle.forward(xs, cache, record)?;
        self.head.forward(xs, cache)
    }
}
