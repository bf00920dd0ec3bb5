//! Layer norms over the last dimension, with statistics in f32.

use std::mem::MaybeUninit;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::cpu;
use super::rope::Rope;

/// `xs + ys · gate`, computed in f32 and rounded to the dtype of `xs`; without a gate, `xs + ys`. Both are (B, L, D),
/// the gate (B, 1, D) in f32. Takes its terms, so that they are freed as soon as they are added.
#[derive(Debug)]
pub struct Sum<'a> {
    /// What is added to.
    pub xs: Tensor,
    /// What is added.
    pub ys: Tensor,
    /// How much of it.
    pub gate: Option<&'a Tensor>,
}

impl Sum<'_> {
    fn value(self) -> Result<Tensor> {
        match self.gate {
            Some(gate) => residual_gate(&self.xs, &self.ys, gate),
            None => self.xs + self.ys,
        }
    }
}

/// (x − mean) / sqrt(var + eps) · weight + bias over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor, // (D)
    bias: Tensor,   // (D)
    eps: f64,
}

impl LayerNorm {
    /// Loads `weight` and `bias` (dim) below `vb`.
    pub fn new(dim: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get(dim, "weight")?, bias: vb.get(dim, "bias")?, eps })
    }

    /// Normalises `xs` (…, D), in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        if cpu::runs_on(&[xs, &self.weight, &self.bias]) {
            let rows = Rows { xs, weight: &self.weight, bias: Some(&self.bias) };
            return rows.normalize(
                #[inline(always)]
                |x, w, b, out| layer_norm_row(x, w, b, self.eps as f32, out),
            );
        }
        let (weight, bias) = (self.weight.to_dtype(DType::F32)?, self.bias.to_dtype(DType::F32)?);
        #[cfg(feature = "cuda")]
        if let Some(ys) = self.kernel(&weight, &bias).of(xs)? {
            return Ok(ys);
        }
        standardize(xs, self.eps)?.broadcast_mul(&weight)?.broadcast_add(&bias)?.to_dtype(xs.dtype())
    }

    /// `sum` and its norm, in one pass where there is a kernel for it.
    pub fn forward_sum(&self, sum: Sum) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        {
            let (weight, bias) = (self.weight.to_dtype(DType::F32)?, self.bias.to_dtype(DType::F32)?);
            if let Some(made) = self.kernel(&weight, &bias).of_sum(&sum.xs, &sum.ys, sum.gate)? {
                return Ok(made);
            }
        }
        let xs = sum.value()?;
        let ys = self.forward(&xs)?;
        Ok((xs, ys))
    }

    #[cfg(feature = "cuda")]
    fn kernel<'a>(&self, weight: &'a Tensor, bias: &'a Tensor) -> super::cuda::LayerNorm<'a> {
        super::cuda::LayerNorm { weight, bias, eps: self.eps, round: false }
    }
}

/// LayerNorm without weights, then `· (1 + scale) + shift`: `xs` (B, L, D), `shift` and `scale` (B, 1, D) in
/// f32. The normalised value is rounded to the dtype of `xs` before the modulation, which runs in f32, as in
/// the reference; the result is in the dtype of `xs`.
pub fn layer_norm_modulated(xs: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (scale + 1.0)?;
    if cpu::runs_on(&[xs, shift, &scale]) && xs.dim(0)? == 1 {
        let rows = Rows { xs, weight: &scale, bias: Some(shift) };
        return rows.normalize(
            #[inline(always)]
            |x, w, b, out| layer_norm_row(x, w, b, eps as f32, out),
        );
    }
    #[cfg(feature = "cuda")]
    if xs.dim(0)? == 1
        && let Some(ys) = (super::cuda::LayerNorm { weight: &scale, bias: shift, eps, round: true }).of(xs)?
    {
        return Ok(ys);
    }
    let ys = standardize(xs, eps)?.to_dtype(xs.dtype())?.to_dtype(DType::F32)?;
    ys.broadcast_mul(&scale)?.broadcast_add(shift)?.to_dtype(xs.dtype())
}

/// `sum` and its [`layer_norm_modulated`], in one pass where there is a kernel for it.
pub fn sum_and_layer_norm_modulated(
    sum: Sum,
    shift: &Tensor,
    scale: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if sum.xs.dim(0)? == 1 {
        let kernel = super::cuda::LayerNorm { weight: &(scale + 1.0)?, bias: shift, eps, round: true };
        if let Some(made) = kernel.of_sum(&sum.xs, &sum.ys, sum.gate)? {
            return Ok(made);
        }
    }
    let xs = sum.value()?;
    let ys = layer_norm_modulated(&xs, shift, scale, eps)?;
    Ok((xs, ys))
}

