//! Self-attention, and cross-attention to text and image.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::Config;
use crate::nn::rope::Rope;
use crate::nn::{Linear, Mask, RmsNorm, attention, trace};

/// Keys and values of one block, (B, L, N, head_dim) each.
#[derive(Clone, Debug)]
pub(super) struct KeysValues {
    pub k: Tensor,
    pub v: Tensor,
}

impl KeysValues {
    /// What the queries `q` (B, Lq, N, head_dim) find: (B, Lq, N * head_dim).
    pub fn attend(&self, q: &Tensor) -> Result<Tensor> {
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        attention(q, &self.k, &self.v, scale, &Mask::None)?.flatten_from(2)
    }
}

/// Splits the width of `xs` (B, L, D) into heads: (B, L, N, D / N).
pub(super) fn split_heads(xs: &Tensor, num_heads: usize) -> Result<Tensor> {
    let (batch, len, dim) = xs.dims3()?;
    xs.reshape((batch, len, num_heads, dim / num_heads))
}

/// Attention of all video tokens among themselves, with normalised and rotated queries and keys.
#[derive(Debug)]
pub(super) struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    num_heads: usize,
}

/// What [`SelfAttention::forward`] makes.
pub(super) struct SelfAttended {
    /// The layer's output, (B, L, D).
    pub ys: Tensor,
    /// Queries after norm and rotation, (B, L, N, head_dim).
    pub q: Tensor,
    /// Keys after norm and rotation, (B, L, N, head_dim).
    pub k: Tensor,
}

impl SelfAttention {
    /// Loads `q`, `k`, `v`, `o`, `norm_q` and `norm_k` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let linear = |name: &str| Linear::new(cfg.dim, cfg.dim, vb.pp(name));
        Ok(Self {
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: linear("o")?,
            norm_q: RmsNorm::new(cfg.dim, cfg.eps, vb.pp("norm_q"))?,
            norm_k: RmsNorm::new(cfg.dim, cfg.eps, vb.pp("norm_k"))?,
            num_heads: cfg.num_heads,
        })
    }

    /// Mixes the tokens `xs` (B, L, D), which lie on the grid of `rope`.
    pub fn forward(&self, xs: Tensor, rope: &Rope) -> Result<SelfAttended> {
        let rotated = |linear: &Linear, norm: &RmsNorm| {
            norm.forward_rotated(&linear.forward(&xs)?, self.num_heads, rope)
        };
        let (q, k) = (rotated(&self.q, &self.norm_q)?, rotated(&self.k, &self.norm_k)?);
        let v = split_heads(&self.v.forward(&xs)?, self.num_heads)?;
        drop(xs);
        let kv = KeysValues { k, v };
        let ys = kv.attend(&q)?;
        let KeysValues { k, v } = kv;
        drop(v);
        Ok(SelfAttended { ys: self.o.forward(&ys)?, q, k })
    }
}

/// Attention of the video tokens to text rows and, apart from them, to image rows.
#[derive(Debug)]
pub(super) struct CrossAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    k_img: Linear,
    v_img: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    norm_k_img: RmsNorm,
    num_heads: usize,
}

/// Keys and values of text and image for one block.
#[derive(Clone, Debug)]
pub(super) struct ContextKeysValues {
    pub text: KeysValues,
    pub image: KeysValues,
}

impl CrossAttention {
    /// Loads `q`, `k`, `v`, `o`, `k_img`, `v_img`, `norm_q`, `norm_k` and `norm_k_img` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let linear = |name: &str| Linear::new(cfg.dim, cfg.dim, vb.pp(name));
        let norm = |name: &str| RmsNorm::new(cfg.dim, cfg.eps, vb.pp(name));
        Ok(Self {
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: linear("o")?,
            k_img: linear("k_img")?,
            v_img: linear("v_img")?,
            norm_q: norm("norm_q")?,
            norm_k: norm("norm_k")?,
            norm_k_img: norm("norm_k_img")?,
            num_heads: cfg.num_heads,
        })
    }

    /// Keys and values of `text` (1, text_len, D) and `image` (1, rows, D).
    pub fn encode(&self, text: &Tensor, image: &Tensor) -> Result<ContextKeysValues> {
        let heads = |xs: &Tensor| split_heads(xs, self.num_heads);
        Ok(ContextKeysValues {
            text: KeysValues {
                k: heads(&self.norm_k.forward(&self.k.forward(text)?)?)?,
                v: heads(&self.v.forward(text)?)?,
            },
            image: KeysValues {
                k: heads(&self.norm_k_img.forward(&self.k_img.forward(image)?)?)?,
                v: heads(&self.v_img.forward(image)?)?,
            },
        })
    }

    /// What the tokens `xs` (1, L, D) find in text and image: (1, L, D).
    pub fn forward(&self, xs: &Tensor, context: &ContextKeysValues) -> Result<Tensor> {
        let q = split_heads(&self.norm_q.forward(&self.q.forward(xs)?)?, self.num_heads)?;
        let found = (context.text.attend(&q)? + context.image.attend(&q)?)?;
        self.o.forward(&found)
    }
}

/// Attention of each latent frame's tokens to that frame's audio tokens.
#[derive(Debug)]
pub(super) struct AudioCrossAttention {
    q_linear: Linear,
    kv_linear: Linear,
    proj: Linear,
    num_heads: usize,
}

impl AudioCrossAttention {
    /// Loads `q_linear`, `kv_linear` and `proj` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            q_linear: Linear::new(cfg.dim, cfg.dim, vb.pp("q_linear"))?,
            kv_linear: Linear::new(cfg.output_dim, 2 * cfg.dim, vb.pp("kv_linear"))?,
            proj: Linear::new(cfg.dim, cfg.dim, vb.pp("proj"))?,
            num_heads: cfg.num_heads,
        })
    }

    /// Keys and values of the audio `tokens` (T, A, output_dim); with two speakers, `rope` turns the keys to
    /// the position of the speaker.
    pub fn encode(&self, tokens: &Tensor, rope: Option<&Rope>) -> Result<KeysValues> {
        let kv = self.kv_linear.forward(tokens)?.chunk(2, 2)?; // 2 × (T, A, D)
        let k = split_heads(&kv[0].contiguous()?, self.num_heads)?;
        let v = split_heads(&kv[1].contiguous()?, self.num_heads)?;
        let k = match rope {
            Some(rope) => rope.rotate(&k)?,
            None => k,
        };
        Ok(KeysValues { k, v })
    }

    /// What the tokens `xs` (1, L, D) of T latent frames find in `audio`: (1, L, D). With two speakers, `rope`
    /// turns the queries to the position of the speaker whom each token shows.
    pub fn forward(&self, xs: &Tensor, audio: &KeysValues, rope: Option<&Rope>) -> Result<Tensor> {
        let (_, len, dim) = xs.dims3()?;
        let frames = audio.k.dim(0)?;
        let q = split_heads(&self.q_linear.forward(xs)?, self.num_heads)?; // (1, L, N, head_dim)
        let q = match rope {
            Some(rope) => rope.rotate(&q)?,
            None => q,
        };
        let q = q.reshape((frames, len / frames, self.num_heads, dim / self.num_heads))?;
        let ys = audio.attend(&q)?.reshape((1, len, dim))?;
        self.proj.forward(&ys)
    }
}

/// Records the queries and keys of block `index`, from which a test makes the attention map of one speaker.
pub(super) fn record_queries_and_keys(index: usize, attended: &SelfAttended) {
    trace::record(|| format!("block_{index}.self_attn.q"), &attended.q);
    trace::record(|| format!("block_{index}.self_attn.k"), &attended.k);
}
