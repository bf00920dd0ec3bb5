//! The Wan causal-3D VAE: video to latents and back, 4× in time and 8× in space.
//!
//! Maps `WanVAE_` of MeiGen-AI/InfiniteTalk at 0107cd9, `wan/modules/vae.py` (Wan 2.1, arXiv 2503.20314), weights
//! `Wan2.1_VAE.pth`, with the checkpoint's names:
//!
//! | reference | here |
//! |---|---|
//! | `Encoder3d`, `encoder.*` | `encoder::Encoder` |
//! | `Decoder3d`, `decoder.*` | `decoder::Decoder` |
//! | `ResidualBlock`, `AttentionBlock`, `RMS_norm` | `blocks` |
//! | `Resample` | `resample` |
//! | `feat_cache`, `feat_idx` | `cache::Cache` |
//! | `conv1`, `conv2`, `WanVAE.scale` | [`Vae`] |
//!
//! Video goes through in chunks, one latent frame each, and every causal convolution keeps the last two frames
//! of its input for the next chunk, so memory is that of a chunk, not of the clip.
//!
//! Where we differ: activations are channels-last; frames of the past are read where they are instead of being
//! concatenated; the half of `conv1` that computes the log-variance is not run, because nothing samples from it;
//! attention inside of the levels (`attn_scales`) is refused, because no checkpoint has it.

mod blocks;
mod cache;
mod cost;
mod decoder;
mod encoder;
mod resample;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::nn::{Conv2d, Padding2d, trace};
use cache::Cache;
pub use cost::Cost;
use decoder::Decoder;
use encoder::Encoder;

/// Channels of the latents; the statistics below are theirs.
const Z_DIM: usize = 16;

/// Mean of each latent channel over the training data (`WanVAE.mean`).
const MEAN: [f32; Z_DIM] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
];

/// Standard deviation of each latent channel over the training data (`WanVAE.std`).
const STD: [f32; Z_DIM] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
];

/// Sizes of the network, named as in the reference.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Config {
    /// Channels at full resolution.
    pub dim: usize,
    /// Channels of the latents: 16.
    pub z_dim: usize,
    /// Channels of each level, in multiples of `dim`, from full resolution down.
    pub dim_mult: Vec<usize>,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub num_res_blocks: usize,
    /// Scales with attention in their levels: none.
    #[serde(default)]
    pub attn_scales: Vec<f64>,
    /// Whether the step from each level to the next also halves the frame rate.
    pub temperal_downsample: Vec<bool>,
}

impl Config {
    /// `Wan2.1_VAE.pth`.
    pub fn wan2_1() -> Self {
        Self {
            dim: 96,
            z_dim: Z_DIM,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            attn_scales: vec![],
            temperal_downsample: vec![false, true, true],
        }
    }

    /// Pixels per latent in each direction of the frame.
    pub fn spatial_stride(&self) -> usize {
        1 << self.temperal_downsample.len()
    }

    /// Frames that the first latent frame is followed by, per latent frame.
    pub fn temporal_stride(&self) -> usize {
        1 << self.temperal_downsample.iter().filter(|&&halves| halves).count()
    }

    fn validate(&self) -> Result<()> {
        let levels = self.dim_mult.len();
        if self.z_dim != Z_DIM {
            candle_core::bail!("`z_dim` is {}, expected {Z_DIM}", self.z_dim);
        }
        if levels == 0 || self.dim == 0 || self.dim_mult.contains(&0) || self.num_res_blocks == 0 {
            candle_core::bail!("a VAE needs `dim`, `dim_mult` and `num_res_blocks` that are not zero");
        }
        if self.temperal_downsample.len() + 1 != levels {
            let halvings = self.temperal_downsample.len();
            candle_core::bail!(
                "`temperal_downsample` has {halvings} entries, expected one less than `dim_mult`"
            );
        }
        if !self.attn_scales.is_empty() {
            candle_core::bail!("`attn_scales` is {:?}, expected none", self.attn_scales);
        }
        // A chunk of four frames can be halved twice, no more.
        if self.temporal_stride() > CHUNK_FRAMES {
            candle_core::bail!("`temperal_downsample` halves the frame rate more than twice");
        }
        Ok(())
    }
}

/// Frames of an encoder chunk after the first, which has one.
const CHUNK_FRAMES: usize = 4;

/// Encoder and decoder.
#[derive(Clone, Debug)]
pub struct Vae {
    encoder: Encoder,
    to_mu: Conv2d,
    from_latents: Conv2d,
    decoder: Decoder,
    mean: Tensor, // (16, 1, 1, 1)
    std: Tensor,  // (16, 1, 1, 1)
    spatial_stride: usize,
    dtype: DType,
}

