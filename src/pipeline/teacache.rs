//! TeaCache (arXiv 2411.19108): skips the blocks of the DiT at steps where the timestep's modulation has
//! hardly changed since they last ran, and adds what they added then.
//!
//! After `teacache_init` and `forward` in `wan/modules/multitalk_model.py` of MeiGen-AI/InfiniteTalk at 0107cd9.
//! The reference tells its guidance passes apart by counting calls modulo three, over all windows, which mixes
//! them up when there are two passes a step; here each pass has a [`Branch`] of its own, made anew for every
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

    /// The state of one guidance pass at the start of a window.
    pub fn branch(&self) -> Branch {
        Branch { config: self.clone(), steps: 0, accumulated: 0.0, previous: None, residual: None }
    }

    /// The estimated change of the blocks' output for a relative change `x` of the modulation.
    fn estimate(&self, x: f64) -> f64 {
        self.coefficients.iter().fold(0.0, |sum, c| sum * x + c)
    }
}

/// What one guidance pass remembers between the steps of one window.
#[derive(Clone, Debug)]
pub struct Branch {
    config: TeaCache,
    steps: usize,
    accumulated: f64,
    previous: Option<Tensor>, // modulation of the step before
    residual: Option<Tensor>, // what the blocks added when they last ran
}

impl Branch {
    /// Whether the blocks can be skipped at this step, whose modulation is `modulation` (1, 6, D) in f32. Called
    /// once per step: on true, [`Branch::reuse`] stands for the blocks; on false, they run and
    /// [`Branch::store`] is told.
    pub fn should_skip(&mut self, modulation: &Tensor) -> Result<bool> {
        let previous = self.previous.replace(modulation.clone());
        let warm = self.steps >= self.config.warmup_steps;
        self.steps += 1;
        let skip = match (previous, &self.residual) {
            (Some(previous), Some(_)) if warm => {
                let change = (modulation - &previous)?.abs()?.mean_all()?;
                let change = (change / previous.abs()?.mean_all()?)?.to_scalar::<f32>()?;
                self.accumulated += self.config.estimate(f64::from(change));
                self.accumulated < self.config.threshold
            }
            _ => false,
        };
        if !skip {
            self.accumulated = 0.0;
        }
        Ok(skip)
    }

    /// The estimated change since the blocks last ran.
    pub fn accumulated(&self) -> f64 {
        self.accumulated
    }

    /// Notes that the blocks turned `before` into `after`, both (1, L, D).
    pub fn store(&mut self, before: &Tensor, after: &Tensor) -> Result<()> {
        self.residual = Some((after - before)?);
        Ok(())
    }

    /// The blocks' output for the tokens `xs` (1, L, D), taken to add what they added when they last ran.
    pub fn reuse(&self, xs: &Tensor) -> Result<Tensor> {
        match &self.residual {
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

    fn run(cache: &TeaCache, values: &[f32]) -> Vec<bool> {
        let mut branch = cache.branch();
        let decide = |&value: &f32| {
            let skip = branch.should_skip(&modulation(value)).unwrap();
            if !skip {
                branch.store(&modulation(0.0), &modulation(value)).unwrap();
            }
            skip
        };
        values.iter().map(decide).collect()
    }

    #[test]
    fn runs_again_when_the_estimates_add_up() {
        // The estimate is the relative change itself.
        let cache = TeaCache { threshold: 0.25, coefficients: [0.0, 0.0, 0.0, 1.0, 0.0], warmup_steps: 2 };
        // Changes of 0.1 each: 0.1 and 0.2 are below the threshold, the third is not, then it starts afresh.
        let values = [1.0, 1.0, 1.1, 1.21, 1.331, 1.4641];
        assert_eq!(run(&cache, &values), [false, false, true, true, false, true]);
        assert_eq!(
            run(&TeaCache { warmup_steps: 4, ..cache }, &values),
            [false, false, false, false, true, true]
        );
    }

    #[test]
    fn never_skips_at_first_nor_on_values_that_are_not_finite() {
        let cache = TeaCache { threshold: 1e9, coefficients: [0.0; 5], warmup_steps: 0 };
        assert_eq!(run(&cache, &[1.0, 1.0, f32::NAN, 1.0]), [false, true, false, false]);
        assert!(cache.branch().reuse(&modulation(1.0)).is_err());
    }

    #[test]
    fn reuse_adds_what_the_blocks_added() {
        let cache = TeaCache { threshold: 0.2, coefficients: TeaCache::COEFFICIENTS_480, warmup_steps: 5 };
        let mut branch = cache.branch();
        branch.store(&modulation(1.0), &modulation(3.5)).unwrap();
        let reused =
            branch.reuse(&modulation(10.0)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(reused, [12.5; 24]);
    }
}
