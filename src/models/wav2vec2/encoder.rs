//! The transformer: a positional convolution, then layers that normalise after each half.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::Config;
use crate::nn::{Conv1d, LayerNorm, Linear, Mask, attention, gelu_erf, trace};

/// Rows that the positional convolution and the feed-forward layers take at a time: their intermediate values are
/// 4 to 128 times as wide as the rows.
const ROWS_PER_BLOCK: usize = 1024;

/// Positional convolution and layers.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    positions: PositionalConv,
    layer_norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Encoder {
    /// Loads `pos_conv_embed`, `layer_norm` and `layers.{i}` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let layers = (0..cfg.num_hidden_layers).map(|i| Layer::new(cfg, vb.pp("layers").pp(i)));
        Ok(Self {
            positions: PositionalConv::new(cfg, vb.pp("pos_conv_embed").pp("conv"))?,
            layer_norm: LayerNorm::new(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("layer_norm"))?,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Maps `xs` (1, L, D) to the outputs of all layers, (L, layers, D).
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (_, len, dim) = xs.dims3()?;
        let positions = self.positions.forward(xs)?;
        trace::record(|| "pos_conv".to_owned(), &positions);
        let mut xs = self.layer_norm.forward(&(xs + positions)?)?;
        trace::record(|| "hidden_states.0".to_owned(), &xs);
        // Written layer by layer: stacking at the end would hold all of it twice.
        let embedding = Tensor::zeros((len, self.layers.len(), dim), xs.dtype(), xs.device())?;
        for (i, layer) in self.layers.iter().enumerate() {
            xs = layer.forward(&xs)?;
            trace::record(|| format!("hidden_states.{}", i + 1), &xs);
            embedding.slice_set(&xs.reshape((len, 1, dim))?, 1, i)?;
        }
        trace::record(|| "last_hidden_state".to_owned(), &xs);
        Ok(embedding)
    }
}

/// A grouped convolution over time, then GELU.
#[derive(Clone, Debug)]
struct PositionalConv {
    conv: Conv1d,
    kernel: usize,
}

impl PositionalConv {
    /// Loads the weight norm's magnitude g (1, 1, k) and direction v (out, in / groups, k) below `vb`, under their
    /// published or their newer names, as the weight g · v / ‖v‖ with one norm per tap; and `bias`.
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (dim, kernel, groups) =
            (cfg.hidden_size, cfg.num_conv_pos_embeddings, cfg.num_conv_pos_embedding_groups);
        let (g, v) = match vb.contains_tensor("weight_g") {
            true => ("weight_g", "weight_v"),
            false => ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        };
        let g = vb.get((1, 1, kernel), g)?.to_dtype(DType::F64)?;
        let v = vb.get((dim, dim / groups, kernel), v)?.to_dtype(DType::F64)?;
        let scale = (g / v.sqr()?.sum_keepdim((0, 1))?.sqrt()?)?; // (1, 1, k)
        let weight = v.broadcast_mul(&scale)?.to_dtype(DType::F32)?;
        Ok(Self { conv: Conv1d::from_parts(weight, Some(vb.get(dim, "bias")?), 1, groups), kernel })
    }

    /// Maps `xs` (1, L, D) to positions (1, L, D). An even kernel sees one more row of the past than of the future:
    /// the reference pads both sides alike and drops the last output.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let padded = xs.pad_with_zeros(1, self.kernel / 2, (self.kernel - 1) / 2)?;
        let context = self.kernel - 1;
        in_row_blocks(xs.dim(1)?, |start, rows| {
            gelu_erf(&self.conv.forward(&padded.narrow(1, start, rows + context)?)?)
        })
    }
}

