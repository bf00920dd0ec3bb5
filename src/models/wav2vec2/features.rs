//! The convolutional feature extractor, block by block.
//!
//! The group norm after the first convolution has one group per channel, so it needs each channel's mean and
//! variance over the whole clip. The convolution has one input channel and no bias: output c at time t is w_c · p_t
//! with p_t the k samples under the kernel. Hence mean_c = w_c · mean(p) and var_c = w_cᵀ cov(p) w_c. One pass over
//! the samples for the k × k covariance, in f64, replaces a pass over all channels of the first convolution, and
//! the norm itself becomes a scale of w_c and a bias.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::Config;
use crate::nn::{Conv1d, gelu_erf};

/// Added to the variance of the clip by Hugging Face's `Wav2Vec2FeatureExtractor`.
const STANDARDIZE_EPS: f64 = 1e-7;

/// Added to the variance by PyTorch's `GroupNorm` when it is not told otherwise.
const GROUP_NORM_EPS: f64 = 1e-5;

/// (x − mean) / sqrt(variance + 1e-7) over the clip, with statistics in f64.
pub(super) fn standardize(samples: &[f32]) -> Vec<f32> {
    let count = samples.len().max(1) as f64;
    let mean = samples.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let variance = samples.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + STANDARDIZE_EPS).sqrt();
    samples.iter().map(|&x| ((f64::from(x) - mean) * scale) as f32).collect()
}

/// The convolutions, each followed by GELU; the first one also by a group norm.
#[derive(Clone, Debug)]
pub(super) struct FeatureExtractor {
    first: FirstConv,
    convs: Vec<Conv1d>, // all others
    kernel: Vec<usize>,
    stride: Vec<usize>,
}

impl FeatureExtractor {
    /// Loads `conv_layers.{i}.conv.weight` (out, in, k) and `conv_layers.0.layer_norm` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("conv_layers");
        let first = FirstConv::new(cfg.conv_dim[0], cfg.conv_kernel[0], cfg.conv_stride[0], vb.pp(0))?;
        let mut convs = Vec::with_capacity(cfg.conv_dim.len() - 1);
        for i in 1..cfg.conv_dim.len() {
            let shape = (cfg.conv_dim[i], cfg.conv_dim[i - 1], cfg.conv_kernel[i]);
            let weight = vb.pp(i).pp("conv").get(shape, "weight")?;
            convs.push(Conv1d::from_parts(weight, None, cfg.conv_stride[i], 1));
        }
        Ok(Self { first, convs, kernel: cfg.conv_kernel.clone(), stride: cfg.conv_stride.clone() })
    }

    /// Samples that one feature sees.
    pub fn receptive_field(&self) -> usize {
        self.samples_of(1)
    }

    /// Maps standardised samples to features (1, L, C), `block` features at a time.
    pub fn forward(&self, input_values: &[f32], block: usize, device: &Device) -> Result<Tensor> {
        if input_values.len() < self.receptive_field() {
            let (have, need) = (input_values.len(), self.receptive_field());
            bail!("wav2vec2: the clip has {have} samples, expected at least {need}: pad it with silence");
        }
        let first = self.first.normalized_over(input_values, device)?;
        let hop: usize = self.stride.iter().product();
        let count = (input_values.len() - self.receptive_field()) / hop + 1;
        let mut blocks = Vec::with_capacity(count.div_ceil(block));
        for start in (0..count).step_by(block) {
            let len = self.samples_of(block.min(count - start));
            let samples = &input_values[start * hop..start * hop + len];
            let xs = Tensor::from_slice(samples, (1, len, 1), device)?;
            let mut xs = gelu_erf(&first.forward(&xs)?)?;
            for conv in &self.convs {
                xs = gelu_erf(&conv.forward(&xs)?)?;
            }
            blocks.push(xs); // (1, ≤ block, C)
        }
        Tensor::cat(&blocks, 1)
    }

    /// Samples under `features` successive features.
    fn samples_of(&self, features: usize) -> usize {
        let layers = self.kernel.iter().zip(&self.stride).rev();
        layers.fold(features, |len, (kernel, stride)| (len - 1) * stride + kernel)
    }
}

/// The first convolution and its group norm, on the host: they are made one convolution for each clip.
#[derive(Clone, Debug)]
struct FirstConv {
    weight: Vec<Vec<f32>>, // out × k
    norm_weight: Vec<f32>,
    norm_bias: Vec<f32>,
    kernel: usize,
    stride: usize,
}

