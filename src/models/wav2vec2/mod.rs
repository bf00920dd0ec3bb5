//! wav2vec 2.0 speech encoder: 16 kHz mono speech → what every transformer layer makes of it, resampled to
//! video frames.
//!
//! Paper: Baevski et al. 2020, <https://arxiv.org/abs/2006.11477>. Reference: `src/audio_analysis/wav2vec2.py`
//! of MeiGen-AI/InfiniteTalk at 0107cd9, which is `Wav2Vec2Model` of Hugging Face transformers with one step
//! inserted: the convolutions' ~49 features a second are interpolated to 25 frames a second before the
//! projection. Weights: `model.safetensors` of `TencentGameMate/chinese-wav2vec2-base`, with or without the
//! `wav2vec2.` prefix of the pre-training class, in either spelling of the weight norm. `masked_spec_embed` and
//! the quantiser are for training and not asked for.
//!
//! Where we differ: the reference runs the whole clip at once, so its first convolution alone holds 6.5 MB for a
//! second of speech. We run the convolutions over blocks of time, with the group norm's statistics over the
//! whole clip known beforehand (see `features`), and attention and feed-forward over blocks of rows. The
//! result is the same; what grows with the clip is the embedding and a few tensors of one layer's width.
//! It always computes in f32, as the reference does.

mod encoder;
mod features;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use self::encoder::Encoder;
use self::features::FeatureExtractor;
use crate::nn::{LayerNorm, Linear, trace};

/// The sample rate that the network was trained on, in Hz.
pub const SAMPLE_RATE_HZ: usize = 16_000;

/// Frames of video that a second of speech becomes.
pub const FRAME_RATE_HZ: usize = 25;

/// Conv features that one block of time covers: 5 s of speech, for which the first convolution of the base
/// checkpoint holds 34 MB. The blocks overlap by 5 ms, so a smaller one would cost no more work.
const FEATURES_PER_BLOCK: usize = 256;

/// The architecture, in the words of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Config {
    /// Whether the convolutions have a bias. Only `false` is supported.
    pub conv_bias: bool,
    /// Output channels of each convolution.
    pub conv_dim: Vec<usize>,
    /// Taps of each convolution.
    pub conv_kernel: Vec<usize>,
    /// Stride of each convolution.
    pub conv_stride: Vec<usize>,
    /// Whether the layers normalise before, not after, each half. Only `false` is supported.
    pub do_stable_layer_norm: bool,
    /// The convolutions' activation. Only `gelu`, the exact one, is supported.
    pub feat_extract_activation: String,
    /// Where the convolutions normalise. Only `group`, after the first one alone, is supported.
    pub feat_extract_norm: String,
    /// The feed-forward activation. Only `gelu`, the exact one, is supported.
    pub hidden_act: String,
    /// Width of the transformer.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Added to the variance in the layer norms.
    pub layer_norm_eps: f64,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Groups of the positional convolution.
    pub num_conv_pos_embedding_groups: usize,
    /// Taps of the positional convolution.
    pub num_conv_pos_embeddings: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
}

impl Config {
    /// `TencentGameMate/chinese-wav2vec2-base`.
    pub fn chinese_base() -> Self {
        Self {
            conv_bias: false,
            conv_dim: vec![512; 7],
            conv_kernel: vec![10, 3, 3, 3, 3, 2, 2],
            conv_stride: vec![5, 2, 2, 2, 2, 2, 2],
            do_stable_layer_norm: false,
            feat_extract_activation: "gelu".to_owned(),
            feat_extract_norm: "group".to_owned(),
            hidden_act: "gelu".to_owned(),
            hidden_size: 768,
            intermediate_size: 3072,
            layer_norm_eps: 1e-5,
            num_attention_heads: 12,
            num_conv_pos_embedding_groups: 16,
            num_conv_pos_embeddings: 128,
            num_hidden_layers: 12,
        }
    }

