//! UMT5 encoder: token ids of a prompt → one vector for each token, the text context of the DiT.
//!
//! Paper: Chung et al. 2023 (UniMax), <https://arxiv.org/abs/2304.09151>, on T5, <https://arxiv.org/abs/1910.10683>.
//! Reference: `wan/modules/t5.py` of MeiGen-AI/InfiniteTalk at 0107cd9, class `T5Encoder`. Weights:
//! `models_t5_umt5-xxl-enc-bf16.pth` of Wan2.1, all of it.
//!
//! Where we differ: the reference pads a prompt to 512 tokens, encodes them, and cuts the result to the prompt's
//! own tokens. Masked tokens reach nothing that is kept, so [`Model::encode`] runs on the prompt alone;
//! [`Model::forward`] is the padded form. Attention computes in f32 whatever the dtype of the weights, where
//! the reference rounds scores and probabilities to that dtype.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::nn::{Linear, Mask, RmsNorm, attention, gelu_tanh, trace};

/// The architecture, in the words of the reference's `T5Encoder`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Config {
    /// Entries of the token table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Width of queries, keys and values, all heads together.
    pub dim_attn: usize,
    /// Width of the feed-forward layers.
    pub dim_ffn: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Transformer blocks.
    pub num_layers: usize,
    /// Buckets of relative positions, half of them for keys after the query.
    pub num_buckets: usize,
    /// Distance in tokens from which on all keys share the last bucket.
    #[serde(default = "default_max_dist")]
    pub max_dist: usize,
    /// Whether all blocks share one table of position biases. Only `false` is supported.
    pub shared_pos: bool,
    /// Added to the mean square in the norms.
    #[serde(default = "default_eps")]
    pub eps: f64,
}

/// `T5RelativeEmbedding`'s default, which no caller in the reference overrides.
fn default_max_dist() -> usize {
    128
}

/// `T5LayerNorm`'s default, which no caller in the reference overrides.
fn default_eps() -> f64 {
    1e-6
}

impl Config {
    /// The encoder of `google/umt5-xxl`.
    pub fn umt5_xxl() -> Self {
        Self {
            vocab: 256_384,
            dim: 4096,
            dim_attn: 4096,
            dim_ffn: 10_240,
            num_heads: 64,
            num_layers: 24,
            num_buckets: 32,
            max_dist: default_max_dist(),
            shared_pos: false,
            eps: default_eps(),
        }
    }

    /// Refuses, by name, what this network does not compute.
    fn validate(&self) -> Result<()> {
        if self.shared_pos {
            bail!("umt5: `shared_pos` is true, expected false");
        }
        if self.num_heads == 0 || !self.dim_attn.is_multiple_of(self.num_heads) {
            bail!(
                "umt5: `num_heads` is {}, expected a divisor of `dim_attn` {}",
                self.num_heads,
                self.dim_attn
            );
        }
        if self.num_buckets == 0 || !self.num_buckets.is_multiple_of(4) {
            bail!("umt5: `num_buckets` is {}, expected a positive multiple of 4", self.num_buckets);
        }
        if self.max_dist <= self.num_buckets / 4 {
            let exact = self.num_buckets / 4;
            bail!("umt5: `max_dist` is {}, expected more than `num_buckets` / 4 = {exact}", self.max_dist);
        }
        Ok(())
    }
}

/// The text encoder.
#[derive(Clone, Debug)]
pub struct Model {
    token_embedding: Tensor, // (vocab, D)
    blocks: Vec<Block>,
    norm: RmsNorm,
    dtype: DType,
}

