//! Whether a device computes what the processor computes in f32: kernel by kernel, network by network, and a whole
//! small video; and, where they are at hand, what the reference computed.
//!
//! On the processor itself it is its kernels that are compared with candle's operations, and bf16 with f32.

mod goldens;
mod networks;
mod operations;

use std::path::Path;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng, rngs::StdRng};
use talkie::nn::kernels;
use talkie::weights::Weights;

use super::SEED;
use crate::job::JobError;

/// How far f32 may be off, as the tests hold the processor to the reference.
const EXACT: f64 = 1e-4;
/// How far bf16 may be off. The same goes for the convolutions of a GPU in f32, whose factors it rounds to TF32.
const ROUNDED: f64 = 3e-2;

/// What one comparison found.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What was computed.
    pub name: String,
    /// In which dtype.
    pub dtype: DType,
    /// The largest difference, relative to the largest expected value.
    pub error: f64,
    /// How large it may be.
    pub tolerance: f64,
}

impl Comparison {
    /// Whether the difference is small enough.
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// Told of each comparison as soon as it is made.
pub type Report<'a> = dyn FnMut(&Comparison) -> Result<(), JobError> + 'a;

/// Makes every comparison on `device`; with `goldens`, a folder as `tests/golden`, also those with the reference.
///
/// # Errors
/// What a network or `report` returns. A difference is no error.
pub fn run(device: &Device, goldens: Option<&Path>, report: &mut Report) -> Result<(), JobError> {
    let bench = Bench { device };
    operations::run(&bench, report)?;
    networks::run(&bench, report)?;
    match goldens {
        Some(folder) => goldens::run(&bench, folder, report),
        None => Ok(()),
    }
}

/// One way of computing.
#[derive(Clone, Copy)]
struct Way {
    dtype: DType,
    plain: bool,
}

/// Compares ways of computing on one device.
struct Bench<'a> {
    device: &'a Device,
}

impl Bench<'_> {
    /// bf16 and f32 by the kernels. On the processor, whose kernels for f32 are what is compared with, f32 is computed
    /// by candle's operations.
    fn ways(&self) -> [Way; 2] {
        let plain = self.device.is_cpu();
        [Way { dtype: DType::BF16, plain: false }, Way { dtype: DType::F32, plain }]
    }

    /// Compares what `compute` makes of a dtype and device in each of `ways` with what it makes in f32 on the
    /// processor. `tolerance` is that of f32; bf16 has its own.
    fn compare(
        &self,
        name: &str,
        ways: &[Way],
        tolerance: f64,
        compute: impl Fn(DType, &Device) -> talkie::Result<Tensor>,
        report: &mut Report,
    ) -> Result<(), JobError> {
        let expected = compute(DType::F32, &Device::Cpu)?;
        for Way { dtype, plain } in ways.iter().copied() {
            let compute = || compute(dtype, self.device);
            let found = if plain { kernels::plainly(compute) } else { compute() }?;
            let error = relative_error(&found, &expected)?;
            let tolerance = if dtype == DType::F32 { tolerance } else { ROUNDED };
            let name = format!("{name}{}", if plain { ", plain" } else { "" });
            report(&Comparison { name, dtype, error, tolerance })?;
        }
        Ok(())
    }

    /// The tolerance of f32 where convolutions are in it.
    fn with_convolutions(&self) -> f64 {
        if self.device.is_cpu() { EXACT } else { ROUNDED }
    }
}

/// Values of unit variance, the same for the same seed.
fn drawn(seed: u64, shape: &[usize]) -> talkie::Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let most = 3f32.sqrt();
    let values: Vec<f32> =
        (0..shape.iter().product::<usize>()).map(|_| rng.random_range(-most..most)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// [`drawn`] values, rounded to bf16 so that every way computes with the same, in a dtype on a device.
fn input(seed: u64, shape: &[usize], dtype: DType, device: &Device) -> talkie::Result<Tensor> {
    Ok(drawn(seed, shape)?.to_dtype(DType::BF16)?.to_device(device)?.to_dtype(dtype)?)
}

/// Random weights, rounded to bf16 so that every way computes with the same.
fn weights(dtype: DType, device: &Device) -> VarBuilder<'static> {
    let drawn = Weights::random(SEED).var_builder(DType::BF16, device);
    VarBuilder::from_backend(Box::new(Rounded(drawn)), dtype, device.clone())
}

