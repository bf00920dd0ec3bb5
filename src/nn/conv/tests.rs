//! The CPU kernel against stock operations, and its own identities.

use candle_core::{DType, Device, Result, Tensor};
use pulp::Arch;

use super::packed::{Geometry, Packed};
use super::{Conv1d, Conv2d, Conv3d, Input, Padding2d, forward_packed, portable};

fn randn(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// Largest difference relative to the largest expected value.
fn error(actual: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(actual.dims(), expected.dims());
    let largest =
        |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    largest(&(actual - expected).unwrap()) / largest(expected).max(1e-12)
}

/// The instruction sets of this machine, from the widest to none.
fn archs() -> Vec<Arch> {
    let mut archs = vec![Arch::new(), Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
    archs
}

/// Checks one convolution of `xs` (B, T, H, W, in) by `weight` on every instruction set.
fn check(xs: &[usize], weight: &[usize], geometry: Geometry) {
    let (xs, weight, bias) = (randn(xs), randn(weight), randn(&weight[..1]));
    let expected = portable::conv(&xs, &weight, Some(&bias), geometry).unwrap();
    for arch in archs() {
        let packed = Packed::for_arch(&weight, Some(&bias), geometry, arch).unwrap();
        let actual = forward_packed(&packed, &Input::of(&xs)).unwrap();
        let error = error(&actual, &expected);
        let (xs, weight) = (xs.shape(), weight.shape());
        assert!(error < 1e-5, "{xs:?} by {weight:?}, {geometry:?} on {arch:?}: {error:e}");
    }
}

#[test]
fn equals_stock_operations_at_every_width_of_channels() {
    // 3 … 8 channels share registers, 17 and 40 leave lanes empty, 100 takes several panels.
    for (channels_in, channels_out) in [(3, 8), (8, 3), (4, 4), (16, 16), (5, 17), (20, 40), (7, 100)] {
        check(
            &[1, 4, 6, 7, channels_in],
            &[channels_out, channels_in, 3, 3, 3],
            Geometry::new((1, 1, 1), Padding2d::same(1)),
        );
        check(
            &[2, 2, 5, 3, channels_in],
            &[channels_out, channels_in, 1, 1, 1],
            Geometry::new((1, 1, 1), Padding2d::default()),
        );
    }
}

#[test]
fn equals_stock_operations_at_stride_two_and_uneven_padding() {
    let right_and_bottom = Padding2d { top: 0, bottom: 1, left: 0, right: 1 };
    for size in [2, 5, 8, 17] {
        check(&[1, 2, size, size + 1, 6], &[12, 6, 1, 3, 3], Geometry::new((1, 2, 2), right_and_bottom));
        check(&[1, 5, 3, size, 6], &[6, 6, 3, 1, 1], Geometry::new((2, 1, 1), Padding2d::default()));
    }
    check(&[2, 1, 1, 1, 3], &[4, 3, 1, 3, 3], Geometry::new((1, 1, 1), Padding2d::same(1)));
}

#[test]
fn equals_stock_operations_where_one_frame_needs_many_tiles_and_threads() {
    check(&[1, 3, 70, 50, 32], &[48, 32, 3, 3, 3], Geometry::new((1, 1, 1), Padding2d::same(1)));
    check(&[1, 1, 9, 300, 64], &[24, 64, 1, 3, 3], Geometry::new((1, 2, 2), Padding2d::same(1)));
    check(&[1, 1, 6, 6, 400], &[50, 400, 1, 3, 3], Geometry::new((1, 1, 1), Padding2d::same(1)));
}

#[test]
fn doubled_images_need_not_be_made() {
    let doubled = Geometry { doubled: true, ..Geometry::new((1, 1, 1), Padding2d::same(1)) };
    for (channels_in, channels_out) in [(8, 4), (16, 8), (6, 3), (32, 16), (10, 40), (40, 100)] {
        check(&[2, 2, 5, 7, channels_in], &[channels_out, channels_in, 1, 3, 3], doubled);
        check(&[1, 1, 1, 1, channels_in], &[channels_out, channels_in, 1, 3, 3], doubled);
    }
    check(&[1, 2, 60, 40, 32], &[16, 32, 1, 3, 3], doubled);
    check(&[1, 1, 1, 300, 32], &[8, 32, 1, 3, 3], doubled);
}

#[test]
fn one_value_seen_as_a_weight_takes_no_memory_and_computes_the_same() -> Result<()> {
    let phantom = Tensor::full(0.5f32, (), &Device::Cpu)?.broadcast_as((64, 64, 3, 3))?;
    let conv = Conv2d::from_parts(phantom.clone(), None, 1, Padding2d::same(1))?;
    assert!(matches!(conv.0.weights, super::Weights::Stock { .. }));
    let packed = Conv2d::from_parts(phantom.force_contiguous()?, None, 1, Padding2d::same(1))?;
    let xs = randn(&[1, 4, 5, 64]);
    assert!(error(&conv.forward(&xs)?, &packed.forward(&xs)?) < 1e-5);
    Ok(())
}

#[test]
fn one_dimensional_layers_are_exact_for_any_length() {
    let flat = |stride, groups| Geometry { groups, ..Geometry::new((1, 1, stride), Padding2d::default()) };
    for length in [10, 11, 14, 15, 400, 1601] {
        check(&[1, 1, 1, length, 1], &[64, 1, 1, 1, 10], flat(5, 1));
        check(&[2, 1, 1, length, 24], &[20, 24, 1, 1, 3], flat(2, 1));
        check(&[1, 1, 1, length, 24], &[12, 6, 1, 1, 8], flat(1, 4));
    }
    check(&[1, 1, 1, 40_000, 1], &[128, 1, 1, 1, 10], flat(5, 1));
}

#[test]
fn conv1d_has_the_shape_of_its_documentation() -> Result<()> {
    let (xs, weight, bias) = (randn(&[2, 21, 6]), randn(&[4, 3, 5]), randn(&[4]));
    let ys = Conv1d::from_parts(weight.clone(), Some(bias.clone()), 2, 2).forward(&xs)?;
    let expected = xs.transpose(1, 2)?.contiguous()?.conv1d(&weight, 0, 2, 1, 2)?;
    let expected = expected.transpose(1, 2)?.broadcast_add(&bias)?.contiguous()?;
    assert_eq!(ys.dims(), [2, 9, 4]);
    assert!(error(&ys, &expected) < 1e-5);
    Ok(())
}

#[test]
fn causal_chunks_equal_the_whole() -> Result<()> {
    let conv = Conv3d::from_parts(randn(&[9, 5, 3, 3, 3]), Some(randn(&[9])), (1, 1, 1), Padding2d::same(1));
    let (xs, residual) = (randn(&[1, 6, 4, 5, 5]), randn(&[1, 6, 4, 5, 9]));
    let whole = conv.forward_causal(&xs, None, Some(&residual))?;
    let first = conv.forward_causal(&xs.narrow(1, 0, 1)?, None, Some(&residual.narrow(1, 0, 1)?))?;
    let second = conv.forward_causal(
        &xs.narrow(1, 1, 2)?,
        Some(&xs.narrow(1, 0, 1)?),
        Some(&residual.narrow(1, 1, 2)?),
    )?;
    let third = conv.forward_causal(
        &xs.narrow(1, 3, 3)?,
        Some(&xs.narrow(1, 1, 2)?),
        Some(&residual.narrow(1, 3, 3)?),
    )?;
    assert!(error(&Tensor::cat(&[first, second, third], 1)?, &whole) < 1e-6);
    // And the whole is what zeros in front of it give.
    let padded = xs.pad_with_zeros(1, 2, 0)?;
    assert!(error(&(conv.forward(&padded)? + residual)?, &whole) < 1e-6);
    Ok(())
}

#[test]
fn an_all_zero_past_leaves_the_bias() -> Result<()> {
    let conv =
        Conv3d::from_parts(randn(&[5, 2, 3, 1, 1]), Some(randn(&[5])), (1, 1, 1), Padding2d::default());
    let xs = Tensor::zeros((1, 2, 3, 3, 2), DType::F32, &Device::Cpu)?;
    let ys = conv.forward_causal(&xs, None, None)?;
    let one = ys.narrow(1, 0, 1)?.narrow(2, 0, 1)?.narrow(3, 0, 1)?;
    assert!(error(&ys, &one.broadcast_as(ys.shape())?.contiguous()?) == 0.0);
    Ok(())
}

#[test]
fn half_precision_is_computed_in_f32_and_rounded_once() -> Result<()> {
    let (xs, weight) = (randn(&[1, 4, 4, 8]).to_dtype(DType::BF16)?, randn(&[8, 8, 3, 3]));
    let conv = Conv2d::from_parts(weight, None, 1, Padding2d::same(1))?;
    let ys = conv.forward(&xs)?;
    assert_eq!(ys.dtype(), DType::BF16);
    let expected = conv.forward(&xs.to_dtype(DType::F32)?)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    assert!(error(&ys.to_dtype(DType::F32)?, &expected) == 0.0);
    Ok(())
}

#[test]
fn views_are_read_in_their_own_order() -> Result<()> {
    let conv = Conv2d::from_parts(randn(&[6, 4, 3, 3]), None, 1, Padding2d::same(1))?;
    let xs = randn(&[3, 5, 7, 4]);
    let view = xs.narrow(0, 1, 2)?.transpose(1, 2)?;
    assert!(error(&conv.forward(&view)?, &conv.forward(&view.force_contiguous()?)?) == 0.0);
    Ok(())
}

#[test]
fn wrong_shapes_are_errors_that_say_so() {
    let conv = Conv2d::from_parts(randn(&[6, 4, 3, 3]), None, 1, Padding2d::default()).unwrap();
    let message = conv.forward(&randn(&[1, 5, 5, 3])).unwrap_err().to_string();
    assert!(message.contains("3 channels, expected 4"), "{message}");
    let message = conv.forward(&randn(&[1, 2, 5, 4])).unwrap_err().to_string();
    assert!(message.contains("smaller than the kernel"), "{message}");
    let bad = Conv1d::from_parts(randn(&[6, 4]), None, 1, 1);
    assert!(bad.forward(&randn(&[1, 5, 4])).is_err());
}
