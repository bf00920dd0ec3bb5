//! The one attention entry point.

use std::mem::MaybeUninit;

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Matrix, Values};
use super::{kernels, work};

/// Which keys a query may see.
#[derive(Clone, Debug)]
pub enum Mask {
    /// All of them; the only value that lets a flash kernel run.
    None,
    /// A bias added to the scaled scores before the softmax, (1 or B, N, Lq, Lk), f32.
    Bias(Tensor),
}

/// Scores that the composed attention holds at once, over batch and heads: 256 MB.
const MAX_SCORES: usize = 1 << 26;
/// Rows and columns of scores that one thread of the CPU kernel holds at once: 256 KB.
const BLOCK_ROWS: usize = 128;
const BLOCK_KEYS: usize = 512;
/// Small problems are cut into blocks of no fewer rows than this.
const MIN_ROWS: usize = 16;
/// The CPU kernel runs on one thread for fewer scores than this: waking the others costs more.
const MIN_PARALLEL: usize = 1 << 14;

/// Softmax attention of queries `q` (B, Lq, N, D) over keys `k` (B, Lk, N, D) and values `v` (B, Lk, N, Dv),
/// scores multiplied by `scale`: (B, Lq, N, Dv) in the dtype of `q`. Softmax statistics are f32, and the scores
/// of all queries and keys never exist at once.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let (batch, q_len, heads, dim) = q.dims4()?;
    let (k_batch, k_len, k_heads, k_dim) = k.dims4()?;
    let (v_batch, v_len, v_heads, _) = v.dims4()?;
    if (k_batch, k_heads, k_dim) != (batch, heads, dim) || (v_batch, v_len, v_heads) != (batch, k_len, heads)
    {
        bail!("queries {:?}, keys {:?} and values {:?} do not fit", q.shape(), k.shape(), v.shape())
    }
    let bias = match mask {
        Mask::None => None,
        Mask::Bias(bias) => Some(bias.to_dtype(DType::F32)?.broadcast_as((batch, heads, q_len, k_len))?),
    };
    let rows = batch * heads * q_len;
    // The result is as large as the queries, but for values of another width.
    work::note(|| Ok(2 * rows * k_len * (dim + v.dim(3)?)), &[q, k, v, q])?;
    if q.device().is_cpu() && !kernels::are_plain() {
        return attention_cpu(q, k, v, scale, bias.as_ref())?.to_dtype(q.dtype());
    }
    #[cfg(feature = "cuda")]
    if bias.is_none()
        && let Some(found) = super::cuda::attention(q, k, v, scale)?
    {
        return Ok(found);
    }
    attention_composed(q, k, v, scale, bias.as_ref())
}

/// Attention of candle's operations, over blocks of rows.
fn attention_composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, q_len, heads, _) = q.dims4()?;
    let heads_first = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous(); // (B, N, L, D)
    let (all, k_t, v) = (heads_first(q)?, heads_first(k)?.t()?, heads_first(v)?);
    let rows = (MAX_SCORES / (batch * heads * k.dim(1)?).max(1)).clamp(1, q_len.max(1));
    let mut blocks = Vec::new();
    for start in (0..q_len).step_by(rows) {
        let len = rows.min(q_len - start);
        let mut scores = (all.narrow(2, start, len)?.contiguous()?.matmul(&k_t)? * scale)?; // (B, N, len, Lk)
        if let Some(bias) = bias {
            scores = (scores + bias.narrow(2, start, len)?)?;
        }
        let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let probs = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        blocks.push(probs.matmul(&v)?.transpose(1, 2)?.contiguous()?.to_dtype(q.dtype())?);
    }
    Tensor::cat(&blocks, 1)
}

/// Rows of (L, N, D) with the strides of L and N, D adjacent.
#[derive(Clone, Copy)]
struct Heads<'a> {
    values: &'a [f32],
    strides: (usize, usize, usize), // batch, row, head
    dim: usize,
}

