//! What the machine can do at most, measured beside what is asked of it: a large matrix product for arithmetic, a copy
//! for memory.

use std::time::Instant;

use candle_core::{Device, Tensor};
use talkie::nn::work::Operation;
use talkie::{Result, device};

use super::randn;

/// Rows and columns of the matrices, and values that are copied; a GPU needs more of both to show what it can do.
const ON_CPU: (usize, usize) = (1024, 1 << 25);
const ON_GPU: (usize, usize) = (8192, 1 << 29);
/// Runs of each, of which the fastest counts.
const RUNS: usize = 10;

/// The most that a device was seen to do.
#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// Multiplications and additions a second, in the dtype that networks compute in.
    pub flops: f64,
    /// Bytes read and written a second.
    pub bytes: f64,
}

impl Roofline {
    /// Measures `on`.
    ///
    /// # Errors
    /// What the device returns.
    pub fn measure(on: &Device) -> Result<Self> {
        let (side, values) = if on.is_cpu() { ON_CPU } else { ON_GPU };
        let dtype = device::compute_dtype(on);
        // Values as networks have them: zeros would draw less power, and so run faster.
        let [a, b] = [randn((side, side), on)?.to_dtype(dtype)?, randn((side, side), on)?.to_dtype(dtype)?];
        let product = fastest(on, || a.matmul(&b))?;
        let xs = Tensor::ones(values, dtype, on)?;
        let copy = fastest(on, || xs.copy())?;
        Ok(Self {
            flops: 2.0 * (side as f64).powi(3) / product,
            bytes: 2.0 * (values * dtype.size_in_bytes()) as f64 / copy,
        })
    }

    /// The least time that `operations` could take here, one after the other.
    pub fn seconds(&self, operations: &[Operation]) -> f64 {
        operations.iter().map(|done| (done.flops / self.flops).max(done.bytes / self.bytes)).sum()
    }
}

/// Seconds of the fastest run after one that is not counted.
fn fastest(on: &Device, run: impl Fn() -> candle_core::Result<Tensor>) -> Result<f64> {
    let once = || -> Result<f64> {
        let start = Instant::now();
        // What was made is freed after the clock has stopped.
        let _made = run()?;
        on.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    once()?;
    let times = (0..RUNS).map(|_| once()).collect::<Result<Vec<_>>>()?;
    Ok(times.into_iter().fold(f64::INFINITY, f64::min))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_is_bound_by_what_takes_longer() {
        let roofline = Roofline { flops: 100.0, bytes: 10.0 };
        let operations = [Operation { flops: 200.0, bytes: 1.0 }, Operation { flops: 1.0, bytes: 30.0 }];
        assert_eq!(roofline.seconds(&operations), 5.0);
        assert_eq!(roofline.seconds(&[]), 0.0);
    }

    #[test]
    fn a_processor_has_a_roofline() {
        let roofline = Roofline::measure(&Device::Cpu).unwrap();
        assert!(roofline.flops > 1e8 && roofline.bytes > 1e7, "{roofline:?}");
    }
}
