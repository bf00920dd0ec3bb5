//! Bytes that someone sent → RGB pixels, without trusting them.
//!
//! Every limit is checked before the pixels are decoded: size of the file, form of the container, sides,
//! area, aspect. Two things the decoders let pass are checked here: a JPEG that ends without its end
//! marker (it would decode to a picture with a grey tail) and a WebP whose chunks claim more bytes than
//! there are (it would make the decoder allocate them).

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::{Portrait, Size};
use crate::{Error, ErrorKind, Result};

/// What a portrait may be, at most.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: u64,
    /// Shortest side in pixels.
    pub min_side: u32,
    /// Longest side in pixels.
    pub max_side: u32,
    /// Pixels in all.
    pub max_pixels: u64,
    /// Longer side divided by the shorter one.
    pub max_aspect: f64,
    /// Memory that the decoder may ask for, in bytes.
    pub max_decoder_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 10 * 1000 * 1000,
            min_side: 64,
            max_side: 8192,
            max_pixels: 40_000_000,
            max_aspect: 4.0,
            max_decoder_bytes: 160 << 20,
        }
    }
}

pub(super) fn decode(bytes: &[u8], limits: &Limits) -> Result<Portrait> {
    if bytes.is_empty() {
        return Err(invalid("IMAGE_EMPTY", "the image is empty (0 bytes)"));
    }
    if bytes.len() as u64 > limits.max_bytes {
        let message = format!("the image has {} bytes, expected at most {}", bytes.len(), limits.max_bytes);
        return Err(Error::new(ErrorKind::ImageTooLarge, message).with_reason("IMAGE_TOO_LARGE"));
    }
    let format = sniff(bytes)?;
    // The decoders have been fuzzed and none panicked, but they are not ours.
    std::panic::catch_unwind(|| decode_as(format, bytes, limits))
        .unwrap_or_else(|_| Err(invalid("IMAGE_CORRUPT", "the image is damaged: its decoder gave up")))
}

fn decode_as(format: ImageFormat, bytes: &[u8], limits: &Limits) -> Result<Portrait> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    // The sides have limits of their own, with better messages, below.
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_decoder_bytes);
    reader.limits(decoder_limits);
    let mut decoder = reader.into_decoder().map_err(undecodable)?;
    let (width, height) = decoder.dimensions();
    check_dimensions(width, height, limits)?;
    if decoder.total_bytes() > limits.max_decoder_bytes {
        return Err(too_many_pixels(width, height, limits));
    }
    match format {
        ImageFormat::Jpeg => check_jpeg_end(bytes)?,
        ImageFormat::WebP => check_riff(bytes)?,
        _ => {}
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(undecodable)?;
    image.apply_orientation(orientation);
    let size = Size { height: image.height() as usize, width: image.width() as usize };
    Ok(Portrait { size, rgb: over_white(image) })
}

/// What the first bytes say it is.
fn sniff(bytes: &[u8]) -> Result<ImageFormat> {
    match bytes {
        [0x89, b'P', b'N', b'G', ..] => return Ok(ImageFormat::Png),
        [0xFF, 0xD8, 0xFF, ..] => return Ok(ImageFormat::Jpeg),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => return Ok(ImageFormat::WebP),
        _ => {}
    }
    let (other, format) = match bytes {
        [b'G', b'I', b'F', b'8', ..] => ("a GIF", "gif"),
        [b'B', b'M', ..] => ("a BMP", "bmp"),
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => ("a TIFF", "tiff"),
        [0, 0, 1, 0, ..] => ("an icon", "ico"),
        [_, _, _, _, b'f', b't', b'y', b'p', b'h' | b'm', ..] => ("an HEIC, HEIF or MP4 file", "heic"),
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', ..] => ("an AVIF", "avif"),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => ("an MP4 or MOV file", "mp4"),
        [b'%', b'P', b'D', b'F', ..] => ("a PDF", "pdf"),
        _ if bytes.trim_ascii_start().starts_with(b"<") => ("SVG, HTML or other XML", "xml"),
        _ => ("of no known form", "unknown"),
    };
    let message = format!("the image is {other}, expected PNG, JPEG or WebP");
    let error = invalid("INVALID_IMAGE_FORMAT", message).with_received_format(format);
    Err(error.with_hint("convert the picture to JPEG or PNG"))
}