    /// Refuses, by name, what this network does not compute.
    fn validate(&self) -> Result<()> {
        if self.conv_bias {
            bail!("wav2vec2: `conv_bias` is true, expected false");
        }
        if self.do_stable_layer_norm {
            bail!("wav2vec2: `do_stable_layer_norm` is true, expected false");
        }
        if self.feat_extract_norm != "group" {
            bail!("wav2vec2: `feat_extract_norm` is {:?}, expected \"group\"", self.feat_extract_norm);
        }
        if self.feat_extract_activation != "gelu" {
            bail!(
                "wav2vec2: `feat_extract_activation` is {:?}, expected \"gelu\"",
                self.feat_extract_activation
            );
        }
        if self.hidden_act != "gelu" {
            bail!("wav2vec2: `hidden_act` is {:?}, expected \"gelu\"", self.hidden_act);
        }
        let convs = self.conv_dim.len();
        if convs == 0 || self.conv_kernel.len() != convs || self.conv_stride.len() != convs {
            bail!(
                "wav2vec2: `conv_dim`, `conv_kernel`, `conv_stride` have {convs}, {}, {} entries, expected one number",
                self.conv_kernel.len(),
                self.conv_stride.len()
            );
        }
        if self.conv_kernel.contains(&0) || self.conv_stride.contains(&0) {
            bail!(
                "wav2vec2: `conv_kernel` {:?} or `conv_stride` {:?} holds a 0",
                self.conv_kernel,
                self.conv_stride
            );
        }
        for (name, parts) in [
            ("num_attention_heads", self.num_attention_heads),
            ("num_conv_pos_embedding_groups", self.num_conv_pos_embedding_groups),
        ] {
            if parts == 0 || !self.hidden_size.is_multiple_of(parts) {
                bail!(
                    "wav2vec2: `{name}` is {parts}, expected a divisor of `hidden_size` {}",
                    self.hidden_size
                );
            }
        }
        Ok(())
    }
}

/// The speech encoder.
#[derive(Clone, Debug)]
pub struct Model {
    feature_extractor: FeatureExtractor,
    projection_norm: LayerNorm,
    projection: Linear,
    encoder: Encoder,
    device: Device,
}

impl Model {
    /// Loads the network below `vb`, or below `vb.pp("wav2vec2")` when the checkpoint has that prefix, in f32
    /// whatever the dtype of `vb`. Fails on configurations that the checkpoint does not need.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let vb = vb.set_dtype(DType::F32);
        let prefixed = vb.contains_tensor("wav2vec2.feature_projection.layer_norm.weight");
        let vb = if prefixed { vb.pp("wav2vec2") } else { vb };
        let projection = vb.pp("feature_projection");
        let channels = cfg.conv_dim[cfg.conv_dim.len() - 1];
        Ok(Self {
            feature_extractor: FeatureExtractor::new(cfg, vb.pp("feature_extractor"))?,
            projection_norm: LayerNorm::new(channels, cfg.layer_norm_eps, projection.pp("layer_norm"))?,
            projection: Linear::new(channels, cfg.hidden_size, projection.pp("projection"))?,
            encoder: Encoder::new(cfg, vb.pp("encoder"))?,
            device: vb.device().clone(),
        })
    }

    /// Whole frames of video that `samples` samples of 16 kHz speech last: n / 16000 · 25 in f64, truncated, as in
    /// the reference. Callers that must not lose the last part of a frame count up and pass that to
    /// [`Model::embed`].
    pub fn frames(samples: usize) -> usize {
        (samples as f64 / SAMPLE_RATE_HZ as f64 * FRAME_RATE_HZ as f64) as usize
    }

    /// The fewest samples that [`Model::embed`] takes: what one feature of the convolutions sees (400, that is
    /// 25 ms, for the base checkpoint). Shorter speech is for the caller to pad with silence.
    pub fn min_samples(&self) -> usize {
        self.feature_extractor.receptive_field()
    }

    /// Maps 16 kHz mono `samples` (any loudness: they are standardised here) to the outputs of all layers at
    /// `frames` points spread evenly over the clip: (frames, num_hidden_layers, hidden_size), f32.
    ///
    /// Fails when `frames` is 0 or when there are fewer than [`Model::min_samples`] samples. Memory: the result,
    /// the input once more, and about a dozen tensors of (frames, hidden_size).
    pub fn embed(&self, samples: &[f32], frames: usize) -> Result<Tensor> {
        if frames == 0 {
            bail!("wav2vec2: `frames` is 0, expected at least 1");
        }
        let input_values = features::standardize(samples);
        trace::record(
            || "input_values".to_owned(),
            &Tensor::from_slice(&input_values, samples.len(), &self.device)?,
        );
        let features = self.feature_extractor.forward(&input_values, FEATURES_PER_BLOCK, &self.device)?;
        trace::record(|| "conv_features".to_owned(), &features);
        let xs = interpolate(&features, frames)?; // (1, frames, C)
        trace::record(|| "interpolated".to_owned(), &xs);
        let xs = self.projection.forward(&self.projection_norm.forward(&xs)?)?; // (1, frames, D)
        trace::record(|| "projected".to_owned(), &xs);
        self.encoder.forward(&xs)
    }
}

