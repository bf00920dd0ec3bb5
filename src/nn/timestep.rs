//! Sinusoidal timestep embedding.

use candle_core::{Device, Result, Tensor};

/// `[cos(t·ωᵢ) | sin(t·ωᵢ)]`, ωᵢ = 10000^(−i/half), half = dim / 2, for timesteps `ts` (0…1000): (len, dim),
/// computed in f64 and rounded to f32.
pub fn sinusoid(ts: &[f64], dim: usize, device: &Device) -> Result<Tensor> {
    let half = dim / 2;
    let mut out = Vec::with_capacity(ts.len() * dim);
    for &t in ts {
        let angle = |i: usize| t * 10000f64.powf(-(i as f64) / half as f64);
        out.extend((0..half).map(|i| angle(i).cos() as f32));
        out.extend((0..half).map(|i| angle(i).sin() as f32));
    }
    Tensor::from_vec(out, (ts.len(), dim), device)
}