/// `xs + ys · gate`: `xs` and `ys` (B, L, D), `gate` (B, 1, D) in f32; computed in f32, in the dtype of `xs`.
pub fn residual_gate(xs: &Tensor, ys: &Tensor, gate: &Tensor) -> Result<Tensor> {
    if cpu::runs_on(&[xs, ys, gate]) && xs.dim(0)? == 1 && xs.dims() == ys.dims() {
        return residual_gate_rows(xs, ys, gate);
    }
    #[cfg(feature = "cuda")]
    if xs.dim(0)? == 1
        && let Some(sum) = super::cuda::residual_gate(xs, ys, gate)?
    {
        return Ok(sum);
    }
    let ys = ys.to_dtype(DType::F32)?.broadcast_mul(gate)?;
    (xs.to_dtype(DType::F32)? + ys)?.to_dtype(xs.dtype())
}

/// x / sqrt(mean(x²) + eps), rounded to the dtype of x, times weight, over the last dimension.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor, // (D)
    eps: f64,
}

impl RmsNorm {
    /// Loads `weight` (dim) below `vb`.
    pub fn new(dim: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get(dim, "weight")?, eps })
    }

    /// Normalises `xs` (…, D), in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        if cpu::runs_on(&[xs, &self.weight]) {
            let rows = Rows { xs, weight: &self.weight, bias: None };
            return rows.normalize(
                #[inline(always)]
                |x, w, _, out| rms_norm_row(x, w, self.eps as f32, out),
            );
        }
        #[cfg(feature = "cuda")]
        if let Some(ys) = super::cuda::rms_rope(xs, Some((&self.weight, self.eps)), None)? {
            return Ok(ys);
        }
        let ys = xs.to_dtype(DType::F32)?;
        let mean_sq = ys.sqr()?.mean_keepdim(D::Minus1)?;
        let ys = ys.broadcast_div(&(mean_sq + self.eps)?.sqrt()?)?.to_dtype(xs.dtype())?;
        ys.broadcast_mul(&self.weight.to_dtype(xs.dtype())?)
    }

    /// Normalises `xs` (B, L, D), splits it into heads and turns them by `rope`: (B, L, N, D / N), in one pass where
    /// there is a kernel for it.
    pub fn forward_rotated(&self, xs: &Tensor, num_heads: usize, rope: &Rope) -> Result<Tensor> {
        let (batch, len, dim) = xs.dims3()?;
        let heads = (batch, len, num_heads, dim / num_heads);
        #[cfg(feature = "cuda")]
        if let Some(angles) = rope.angles_of(len, dim / num_heads)
            && let Some(ys) = super::cuda::rms_rope(xs, Some((&self.weight, self.eps)), Some(angles))?
        {
            return ys.reshape(heads);
        }
        rope.rotate(&self.forward(xs)?.reshape(heads)?)
    }
}

/// (x − mean) / sqrt(var + eps) over the last dimension, in f32.
fn standardize(xs: &Tensor, eps: f64) -> Result<Tensor> {
    let xs = xs.to_dtype(DType::F32)?;
    let xs = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let var = xs.sqr()?.mean_keepdim(D::Minus1)?;
    xs.broadcast_div(&(var + eps)?.sqrt()?)
}

/// Rows of the CPU kernels below, and the weights that all rows share.
struct Rows<'a> {
    xs: &'a Tensor,           // (…, D)
    weight: &'a Tensor,       // D values
    bias: Option<&'a Tensor>, // D values
}

impl Rows<'_> {
    /// `row(x, weight, bias, out)` for every row; the bias is empty where there is none.
    fn normalize(
        &self,
        row: impl Fn(&[f32], &[f32], &[f32], &mut [MaybeUninit<f32>]) + Sync,
    ) -> Result<Tensor> {
        let dim = self.xs.dim(D::Minus1)?;
        let (xs, weight) = (self.xs.contiguous()?, self.weight.contiguous()?);
        let bias = self.bias.map(Tensor::contiguous).transpose()?;
        let (values, weight) = (cpu::Values::new(&xs), cpu::Values::new(&weight));
        let bias = bias.as_ref().map(cpu::Values::new);
        let (values, weight) = (values.contiguous()?, weight.contiguous()?);
        let bias = bias.as_ref().map_or(Ok(&[][..]), |bias| bias.contiguous())?;
        if weight.len() != dim || self.bias.is_some() && bias.len() != dim {
            bail!("a norm with {} weights was given rows of {dim}", weight.len())
        }
        // SAFETY: `row` writes its whole row, as both rows below do.
        unsafe {
            cpu::build(self.xs.shape(), |out| {
                cpu::for_rows(out, dim, |first, out| {
                    let values = &values[first * dim..][..out.len()];
                    cpu::vectorized(
                        #[inline(always)]
                        || {
                            for (x, out) in values.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
                                row(x, weight, bias, out);
                            }
                        },
                    );
                });
                Ok(())
            })
        }
    }
}