/// Linear interpolation of `xs` (1, L, C) to `len` positions of which the first and the last are those of `xs`
/// (PyTorch's `align_corners=True`): (1, len, C). One position is the first of `xs`.
///
/// Positions are f32, as in PyTorch, so that long clips agree with it to the last digit.
pub fn interpolate(xs: &Tensor, len: usize) -> Result<Tensor> {
    let (_, old_len, _) = xs.dims3()?;
    if old_len == 0 || len == 0 {
        bail!("wav2vec2: cannot interpolate {old_len} features to {len}");
    }
    let step = if len > 1 { (old_len - 1) as f32 / (len - 1) as f32 } else { 0.0 };
    let last = old_len - 1;
    let (mut left, mut right, mut weight) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..len {
        let position = step * i as f32;
        let index = (position as usize).min(last);
        left.push(index as u32);
        right.push((index + 1).min(last) as u32);
        weight.push((position - index as f32).clamp(0.0, 1.0));
    }
    let pick = |indices: Vec<u32>| xs.index_select(&Tensor::from_vec(indices, len, xs.device())?, 1);
    let weight = Tensor::from_vec(weight, (1, len, 1), xs.device())?.to_dtype(xs.dtype())?;
    let left = pick(left)?.broadcast_mul(&weight.affine(-1.0, 1.0)?)?;
    left + pick(right)?.broadcast_mul(&weight)?
}

#[cfg(test)]
mod tests {
    use candle_nn::VarMap;

    use super::*;

    fn tiny() -> Config {
        Config {
            conv_dim: vec![8, 6, 4],
            conv_kernel: vec![10, 3, 2],
            conv_stride: vec![5, 2, 2],
            hidden_size: 16,
            intermediate_size: 24,
            num_attention_heads: 2,
            num_conv_pos_embedding_groups: 4,
            num_conv_pos_embeddings: 8,
            num_hidden_layers: 2,
            ..Config::chinese_base()
        }
    }

    fn model(cfg: &Config) -> Result<Model> {
        Model::new(cfg, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        let base = Config::chinese_base;
        for (cfg, name) in [
            (Config { conv_bias: true, ..base() }, "conv_bias"),
            (Config { do_stable_layer_norm: true, ..base() }, "do_stable_layer_norm"),
            (Config { feat_extract_norm: "layer".into(), ..base() }, "feat_extract_norm"),
            (Config { feat_extract_activation: "relu".into(), ..base() }, "feat_extract_activation"),
            (Config { hidden_act: "gelu_new".into(), ..base() }, "hidden_act"),
            (Config { conv_stride: vec![5], ..base() }, "conv_stride"),
            (Config { conv_stride: vec![0; 7], ..base() }, "conv_stride"),
            (Config { num_attention_heads: 7, ..base() }, "num_attention_heads"),
            (Config { num_conv_pos_embedding_groups: 0, ..base() }, "num_conv_pos_embedding_groups"),
        ] {
            let message = cfg.validate().unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
        base().validate().unwrap();
    }

    #[test]
    fn frames_truncate() {
        assert_eq!(Model::frames(16_000), 25);
        assert_eq!(Model::frames(15_999), 24);
        assert_eq!(Model::frames(639), 0);
        assert_eq!(Model::frames(640), 1);
    }

    #[test]
    fn too_short_speech_and_no_frames_are_errors() {
        let model = model(&tiny()).unwrap();
        // One feature sees 10 + 5 · ((3 − 1) + 2 · (2 − 1)) samples.
        assert_eq!(model.min_samples(), 30);
        let message = model.embed(&[0.0; 29], 1).unwrap_err().to_string();
        assert!(message.contains("29 samples, expected at least 30"), "{message}");
        assert!(model.embed(&[], 1).is_err());
        assert!(model.embed(&[0.0; 30], 0).unwrap_err().to_string().contains("`frames` is 0"));
        assert_eq!(model.embed(&[0.0; 30], 3).unwrap().dims(), [3, 2, 16]);
    }

    #[test]
    fn interpolation_keeps_both_ends() {
        let xs = Tensor::new(&[[[0f32], [10.0], [20.0]]], &Device::Cpu).unwrap();
        let values = |len| interpolate(&xs, len).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(1), [0.0]);
        assert_eq!(values(2), [0.0, 20.0]);
        assert_eq!(values(3), [0.0, 10.0, 20.0]);
        assert_eq!(values(5), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert!(interpolate(&xs, 0).is_err());
    }
}
