//! Pointwise activations, of any shape, in the dtype of their input.

use candle_core::{Result, Tensor};

use super::cpu;

/// GELU with the tanh approximation.
pub fn gelu_tanh(xs: &Tensor) -> Result<Tensor> {
    match cpu::runs_on(&[xs]) {
        true => map(xs, gelu_tanh_scalar),
        false => xs.gelu(),
    }
}

/// GELU with the exact error function.
pub fn gelu_erf(xs: &Tensor) -> Result<Tensor> {
    match cpu::runs_on(&[xs]) {
        true => map(xs, gelu_erf_scalar),
        false => xs.gelu_erf(),
    }
}

/// x * sigmoid(x).
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    match cpu::runs_on(&[xs]) {
        true => map(xs, silu_scalar),
        false => xs.silu(),
    }
}

/// `f` of every value.
fn map(xs: &Tensor, f: impl Fn(f32) -> f32 + Sync + Copy) -> Result<Tensor> {
    let xs = xs.contiguous()?;
    let values = cpu::Values::new(&xs);
    let values = values.contiguous()?;
    // SAFETY: every element is written from the input's element of the same number.
    unsafe {
        cpu::build(xs.shape(), |out| {
            cpu::for_rows(out, 1, |first, out| {
                let values = &values[first..][..out.len()];
                cpu::vectorized(
                    #[inline(always)]
                    || {
                        for (y, x) in out.iter_mut().zip(values) {
                            y.write(f(*x));
                        }
                    },
                );
            });
            Ok(())
        })
    }
}

/// 0.5x(1 + tanh u) = x / (1 + e^−2u), u = √(2/π)(x + 0.044715x³).
#[inline(always)]
pub(super) fn gelu_tanh_scalar(x: f32) -> f32 {
    const MINUS_TWO_U: f32 = -1.595_769_2; // −2√(2/π)
    x / (1.0 + cpu::exp(MINUS_TWO_U * x * (x * x).mul_add(0.044715, 1.0)))
}

/// xΦ(x), with the complementary error function of Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
#[inline(always)]
fn gelu_erf_scalar(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
    let p = 1.061_405_4f32;
    let p = p.mul_add(t, -1.453_152);
    let p = p.mul_add(t, 1.421_413_7);
    let p = p.mul_add(t, -0.284_496_74);
    let p = p.mul_add(t, 0.254_829_6);
    let tail = 0.5 * p * t * cpu::exp(-z * z); // Φ(−|x|)
    if x > 0.0 { x - x * tail } else { x * tail }
}

#[inline(always)]
pub(super) fn silu_scalar(x: f32) -> f32 {
    x / (1.0 + cpu::exp(-x))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn equals_candles_operations() {
        let xs: Vec<f32> = (-200_000..200_000).map(|i| i as f32 / 10_000.0).chain([-1e4, 1e4]).collect();
        let xs = Tensor::new(xs, &Device::Cpu).unwrap();
        let exact = xs.to_dtype(candle_core::DType::F64).unwrap();
        let cases = [
            (gelu_tanh(&xs).unwrap(), exact.gelu().unwrap()),
            (gelu_erf(&xs).unwrap(), exact.gelu_erf().unwrap()),
            (silu(&xs).unwrap(), exact.silu().unwrap()),
        ];
        for (i, (actual, expected)) in cases.into_iter().enumerate() {
            let actual = actual.to_dtype(candle_core::DType::F64).unwrap().to_vec1::<f64>().unwrap();
            let expected = expected.to_vec1::<f64>().unwrap();
            let worst = actual
                .iter()
                .zip(&expected)
                .map(|(a, e)| (a - e).abs() / e.abs().max(1.0))
                .fold(0.0, f64::max);
            assert!(worst < 1e-6, "case {i}: {worst:e}");
        }
    }

    #[test]
    fn follows_strides_and_keeps_the_dtype() {
        let xs = Tensor::randn(0f32, 1., (5, 7), &Device::Cpu).unwrap().t().unwrap();
        let values = |x: &Tensor| x.to_vec2::<f32>().unwrap();
        assert_eq!(values(&silu(&xs).unwrap()), values(&silu(&xs.contiguous().unwrap()).unwrap()));
        let half = xs.to_dtype(candle_core::DType::BF16).unwrap();
        assert_eq!(gelu_tanh(&half).unwrap().dtype(), candle_core::DType::BF16);
    }
}