/// Self-attention and feed-forward, each added to its input and then normalised.
#[derive(Clone, Debug)]
struct Layer {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    final_layer_norm: LayerNorm,
    num_heads: usize,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (dim, ffn_dim) = (cfg.hidden_size, cfg.intermediate_size);
        let projection = |name| Linear::new(dim, dim, vb.pp("attention").pp(name));
        let norm = |name| LayerNorm::new(dim, cfg.layer_norm_eps, vb.pp(name));
        let feed_forward = vb.pp("feed_forward");
        Ok(Self {
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm: norm("layer_norm")?,
            intermediate: Linear::new(dim, ffn_dim, feed_forward.pp("intermediate_dense"))?,
            output: Linear::new(ffn_dim, dim, feed_forward.pp("output_dense"))?,
            final_layer_norm: norm("final_layer_norm")?,
            num_heads: cfg.num_attention_heads,
        })
    }

    /// Maps `xs` (1, L, D) to (1, L, D).
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = self.layer_norm.forward(&(xs + self.self_attention(xs)?)?)?;
        in_row_blocks(xs.dim(1)?, |start, rows| {
            let xs = xs.narrow(1, start, rows)?.contiguous()?;
            let ys = self.output.forward(&gelu_erf(&self.intermediate.forward(&xs)?)?)?;
            self.final_layer_norm.forward(&(xs + ys)?)
        })
    }

    fn self_attention(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, len, dim) = xs.dims3()?;
        let head_dim = dim / self.num_heads;
        let heads = |xs: Tensor| xs.reshape((batch, len, self.num_heads, head_dim));
        let (q, k, v) = (self.q_proj.forward(xs)?, self.k_proj.forward(xs)?, self.v_proj.forward(xs)?);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let ys = attention(&heads(q)?, &heads(k)?, &heads(v)?, scale, &Mask::None)?; // (B, L, N, D / N)
        self.out_proj.forward(&ys.reshape((batch, len, dim))?)
    }
}

/// The results of `f(start, rows)` for successive blocks of `len` rows, joined along dimension 1.
fn in_row_blocks(len: usize, f: impl Fn(usize, usize) -> Result<Tensor>) -> Result<Tensor> {
    let starts = (0..len).step_by(ROWS_PER_BLOCK);
    let blocks: Vec<_> =
        starts.map(|start| f(start, ROWS_PER_BLOCK.min(len - start))).collect::<Result<_>>()?;
    Tensor::cat(&blocks, 1)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn config() -> Config {
        Config {
            hidden_size: 8,
            intermediate_size: 12,
            num_attention_heads: 2,
            num_conv_pos_embedding_groups: 2,
            num_conv_pos_embeddings: 6,
            num_hidden_layers: 1,
            ..Config::chinese_base()
        }
    }

    #[test]
    fn row_blocks_equal_the_whole() -> Result<()> {
        let len = 2 * ROWS_PER_BLOCK + 3;
        let xs = Tensor::randn(0f32, 1.0, (1, len, 8), &Device::Cpu)?;
        let positions = positional_conv(["weight_g", "weight_v"])?;
        let blocks = positions.forward(&xs)?;
        let whole = gelu_erf(&positions.conv.forward(&xs.pad_with_zeros(1, 3, 2)?)?)?;
        let difference = (blocks - whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-4, "blocks differ from the whole by {difference}");
        let rows = in_row_blocks(len, |start, rows| xs.narrow(1, start, rows))?;
        assert_eq!((rows - xs)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        Ok(())
    }

    #[test]
    fn each_tap_of_the_folded_weight_has_the_norm_g() -> Result<()> {
        let published = positional_conv(["weight_g", "weight_v"])?;
        let newer =
            positional_conv(["parametrizations.weight.original0", "parametrizations.weight.original1"])?;
        // An impulse at row 5 puts tap 5 − t at row t. Each input channel belongs to one group, so impulses in all
        // channels, one after the other, meet every weight once.
        let mut energy = [0f32; 6];
        for channel in 0..8 {
            let mut impulse = vec![0f32; 11 * 8];
            impulse[5 * 8 + channel] = 1.0;
            let impulse = Tensor::from_vec(impulse, (1, 11, 8), &Device::Cpu)?;
            let ys = published.conv.forward(&impulse)?; // (1, 6, 8)
            assert_eq!((&ys - newer.conv.forward(&impulse)?)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
            let rows = ys.sqr()?.sum(2)?.flatten_all()?.to_vec1::<f32>()?;
            energy.iter_mut().zip(rows.iter().rev()).for_each(|(e, row)| *e += row);
        }
        for (tap, e) in energy.iter().enumerate() {
            assert!((e.sqrt() - (tap + 1) as f32).abs() < 1e-4, "tap {tap}: norm {}", e.sqrt());
        }
        Ok(())
    }

    /// A positional convolution whose six taps have the norms 1 to 6, its weight norm loaded from `names`.
    fn positional_conv(names: [&str; 2]) -> Result<PositionalConv> {
        let g = Tensor::new(&[[[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]]], &Device::Cpu)?;
        let v = Tensor::arange(0f32, 192.0, &Device::Cpu)?.sin()?.reshape((8, 4, 6))?;
        let tensors = [(names[0], g), (names[1], v), ("bias", Tensor::zeros(8, DType::F32, &Device::Cpu)?)];
        let tensors = tensors.into_iter().map(|(name, x)| (name.to_owned(), x)).collect();
        PositionalConv::new(&config(), VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
    }
}