fn check_dimensions(width: u32, height: u32, limits: &Limits) -> Result<()> {
    let (shorter, longer) = (width.min(height), width.max(height));
    if shorter == 0 {
        return Err(invalid("IMAGE_CORRUPT", format!("the image is {width}x{height} pixels: it has none")));
    }
    if longer > limits.max_side || u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(too_many_pixels(width, height, limits));
    }
    if shorter < limits.min_side {
        let message = format!(
            "the image is {width}x{height} pixels, expected at least {} on each side",
            limits.min_side
        );
        return Err(invalid("IMAGE_TOO_SMALL", message));
    }
    if f64::from(longer) > limits.max_aspect * f64::from(shorter) {
        let message = format!(
            "the image is {width}x{height} pixels, expected a longer side of at most {} times the shorter",
            limits.max_aspect
        );
        return Err(invalid("IMAGE_ASPECT", message).with_hint("crop the picture around the face"));
    }
    Ok(())
}

fn too_many_pixels(width: u32, height: u32, limits: &Limits) -> Error {
    let message = format!(
        "the image is {width}x{height} pixels, expected at most {} on a side, {} in all and {} MiB decoded",
        limits.max_side,
        limits.max_pixels,
        limits.max_decoder_bytes >> 20
    );
    Error::new(ErrorKind::ImageTooLarge, message)
        .with_reason("IMAGE_DIMENSIONS")
        .with_hint("scale the picture down; videos are at most 1920 pixels wide or high")
}

/// Walks the markers of a JPEG up to its end marker. A thumbnail inside the metadata has an end marker too,
/// so looking for its two bytes is not enough.
fn check_jpeg_end(bytes: &[u8]) -> Result<()> {
    const END: u8 = 0xD9;
    let truncated = || invalid("IMAGE_CORRUPT", "the JPEG is cut off: its end marker is missing");
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        // Between segments, and inside entropy-coded data where 0xFF 0x00 and restarts are no markers.
        let at = rest.windows(2).position(|w| w[0] == 0xFF && !matches!(w[1], 0x00 | 0xD0..=0xD7 | 0xFF));
        let Some(at) = at else { return Err(truncated()) };
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        match marker {
            END => return Ok(()),
            0xC0..=0xFE => {
                let Some(&[high, low]) = rest.first_chunk() else { return Err(truncated()) };
                let length = usize::from(u16::from_be_bytes([high, low]));
                rest = rest.get(length.max(2)..).ok_or_else(truncated)?;
            }
            _ => {
                return Err(invalid(
                    "IMAGE_CORRUPT",
                    format!("the JPEG is damaged: it has a marker 0xFF{marker:02X}"),
                ));
            }
        }
    }
}

/// Walks the chunks of a RIFF file and refuses those that claim more bytes than there are.
fn check_riff(bytes: &[u8]) -> Result<()> {
    let length = |at: usize| {
        bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(|b: [u8; 4]| u32::from_le_bytes(b) as usize)
    };
    let truncated = || invalid("IMAGE_CORRUPT", "the WebP is cut off: it claims more bytes than it has");
    let end = length(4).ok_or_else(truncated)?.saturating_add(8);
    if end > bytes.len() {
        return Err(truncated());
    }
    let mut at = 12;
    while at + 8 <= end {
        let chunk = length(at + 4).ok_or_else(truncated)?;
        if chunk > end - at - 8 {
            return Err(truncated());
        }
        at += 8 + chunk + chunk % 2;
    }
    Ok(())
}

/// RGB pixels, with what is transparent laid over white.
fn over_white(image: DynamicImage) -> Vec<u8> {
    if !image.color().has_alpha() {
        return image.into_rgb8().into_raw();
    }
    let rgba = image.into_rgba8().into_raw();
    let mix = |&[r, g, b, alpha]: &[u8; 4]| {
        let alpha = u32::from(alpha);
        [r, g, b].map(|v| ((u32::from(v) * alpha + 255 * (255 - alpha) + 127) / 255) as u8)
    };
    rgba.as_chunks::<4>().0.iter().flat_map(mix).collect()
}

fn undecodable(error: ImageError) -> Error {
    match error {
        ImageError::Limits(_) => {
            Error::new(ErrorKind::ImageTooLarge, format!("the image is too large: {error}"))
                .with_reason("IMAGE_DIMENSIONS")
                .with_source(error)
        }
        _ => invalid("IMAGE_CORRUPT", format!("the image cannot be decoded: {error}")).with_source(error),
    }
}

fn invalid(reason: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message).with_reason(reason)
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
