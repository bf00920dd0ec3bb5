//! Time steps of the flow-matching schedule and the Euler rule.
//!
//! Source: MeiGen-AI/InfiniteTalk at 0107cd9, `wan/multitalk.py` (`timestep_transform` and the sampling loop of
//! `generate_infinitetalk`). The grid ends at 1, not at 0, so the last step hardly moves the latents; kept,
//! because the step-distilled LoRAs were trained on it.

use candle_core::{Result, Tensor};

/// Timesteps of training: `t` runs from this to 0.
pub const NUM_TRAIN_TIMESTEPS: f32 = 1000.0;

/// The `num_steps + 1` timesteps of a run, from 1000 down to 0: a linear grid from 1000 to 1, then 0, bent by
/// `u → shift·u / (1 + (shift − 1)·u)` with u = t / 1000. A larger `shift` spends more steps on the structure
/// of the picture. Computed in f32 as the reference does.
pub fn timesteps(num_steps: usize, shift: f64) -> Vec<f32> {
    let shift = shift as f32;
    let last = num_steps.saturating_sub(1).max(1) as f64;
    let grid = (0..num_steps).map(|i| (1000.0 - 999.0 * i as f64 / last) as f32);
    grid.chain([0.0])
        .map(|t| {
            let u = t / NUM_TRAIN_TIMESTEPS;
            shift * u / (1.0 + (shift - 1.0) * u) * NUM_TRAIN_TIMESTEPS
        })
        .collect()
}

/// One Euler step from timestep `t` to `t_next`: latents − velocity · (t − t_next) / 1000, any shape.
pub fn euler_step(latents: &Tensor, velocity: &Tensor, t: f32, t_next: f32) -> Result<Tensor> {
    let dt = f64::from((t - t_next) / NUM_TRAIN_TIMESTEPS);
    latents - (velocity * dt)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_starts_at_1000_and_ends_at_0() {
        let ts = timesteps(4, 2.0);
        assert_eq!(ts.len(), 5);
        assert_eq!((ts[0], ts[4]), (1000.0, 0.0));
        assert!((ts[3] - 1.998).abs() < 1e-3, "{ts:?}");
    }

    #[test]
    fn one_step_covers_the_whole_way() {
        assert_eq!(timesteps(1, 7.0), [1000.0, 0.0]);
    }

    #[test]
    fn a_constant_velocity_is_integrated_exactly() -> Result<()> {
        let dev = &candle_core::Device::Cpu;
        let ts = timesteps(7, 5.0);
        let velocity = Tensor::new(&[2f32, -4.0], dev)?;
        let mut xs = Tensor::new(&[1f32, 1.0], dev)?;
        for pair in ts.windows(2) {
            xs = euler_step(&xs, &velocity, pair[0], pair[1])?;
        }
        let xs = xs.to_vec1::<f32>()?;
        assert!((xs[0] + 1.0).abs() < 1e-5 && (xs[1] - 5.0).abs() < 1e-5, "{xs:?}");
        Ok(())
    }
}