impl Model {
    /// Loads `token_embedding`, `blocks.{i}` and `norm` below `vb`, in the dtype of `vb`: bf16 as published, or f32.
    /// Fails on configurations that the checkpoint does not need, and on f16, which UMT5-XXL overflows.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let dtype = vb.dtype();
        if !matches!(dtype, DType::F32 | DType::BF16) {
            bail!("umt5: the dtype is {dtype:?}, expected F32 or BF16");
        }
        let blocks = (0..cfg.num_layers).map(|i| Block::new(cfg, vb.pp("blocks").pp(i)));
        Ok(Self {
            token_embedding: vb.pp("token_embedding").get((cfg.vocab, cfg.dim), "weight")?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: RmsNorm::new(cfg.dim, cfg.eps, vb.pp("norm"))?,
            dtype,
        })
    }

    /// Encodes one prompt of `ids`, `</s>` included and without padding: (ids, D) in the dtype of the weights.
    ///
    /// Fails on an empty prompt and on ids outside of the vocabulary.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, (1, ids.len()), self.token_embedding.device())?;
        self.run(&ids, None)?.squeeze(0)
    }

    /// Maps `ids` (B, S), u32, to (B, S, D) in the dtype of the weights. `mask` (B, S), of any dtype, is 1 for tokens
    /// and 0 for padding, which nobody attends to; the rows of padding in the result mean nothing.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        if mask.dims() != ids.dims() {
            bail!("umt5: the mask is {:?}, expected the shape of the ids, {:?}", mask.dims(), ids.dims());
        }
        self.run(ids, Some(mask))
    }

    fn run(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, len) = ids.dims2()?;
        if len == 0 {
            bail!("umt5: the prompt has no tokens, expected at least `</s>`");
        }
        let xs = self.token_embedding.index_select(&ids.flatten_all()?, 0)?;
        let mut xs = xs.reshape((batch, len, self.token_embedding.dim(1)?))?;
        trace::record(|| "embed".to_owned(), &xs);
        let padding = match mask {
            Some(mask) => Some(mask.eq(0f64)?.reshape((batch, 1, 1, len))?),
            None => None,
        };
        for (i, block) in self.blocks.iter().enumerate() {
            let bias = block.position_bias(len)?; // (1, N, S, S)
            trace::record(|| format!("pos_bias_block{i}"), &bias);
            let bias = match &padding {
                Some(padding) => mask_keys(&bias, padding, self.dtype)?,
                None => bias,
            };
            xs = block.forward(&xs, &Mask::Bias(bias))?;
            trace::record(|| format!("block_{i}"), &xs);
        }
        self.norm.forward(&xs)
    }
}

/// `bias` (1, N, S, S) with the most negative finite value of `dtype` where `padding` (B, 1, 1, S) is not 0:
/// (B, N, S, S). Not −∞, so that a row whose keys are all padding stays finite.
fn mask_keys(bias: &Tensor, padding: &Tensor, dtype: DType) -> Result<Tensor> {
    let lowest = match dtype {
        DType::BF16 => half::bf16::MIN.to_f32(),
        _ => f32::MIN,
    };
    let (_, heads, len, _) = bias.dims4()?;
    let shape = (padding.dim(0)?, heads, len, len);
    let lowest = Tensor::full(lowest, (1, 1, 1, 1), bias.device())?.broadcast_as(shape)?;
    padding.broadcast_as(shape)?.where_cond(&lowest, &bias.broadcast_as(shape)?)
}

/// The bucket of a key `relative` tokens after its query (before it when negative), out of `num_buckets`.
///
/// Half of the buckets are for keys after the query. Of each half, the first half holds one distance each and the
/// rest grow logarithmically up to `max_dist`. f32 throughout, as in the reference.
pub fn relative_bucket(relative: i64, num_buckets: usize, max_dist: usize) -> usize {
    let half = num_buckets / 2;
    let offset = if relative > 0 { half } else { 0 };
    let distance = relative.unsigned_abs() as usize;
    let max_exact = half / 2;
    if distance < max_exact {
        return offset + distance;
    }
    let log = (distance as f32 / max_exact as f32).ln();
    let log_max = (max_dist as f64 / max_exact as f64).ln() as f32;
    let bucket = max_exact + (log / log_max * (half - max_exact) as f32) as usize;
    offset + bucket.min(half - 1)
}