impl Vae {
    /// Loads `encoder`, `conv1`, `conv2` and `decoder` below `vb`.
    ///
    /// # Errors
    /// A config that no checkpoint has, or weights that do not fit it.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let z = cfg.z_dim;
        let encoder = Encoder::new(cfg, vb.pp("encoder"))?;
        let conv1 = vb.pp("conv1");
        let weight = conv1.get((2 * z, 2 * z, 1, 1, 1), "weight")?.narrow(0, 0, z)?.squeeze(2)?;
        let to_mu =
            Conv2d::from_parts(weight, Some(conv1.get(2 * z, "bias")?.narrow(0, 0, z)?), 1, NO_PADDING)?;
        let conv2 = vb.pp("conv2");
        let weight = conv2.get((z, z, 1, 1, 1), "weight")?.squeeze(2)?;
        let from_latents = Conv2d::from_parts(weight, Some(conv2.get(z, "bias")?), 1, NO_PADDING)?;
        let decoder = Decoder::new(cfg, vb.pp("decoder"))?;
        let stats = |values: &[f32; Z_DIM]| Tensor::new(values, vb.device())?.reshape((Z_DIM, 1, 1, 1));
        Ok(Self {
            encoder,
            to_mu,
            from_latents,
            decoder,
            mean: stats(&MEAN)?,
            std: stats(&STD)?,
            spatial_stride: cfg.spatial_stride(),
            dtype: vb.dtype(),
        })
    }

    /// Maps `video` (3, F, H, W) in [−1, 1] to normalised latents (16, T, H/8, W/8) in f32, T = (F − 1) / 4 + 1;
    /// frames that do not fill a chunk of four are ignored, as in the reference.
    ///
    /// # Errors
    /// H or W is not a multiple of 8, or there is no frame.
    pub fn encode(&self, video: &Tensor) -> Result<Tensor> {
        let (channels, frames, height, width) = video.dims4()?;
        let stride = self.spatial_stride;
        if channels != 3 || frames == 0 || height * width == 0 || height % stride != 0 || width % stride != 0
        {
            candle_core::bail!(
                "the video is {:?}, expected (3, F, H, W) with H and W multiples of {stride}",
                video.shape()
            );
        }
        let mut cache = Cache::default();
        let mut latents = Vec::with_capacity(frames.div_ceil(CHUNK_FRAMES));
        let chunks = std::iter::once((0, 1))
            .chain((1..).step_by(CHUNK_FRAMES).map(|start| (start, CHUNK_FRAMES)))
            .take_while(|(start, len)| start + len <= frames);
        for (i, (start, len)) in chunks.enumerate() {
            let xs = video.narrow(1, start, len)?.permute((1, 2, 3, 0))?.to_dtype(self.dtype)?; // (f, H, W, 3)
            cache.start_chunk();
            let xs = self.encoder.forward(xs.contiguous()?.unsqueeze(0)?, i, &mut cache)?; // (1, t, h, w, 32)
            latents.push(self.to_mu.forward(&xs.squeeze(0)?)?); // (t, h, w, 16)
        }
        let mu = Tensor::cat(&latents, 0)?.permute((3, 0, 1, 2))?.to_dtype(DType::F32)?.contiguous()?; // (16, T, h, w)
        trace::record(|| "enc.mu".to_owned(), &mu);
        mu.broadcast_sub(&self.mean)?.broadcast_div(&self.std)
    }

    /// Maps normalised `latents` (16, T, h, w) to a video (3, 1 + 4 (T − 1), 8 h, 8 w) in f32, clamped to [−1, 1].
    /// [`Vae::decode_chunks`] gives the same frames without keeping them.
    ///
    /// # Errors
    /// `latents` has another shape.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut chunks = Vec::new();
        self.decode_chunks(latents, &mut |frames| {
            chunks.push(frames);
            Ok(())
        })?;
        Tensor::cat(&chunks, 1)
    }

    /// Decodes normalised `latents` (16, T, h, w) and hands over the frames (3, f, 8 h, 8 w) of each latent frame,
    /// in f32, clamped to [−1, 1]: one frame for the first, four for each that follows.
    ///
    /// # Errors
    /// `latents` has another shape, or `sink` fails.
    pub fn decode_chunks(&self, latents: &Tensor, sink: &mut dyn FnMut(Tensor) -> Result<()>) -> Result<()> {
        let (channels, frames, height, width) = latents.dims4()?;
        if channels != Z_DIM || frames * height * width == 0 {
            candle_core::bail!("the latents are {:?}, expected ({Z_DIM}, T, h, w)", latents.shape());
        }
        let xs = latents.to_dtype(DType::F32)?.broadcast_mul(&self.std)?.broadcast_add(&self.mean)?;
        let xs = xs.permute((1, 2, 3, 0))?.to_dtype(self.dtype)?.contiguous()?; // (T, h, w, 16)
        let xs = self.from_latents.forward(&xs)?.unsqueeze(0)?; // (1, T, h, w, 16)
        trace::record(|| "dec.conv2".to_owned(), &xs);
        let mut cache = Cache::default();
        for i in 0..frames {
            cache.start_chunk();
            let ys = self.decoder.forward(xs.narrow(1, i, 1)?, i, &mut cache)?; // (1, f, H, W, 3)
            let ys = ys.squeeze(0)?.permute((3, 0, 1, 2))?.to_dtype(DType::F32)?; // (3, f, H, W)
            sink(ys.clamp(-1f32, 1f32)?.contiguous()?)?;
        }
        Ok(())
    }
}

const NO_PADDING: Padding2d = Padding2d { top: 0, bottom: 0, left: 0, right: 0 };

#[cfg(test)]
mod tests;
