//! CLIP's visual tower: one reference frame → 257 vectors, the image context of the DiT.
//!
//! Papers: Radford et al. 2021, <https://arxiv.org/abs/2103.00020>; OpenCLIP's ViT-H/14. Reference:
//! `wan/modules/clip.py` of MeiGen-AI/InfiniteTalk at 0107cd9, `CLIPModel.visual`. Weights: the `visual.*` part of
//! `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.
//!
//! As in the reference, the output is what comes out of all blocks but the last: the last block, the norm after it
//! and the projection head are never used. Where we differ: we do not ask for their weights, nor for those of the
//! text tower.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::nn::{LayerNorm, Linear, Mask, attention, gelu_erf, trace};

/// Mean of red, green and blue (0…1) in CLIP's training data.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];

/// Standard deviation of red, green and blue in CLIP's training data.
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// The cubic kernel's parameter in PyTorch's `bicubic`.
const CUBIC_A: f32 = -0.75;

/// The architecture, in the words of the reference's `XLMRobertaCLIP`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Config {
    /// Height and width of the input, in pixels.
    pub image_size: usize,
    /// Height and width of a patch, in pixels.
    pub patch_size: usize,
    /// Width of the transformer.
    pub vision_dim: usize,
    /// Attention heads.
    pub vision_heads: usize,
    /// Transformer blocks in the checkpoint, of which the last is not used.
    pub vision_layers: usize,
    /// Width of the feed-forward layers, as a multiple of `vision_dim`.
    pub vision_mlp_ratio: f64,
    /// How the tokens become one. Only `token`, a class token before the patches, is supported.
    pub vision_pool: String,
    /// Whether there is a norm before the first block. Only `true` is supported.
    pub vision_pre_norm: bool,
    /// Whether the blocks normalise after each half. Only `false` is supported.
    pub vision_post_norm: bool,
    /// The feed-forward activation. Only `gelu`, the exact one, is supported.
    pub activation: String,
    /// Added to the variance in the norms.
    #[serde(default = "default_eps")]
    pub eps: f64,
}

/// The reference's `norm_eps`, which no caller overrides.
fn default_eps() -> f64 {
    1e-5
}

impl Config {
    /// ViT-H/14 of `open-clip-xlm-roberta-large-vit-huge-14`.
    pub fn vit_h_14() -> Self {
        Self {
            image_size: 224,
            patch_size: 14,
            vision_dim: 1280,
            vision_heads: 16,
            vision_layers: 32,
            vision_mlp_ratio: 4.0,
            vision_pool: "token".to_owned(),
            vision_pre_norm: true,
            vision_post_norm: false,
            activation: "gelu".to_owned(),
            eps: default_eps(),
        }
    }

    /// Refuses, by name, what this network does not compute.
    fn validate(&self) -> Result<()> {
        if self.vision_pool != "token" {
            bail!("clip: `vision_pool` is {:?}, expected \"token\"", self.vision_pool);
        }
        if !self.vision_pre_norm {
            bail!("clip: `vision_pre_norm` is false, expected true");
        }
        if self.vision_post_norm {
            bail!("clip: `vision_post_norm` is true, expected false");
        }
        if self.activation != "gelu" {
            bail!("clip: `activation` is {:?}, expected \"gelu\"", self.activation);
        }
        if self.vision_layers == 0 {
            bail!("clip: `vision_layers` is 0, expected at least 1");
        }
        if self.vision_heads == 0 || !self.vision_dim.is_multiple_of(self.vision_heads) {
            bail!(
                "clip: `vision_heads` is {}, expected a divisor of `vision_dim` {}",
                self.vision_heads,
                self.vision_dim
            );
        }
        if self.patch_size == 0 || !self.image_size.is_multiple_of(self.patch_size) {
            bail!(
                "clip: `patch_size` is {}, expected a divisor of `image_size` {}",
                self.patch_size,
                self.image_size
            );
        }
        Ok(())
    }

    /// Rows of the output: a class token and one for each patch.
    pub fn rows(&self) -> usize {
        1 + self.grid().pow(2)
    }

    /// Patches along one side of the image.
    fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

/// The visual tower.
#[derive(Clone, Debug)]
pub struct Model {
    patch_embedding: Linear,
    cls_embedding: Tensor, // (1, 1, D)
    pos_embedding: Tensor, // (1, 1 + patches, D)
    pre_norm: LayerNorm,
    blocks: Vec<Block>,
    config: Config,
    dtype: DType,
    device: Device,
}

impl Model {
    /// Loads the part of `visual` below `vb` that is used, in the dtype of `vb`. Fails on configurations that the
    /// checkpoint does not need.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::with_num_blocks(cfg, cfg.vision_layers.saturating_sub(1), vb)
    }