impl<'a> Heads<'a> {
    fn new(values: &'a Values, dim: usize) -> Result<Self> {
        let (values, strides) = values.strided()?;
        Ok(Self { values, strides: (strides[0], strides[1], strides[2]), dim })
    }

    /// Rows from `row` on of one head.
    fn rows(&self, batch: usize, row: usize, head: usize) -> Matrix<'a> {
        let (b, l, n) = self.strides;
        Matrix { values: &self.values[batch * b + row * l + head * n..], row_stride: l, col_stride: 1 }
    }
}

/// Attention in blocks of scores that stay in the cache, with a softmax that is rescaled from block to block.
fn attention_cpu(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    let (batch, q_len, heads, dim) = q.dims4()?;
    let (k_len, v_dim) = (k.dim(1)?, v.dim(3)?);
    // Heads may be any rows of a larger tensor, as long as their channels are adjacent.
    let adjacent = |xs: &Tensor| -> Result<Tensor> {
        let xs = xs.to_dtype(DType::F32)?;
        match xs.stride()[3] == 1 {
            true => Ok(xs),
            false => xs.contiguous(),
        }
    };
    let (q, k, v) = (adjacent(q)?, adjacent(k)?, adjacent(v)?);
    let k_t = transpose_keys(&if k.stride()[1] == 0 { k.force_contiguous()? } else { k })?;
    let (q, k_t, v) = (Values::new(&q), Values::new(&k_t), Values::new(&v));
    let bias = bias.map(adjacent).transpose()?;
    let bias = bias.as_ref().map(Values::new);
    let problem = Problem {
        q: Heads::new(&q, dim)?,
        k_t: k_t.contiguous()?,
        v: Heads::new(&v, v_dim)?,
        k_len,
        heads,
        scale: scale as f32,
        bias: bias.as_ref().map(Values::strided).transpose()?,
    };
    // Small problems are cut finer, so that every thread gets some rows.
    let parallel = batch * q_len * heads * k_len >= MIN_PARALLEL;
    let share = (batch * q_len).div_ceil(2 * rayon::current_num_threads());
    let rows = if parallel { share.clamp(MIN_ROWS, BLOCK_ROWS) } else { BLOCK_ROWS };
    let row_len = heads * v_dim;
    if batch * q_len * row_len == 0 || k_len * dim == 0 {
        bail!("attention of {q_len} queries over {k_len} keys of {dim} channels")
    }
    // SAFETY: every block writes all rows and heads of its chunk of the output.
    unsafe {
        cpu::build((batch, q_len, heads, v_dim), |out| {
            let blocks = out.chunks_mut(q_len * row_len).enumerate().flat_map(|(b, out)| {
                out.chunks_mut(rows * row_len).enumerate().map(move |(i, out)| (b, i * rows, out))
            });
            let scratch = || Scratch::new(rows.min(q_len), k_len.min(BLOCK_KEYS), v_dim);
            if parallel {
                let blocks: Vec<_> = blocks.collect();
                blocks.into_par_iter().for_each_init(scratch, |scratch, (b, row, out)| {
                    problem.block(b, row, scratch, out);
                });
            } else {
                let mut scratch = scratch();
                blocks.for_each(|(b, row, out)| problem.block(b, row, &mut scratch, out));
            }
            Ok(())
        })
    }
}