/// T5 does not divide its attention by the root of a head's 64 channels: the weights of its queries begin as much
/// smaller. Otherwise the softmax takes one key almost alone, and rounding decides which.
const T5_QUERIES: f64 = 8.0;

/// Tensors as they are in bf16, in whatever dtype they are asked for.
struct Rounded(VarBuilder<'static>);

impl SimpleBackend for Rounded {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        hints: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let drawn = self.0.get_with_hints_dtype(shape, name, hints, DType::BF16)?;
        let drawn = match name.ends_with(".attn.q.weight") {
            true => (drawn / T5_QUERIES)?,
            false => drawn,
        };
        drawn.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.0.get_unchecked_dtype(name, DType::BF16)?.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

/// The largest difference of `found` from `expected`, relative to the largest value of `expected`; infinite where
/// one is not a number.
fn relative_error(found: &Tensor, expected: &Tensor) -> talkie::Result<f64> {
    let values = |xs: &Tensor| -> talkie::Result<Vec<f64>> {
        Ok(xs.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
    };
    if found.dims() != expected.dims() {
        return Ok(f64::INFINITY);
    }
    let (found, expected) = (values(found)?, values(expected)?);
    let largest = expected.iter().fold(0f64, |most, value| most.max(value.abs()));
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0f64, |most, d| if d.is_nan() { f64::INFINITY } else { most.max(d) });
    Ok(worst / (largest + 1e-12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_relative_and_never_hidden() {
        let error = |a: &[f32], b: &[f32]| {
            let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
            relative_error(&tensor(a), &tensor(b)).unwrap()
        };
        assert!((error(&[1.0, 3.0], &[1.0, 4.0]) - 0.25).abs() < 1e-9);
        assert_eq!(error(&[1.0, f32::NAN], &[1.0, 4.0]), f64::INFINITY);
        assert_eq!(error(&[1.0], &[1.0, 4.0]), f64::INFINITY, "another shape");
        let comparison =
            |error| Comparison { name: String::new(), dtype: DType::F32, error, tolerance: 1e-4 };
        assert!(comparison(1e-5).holds() && !comparison(1e-3).holds() && !comparison(f64::NAN).holds());
    }

    #[test]
    fn the_processor_agrees_with_itself_and_with_the_reference() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        let mut found = Vec::new();
        let mut report = |comparison: &Comparison| {
            found.push(comparison.clone());
            Ok(())
        };
        run(&Device::Cpu, Some(&goldens), &mut report).unwrap();
        let wrong: Vec<_> = found.iter().filter(|comparison| !comparison.holds()).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        for part in
            ["attention", "convolution", "DiT", "UMT5", "CLIP", "wav2vec2", "VAE", "video", "reference: VAE"]
        {
            let of_part = |comparison: &&Comparison| comparison.name.starts_with(part);
            let errors: Vec<_> = found.iter().filter(of_part).map(|comparison| comparison.error).collect();
            assert!(errors.iter().any(|&error| error > 0.0), "{part}: nothing was compared with another way");
        }
    }

    #[test]
    fn a_wrong_result_is_reported_and_no_way_is_left_out() {
        let bench = Bench { device: &Device::Cpu };
        let mut found = Vec::new();
        let mut report = |comparison: &Comparison| {
            found.push((comparison.name.clone(), comparison.dtype, comparison.holds()));
            Ok(())
        };
        // What is asked for in bf16 is off by a tenth.
        let compute = |dtype: DType, device: &Device| {
            let factor = if dtype == DType::BF16 { 1.1 } else { 1.0 };
            Ok((input(1, &[4, 4], dtype, device)? * factor)?)
        };
        bench.compare("doubled", &bench.ways(), EXACT, compute, &mut report).unwrap();
        assert_eq!(
            found,
            [("doubled".into(), DType::BF16, false), ("doubled, plain".into(), DType::F32, true)]
        );
    }
}
