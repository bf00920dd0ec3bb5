//! How much there is to compute: matrix products, attentions and convolutions note what they take at the least, and a
//! benchmark adds it up. Outside of [`count`], noting costs one thread-local read.

use std::cell::RefCell;

use candle_core::{Result, Tensor};

thread_local! {
    static NOTED: RefCell<Option<Vec<Operation>>> = const { RefCell::new(None) };
}

/// What one operation takes, however it is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operation {
    /// Multiplications and additions.
    pub flops: f64,
    /// What it reads and writes, every tensor once.
    pub bytes: f64,
}

/// Notes an operation of `flops` on `tensors`, when a [`count`] is running on this thread.
pub(super) fn note(flops: impl FnOnce() -> Result<usize>, tensors: &[&Tensor]) -> Result<()> {
    NOTED.with_borrow_mut(|noted| {
        if let Some(noted) = noted {
            let bytes: usize = tensors.iter().map(|xs| xs.elem_count() * xs.dtype().size_in_bytes()).sum();
            noted.push(Operation { flops: flops()? as f64, bytes: bytes as f64 });
        }
        Ok(())
    })
}

/// Runs `f` and returns what it noted on this thread beside its result.
pub fn count<T>(f: impl FnOnce() -> T) -> (T, Vec<Operation>) {
    NOTED.with_borrow_mut(|noted| *noted = Some(Vec::new()));
    let out = f();
    (out, NOTED.with_borrow_mut(Option::take).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::nn::{Conv3d, Linear, Mask, Padding2d, attention};

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn products_attentions_and_convolutions_are_counted_once_each() {
        let linear = Linear::from_parts(zeros(&[7, 5]), None);
        let conv = Conv3d::from_parts(zeros(&[4, 2, 1, 3, 3]), None, (1, 1, 1), Padding2d::same(1));
        let (q, k) = (zeros(&[1, 3, 2, 8]), zeros(&[1, 9, 2, 8]));
        let (done, operations) = count(|| -> Result<()> {
            linear.forward_gelu_tanh(&zeros(&[2, 3, 5]))?;
            linear.forward_gelu_tanh(&zeros(&[6, 5]).to_dtype(DType::BF16)?)?;
            attention(&q, &k, &k, 1.0, &Mask::None)?;
            conv.forward(&zeros(&[1, 2, 6, 5, 2]))?;
            Ok(())
        });
        done.unwrap();
        let flops: Vec<_> = operations.iter().map(|operation| operation.flops).collect();
        // 2 · 6 rows · 5 · 7; two products of 2 · 3 · 9 · 8 for two heads; 2 · 2 · 30 pixels · 9 taps · 2 · 4.
        assert_eq!(flops, [420.0, 420.0, 1728.0, 8640.0]);
        assert_eq!(operations[0].bytes, 4.0 * (30 + 35 + 42) as f64);
        assert_eq!(operations[1].bytes, (2 * 30 + 4 * 35 + 2 * 42) as f64);
        assert_eq!(operations[2].bytes, 4.0 * (48 + 144 + 144 + 48) as f64);
        assert!(count(|| ()).1.is_empty());
    }
}