/// Keys (B, Lk, N, D) as (B, N, D, Lk): the matrix product is a third faster for it, and every block of rows uses
/// them again.
fn transpose_keys(k: &Tensor) -> Result<Tensor> {
    /// Keys whose channels are read together, so that they are still in the cache.
    const KEYS: usize = 16;
    let (batch, len, heads, dim) = k.dims4()?;
    let values = Values::new(k);
    let keys = Heads::new(&values, dim)?;
    // SAFETY: the loops visit every channel and key of every head.
    unsafe {
        cpu::build((batch, heads, dim, len), |out| {
            cpu::for_rows(out, dim * len, |first, out| {
                for (i, out) in out.chunks_exact_mut(dim * len).enumerate() {
                    let (b, n) = ((first + i) / heads, (first + i) % heads);
                    for start in (0..len).step_by(KEYS) {
                        let Matrix { values, row_stride, .. } = keys.rows(b, start, n);
                        for (channel, out) in out.chunks_exact_mut(len).enumerate() {
                            let out = &mut out[start..len.min(start + KEYS)];
                            for (y, x) in out.iter_mut().zip(values[channel..].iter().step_by(row_stride)) {
                                y.write(*x);
                            }
                        }
                    }
                }
            });
            Ok(())
        })
    }
}

/// One thread's buffers.
struct Scratch {
    scores: Vec<f32>, // (rows, keys)
    found: Vec<f32>,  // (rows, Dv)
    max: Vec<f32>,    // (rows)
    sum: Vec<f32>,    // (rows)
    keys: usize,
}

impl Scratch {
    fn new(rows: usize, keys: usize, v_dim: usize) -> Self {
        let zeros = |len| vec![0f32; len];
        Self {
            scores: zeros(rows * keys),
            found: zeros(rows * v_dim),
            max: zeros(rows),
            sum: zeros(rows),
            keys,
        }
    }
}

/// All of one attention.
struct Problem<'a> {
    q: Heads<'a>,
    k_t: &'a [f32], // (B, N, D, Lk)
    v: Heads<'a>,
    k_len: usize,
    heads: usize,
    scale: f32,
    bias: Option<(&'a [f32], &'a [usize])>, // (B, N, Lq, Lk), with strides; keys are adjacent
}

impl Problem<'_> {
    /// All heads of the rows from `first` on that fit `out` (rows, N, Dv).
    fn block(&self, batch: usize, first: usize, scratch: &mut Scratch, out: &mut [MaybeUninit<f32>]) {
        let row_len = self.heads * self.v.dim;
        let rows = out.len() / row_len;
        for head in 0..self.heads {
            self.head(batch, first, rows, head, scratch);
            let sums = &scratch.sum[..rows];
            let found = scratch.found.chunks_exact(self.v.dim);
            for ((out, found), sum) in out.chunks_exact_mut(row_len).zip(found).zip(sums) {
                let out = &mut out[head * self.v.dim..][..self.v.dim];
                let factor = 1.0 / sum;
                for (y, x) in out.iter_mut().zip(found) {
                    y.write(x * factor);
                }
            }
        }
    }

    /// Leaves Σ e^(score − max) · v of each row in `scratch.found`, and Σ e^(score − max) in `scratch.sum`.
    fn head(&self, batch: usize, first: usize, rows: usize, head: usize, scratch: &mut Scratch) {
        let Scratch { scores, found, max, sum, keys } = scratch;
        let (keys, v_dim) = (*keys, self.v.dim);
        max[..rows].fill(f32::NEG_INFINITY);
        sum[..rows].fill(0.0);
        for start in (0..self.k_len).step_by(keys) {
            let len = keys.min(self.k_len - start);
            let (q, dim) = (self.q.rows(batch, first, head), self.q.dim);
            let k_t = &self.k_t[(batch * self.heads + head) * dim * self.k_len + start..];
            let k_t = Matrix { values: k_t, row_stride: self.k_len, col_stride: 1 };
            cpu::gemm((rows, len, dim), (as_uninit(scores), keys), (q, k_t), self.scale, false, false);
            if let Some((bias, strides)) = self.bias {
                let at = batch * strides[0] + head * strides[1] + first * strides[2] + start;
                for (i, row) in scores.chunks_exact_mut(keys).take(rows).enumerate() {
                    let bias = &bias[at + i * strides[2]..];
                    row[..len].iter_mut().zip(bias).for_each(|(s, b)| *s += b);
                }
            }
            cpu::vectorized(
                #[inline(always)]
                || {
                    let rows = scores.chunks_exact_mut(keys).zip(found.chunks_exact_mut(v_dim)).take(rows);
                    for ((row, found), (max, sum)) in rows.zip(max.iter_mut().zip(sum.iter_mut())) {
                        let row = &mut row[..len];
                        let new_max = cpu::max(row).max(*max);
                        // A row that sees no key yet has the maximum −∞, from which nothing can be subtracted.
                        let from = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
                        let rescale = if *max == f32::NEG_INFINITY { 0.0 } else { cpu::exp(*max - from) };
                        *sum = sum.mul_add(rescale, exponentials(row, from));
                        *max = new_max;
                        if start > 0 {
                            found.iter_mut().for_each(|x| *x *= rescale);
                        }
                    }
                },
            );
            let probs = Matrix { values: scores, row_stride: keys, col_stride: 1 };
            let v = self.v.rows(batch, start, head);
            cpu::gemm((rows, v_dim, len), (as_uninit(found), v_dim), (probs, v), 1.0, start > 0, false);
        }
    }
}

