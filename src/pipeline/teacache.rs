//! TeaCache (arXiv 2411.19108): skips the blocks of the DiT at steps where the timestep's modulation has
//! hardly changed since they last ran, and adds what they added then.
//!
//! After `teacache_init` and `forward` in `wan/modules/multitalk_model.py` of MeiGen-AI/InfiniteTalk at 0107cd9.
//! The reference tells its guidance passes apart by counting calls modulo three, over all windows, which mixes
//! them up when there are two passes a step; here each pass has a [`Residual`] of its own, made anew for every
//! window.

use candle_core::Tensor;

use crate::{Error, ErrorKind, Result};

/// When blocks are skipped.
#[derive(Clone, Debug, PartialEq)]
pub struct TeaCache {
    /// How far the estimated change of the blocks' output may add up before they run again; the reference
    /// suggests 0.2 to 0.5.
    pub threshold: f64,
    /// The polynomial from the modulation's relative change to the output's, highest power first.
    pub coefficients: [f64; 5],
    /// Steps at the start that always run.
    pub warmup_steps: usize,
}

impl TeaCache {
    /// Fitted to the 480p model.
    pub const COEFFICIENTS_480: [f64; 5] =
        [2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1];
    /// Fitted to the 720p model.
    pub const COEFFICIENTS_720: [f64; 5] =
        [8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2];
    /// The reference's number of steps that always run.
    pub const WARMUP_STEPS: usize = 5;

    /// What each step of a window does, given the modulations (1, 6, D) of all its steps in f32. They follow from the
    /// timesteps alone, so the device is looked at once a window, before its first step, and guidance passes decide
    /// alike.
    pub fn decide(&self, modulations: &[Tensor]) -> Result<Vec<Decision>> {
        let mut changes = vec![];
        for pair in modulations.windows(2) {
            let change = (&pair[1] - &pair[0])?.abs()?.mean_all()?;
            changes.push((change / pair[0].abs()?.mean_all()?)?);
        }
        let changes = match changes.is_empty() {
            true => vec![],
            false => Tensor::stack(&changes, 0)?.to_vec1::<f32>()?,
        };
        let mut accumulated = 0.0;
        let decide = |step: usize| {
            // The first step has nothing to reuse.
            let change = step.checked_sub(1).and_then(|before| changes.get(before));
            let skips = match change {
                Some(change) if step >= self.warmup_steps => {
                    accumulated += self.estimate(f64::from(*change));
                    accumulated < self.threshold
                }
                _ => false,
            };
            if !skips {
                accumulated = 0.0;
            }
            Decision { skips, accumulated }
        };
        Ok((0..modulations.len()).map(decide).collect())
    }

    /// The estimated change of the blocks' output for a relative change `x` of the modulation.
    fn estimate(&self, x: f64) -> f64 {
        self.coefficients.iter().fold(0.0, |sum, c| sum * x + c)
    }
}

/// What one step does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Whether the blocks are skipped.
    pub skips: bool,
    /// The estimated change since they last ran.
    pub accumulated: f64,
}

/// What one guidance pass remembers between the steps of one window: what the blocks added when they last ran.
#[derive(Clone, Debug, Default)]
pub struct Residual(Option<Tensor>);

impl Residual {
    /// What `blocks` make of the tokens `xs` (1, L, D); where the step `skips` them, what they would, if they added
    /// what they added when they last ran.
    pub fn apply(
        &mut self,
        skips: bool,
        xs: &Tensor,
        blocks: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        if !skips {
            let ys = blocks()?;
            self.0 = Some((&ys - xs)?);
            return Ok(ys);
        }
        match &self.0 {
            Some(residual) => Ok((xs + residual)?),
            None => Err(Error::new(ErrorKind::Inference, "blocks were skipped before they ran once")),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn modulation(value: f32) -> Tensor {
        Tensor::full(value, (1, 6, 4), &Device::Cpu).unwrap()
    }

    fn skips(cache: &TeaCache, values: &[f32]) -> Vec<bool> {
        let modulations: Vec<_> = values.iter().map(|&value| modulation(value)).collect();
        cache.decide(&modulations).unwrap().into_iter().map(|decision| decision.skips).collect()
    }

    #[test]
    fn runs_again_when_the_estimates_add_up() {
        // The estimate is the relative change itself.
        let cache = TeaCache { threshold: 0.25, coefficients: [0.0, 0.0, 0.0, 1.0, 0.0], warmup_steps: 2 };
        // Changes of 0.1 each: 0.1 and 0.2 are below the threshold, the third is not, then it starts afresh.
        let values = [1.0, 1.0, 1.1, 1.21, 1.331, 1.4641];
        assert_eq!(skips(&cache, &values), [false, false, true, true, false, true]);
        let later = TeaCache { warmup_steps: 4, ..cache };
        assert_eq!(skips(&later, &values), [false, false, false, false, true, true]);
        assert!(skips(&later, &[]).is_empty());
    }

    #[test]
    fn never_skips_at_first_nor_on_values_that_are_not_finite() {
        let cache = TeaCache { threshold: 1e9, coefficients: [0.0; 5], warmup_steps: 0 };
        assert_eq!(skips(&cache, &[1.0, 1.0, f32::NAN, 1.0]), [false, true, false, false]);
        assert!(Residual::default().apply(true, &modulation(1.0), || Ok(modulation(1.0))).is_err());
    }

    #[test]
    fn skipping_adds_what_the_blocks_added() {
        let mut residual = Residual::default();
        let made = residual.apply(false, &modulation(1.0), || Ok(modulation(3.5))).unwrap();
        let values = |xs: Tensor| xs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(made), [3.5; 24]);
        let skipped = residual.apply(true, &modulation(10.0), || panic!("the blocks are skipped")).unwrap();
        assert_eq!(values(skipped), [12.5; 24]);
    }
}
