//! Scaling of every pixel's channels to a given length, alone or with the activation that follows it.

use std::mem::MaybeUninit;

use candle_core::{D, DType, Result, Tensor};

use super::activation::{silu, silu_scalar};
use super::cpu;

/// Smallest norm that is divided by, as in `torch.nn.functional.normalize`.
const EPS: f64 = 1e-12;

/// Floats that one pass works on before the next: they stay in the first-level cache.
const BLOCK: usize = 2048;

/// x / max(‖x‖₂, 1e-12) · scale over the last dimension: `xs` (…, C), `scale` (C) in f32; in the dtype of `xs`.
pub fn unit_norm(xs: &Tensor, scale: &Tensor) -> Result<Tensor> {
    if cpu::runs_on(&[xs, scale]) {
        return rows(xs, scale, |x| x);
    }
    #[cfg(feature = "cuda")]
    if let Some(ys) = super::cuda::unit_norm(xs, scale, false)? {
        return Ok(ys);
    }
    let ys = xs.to_dtype(DType::F32)?;
    let norm = ys.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(EPS)?;
    ys.broadcast_div(&norm)?.broadcast_mul(scale)?.to_dtype(xs.dtype())
}

/// SiLU of [`unit_norm`], in one pass over memory.
pub fn unit_norm_silu(xs: &Tensor, scale: &Tensor) -> Result<Tensor> {
    if cpu::runs_on(&[xs, scale]) {
        return rows(xs, scale, silu_scalar);
    }
    #[cfg(feature = "cuda")]
    if let Some(ys) = super::cuda::unit_norm(xs, scale, true)? {
        return Ok(ys);
    }
    silu(&unit_norm(&xs.to_dtype(DType::F32)?, scale)?)?.to_dtype(xs.dtype())
}

/// `f` of the scaled values.
fn rows(xs: &Tensor, scale: &Tensor, f: impl Fn(f32) -> f32 + Sync + Copy) -> Result<Tensor> {
    let xs = xs.contiguous()?;
    let (xs_values, scale_values) = (cpu::Values::new(&xs), cpu::Values::new(scale));
    let (values, scale) = (xs_values.contiguous()?, scale_values.contiguous()?);
    let channels = scale.len();
    if xs.dim(D::Minus1)? != channels {
        candle_core::bail!("the input has {} channels, the scale {channels}", xs.dim(D::Minus1)?);
    }
    // SAFETY: `normalize` writes as many elements as the input has.
    unsafe {
        cpu::build(xs.shape(), |out| {
            cpu::for_rows(out, channels, |first, out| {
                let values = &values[first * channels..][..out.len()];
                cpu::vectorized(
                    #[inline(always)]
                    || normalize(values, scale, f, out),
                );
            });
            Ok(())
        })
    }
}

/// Writes every element of `out`: rows of `values`, as long as `scale`.
#[inline(always)]
fn normalize(values: &[f32], scale: &[f32], f: impl Fn(f32) -> f32, out: &mut [MaybeUninit<f32>]) {
    let channels = scale.len();
    let block = (BLOCK / channels).max(1);
    let mut factors = [0f32; BLOCK];
    for (values, out) in values.chunks(block * channels).zip(out.chunks_mut(block * channels)) {
        let factors = &mut factors[..values.len() / channels];
        for (factor, row) in factors.iter_mut().zip(values.chunks_exact(channels)) {
            *factor = sum_of_squares(row);
        }
        factors.iter_mut().for_each(|x| *x = 1.0 / x.sqrt().max(EPS as f32));
        for ((factor, row), out) in
            factors.iter().zip(values.chunks_exact(channels)).zip(out.chunks_exact_mut(channels))
        {
            for ((y, x), scale) in out.iter_mut().zip(row).zip(scale) {
                y.write(x * factor * scale);
            }
        }
        // The activation runs over whole blocks, because a row of few channels does not fill a register.
        for y in out {
            // SAFETY: the loop above has written it.
            y.write(f(unsafe { y.assume_init() }));
        }
    }
}

/// Σ x², in lanes where the row is long enough for them.
#[inline(always)]
fn sum_of_squares(row: &[f32]) -> f32 {
    const LANES: usize = 8;
    if row.len() >= 128 {
        return cpu::sum(row, |x| x * x);
    }
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h)) + tail.iter().map(|x| x * x).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The composition of stock operations.
    fn composed(xs: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let norm = xs.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(EPS)?;
        xs.broadcast_div(&norm)?.broadcast_mul(scale)
    }

    fn assert_close(actual: &Tensor, expected: &Tensor) -> Result<()> {
        let worst = (actual - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert!(worst < 2e-6, "{:?} is off by {worst:e}", actual.shape());
        Ok(())
    }

    #[test]
    fn equals_the_composition_at_every_number_of_channels() -> Result<()> {
        for channels in [1, 3, 4, 8, 12, 16, 31, 96, 130, 384, 3000] {
            let xs = (Tensor::randn(0f32, 1.0, (2, 37, channels), &Device::Cpu)? * 3.0)?;
            let scale = Tensor::randn(0f32, 1.0, channels, &Device::Cpu)?;
            let expected = composed(&xs, &scale)?;
            assert_close(&unit_norm(&xs, &scale)?, &expected)?;
            assert_close(&unit_norm_silu(&xs, &scale)?, &expected.silu()?)?;
        }
        Ok(())
    }

    #[test]
    fn many_rows_are_shared_among_threads() -> Result<()> {
        let xs = Tensor::randn(0f32, 1.0, (3, 5, 2000, 12), &Device::Cpu)?.narrow(1, 1, 3)?;
        let scale = Tensor::randn(0f32, 1.0, 12, &Device::Cpu)?;
        assert_close(&unit_norm_silu(&xs, &scale)?, &composed(&xs, &scale)?.silu()?)
    }

    #[test]
    fn rows_of_zeros_stay_zeros() -> Result<()> {
        let xs = Tensor::zeros((4, 6), DType::F32, &Device::Cpu)?;
        let ys = unit_norm(&xs, &Tensor::ones(6, DType::F32, &Device::Cpu)?)?;
        assert_eq!(ys.flatten_all()?.to_vec1::<f32>()?, [0f32; 24]);
        Ok(())
    }

    #[test]
    fn half_precision_is_rounded_once_at_the_end() -> Result<()> {
        let xs = Tensor::randn(0f32, 1.0, (5, 8), &Device::Cpu)?.to_dtype(DType::BF16)?;
        let scale = Tensor::randn(0f32, 1.0, 8, &Device::Cpu)?;
        let expected = unit_norm_silu(&xs.to_dtype(DType::F32)?, &scale)?;
        let ys = unit_norm_silu(&xs, &scale)?;
        assert_eq!(ys.dtype(), DType::BF16);
        let difference = (ys.to_dtype(DType::F32)? - &expected)?.abs()?;
        let bound = ((expected.abs()? / 128.0)? + 1e-5)?;
        assert_eq!(difference.gt(&bound)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?, 0.0);
        Ok(())
    }

    #[test]
    fn another_number_of_channels_is_an_error() {
        let xs = Tensor::zeros((4, 6), DType::F32, &Device::Cpu).unwrap();
        assert!(unit_norm(&xs, &Tensor::ones(5, DType::F32, &Device::Cpu).unwrap()).is_err());
    }
}
