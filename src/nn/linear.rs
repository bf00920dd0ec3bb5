//! Linear layers.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;

use super::activation::gelu_tanh_scalar;
use super::cpu::{self, Matrix};
use super::{gelu_tanh, kernels, work};

/// y = x Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,               // (out, in)
    bias: Option<Tensor>,         // (out)
    transposed: OnceLock<Tensor>, // (in, out) in f32, for the CPU, made on first use
}

/// Weights of at most this many elements are kept transposed as well: products of few rows are up to a third
/// faster for it, and large weights see many rows.
const MAX_TRANSPOSED: usize = 1 << 20;
/// Products of fewer multiplications run on one thread: waking the others costs more.
const MIN_PARALLEL: usize = 1 << 20;

impl Linear {
    /// Loads `weight` (out_dim, in_dim) and `bias` (out_dim) below `vb`.
    pub fn new(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self::from_parts(vb.get((out_dim, in_dim), "weight")?, Some(vb.get(out_dim, "bias")?)))
    }

    /// Loads `weight` (out_dim, in_dim) below `vb`; there is no bias.
    pub fn no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self::from_parts(vb.get((out_dim, in_dim), "weight")?, None))
    }

    /// A layer of `weight` (out, in) and `bias` (out).
    pub fn from_parts(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias, transposed: OnceLock::new() }
    }

    /// Bytes of the copy that a layer on the CPU keeps of a weight of this shape, once it has run.
    pub(crate) fn transposed_bytes(weight: &Shape) -> usize {
        let is_kept = weight.rank() == 2 && weight.elem_count() <= MAX_TRANSPOSED;
        if is_kept { weight.elem_count() * DType::F32.size_in_bytes() } else { 0 }
    }

    /// Maps `xs` (…, in) to (…, out), in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = match xs.device().is_cpu() && !kernels::are_plain() {
            true => self.forward_cpu(xs, false),
            false => self.forward_composed(xs, false),
        };
        self.noted(xs, ys?)
    }

    /// [`Linear::forward`], then the tanh approximation of GELU.
    pub fn forward_gelu_tanh(&self, xs: &Tensor) -> Result<Tensor> {
        // The reference rounds between the two, where that is a difference.
        let ys = match cpu::runs_on(&[xs]) {
            true => self.forward_cpu(xs, true),
            false if xs.device().is_cpu() => return gelu_tanh(&self.forward(xs)?),
            false => self.forward_composed(xs, true),
        };
        self.noted(xs, ys?)
    }

    fn noted(&self, xs: &Tensor, ys: Tensor) -> Result<Tensor> {
        work::note(|| Ok(2 * ys.elem_count() * self.weight.dim(1)?), &[xs, &self.weight, &ys])?;
        Ok(ys)
    }

    fn forward_composed(&self, xs: &Tensor, gelu: bool) -> Result<Tensor> {
        let (rows, shape) = self.output_shape(xs)?;
        let ys = xs.reshape((rows, ()))?.matmul(&self.weight.to_dtype(xs.dtype())?.t()?)?;
        #[cfg(feature = "cuda")]
        if let Some(bias) = &self.bias
            && super::cuda::add_bias(&ys, bias, gelu)?
        {
            return ys.reshape(shape);
        }
        let ys = match &self.bias {
            Some(bias) => ys.broadcast_add(&bias.to_dtype(xs.dtype())?)?,
            None => ys,
        };
        let ys = if gelu { gelu_tanh(&ys)? } else { ys };
        ys.reshape(shape)
    }

    /// Rows and shape of the result for `xs` (…, in).
    fn output_shape(&self, xs: &Tensor) -> Result<(usize, Vec<usize>)> {
        let (out_dim, in_dim) = self.weight.dims2()?;
        if xs.dim(D::Minus1)? != in_dim {
            bail!("a linear layer from {in_dim} to {out_dim} was given {:?}", xs.shape())
        }
        let mut shape = xs.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out_dim;
        }
        Ok((shape.iter().rev().skip(1).product(), shape))
    }

    /// In f32, with bias and activation applied to each block of rows before it leaves the cache.
    fn forward_cpu(&self, xs: &Tensor, gelu: bool) -> Result<Tensor> {
        let (dtype, (rows, shape)) = (xs.dtype(), self.output_shape(xs)?);
        let (out_dim, in_dim) = self.weight.dims2()?;
        let f32_contiguous = |xs: &Tensor| xs.to_dtype(DType::F32)?.contiguous();
        let (xs, (weight, strides)) = (f32_contiguous(xs)?, self.weight_cpu()?);
        let bias = self.bias.as_ref().map(f32_contiguous).transpose()?;
        let (xs, weight) = (cpu::Values::new(&xs), cpu::Values::new(&weight));
        let bias = bias.as_ref().map(cpu::Values::new);
        let (xs, weight) = (xs.contiguous()?, weight.contiguous()?);
        let bias = bias.as_ref().map(|bias| bias.contiguous()).transpose()?;

        let lhs = Matrix { values: xs, row_stride: in_dim, col_stride: 1 };
        let rhs = Matrix { values: weight, row_stride: strides.0, col_stride: strides.1 };
        let parallel = rows * in_dim * out_dim >= MIN_PARALLEL;
        // SAFETY: the product writes every element of (rows, out_dim).
        let ys = unsafe {
            cpu::build(shape, |out| {
                if in_dim == 0 {
                    bail!("a linear layer without inputs")
                }
                cpu::gemm((rows, out_dim, in_dim), (out, out_dim), (lhs, rhs), 1.0, false, parallel);
                if bias.is_some() || gelu {
                    cpu::for_rows(out, out_dim, |_, rows| finish(rows, bias.unwrap_or(&[]), gelu, out_dim));
                }
                Ok(())
            })?
        };
        ys.to_dtype(dtype)
    }

    /// The weight as (in, out) in f32, and its strides.
    fn weight_cpu(&self) -> Result<(Tensor, (usize, usize))> {
        let (out_dim, in_dim) = self.weight.dims2()?;
        if self.weight.elem_count() > MAX_TRANSPOSED {
            return Ok((self.weight.to_dtype(DType::F32)?.contiguous()?, (1, in_dim)));
        }
        let transposed = match self.transposed.get() {
            Some(transposed) => transposed,
            None => {
                let transposed = self.weight.t()?.to_dtype(DType::F32)?.contiguous()?;
                self.transposed.get_or_init(|| transposed)
            }
        };
        Ok((transposed.clone(), (out_dim, 1)))
    }
}

