//! What the CPU kernels share: the f32 values of tensors, output vectors, parallel rows, matrix products, and
//! functions that the compiler turns into vector instructions inside of [`vectorized`].

use std::mem::MaybeUninit;
use std::ops::Deref;

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::kernels;

/// Elements that one thread works on between two looks at the queue.
const CHUNK: usize = 1 << 15;

/// Whether all of `tensors` are f32 on the CPU and plain kernels are not asked for: then a kernel runs, else its
/// composition of candle's operations.
pub(super) fn runs_on(tensors: &[&Tensor]) -> bool {
    !kernels::are_plain() && tensors.iter().all(|xs| xs.device().is_cpu() && xs.dtype() == DType::F32)
}

/// The values of a tensor for which [`runs_on`] holds.
pub(super) struct Values<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> Values<'a> {
    pub fn new(xs: &'a Tensor) -> Self {
        let (storage, layout) = xs.storage_and_layout();
        Self { storage: Box::new(storage), layout }
    }

    /// All values, in order; an error when they are not adjacent.
    pub fn contiguous(&self) -> Result<&[f32]> {
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(&self.buffer()?[start..end]),
            None => bail!("a kernel was given a strided tensor: {:?}", self.layout),
        }
    }

    /// The values from the first one on, and the strides of the dimensions in them.
    pub fn strided(&self) -> Result<(&[f32], &[usize])> {
        Ok((&self.buffer()?[self.layout.start_offset()..], self.layout.stride()))
    }

    fn buffer(&self) -> Result<&[f32]> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(values),
            _ => bail!("a CPU kernel for f32 was given another tensor"),
        }
    }
}

/// A tensor of `shape` whose values `fill` writes. Saves the pass over memory that zeros would cost.
///
/// # Safety
/// `fill` must write every element.
pub(super) unsafe fn build(
    shape: impl Into<Shape>,
    fill: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<()>,
) -> Result<Tensor> {
    let shape = shape.into();
    let len = shape.elem_count();
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len])?;
    // SAFETY: the capacity is at least `len`, and `fill` wrote that many elements, as the caller promises.
    unsafe { values.set_len(len) };
    Tensor::from_vec(values, shape, &candle_core::Device::Cpu)
}

/// Calls `f` with the number of the first row and a chunk of whole rows of `out`, for all rows of `row_len`
/// elements, on all threads when that pays.
pub(super) fn for_rows<T: Send>(out: &mut [T], row_len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if row_len == 0 {
        return;
    }
    let rows = (CHUNK / row_len).max(1);
    if out.len() <= 2 * CHUNK {
        return f(0, out);
    }
    out.par_chunks_mut(rows * row_len).enumerate().for_each(|(i, chunk)| f(i * rows, chunk));
}

/// Runs `f` with the widest vector instructions of this machine. What `f` calls must be `#[inline(always)]`.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// One operand of [`gemm`]: values and the strides of rows and columns in them.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl Matrix<'_> {
    fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.values.len()
    }
}

/// `dst = factor · lhs · rhs`, plus `dst` where `accumulate` is set: `lhs` (m, k), `rhs` (k, n), and `dst`
/// (m, n) with adjacent columns and rows `dst_stride` apart. It runs on this thread, or on all of them when
/// `parallel` is set. Without `accumulate`, the elements of the m × n matrix are written only.
pub(super) fn gemm(
    (m, n, k): (usize, usize, usize),
    dst: (&mut [MaybeUninit<f32>], usize),
    (lhs, rhs): (Matrix, Matrix),
    factor: f32,
    accumulate: bool,
    parallel: bool,
) {
    let (dst, dst_stride) = dst;
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        (m - 1) * dst_stride + n <= dst.len() && n <= dst_stride,
        "the product does not fit its destination"
    );
    assert!(lhs.covers(m, k) && rhs.covers(k, n), "a factor is smaller than its dimensions");
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the assertions above keep every access inside of the three slices, `dst` is borrowed exclusively,
    // and it is read only where `accumulate` says that it holds values.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr().cast::<f32>(),
            1,
            dst_stride as isize,
            accumulate,
            lhs.values.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.values.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1f32,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Sums `f(x)` over `xs` in independent lanes.
#[inline(always)]
pub(super) fn sum(xs: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, tail) = xs.as_chunks::<64>();
    let mut lanes = [0f32; 64];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    lanes.iter().sum::<f32>() + tail.iter().map(|x| f(*x)).sum::<f32>()
}

/// The largest of `xs`, −∞ when there is none.
#[inline(always)]
pub(super) fn max(xs: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, tail) = xs.as_chunks::<64>();
    let mut lanes = [f32::NEG_INFINITY; 64];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *x);
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// e^x within about 2 ulp (Cephes' `expf`), for x clamped to ±87.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding 1.5 · 2²³ leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n times the first is exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r + 1.0);
    y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_libm_one() {
        let xs: Vec<f32> = (-87_000..=87_000).map(|i| i as f32 / 1000.0).collect();
        let worst = vectorized(|| {
            xs.iter().map(|&x| (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs()).fold(0.0, f64::max)
        });
        assert!(worst < 3e-7, "{worst:e}");
        assert!(exp(-1e30) < 1e-37 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_include_the_tail() {
        for len in [0, 1, 63, 64, 65, 200] {
            let xs: Vec<f32> = (0..len).map(|i| i as f32 - 500.0).collect();
            assert_eq!(sum(&xs, |x| x), xs.iter().sum::<f32>());
            assert_eq!(max(&xs), xs.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
    }

    #[test]
    fn values_follow_offsets_and_refuse_strides() {
        let xs = Tensor::arange(0f32, 12., &candle_core::Device::Cpu).unwrap().reshape((3, 4)).unwrap();
        let row = xs.narrow(0, 1, 1).unwrap();
        assert_eq!(Values::new(&row).contiguous().unwrap(), [4., 5., 6., 7.]);
        let column = xs.narrow(1, 1, 1).unwrap();
        assert!(Values::new(&column).contiguous().is_err());
        assert_eq!(Values::new(&column).strided().unwrap().0[..5], [1., 2., 3., 4., 5.]);
    }
}
