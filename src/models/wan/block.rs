//! One transformer block.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::Config;
use super::attention::{
    AudioCrossAttention, ContextKeysValues, CrossAttention, KeysValues, SelfAttended, SelfAttention,
    record_queries_and_keys,
};
use super::routing::Routing;
use crate::nn::rope::Rope;
use crate::nn::{
    LayerNorm, Linear, Sum, layer_norm_modulated, residual_gate, sum_and_layer_norm_modulated, trace,
};

/// Self-attention, attention to text and image, attention to audio, feed-forward; the first and the last
/// under AdaLN modulation.
#[derive(Debug)]
pub(super) struct Block {
    self_attn: SelfAttention,
    norm3: LayerNorm,
    cross_attn: CrossAttention,
    norm_x: LayerNorm,
    audio_cross_attn: AudioCrossAttention,
    ffn_in: Linear,
    ffn_out: Linear,
    modulation: Tensor, // (1, 6, D)
    eps: f64,
    index: usize,
}

/// What one block is told beside its tokens.
pub(super) struct Conditions<'a> {
    /// (1, 6, D) in f32.
    pub modulation: &'a Tensor,
    pub rope: &'a Rope,
    pub context: &'a ContextKeysValues,
    pub audio: &'a KeysValues,
    /// Present with two speakers.
    pub routing: Option<&'a Routing>,
}

impl Block {
    /// Loads block `index` below `vb`.
    pub fn new(cfg: &Config, index: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            self_attn: SelfAttention::new(cfg, vb.pp("self_attn"))?,
            norm3: LayerNorm::new(cfg.dim, cfg.eps, vb.pp("norm3"))?,
            cross_attn: CrossAttention::new(cfg, vb.pp("cross_attn"))?,
            norm_x: LayerNorm::new(cfg.dim, cfg.eps, vb.pp("norm_x"))?,
            audio_cross_attn: AudioCrossAttention::new(cfg, vb.pp("audio_cross_attn"))?,
            ffn_in: Linear::new(cfg.dim, cfg.ffn_dim, vb.pp("ffn.0"))?,
            ffn_out: Linear::new(cfg.ffn_dim, cfg.dim, vb.pp("ffn.2"))?,
            modulation: vb.get((1, 6, cfg.dim), "modulation")?,
            eps: cfg.eps,
            index,
        })
    }

    /// Keys and values of `text` (1, text_len, D) and `image` (1, rows, D).
    pub fn encode_context(&self, text: &Tensor, image: &Tensor) -> Result<ContextKeysValues> {
        self.cross_attn.encode(text, image)
    }

    /// Keys and values of the audio `tokens` (T, A, output_dim), turned by `rope` with two speakers.
    pub fn encode_audio(&self, tokens: &Tensor, rope: Option<&Rope>) -> Result<KeysValues> {
        self.audio_cross_attn.encode(tokens, rope)
    }

    /// Maps tokens `xs` (1, L, D) to (1, L, D), in the dtype of `xs`; modulation and gates are f32.
    pub fn forward(&self, xs: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let record = |name: &str, xs: &Tensor| trace::record(|| format!("block_{}.{name}", self.index), xs);
        let modulation = (self.modulation.to_dtype(DType::F32)? + conditions.modulation)?;
        let part = |i: usize| modulation.narrow(1, i, 1); // (1, 1, D)

        // Every tensor is as large as the tokens, so each is dropped as soon as it has been used.
        let ys = layer_norm_modulated(xs, &part(0)?, &part(1)?, self.eps)?;
        let attended = self.self_attn.forward(ys, conditions.rope)?;
        record("self_attn", &attended.ys);
        record_queries_and_keys(self.index, &attended);
        let SelfAttended { ys, q, k } = attended;
        let (xs, normed) = self.norm3.forward_sum(Sum { xs: xs.clone(), ys, gate: Some(&part(2)?) })?;
        let audio_rope = match conditions.routing {
            Some(routing) => {
                let (map, rope) = routing.queries(&q, &k)?;
                record("ref_attn_map", &map);
                Some(rope)
            }
            None => None,
        };
        drop((q, k));

        let ys = self.cross_attn.forward(&normed, conditions.context)?;
        drop(normed);
        record("cross_attn", &ys);
        let (xs, normed) = self.norm_x.forward_sum(Sum { xs, ys, gate: None })?;

        let ys = self.audio_cross_attn.forward(&normed, conditions.audio, audio_rope.as_ref())?;
        drop(normed);
        record("audio_cross_attn", &ys);
        let sum = Sum { xs, ys, gate: None };
        let (xs, normed) = sum_and_layer_norm_modulated(sum, &part(3)?, &part(4)?, self.eps)?;
        let hidden = self.ffn_in.forward_gelu_tanh(&normed)?;
        drop(normed);
        let ys = self.ffn_out.forward(&hidden)?;
        drop(hidden);
        record("ffn", &ys);
        let xs = residual_gate(&xs, &ys, &part(5)?)?;
        trace::record(|| format!("block_{}", self.index), &xs);
        Ok(xs)
    }
}