/// Adds the bias, unless it is empty, to rows of `dim` products, and applies GELU where `gelu` says so.
fn finish(rows: &mut [MaybeUninit<f32>], bias: &[f32], gelu: bool, dim: usize) {
    // SAFETY: the product has written every element of these rows.
    let rows = unsafe { std::slice::from_raw_parts_mut(rows.as_mut_ptr().cast::<f32>(), rows.len()) };
    cpu::vectorized(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(dim) {
                match (bias.is_empty(), gelu) {
                    (false, true) => {
                        row.iter_mut().zip(bias).for_each(|(y, b)| *y = gelu_tanh_scalar(*y + b))
                    }
                    (false, false) => row.iter_mut().zip(bias).for_each(|(y, b)| *y += b),
                    (true, _) => row.iter_mut().for_each(|y| *y = gelu_tanh_scalar(*y)),
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn randn(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    fn assert_close(actual: &Tensor, expected: &Tensor, tolerance: f32) {
        assert_eq!((actual.dims(), actual.dtype()), (expected.dims(), expected.dtype()));
        let error = (actual - expected).unwrap().to_dtype(DType::F32).unwrap();
        let error = error.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(error < tolerance, "{error}");
    }

    #[test]
    fn the_kernel_equals_the_composition() {
        // One row, one output, sizes that fill no vector, one that runs on all threads, and a weight that is not
        // kept transposed.
        for (shape, out_dim) in
            [(&[2, 1050][..], 1001), (&[1, 7], 1), (&[3, 5], 33), (&[2, 3, 4, 9], 6), (&[1, 300, 70], 130)]
        {
            let xs = randn(shape);
            let in_dim = *shape.last().unwrap();
            for bias in [None, Some(randn(&[out_dim]))] {
                let linear = Linear::from_parts(randn(&[out_dim, in_dim]), bias);
                let expected = kernels::plainly(|| linear.forward(&xs)).unwrap();
                assert_close(&linear.forward(&xs).unwrap(), &expected, 1e-3);
                let expected = expected.gelu().unwrap();
                assert_close(&linear.forward_gelu_tanh(&xs).unwrap(), &expected, 1e-3);
            }
        }
    }

    #[test]
    fn follows_strides_and_keeps_the_dtype() {
        let linear = Linear::from_parts(randn(&[6, 4]), Some(randn(&[6])));
        let xs = randn(&[4, 5]).t().unwrap();
        let expected = linear.forward(&xs.contiguous().unwrap()).unwrap();
        assert_close(&linear.forward(&xs).unwrap(), &expected, 1e-6);
        let rounded = linear.forward(&xs.to_dtype(DType::BF16).unwrap()).unwrap();
        assert_close(&rounded, &expected.to_dtype(DType::BF16).unwrap(), 0.2);
        assert!(linear.forward(&randn(&[2, 5])).unwrap_err().to_string().contains("from 4 to 6"));
    }
}
