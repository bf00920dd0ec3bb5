//! Weights drawn from a seed, for benchmarks, for tests and for the profile `tiny`. A value depends on the seed, the
//! tensor's name and the element's index only: neither the order of requests, nor the number of threads, nor the
//! machine changes it (integers, then one exact conversion, one multiplication and one addition).

/// How the values of one tensor are drawn: uniform in `mean ± spread`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Distribution {
    mean: f32,
    spread: f32,
}

/// Draws one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Generator {
    key: u64,
    distribution: Distribution,
}

impl Generator {
    /// The generator of tensor `name` of `shape`.
    pub(super) fn new(seed: u64, name: &str, shape: &[usize]) -> Self {
        // FNV-1a, then the finalizer of splitmix64.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), |h, b| {
                (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
            });
        let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self { key: hash ^ (hash >> 31), distribution: distribution(name, shape) }
    }

    /// Writes elements `start..start + out.len()`, which must not cross a multiple of 2³².
    pub(super) fn fill(&self, start: usize, out: &mut [f32]) {
        // What exceeds 32 bits of the index goes into the second key.
        let high = ((start as u64) >> 32) as u32;
        let keys = (self.key as u32, (self.key >> 32) as u32 ^ high.wrapping_mul(0x85eb_ca6b));
        let Distribution { mean, spread } = self.distribution;
        pulp::Arch::new().dispatch(|| draw(start as u32, keys, mean, spread, out));
    }
}

#[inline(always)]
fn draw(start: u32, keys: (u32, u32), mean: f32, spread: f32, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        // 24 bits, centred on zero, in −1…1: exact in f32.
        let unit =
            ((hash(start.wrapping_add(i as u32), keys) >> 8) as i32 - (1 << 23)) as f32 / (1 << 23) as f32;
        *out = unit * spread + mean;
    }
}

/// A 32-bit mixer (constants of "lowbias32", C. Wellons), with one key before and one in the middle, so that two
/// tensors never are shifted copies of one sequence. 32 bits vectorise on every x86.
#[inline(always)]
fn hash(index: u32, keys: (u32, u32)) -> u32 {
    let mut x = index.wrapping_add(keys.0);
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_add(keys.1).wrapping_mul(0x846c_a68b);
    x = (x ^ (x >> 16)).wrapping_mul(0x9e37_79b1);
    x ^ (x >> 15)
}

/// Weights that keep deep networks finite and lively, by name and shape.
///
/// Matrices and kernels have a variance of 1 / fan-in, so that activations keep their size from layer to layer;
/// gains (`gamma`, one-dimensional `weight`, `weight_g`) lie around 1; biases are small; tables that are added to
/// activations (`modulation`, `…_embedding`) have a variance of 1 / width, as at the start of training.
fn distribution(name: &str, shape: &[usize]) -> Distribution {
    // A uniform distribution of unit variance reaches to ±√3.
    let variance = |n: usize| Distribution { mean: 0.0, spread: (3.0 / n.max(1) as f64).sqrt() as f32 };
    let width = shape.last().copied().unwrap_or(1);
    let fan_in = shape.iter().skip(1).product();
    let last = name.rsplit('.').next().unwrap_or(name);
    match last {
        "weight_g" | "gamma" => Distribution { mean: 1.0, spread: 0.1 },
        "weight" if shape.len() <= 1 => Distribution { mean: 1.0, spread: 0.1 },
        "bias" => Distribution { mean: 0.0, spread: 0.02 },
        "modulation" => variance(width),
        _ if last.ends_with("_embedding") => variance(width),
        _ if name.ends_with("embedding.weight") && shape.len() == 2 && !name.contains("patch_embedding") => {
            variance(1)
        }
        _ => variance(fan_in),
    }
}

/// Whether a network that looks for a tensor under several names finds it under `name`: random weights have one
/// spelling each. For wav2vec2 that is `weight_g` / `weight_v` without the prefix `wav2vec2.`.
pub(super) fn contains(name: &str) -> bool {
    !name.contains("parametrizations") && !name.starts_with("wav2vec2.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw_all(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
        let mut out = vec![0.0; shape.iter().product()];
        Generator::new(seed, name, shape).fill(0, &mut out);
        out
    }

    #[test]
    fn values_are_pinned() {
        let values = draw_all(42, "blocks.0.self_attn.q.weight", &[2, 3]);
        assert_eq!(values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), PINNED);
    }

    const PINNED: [u32; 6] =
        [1_064_346_092, 3_205_070_302, 3_198_269_704, 1_045_741_184, 3_182_773_536, 3_207_180_712];

    #[test]
    fn any_part_can_be_drawn_alone() {
        let whole = draw_all(7, "a.weight", &[10, 100]);
        let mut part = vec![0.0; 300];
        Generator::new(7, "a.weight", &[10, 100]).fill(450, &mut part);
        assert_eq!(part, whole[450..750]);
    }

    #[test]
    fn seed_and_name_change_every_value() {
        let base = draw_all(1, "a.weight", &[1, 1000]);
        for other in [draw_all(2, "a.weight", &[1, 1000]), draw_all(1, "b.weight", &[1, 1000])] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 3, "{same} of 1000 values agree");
            // Nor is one a shifted copy of the other.
            assert!(
                (1..1000).all(|shift| base[shift..].iter().zip(&other).filter(|(a, b)| a == b).count() < 3)
            );
        }
    }

    #[test]
    fn a_matrix_has_the_moments_of_its_distribution() {
        let values = draw_all(3, "x.weight", &[500, 400]);
        let n = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
        // Standard errors: of the mean 1.1e-4, of the variance relative 2.0e-3.
        assert!(mean.abs() < 5e-4, "mean {mean}");
        assert!((variance * 400.0 - 1.0).abs() < 0.01, "variance {variance}");
        let neighbours =
            values.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / n * 400.0;
        assert!(neighbours.abs() < 0.01, "neighbours correlate by {neighbours}");
    }

    #[test]
    fn each_kind_of_tensor_has_its_distribution() {
        let gain = Distribution { mean: 1.0, spread: 0.1 };
        let variance = |v: f64| Distribution { mean: 0.0, spread: (3.0 * v).sqrt() as f32 };
        let cases: [(&str, &[usize], Distribution); 10] = [
            ("blocks.0.norm3.weight", &[80], gain),
            ("encoder.downsamples.0.residual.0.gamma", &[8, 1, 1, 1], gain),
            ("encoder.pos_conv_embed.conv.weight_g", &[1, 1, 128], gain),
            ("blocks.0.modulation", &[1, 6, 64], variance(1.0 / 64.0)),
            ("visual.cls_embedding", &[1, 1, 64], variance(1.0 / 64.0)),
            ("token_embedding.weight", &[384, 64], variance(1.0)),
            ("blocks.1.pos_embedding.embedding.weight", &[32, 4], variance(1.0)),
            ("patch_embedding.weight", &[96, 36, 1, 2, 2], variance(1.0 / 144.0)),
            ("decoder.conv1.weight", &[8, 16, 3, 3, 3], variance(1.0 / 432.0)),
            ("head.head.bias", &[64], Distribution { mean: 0.0, spread: 0.02 }),
        ];
        for (name, shape, expected) in cases {
            assert_eq!(distribution(name, shape), expected, "{name}");
        }
    }
}