#[inline(always)]
fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [MaybeUninit<f32>]) {
    let count = x.len() as f32;
    let mean = cpu::sum(x, |x| x) / count;
    let var = cpu::sum(x, |x| (x - mean) * (x - mean)) / count;
    let inverse = 1.0 / (var + eps).sqrt();
    for (((y, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        y.write(((x - mean) * inverse).mul_add(*w, *b));
    }
}

#[inline(always)]
fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [MaybeUninit<f32>]) {
    let mean_sq = cpu::sum(x, |x| x * x) / x.len() as f32;
    let inverse = 1.0 / (mean_sq + eps).sqrt();
    for ((y, x), w) in out.iter_mut().zip(x).zip(weight) {
        y.write(x * inverse * w);
    }
}

fn residual_gate_rows(xs: &Tensor, ys: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let dim = xs.dim(D::Minus1)?;
    let (xs, ys, gate) = (xs.contiguous()?, ys.contiguous()?, gate.contiguous()?);
    let shape = xs.shape();
    let (xs, ys, gate) = (cpu::Values::new(&xs), cpu::Values::new(&ys), cpu::Values::new(&gate));
    let (xs, ys, gate) = (xs.contiguous()?, ys.contiguous()?, gate.contiguous()?);
    if gate.len() != dim {
        bail!("a gate of {} was given rows of {dim}", gate.len())
    }
    // SAFETY: the zipped rows have `dim` elements each, so all of `out` is written.
    unsafe {
        cpu::build(shape, |out| {
            cpu::for_rows(out, dim, |first, out| {
                let (xs, ys) = (&xs[first * dim..][..out.len()], &ys[first * dim..][..out.len()]);
                cpu::vectorized(
                    #[inline(always)]
                    || {
                        let rows = xs.chunks_exact(dim).zip(ys.chunks_exact(dim));
                        for (out, (xs, ys)) in out.chunks_exact_mut(dim).zip(rows) {
                            for (((out, x), y), g) in out.iter_mut().zip(xs).zip(ys).zip(gate) {
                                out.write(y.mul_add(*g, *x));
                            }
                        }
                    },
                );
            });
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn randn(shape: &[usize]) -> Tensor {
        (Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap() + 0.5).unwrap()
    }

    fn assert_close(actual: &Tensor, expected: &Tensor) {
        let error = (actual - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(error.to_scalar::<f32>().unwrap() < 1e-5, "{error}");
    }

    #[test]
    fn kernels_equal_the_composition() {
        for shape in [[1, 5, 3], [1, 3, 64], [1, 70, 1000]] {
            let dim = shape[2];
            let (xs, ys) = (randn(&shape), randn(&shape));
            let (weight, bias) = (randn(&[dim]), randn(&[dim]));
            let scaled = |eps| standardize(&xs, eps).unwrap().broadcast_mul(&weight).unwrap();

            let norm = LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: 1e-5 };
            assert_close(&norm.forward(&xs).unwrap(), &scaled(1e-5).broadcast_add(&bias).unwrap());

            let shift = bias.reshape((1, 1, dim)).unwrap();
            let scale = (weight.reshape((1, 1, dim)).unwrap() - 1.0).unwrap();
            let actual = layer_norm_modulated(&xs, &shift, &scale, 1e-6).unwrap();
            assert_close(&actual, &scaled(1e-6).broadcast_add(&bias).unwrap());

            let norm = RmsNorm { weight: weight.clone(), eps: 1e-6 };
            let rms = (xs.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-6).unwrap().sqrt().unwrap();
            let expected = xs.broadcast_div(&rms).unwrap().broadcast_mul(&weight).unwrap();
            assert_close(&norm.forward(&xs).unwrap(), &expected);

            let expected = (&xs + ys.broadcast_mul(&scale).unwrap()).unwrap();
            assert_close(&residual_gate(&xs, &ys, &scale).unwrap(), &expected);
        }
    }

    #[test]
    fn batches_have_modulations_of_their_own() {
        let (xs, ys) = (randn(&[2, 3, 8]), randn(&[2, 3, 8]));
        let (shift, scale) = (randn(&[2, 1, 8]), randn(&[2, 1, 8]));
        let of = |x: &Tensor, i: usize| x.narrow(0, i, 1).unwrap();
        let normed = layer_norm_modulated(&xs, &shift, &scale, 1e-6).unwrap();
        let gated = residual_gate(&xs, &ys, &scale).unwrap();
        for i in 0..2 {
            let alone = layer_norm_modulated(&of(&xs, i), &of(&shift, i), &of(&scale, i), 1e-6).unwrap();
            assert_close(&of(&normed, i), &alone);
            assert_close(&of(&gated, i), &residual_gate(&of(&xs, i), &of(&ys, i), &of(&scale, i)).unwrap());
        }
    }

    #[test]
    fn weights_of_another_width_are_refused() {
        let norm = RmsNorm { weight: randn(&[4]), eps: 1e-6 };
        assert!(norm.forward(&randn(&[1, 2, 5])).is_err());
        assert!(residual_gate(&randn(&[1, 2, 5]), &randn(&[1, 2, 5]), &randn(&[1, 1, 4])).is_err());
    }
}
