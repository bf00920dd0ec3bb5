//! bf16 weights → codes of 8 bits with a scale for each row.

use std::sync::LazyLock;

use float8::F8E4M3;
use half::bf16;
use rayon::prelude::*;

/// The largest value of `F8_E4M3`.
const LARGEST_FP8: f32 = 448.0;

/// The codes of the 65,536 values of bf16 as `F8_E4M3`, saturating.
static FP8_OF_BF16: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let saturated = |bits| bf16::from_bits(bits).to_f32().clamp(-LARGEST_FP8, LARGEST_FP8);
    (0..=u16::MAX).map(|bits| F8E4M3::from_f32(saturated(bits)).to_bits()).collect()
});

/// The codes of the rows of `values`, each of `width`, and the scale of each row: what optimum-quanto makes of a bf16
/// weight, bit for bit. A row of zeros has the scale 0.
///
/// Fails with the index of a row that holds a value that is not finite.
pub(super) fn fp8(values: &[bf16], width: usize) -> Result<(Vec<u8>, Vec<bf16>), usize> {
    let mut codes = vec![0; values.len()];
    let rows = values.par_chunks_exact(width).zip(codes.par_chunks_exact_mut(width)).enumerate();
    let scales = rows.map(|(row, (values, codes))| fp8_row(values, codes).ok_or(row));
    let scales = scales.collect::<Result<_, _>>()?;
    Ok((codes, scales))
}

fn fp8_row(values: &[bf16], codes: &mut [u8]) -> Option<bf16> {
    // The bits of a bf16 without its sign are in the order of the magnitudes, those that are not finite last.
    let largest = values.iter().map(|value| value.to_bits() & 0x7fff).max().unwrap_or(0);
    let largest = bf16::from_bits(largest);
    if !largest.is_finite() {
        return None;
    }
    let scale = bf16::from_f32(largest.to_f32() / LARGEST_FP8);
    if scale == bf16::ZERO {
        return Some(scale);
    }
    let (table, divisor) = (&**FP8_OF_BF16, scale.to_f32());
    for (code, value) in codes.iter_mut().zip(values) {
        *code = table[usize::from(bf16::from_f32(value.to_f32() / divisor).to_bits())];
    }
    Some(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32], width: usize) -> Result<(Vec<u8>, Vec<bf16>), usize> {
        fp8(&values.iter().map(|value| bf16::from_f32(*value)).collect::<Vec<_>>(), width)
    }

    #[test]
    fn rows_are_scaled_to_the_largest_code_and_saturate() {
        let values = [1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 1e-3, 7e-4, -1e-3];
        let (codes, scales) = rows(&values, 3).unwrap();
        assert_eq!((scales[0], scales[1]), (bf16::from_f32(2.0 / 448.0), bf16::ZERO));
        assert_eq!(codes[3..6], [0; 3]);
        for (i, value) in values.iter().enumerate() {
            let back = F8E4M3::from_bits(codes[i]).to_f32() * scales[i / 3].to_f32();
            // Three bits of mantissa, and bf16's rounding of value, quotient and scale.
            assert!((back - value).abs() <= value.abs() * (1.0 / 16.0 + 3.0 / 256.0), "{value} {back}");
        }
        assert_eq!(codes[8], 0xfe, "the largest magnitude has the largest code");
    }

    #[test]
    fn a_value_that_is_not_finite_is_found() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(rows(&[1.0, 1.0, 1.0, bad], 2), Err(1), "{bad}");
        }
    }
}