impl FirstConv {
    fn new(channels: usize, kernel: usize, stride: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.pp("conv").get((channels, 1, kernel), "weight")?.squeeze(1)?.to_vec2()?,
            norm_weight: vb.pp("layer_norm").get(channels, "weight")?.to_vec1()?,
            norm_bias: vb.pp("layer_norm").get(channels, "bias")?.to_vec1()?,
            kernel,
            stride,
        })
    }

    /// This convolution with the group norm over `input_values` folded in.
    fn normalized_over(&self, input_values: &[f32], device: &Device) -> Result<Conv1d> {
        let (mean, covariance) = self.patch_statistics(input_values);
        let mut weight = Vec::with_capacity(self.weight.len() * self.kernel);
        let mut bias = Vec::with_capacity(self.weight.len());
        for ((taps, &gain), &offset) in self.weight.iter().zip(&self.norm_weight).zip(&self.norm_bias) {
            let dot = |row: &[f64]| taps.iter().zip(row).map(|(&w, m)| f64::from(w) * m).sum::<f64>();
            let variance: f64 = taps.iter().zip(&covariance).map(|(&w, row)| f64::from(w) * dot(row)).sum();
            let scale = f64::from(gain) / (variance.max(0.0) + GROUP_NORM_EPS).sqrt();
            weight.extend(taps.iter().map(|&w| (f64::from(w) * scale) as f32));
            bias.push((f64::from(offset) - dot(&mean) * scale) as f32);
        }
        let channels = self.weight.len();
        let weight = Tensor::from_vec(weight, (channels, 1, self.kernel), device)?;
        Ok(Conv1d::from_parts(weight, Some(Tensor::from_vec(bias, channels, device)?), self.stride, 1))
    }

    /// Mean (k) and covariance (k × k) of the samples under the kernel, over its positions in `xs`, which has at
    /// least one.
    fn patch_statistics(&self, xs: &[f32]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let patches = || xs.windows(self.kernel).step_by(self.stride);
        let count = patches().count() as f64;
        let mut mean = vec![0.0; self.kernel];
        for patch in patches() {
            mean.iter_mut().zip(patch).for_each(|(m, &x)| *m += f64::from(x) / count);
        }
        let mut covariance = vec![vec![0.0; self.kernel]; self.kernel];
        let mut centred = vec![0.0; self.kernel];
        for patch in patches() {
            for ((c, &x), m) in centred.iter_mut().zip(patch).zip(&mean) {
                *c = f64::from(x) - m;
            }
            for (row, a) in covariance.iter_mut().zip(&centred) {
                row.iter_mut().zip(&centred).for_each(|(sum, b)| *sum += a * b / count);
            }
        }
        (mean, covariance)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use candle_nn::VarMap;

    use super::*;

    fn extractor() -> FeatureExtractor {
        let cfg = Config {
            conv_dim: vec![8, 6, 4],
            conv_kernel: vec![10, 3, 2],
            conv_stride: vec![5, 2, 2],
            ..Config::chinese_base()
        };
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let extractor = FeatureExtractor::new(&cfg, vb.clone()).unwrap();
        for (name, var) in vars.data().lock().unwrap().iter() {
            let mean = if name.ends_with("norm.weight") { 1.0 } else { 0.1 };
            var.set(&Tensor::randn(mean, 0.3f32, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        // Loaded again, because the first convolution keeps copies.
        drop(extractor);
        FeatureExtractor::new(&cfg, vb).unwrap()
    }

    /// A clip whose mean and loudness drift, so that statistics of a block are not those of the clip.
    fn clip(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 * 0.002) + i as f32 * 0.001).collect()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn blocks_equal_the_whole() {
        let extractor = extractor();
        let xs = standardize(&clip(2017));
        let whole = extractor.forward(&xs, usize::MAX, &Device::Cpu).unwrap();
        assert_eq!(whole.dims(), [1, 100, 4]);
        for block in [1, 2, 7, 99, 100, 101] {
            let blocks = extractor.forward(&xs, block, &Device::Cpu).unwrap();
            assert!(difference(&blocks, &whole) < 1e-5, "block {block}");
        }
    }

    #[test]
    fn the_folded_group_norm_equals_the_plain_one() {
        let extractor = extractor();
        let first = &extractor.first;
        let xs = standardize(&clip(1003));
        let weight = Tensor::new(first.weight.clone(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let input = Tensor::from_slice(&xs, (1, xs.len(), 1), &Device::Cpu).unwrap();
        let ys = Conv1d::from_parts(weight, None, first.stride, 1).forward(&input).unwrap();
        let ys = ys.broadcast_sub(&ys.mean_keepdim(1).unwrap()).unwrap();
        let variance = ys.sqr().unwrap().mean_keepdim(1).unwrap();
        let ys = ys.broadcast_div(&(variance + GROUP_NORM_EPS).unwrap().sqrt().unwrap()).unwrap();
        let norm = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu).unwrap();
        let plain =
            ys.broadcast_mul(&norm(&first.norm_weight)).unwrap().broadcast_add(&norm(&first.norm_bias));
        let folded = first.normalized_over(&xs, &Device::Cpu).unwrap().forward(&input).unwrap();
        assert!(difference(&folded, &plain.unwrap()) < 1e-5);
    }

    #[test]
    fn silence_stays_finite() {
        let xs = standardize(&[0.0; 500]);
        let ys = extractor().forward(&xs, 4, &Device::Cpu).unwrap();
        assert!(ys.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|y| y.is_finite()));
    }

    #[test]
    fn standardizing_removes_mean_and_loudness() {
        let xs = standardize(&[2.0, 4.0, 2.0, 4.0]);
        assert!(
            xs.iter().zip([-1.0, 1.0, -1.0, 1.0]).all(|(x, y): (&f32, f32)| (x - y).abs() < 1e-6),
            "{xs:?}"
        );
    }
}
