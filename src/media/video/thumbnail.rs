//! A small JPEG of one frame: the poster that a page shows before the video plays.

use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{ExtendedColorType, ImageBuffer, ImageEncoder as _, Rgb};

use super::encode_error;
use crate::Result;

/// The longer side of a thumbnail in pixels: sharp in a list or a card, and about 20 kB.
pub const THUMBNAIL_MAX_SIDE: usize = 480;

const JPEG_QUALITY: u8 = 85;

/// `rgb`, 8-bit RGB, row-major (`height`, `width`, 3), as a JPEG whose longer side is at most
/// [`THUMBNAIL_MAX_SIDE`]; smaller frames keep their size.
///
/// # Errors
/// Kind `Encode` when a side is 0 or `rgb` is not `width`·`height`·3 bytes long.
pub fn thumbnail_jpeg(rgb: &[u8], width: usize, height: usize) -> Result<Vec<u8>> {
    let wrong_size = || {
        let bytes = rgb.len();
        encode_error(format!(
            "a frame of {width}×{height} pixels has {bytes} bytes, expected {width}·{height}·3"
        ))
    };
    let (Ok(w), Ok(h)) = (u32::try_from(width), u32::try_from(height)) else { return Err(wrong_size()) };
    if w == 0 || h == 0 || width.checked_mul(height).and_then(|n| n.checked_mul(3)) != Some(rgb.len()) {
        return Err(wrong_size());
    }
    let mut jpeg = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY);
    let longer = width.max(height);
    let encoded = if longer <= THUMBNAIL_MAX_SIDE {
        encoder.write_image(rgb, w, h, ExtendedColorType::Rgb8)
    } else {
        let scaled = |side: usize| (side * THUMBNAIL_MAX_SIDE).div_ceil(longer) as u32;
        let frame: ImageBuffer<Rgb<u8>, &[u8]> = ImageBuffer::from_raw(w, h, rgb).ok_or_else(wrong_size)?;
        let small = imageops::resize(&frame, scaled(width), scaled(height), FilterType::Triangle);
        small.write_with_encoder(encoder)
    };
    encoded.map_err(|e| encode_error(format!("the thumbnail could not be encoded: {e}")).with_source(e))?;
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::super::testing::solid;
    use super::*;

    #[test]
    fn the_longer_side_is_bounded_and_the_colour_kept() {
        for (size, expected) in [((832, 480), (480, 277)), ((704, 1280), (264, 480)), ((64, 48), (64, 48))] {
            let (width, height) = size;
            let jpeg = thumbnail_jpeg(&solid(width, height, [200, 30, 40]), width, height).unwrap();
            let back = image::load_from_memory(&jpeg).unwrap().to_rgb8();
            assert_eq!(back.dimensions(), expected);
            let [r, g, b] = back.get_pixel(expected.0 / 2, expected.1 / 2).0;
            assert!(r.abs_diff(200) < 4 && g.abs_diff(30) < 4 && b.abs_diff(40) < 4, "{r} {g} {b}");
        }
    }

    #[test]
    fn wrong_sizes_are_errors() {
        for (bytes, width, height) in [(11, 2, 2), (0, 0, 4), (12, usize::MAX, 2), (0, 0, 0)] {
            let error = thumbnail_jpeg(&vec![0; bytes], width, height).unwrap_err();
            assert!(error.to_string().contains(&format!("{bytes} bytes")), "{error}");
        }
    }
}
