//! Stored bytes → f32 → the dtype a network computes in, a block at a time.

use std::mem::MaybeUninit;
use std::sync::LazyLock;

use candle_core::WithDType;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::Dtype;

/// Elements converted at once: few enough that a block stays in a core's cache. A power of two, so that no block
/// crosses a multiple of 2³² elements.
pub(super) const BLOCK: usize = 1 << 18;

/// A dtype that weights can be loaded as.
pub(super) trait Element: WithDType {
    /// The stored dtype of the same values.
    const STORED: Dtype;

    /// Writes every element of `out`, as long as `values`: rounded to nearest, ties to even.
    fn round(values: &[f32], out: &mut [MaybeUninit<Self>]);

    /// Writes every element of `out` from the little-endian `bytes` of [`Element::STORED`].
    fn copy(bytes: &[u8], out: &mut [MaybeUninit<Self>]);
}

impl Element for f32 {
    const STORED: Dtype = Dtype::F32;

    fn round(values: &[f32], out: &mut [MaybeUninit<f32>]) {
        assert_eq!(values.len(), out.len());
        out.iter_mut().zip(values).for_each(|(out, value)| _ = out.write(*value));
    }

    fn copy(bytes: &[u8], out: &mut [MaybeUninit<f32>]) {
        copy(bytes, out, f32::from_le_bytes);
    }
}

impl Element for bf16 {
    const STORED: Dtype = Dtype::BF16;

    fn round(values: &[f32], out: &mut [MaybeUninit<bf16>]) {
        #[inline(always)]
        fn run(values: &[f32], out: &mut [MaybeUninit<bf16>]) {
            for (out, value) in out.iter_mut().zip(values) {
                out.write(bf16::from_bits(round_to_bf16(*value)));
            }
        }
        assert_eq!(values.len(), out.len());
        pulp::Arch::new().dispatch(|| run(values, out));
    }

    fn copy(bytes: &[u8], out: &mut [MaybeUninit<bf16>]) {
        copy(bytes, out, bf16::from_le_bytes);
    }
}

impl Element for f16 {
    const STORED: Dtype = Dtype::F16;

    fn round(values: &[f32], out: &mut [MaybeUninit<f16>]) {
        assert_eq!(values.len(), out.len());
        let mut halves = [f16::ZERO; 1024];
        for (values, out) in values.chunks(halves.len()).zip(out.chunks_mut(halves.len())) {
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            out.iter_mut().zip(halves).for_each(|(out, half)| _ = out.write(*half));
        }
    }

    fn copy(bytes: &[u8], out: &mut [MaybeUninit<f16>]) {
        copy(bytes, out, f16::from_le_bytes);
    }
}

#[inline(always)]
fn copy<T, const N: usize>(bytes: &[u8], out: &mut [MaybeUninit<T>], decode: impl Fn([u8; N]) -> T) {
    let elements = bytes.as_chunks::<N>().0;
    assert_eq!(elements.len(), out.len());
    out.iter_mut().zip(elements).for_each(|(out, bytes)| _ = out.write(decode(*bytes)));
}

/// The bits of `value` as bf16. The crate `half` branches on NaN, which keeps its loop from being vectorised.
#[inline(always)]
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { quiet_nan } else { rounded }
}

/// Multiplies `values` by `scale` and rounds the products to bf16.
pub(super) fn scale_to_bf16(values: &mut [f32], scale: f32) {
    #[inline(always)]
    fn run(values: &mut [f32], scale: f32) {
        for value in values {
            *value = f32::from_bits(u32::from(round_to_bf16(*value * scale)) << 16);
        }
    }
    pulp::Arch::new().dispatch(|| run(values, scale));
}

/// Values of the 256 codes of `F8_E4M3` (the variant without infinities).
static F8_E4M3: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|code| float8::F8E4M3::from_bits(code as u8).to_f32()));

/// Values of the 256 codes of `F8_E5M2`: the upper half of an f16.
static F8_E5M2: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|code| f16::from_bits((code as u16) << 8).to_f32()));

/// Bytes of one element of `dtype`; `None` where weights of that dtype are not read.
pub(super) fn element_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::I8 | Dtype::U8 => Some(1),
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
            let mut halves = [f16::ZERO; 1024];
            for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..out.len()];
                halves.iter_mut().zip(bytes.as_chunks().0).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
                halves.convert_to_f32_slice(out);
            }
        }
        Dtype::F8_E4M3 => {
            let values = &*F8_E4M3;
            each(bytes, out, |[b]| values[usize::from(b)]);
        }
        Dtype::F8_E5M2 => {
            let values = &*F8_E5M2;
            each(bytes, out, |[b]| values[usize::from(b)]);
        }
        Dtype::I8 => each(bytes, out, |[b]| f32::from(b as i8)),
        Dtype::U8 => each(bytes, out, |[b]| f32::from(b)),
        other => unreachable!("a tensor of {other:?} is refused before it is read"),
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
                let mut scaled = [value];
                scale_to_bf16(&mut scaled, 0.3);
                let theirs = bf16::from_f32(value * 0.3).to_f32();
                assert!(scaled[0] == theirs || scaled[0].is_nan() && theirs.is_nan(), "{value}");
            }
        }
    }

    #[test]
    fn every_stored_dtype_is_decoded() {
        let cases: [(Dtype, Vec<u8>, f32); 9] = [
            (Dtype::F64, (-1.5f64).to_le_bytes().to_vec(), -1.5),
            (Dtype::F32, 0.1f32.to_le_bytes().to_vec(), 0.1),
            (Dtype::BF16, bf16::from_f32(-3.25).to_le_bytes().to_vec(), -3.25),
            (Dtype::F16, f16::from_f32(0.375).to_le_bytes().to_vec(), 0.375),
            (Dtype::F8_E4M3, vec![0x7e], 448.0), // the largest finite value
            (Dtype::F8_E5M2, vec![0x7b], 57344.0), // likewise
            (Dtype::F8_E5M2, vec![0x81], -1.0 / 65536.0), // the smallest below zero
            (Dtype::I8, vec![0x80], -128.0),
            (Dtype::U8, vec![0xff], 255.0),
        ];
        for (dtype, bytes, expected) in cases {
            let mut out = [0.0];
            assert_eq!(element_bytes(dtype), Some(bytes.len()));
            decode(dtype, &bytes, &mut out);
            assert_eq!(out, [expected], "{dtype:?}");
        }
        assert_eq!(element_bytes(Dtype::I64), None);
    }
}