    /// Like [`Model::new`], with the first `num_blocks` of the checkpoint's blocks instead of all but the last.
    pub fn with_num_blocks(cfg: &Config, num_blocks: usize, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        if num_blocks > cfg.vision_layers {
            bail!("clip: {num_blocks} blocks, expected at most `vision_layers` = {}", cfg.vision_layers);
        }
        let vb = vb.pp("visual");
        let (dim, patch) = (cfg.vision_dim, cfg.patch_size);
        let patch_weight = vb.pp("patch_embedding").get((dim, 3, patch, patch), "weight")?;
        let blocks = (0..num_blocks).map(|i| Block::new(cfg, vb.pp("transformer").pp(i)));
        Ok(Self {
            // A convolution whose stride is its kernel is a linear layer over flattened patches.
            patch_embedding: Linear::from_parts(patch_weight.flatten_from(1)?, None),
            cls_embedding: vb.get((1, 1, dim), "cls_embedding")?,
            pos_embedding: vb.get((1, cfg.rows(), dim), "pos_embedding")?,
            pre_norm: LayerNorm::new(dim, cfg.eps, vb.pp("pre_norm"))?,
            blocks: blocks.collect::<Result<_>>()?,
            config: cfg.clone(),
            dtype: vb.dtype(),
            device: vb.device().clone(),
        })
    }

    /// Makes the network's input of one `frame` (3, 1, H, W) in −1…1, of any size: resized bicubically to a square
    /// without regard to its aspect, and standardised: (1, 3, image_size, image_size), f32, on the network's device.
    pub fn preprocess(&self, frame: &Tensor) -> Result<Tensor> {
        let (channels, frames, height, width) = frame.dims4()?;
        if (channels, frames) != (3, 1) || height == 0 || width == 0 {
            bail!("clip: the frame is {:?}, expected (3, 1, H, W)", frame.dims());
        }
        let size = self.config.image_size;
        let xs = frame.to_device(&self.device)?.to_dtype(DType::F32)?.reshape((3 * height, width))?;
        let columns = bicubic_matrix(width, size, &self.device)?.t()?.contiguous()?; // (W, size)
        let xs = xs.matmul(&columns)?.reshape((3, height, size))?;
        let rows = bicubic_matrix(height, size, &self.device)?.broadcast_left(3)?.contiguous()?; // (3, size, H)
        let xs = rows.matmul(&xs)?.affine(0.5, 0.5)?.unsqueeze(0)?; // (1, 3, size, size)
        let per_channel = |values: &[f32; 3]| Tensor::new(values, &self.device)?.reshape((1, 3, 1, 1));
        xs.broadcast_sub(&per_channel(&MEAN)?)?.broadcast_div(&per_channel(&STD)?)
    }

    /// Maps `pixel_values` (B, 3, image_size, image_size) to the class token and the patches row by row,
    /// (B, 1 + patches, D), in the dtype of the weights.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let xs = self.patch_embedding.forward(&self.patches(&pixel_values.to_dtype(self.dtype)?)?)?;
        trace::record(|| "patches".to_owned(), &xs);
        let (batch, _, dim) = xs.dims3()?;
        let class = self.cls_embedding.broadcast_as((batch, 1, dim))?;
        let xs = Tensor::cat(&[&class, &xs], 1)?.broadcast_add(&self.pos_embedding)?;
        let mut xs = self.pre_norm.forward(&xs)?;
        trace::record(|| "pre_norm".to_owned(), &xs);
        for (i, block) in self.blocks.iter().enumerate() {
            xs = block.forward(&xs)?;
            trace::record(|| format!("block_{i}"), &xs);
        }
        Ok(xs)
    }

    /// Cuts `xs` (B, 3, H, W) into flattened patches (B, patches, 3 · patch · patch).
    fn patches(&self, xs: &Tensor) -> Result<Tensor> {
        let (size, patch, grid) = (self.config.image_size, self.config.patch_size, self.config.grid());
        let (batch, channels, height, width) = xs.dims4()?;
        if (channels, height, width) != (3, size, size) {
            bail!("clip: the pixel values are {:?}, expected (B, 3, {size}, {size})", xs.dims());
        }
        xs.reshape(&[batch, 3, grid, patch, grid, patch])?
            .permute(vec![0, 2, 4, 1, 3, 5])? // (B, rows, columns, 3, patch, patch)
            .reshape((batch, grid * grid, 3 * patch * patch))
    }
}

