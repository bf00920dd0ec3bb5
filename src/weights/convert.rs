//! Stored bytes → f32 → the dtype a network computes in, a block at a time, in parallel.

use std::sync::LazyLock;

use candle_core::{DType, Device, Shape, Tensor, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::{Error, ErrorKind, Result};

/// Elements converted at once: small enough that a block stays in a core's cache, large enough for one read of the
/// file each. A power of two, so that no block crosses a multiple of 2³² elements.
pub(super) const BLOCK: usize = 1 << 18;

/// Buffers that a thread reuses from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    /// The block's bytes as stored.
    pub(super) bytes: Vec<u8>,
}

/// Makes a tensor of `shape` and `dtype` on `device`; `fill(start, values, scratch)` writes elements `start..` as
/// f32, and is called from several threads. Each value is rounded to `dtype` once.
pub(super) fn materialize(
    shape: &Shape,
    dtype: DType,
    device: &Device,
    fill: impl Fn(usize, &mut [f32], &mut Scratch) -> Result<()> + Sync,
) -> Result<Tensor> {
    let tensor = match dtype {
        DType::F32 => collect::<f32>(shape, fill),
        DType::BF16 => collect::<bf16>(shape, fill),
        DType::F16 => collect::<f16>(shape, fill),
        other => {
            let message =
                format!("weights cannot be loaded as {}, expected f32, bf16 or f16", other.as_str());
            Err(Error::new(ErrorKind::Inference, message))
        }
    }?;
    Ok(tensor.to_device(device)?)
}

fn collect<T: Element>(
    shape: &Shape,
    fill: impl Fn(usize, &mut [f32], &mut Scratch) -> Result<()> + Sync,
) -> Result<Tensor> {
    let mut out = vec![T::zero(); shape.elem_count()];
    let buffers = || (Vec::<f32>::new(), Scratch::default());
    out.par_chunks_mut(BLOCK).enumerate().try_for_each_init(buffers, |(values, scratch), (block, out)| {
        values.resize(out.len(), 0.0);
        fill(block * BLOCK, values, scratch)?;
        T::round(values, out);
        Ok::<_, Error>(())
    })?;
    Ok(Tensor::from_vec(out, shape, &Device::Cpu)?)
}

/// A dtype that weights can be loaded as.
trait Element: WithDType {
    /// Rounds to nearest, ties to even.
    fn round(values: &[f32], out: &mut [Self]);
}

impl Element for f32 {
    fn round(values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }
}

impl Element for bf16 {
    fn round(values: &[f32], out: &mut [Self]) {
        #[inline(always)]
        fn run(values: &[f32], out: &mut [bf16]) {
            for (out, value) in out.iter_mut().zip(values) {
                *out = bf16::from_bits(round_to_bf16(*value));
            }
        }
        pulp::Arch::new().dispatch(|| run(values, out));
    }
}

impl Element for f16 {
    fn round(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
}

/// The bits of `value` as bf16. The crate `half` branches on NaN, which keeps its loop from being vectorised.
#[inline(always)]
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { quiet_nan } else { rounded }
}

/// Values of the 256 codes of `F8_E4M3` (the variant without infinities).
static F8_E4M3: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|code| float8::F8E4M3::from_bits(code as u8).to_f32()));

/// Bytes of one element of `dtype`; `None` where weights of that dtype are not read.
pub(super) fn element_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F8_E4M3 | Dtype::I8 => Some(1),
        _ => None,
    }
}

/// Decodes little-endian `bytes` of `dtype`, one that [`element_bytes`] knows, into `out`.
pub(super) fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    pulp::Arch::new().dispatch(|| match dtype {
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Dtype::F16 => {
            let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
            halves.convert_to_f32_slice(out);
        }
        Dtype::F8_E4M3 => {
            let values = &*F8_E4M3;
            each(bytes, out, |[b]| values[usize::from(b)]);
        }
        Dtype::I8 => each(bytes, out, |[b]| f32::from(b as i8)),
        other => unreachable!("a header with {other:?} is refused"),
    });
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = decode(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_crate_half_does() {
        let mut bits = 0u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            for bits in [bits, bits | 0x8000, (bits & !0xffff) | 0x8000, bits | 0x7f80_0000] {
                let value = f32::from_bits(bits);
                let (ours, theirs) = (bf16::from_bits(round_to_bf16(value)), bf16::from_f32(value));
                assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{value} {ours} {theirs}");
            }
        }
    }

    #[test]
    fn every_stored_dtype_is_decoded() {
        let cases: [(Dtype, Vec<u8>, f32); 6] = [
            (Dtype::F64, (-1.5f64).to_le_bytes().to_vec(), -1.5),
            (Dtype::F32, 0.1f32.to_le_bytes().to_vec(), 0.1),
            (Dtype::BF16, bf16::from_f32(-3.25).to_le_bytes().to_vec(), -3.25),
            (Dtype::F16, f16::from_f32(0.375).to_le_bytes().to_vec(), 0.375),
            (Dtype::F8_E4M3, vec![0x7e], 448.0), // the largest finite value
            (Dtype::I8, vec![0x80], -128.0),
        ];
        for (dtype, bytes, expected) in cases {
            let mut out = [0.0];
            assert_eq!(element_bytes(dtype), Some(bytes.len()));
            decode(dtype, &bytes, &mut out);
            assert_eq!(out, [expected], "{dtype:?}");
        }
        assert_eq!(element_bytes(Dtype::I64), None);
    }

    #[test]
    fn blocks_are_put_where_they_belong() {
        let len = 2 * BLOCK + 3;
        let fill = |start: usize, values: &mut [f32], _: &mut Scratch| {
            values.iter_mut().enumerate().for_each(|(i, v)| *v = (start + i) as f32);
            Ok(())
        };
        let values =
            materialize(&len.into(), DType::F32, &Device::Cpu, fill).unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().enumerate().all(|(i, v)| *v == i as f32));
    }
}