/// A pre-norm transformer block with position biases of its own.
#[derive(Clone, Debug)]
struct Block {
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm2: RmsNorm,
    gate: Linear,
    fc1: Linear,
    fc2: Linear,
    position_embedding: Tensor, // (buckets, N)
    num_heads: usize,
    max_dist: usize,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (attn, ffn) = (vb.pp("attn"), vb.pp("ffn"));
        let position_shape = (cfg.num_buckets, cfg.num_heads);
        Ok(Self {
            norm1: RmsNorm::new(cfg.dim, cfg.eps, vb.pp("norm1"))?,
            q: Linear::no_bias(cfg.dim, cfg.dim_attn, attn.pp("q"))?,
            k: Linear::no_bias(cfg.dim, cfg.dim_attn, attn.pp("k"))?,
            v: Linear::no_bias(cfg.dim, cfg.dim_attn, attn.pp("v"))?,
            o: Linear::no_bias(cfg.dim_attn, cfg.dim, attn.pp("o"))?,
            norm2: RmsNorm::new(cfg.dim, cfg.eps, vb.pp("norm2"))?,
            gate: Linear::no_bias(cfg.dim, cfg.dim_ffn, ffn.pp("gate.0"))?,
            fc1: Linear::no_bias(cfg.dim, cfg.dim_ffn, ffn.pp("fc1"))?,
            fc2: Linear::no_bias(cfg.dim_ffn, cfg.dim, ffn.pp("fc2"))?,
            position_embedding: vb.pp("pos_embedding.embedding").get(position_shape, "weight")?,
            num_heads: cfg.num_heads,
            max_dist: cfg.max_dist,
        })
    }

    /// The bias of every query-key pair of `len` tokens: (1, N, S, S), f32.
    fn position_bias(&self, len: usize) -> Result<Tensor> {
        let num_buckets = self.position_embedding.dim(0)?;
        let pairs = (0..len as i64).flat_map(|query| (0..len as i64).map(move |key| key - query));
        let buckets = pairs.map(|relative| relative_bucket(relative, num_buckets, self.max_dist) as u32);
        let buckets = Tensor::from_iter(buckets, self.position_embedding.device())?;
        let by_head = self.position_embedding.to_dtype(DType::F32)?.t()?.contiguous()?; // (N, buckets)
        by_head.index_select(&buckets, 1)?.reshape((1, self.num_heads, len, len))
    }

    /// Maps `xs` (B, S, D) to (B, S, D).
    fn forward(&self, xs: &Tensor, mask: &Mask) -> Result<Tensor> {
        let xs = (xs + self.self_attention(&self.norm1.forward(xs)?, mask)?)?;
        let ys = self.norm2.forward(&xs)?;
        let ys = (self.fc1.forward(&ys)? * gelu_tanh(&self.gate.forward(&ys)?)?)?;
        xs + self.fc2.forward(&ys)?
    }

    /// Attention whose scores are not scaled: T5 puts 1 / √head_dim into the initial weights.
    fn self_attention(&self, xs: &Tensor, mask: &Mask) -> Result<Tensor> {
        let (batch, len, _) = xs.dims3()?;
        let heads = |xs: Tensor| {
            let head_dim = xs.dim(2)? / self.num_heads;
            xs.reshape((batch, len, self.num_heads, head_dim))
        };
        let (q, k, v) = (self.q.forward(xs)?, self.k.forward(xs)?, self.v.forward(xs)?);
        let ys = attention(&heads(q)?, &heads(k)?, &heads(v)?, 1.0, mask)?; // (B, S, N, D_attn / N)
        self.o.forward(&ys.flatten_from(2)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn buckets_of_the_real_checkpoint_change_at_the_table_of_integers() {
        let bucket = |distance: i64| relative_bucket(-distance, 32, 128);
        let starts = [(8, 8), (12, 9), (16, 10), (23, 11), (32, 12), (46, 13), (64, 14), (91, 15)];
        for distance in 0..8 {
            assert_eq!(bucket(distance), distance as usize);
        }
        for (start, expected) in starts {
            assert_eq!((bucket(start - 1), bucket(start)), (expected - 1, expected), "distance {start}");
        }
        assert_eq!(bucket(i64::from(i32::MAX)), 15);
        assert_eq!(relative_bucket(1, 32, 128), 17);
        assert_eq!(relative_bucket(511, 32, 128), 31);
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        let xxl = Config::umt5_xxl;
        for (cfg, name) in [
            (Config { shared_pos: true, ..xxl() }, "shared_pos"),
            (Config { num_heads: 60, ..xxl() }, "num_heads"),
            (Config { num_buckets: 30, ..xxl() }, "num_buckets"),
            (Config { max_dist: 8, ..xxl() }, "max_dist"),
        ] {
            let message = cfg.validate().unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
        xxl().validate().unwrap();
        let vb = VarBuilder::zeros(DType::F16, &Device::Cpu);
        assert!(Model::new(&xxl(), vb).unwrap_err().to_string().contains("F16"));
    }

    #[test]
    fn masked_keys_get_the_lowest_finite_value_of_the_dtype() {
        let bias = Tensor::ones((1, 2, 3, 3), DType::F32, &Device::Cpu).unwrap();
        let padding =
            Tensor::new(&[[0u8, 0, 1], [0, 1, 1]], &Device::Cpu).unwrap().reshape((2, 1, 1, 3)).unwrap();
        for (dtype, lowest) in [(DType::F32, f32::MIN), (DType::BF16, half::bf16::MIN.to_f32())] {
            let masked = mask_keys(&bias, &padding, dtype).unwrap();
            let rows = masked.reshape((2, 6, 3)).unwrap().to_vec3::<f32>().unwrap();
            assert!(rows[0].iter().all(|row| row == &[1.0, 1.0, lowest]));
            assert!(rows[1].iter().all(|row| row == &[1.0, lowest, lowest]));
        }
    }
}