/// A pre-norm transformer block.
#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    to_qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    mlp_in: Linear,
    mlp_out: Linear,
    num_heads: usize,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let dim = cfg.vision_dim;
        let mlp_dim = (dim as f64 * cfg.vision_mlp_ratio) as usize;
        Ok(Self {
            norm1: LayerNorm::new(dim, cfg.eps, vb.pp("norm1"))?,
            to_qkv: Linear::new(dim, 3 * dim, vb.pp("attn.to_qkv"))?,
            proj: Linear::new(dim, dim, vb.pp("attn.proj"))?,
            norm2: LayerNorm::new(dim, cfg.eps, vb.pp("norm2"))?,
            mlp_in: Linear::new(dim, mlp_dim, vb.pp("mlp.0"))?,
            mlp_out: Linear::new(mlp_dim, dim, vb.pp("mlp.2"))?,
            num_heads: cfg.vision_heads,
        })
    }

    /// Maps `xs` (B, L, D) to (B, L, D).
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = (xs + self.self_attention(&self.norm1.forward(xs)?)?)?;
        let ys = gelu_erf(&self.mlp_in.forward(&self.norm2.forward(&xs)?)?)?;
        xs + self.mlp_out.forward(&ys)?
    }

    fn self_attention(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, len, dim) = xs.dims3()?;
        let head_dim = dim / self.num_heads;
        let qkv = self.to_qkv.forward(xs)?.reshape((batch, len, 3, self.num_heads, head_dim))?;
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2)?.contiguous(); // (B, L, N, D / N)
        let scale = 1.0 / (head_dim as f64).sqrt();
        let ys = attention(&part(0)?, &part(1)?, &part(2)?, scale, &Mask::None)?;
        self.proj.forward(&ys.reshape((batch, len, dim))?)
    }
}

/// The matrix (new_len, len) that resizes a line of `len` pixels to `new_len` as PyTorch's `bicubic` does: half-pixel
/// centres, no antialiasing, the edge pixels repeated outwards; in f32, as there.
fn bicubic_matrix(len: usize, new_len: usize, device: &Device) -> Result<Tensor> {
    let near = |x: f32| ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1.0; // |x| ≤ 1
    let far = |x: f32| ((CUBIC_A * x - 5.0 * CUBIC_A) * x + 8.0 * CUBIC_A) * x - 4.0 * CUBIC_A; // 1 < |x| < 2
    let step = len as f32 / new_len as f32;
    let mut matrix = vec![0f32; new_len * len];
    for (i, row) in matrix.chunks_exact_mut(len).enumerate() {
        let centre = step * (i as f32 + 0.5) - 0.5;
        let left = centre.floor();
        let t = centre - left;
        for (tap, weight) in [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)].into_iter().enumerate() {
            let source = (left as i64 + tap as i64 - 1).clamp(0, len as i64 - 1);
            row[source as usize] += weight;
        }
    }
    Tensor::from_vec(matrix, (new_len, len), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Config {
        Config {
            image_size: 6,
            patch_size: 2,
            vision_dim: 8,
            vision_heads: 2,
            vision_layers: 2,
            ..Config::vit_h_14()
        }
    }

    fn model(cfg: &Config) -> Result<Model> {
        Model::new(cfg, VarBuilder::zeros(DType::F32, &Device::Cpu))
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        for (cfg, name) in [
            (Config { vision_pool: "mean".into(), ..tiny() }, "vision_pool"),
            (Config { vision_pre_norm: false, ..tiny() }, "vision_pre_norm"),
            (Config { vision_post_norm: true, ..tiny() }, "vision_post_norm"),
            (Config { activation: "quick_gelu".into(), ..tiny() }, "activation"),
            (Config { vision_layers: 0, ..tiny() }, "vision_layers"),
            (Config { vision_heads: 3, ..tiny() }, "vision_heads"),
            (Config { patch_size: 4, ..tiny() }, "patch_size"),
        ] {
            let message = model(&cfg).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn the_bicubic_matrix_has_half_pixel_centres_and_repeats_the_edges() {
        let matrix =
            |len, new_len| bicubic_matrix(len, new_len, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        // Half-way between pixels the cubic with a = −0.75 weighs −3/32, 19/32, 19/32, −3/32.
        let half = [[16.0, 19.0, -3.0, 0.0], [0.0, -3.0, 19.0, 16.0]];
        assert_eq!(matrix(4, 2), half.map(|row| row.map(|weight: f32| weight / 32.0)));
        assert_eq!(matrix(2, 2), [[1.0, 0.0], [0.0, 1.0]]);
        for (len, new_len) in [(7, 5), (5, 7), (1, 6), (640, 224)] {
            let rows = matrix(len, new_len);
            assert!(rows.iter().all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5), "{len} → {new_len}");
        }
    }

    #[test]
    fn a_grey_frame_of_any_size_is_standardised() {
        let model = model(&tiny()).unwrap();
        let frame = Tensor::zeros((3, 1, 5, 9), DType::F32, &Device::Cpu).unwrap();
        let xs = model.preprocess(&frame).unwrap();
        assert_eq!(xs.dims(), [1, 3, 6, 6]);
        for (channel, (mean, std)) in MEAN.iter().zip(STD).enumerate() {
            let values = xs.narrow(1, channel, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|v| (v - (0.5 - mean) / std).abs() < 1e-5));
        }
    }

    #[test]
    fn inputs_of_other_shapes_are_errors() {
        let model = model(&tiny()).unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        assert!(model.preprocess(&zeros(&[3, 2, 4, 4])).is_err());
        assert!(model.preprocess(&zeros(&[1, 1, 4, 4])).is_err());
        assert!(model.forward(&zeros(&[1, 3, 6, 4])).is_err());
        assert_eq!(model.forward(&zeros(&[2, 3, 6, 6])).unwrap().dims(), [2, 10, 8]);
    }
}