/// Replaces every score by e^(score − max) and returns the sum.
#[inline(always)]
fn exponentials(row: &mut [f32], max: f32) -> f32 {
    let (chunks, tail) = row.as_chunks_mut::<64>();
    let mut lanes = [0f32; 64];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = cpu::exp(*x - max);
            *lane += *x;
        }
    }
    let mut total = lanes.iter().sum::<f32>();
    for x in tail {
        *x = cpu::exp(*x - max);
        total += *x;
    }
    total
}

/// Values as a destination that is written, or added to where it holds values.
fn as_uninit(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: `MaybeUninit<f32>` has the layout of f32, and the only user, `cpu::gemm`, writes values only.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn randn(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
        let difference = (a - b).unwrap().to_dtype(DType::F32).unwrap().abs().unwrap();
        difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// (batch, queries, keys, heads, dim, dim of values): one of everything, sizes beside the block sizes, tiny
    /// heads, more keys than one block, and enough work for all threads.
    const SIZES: [(usize, usize, usize, usize, usize, usize); 6] = [
        (1, 1, 1, 1, 1, 1),
        (2, 5, 7, 3, 4, 4),
        (1, 129, 513, 2, 20, 3),
        (3, 33, 64, 4, 12, 12),
        (1, 300, 1100, 2, 32, 32),
        (2, 260, 100, 1, 17, 5),
    ];

    #[test]
    fn the_kernel_equals_the_composition_with_and_without_bias() {
        for (batch, q_len, k_len, heads, dim, v_dim) in SIZES {
            let q = randn(&[batch, q_len, heads, dim]);
            let k = randn(&[batch, k_len, heads, dim]);
            let v = randn(&[batch, k_len, heads, v_dim]);
            let shared = (randn(&[1, heads, q_len, k_len]) * 3.0).unwrap();
            for bias in [None, Some(&shared)] {
                let mask = bias.map_or(Mask::None, |bias| Mask::Bias(bias.clone()));
                let bias = bias.map(|bias| bias.broadcast_as((batch, heads, q_len, k_len)).unwrap());
                let actual = attention(&q, &k, &v, 0.7, &mask).unwrap();
                let expected = attention_composed(&q, &k, &v, 0.7, bias.as_ref()).unwrap();
                let difference = largest_difference(&actual, &expected);
                assert!(difference < 1e-5, "{q_len} × {k_len}, bias {}: {difference}", bias.is_some());
            }
        }
    }

    #[test]
    fn a_bias_may_be_of_one_key_row_for_all_queries() {
        let (q, k) = (randn(&[2, 9, 2, 8]), randn(&[2, 11, 2, 8]));
        // The last three keys are hidden, in the first batch only.
        let hidden = |b: usize, key: usize| if b == 0 && key > 7 { f32::MIN } else { 0.0 };
        let bias: Vec<f32> = (0..22).map(|i| hidden(i / 11, i % 11)).collect();
        let bias = Tensor::from_vec(bias, (2, 1, 1, 11), &Device::Cpu).unwrap();
        let actual = attention(&q, &k, &k, 0.3, &Mask::Bias(bias)).unwrap();
        let first = |x: &Tensor, keys| x.narrow(0, 0, 1).unwrap().narrow(1, 0, keys).unwrap();
        let seen = first(&k, 8);
        let expected = attention(&first(&q, 9), &seen, &seen, 0.3, &Mask::None).unwrap();
        assert!(largest_difference(&first(&actual, 9), &expected) < 1e-6);
        // A bias that is the same for all keys changes nothing.
        let actual = attention(&q, &k, &k, 0.3, &Mask::Bias(randn(&[1, 2, 9, 1]))).unwrap();
        assert!(largest_difference(&actual, &attention(&q, &k, &k, 0.3, &Mask::None).unwrap()) < 1e-6);
    }

    /// The first key for all rows, with a stride of 0.
    fn k_of_one_row(k: &Tensor) -> Tensor {
        k.narrow(1, 0, 1).unwrap().broadcast_as(k.shape()).unwrap()
    }

    #[test]
    fn heads_may_be_cut_out_of_a_larger_tensor() {
        let qkv = randn(&[1, 40, 3, 2, 6]);
        let part = |i: usize| qkv.get_on_dim(2, i).unwrap(); // (1, 40, 2, 6), strided
        let actual = attention(&part(0), &part(1), &part(2), 1.0, &Mask::None).unwrap();
        let whole = |i: usize| part(i).contiguous().unwrap();
        let expected = attention(&whole(0), &whole(1), &whole(2), 1.0, &Mask::None).unwrap();
        assert!(largest_difference(&actual, &expected) < 1e-6);
        let same = k_of_one_row(&part(1));
        let expected = attention(&part(0), &same.contiguous().unwrap(), &part(2), 1.0, &Mask::None).unwrap();
        let actual_of_same = attention(&part(0), &same, &part(2), 1.0, &Mask::None).unwrap();
        assert!(largest_difference(&actual_of_same, &expected) < 1e-6);
        let turned = part(0).t().unwrap().contiguous().unwrap().t().unwrap(); // channels not adjacent
        assert!(
            largest_difference(&attention(&turned, &part(1), &part(2), 1.0, &Mask::None).unwrap(), &actual)
                < 1e-6
        );
    }

    #[test]
    fn scores_far_apart_stay_finite_and_half_precision_keeps_its_dtype() {
        let q =
            (Tensor::eye(8, DType::F32, &Device::Cpu).unwrap().reshape((1, 8, 1, 8)).unwrap() * 1e4).unwrap();
        let out = attention(&q, &q, &q, 1.0, &Mask::None).unwrap();
        assert!(largest_difference(&out, &q) < 1e-2, "every query finds itself");
        let half = q.to_dtype(DType::BF16).unwrap();
        assert_eq!(attention(&half, &half, &half, 1.0, &Mask::None).unwrap().dtype(), DType::BF16);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (q, k) = (randn(&[1, 3, 2, 4]), randn(&[1, 5, 2, 4]));
        let refused = |q: &Tensor, k: &Tensor, v: &Tensor| attention(q, k, v, 1.0, &Mask::None).is_err();
        assert!(
            refused(&q, &randn(&[1, 5, 2, 3]), &k)
                && refused(&q, &k, &q)
                && refused(&q, &randn(&[1, 0, 2, 4]), &randn(&[1, 0, 2, 4]))
        );
        assert!(attention(&q, &k, &k, 1.0, &Mask::Bias(randn(&[1, 2, 3, 4]))).is_err());
    }
}
