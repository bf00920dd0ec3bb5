//! Images in: a portrait's bytes → checked RGB pixels → the frame that the networks see.
//!
//! ```text
//!  bytes ──Portrait::open──► RGB8 ──Buckets::choose──► Size ──fit──► RGB8 at that size ──to_tensor──► [-1, 1]
//! ```
//!
//! Resizing, cropping, masks and the bytes of finished frames equal the reference to the last bit. Unlike
//! the reference we apply the EXIF orientation and lay transparency over white.

mod buckets;
mod decode;
mod masks;
mod resize;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use buckets::{Bucket, Buckets, Size};
pub use decode::Limits;
pub use masks::{DEFAULT_FACE_SCALE, PersonMasks, Rectangle};

/// A decoded picture: RGB, 8 bits per channel.
#[derive(Clone, PartialEq)]
pub struct Portrait {
    size: Size,
    rgb: Vec<u8>,
}

impl Portrait {
    /// Decodes PNG, JPEG or WebP, whichever the bytes are, within `limits`; an animation gives its first
    /// frame.
    ///
    /// # Errors
    /// Of kind `InvalidImage` or `ImageTooLarge`, with one of these reasons: `IMAGE_EMPTY`,
    /// `INVALID_IMAGE_FORMAT`, `IMAGE_CORRUPT`, `IMAGE_TOO_SMALL`, `IMAGE_ASPECT` and `IMAGE_TOO_LARGE`
    /// (bytes), `IMAGE_DIMENSIONS` (pixels or the memory that decoding takes).
    pub fn open(bytes: &[u8], limits: &Limits) -> crate::Result<Self> {
        decode::decode(bytes, limits)
    }

    /// A picture from its pixels (H, W, 3); `None` unless there are as many as `size` says.
    pub fn from_rgb(size: Size, rgb: Vec<u8>) -> Option<Self> {
        let fits = size.height > 0 && size.width > 0 && rgb.len() == size.height * size.width * 3;
        fits.then_some(Self { size, rgb })
    }

    /// Height and width in pixels.
    pub fn size(&self) -> Size {
        self.size
    }

    /// The pixels (H, W, 3), row by row.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Whether every pixel has the same colour, so that there can be no face.
    pub fn is_blank(&self) -> bool {
        let pixels = self.rgb.as_chunks::<3>().0;
        pixels.iter().all(|pixel| *pixel == pixels[0])
    }

    /// Scaled until it covers `target`, then cut to it around the centre. Both sides of `target` must be
    /// above 0.
    pub fn fit(&self, target: Size) -> Self {
        Self { size: target, rgb: resize::cover_rgb(&self.rgb, self.size, target) }
    }

    /// The picture as one frame of video: (3, 1, H, W), `f32` in [-1, 1].
    pub fn to_tensor(&self, device: &Device) -> candle_core::Result<Tensor> {
        let Size { height, width } = self.size;
        let pixels = self.rgb.as_chunks::<3>().0;
        let values: Vec<f32> =
            (0..3).flat_map(|c| pixels.iter().map(move |p| (f32::from(p[c]) / 255.0 - 0.5) * 2.0)).collect();
        Tensor::from_vec(values, (3, 1, height, width), device)
    }
}

impl std::fmt::Debug for Portrait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Portrait({}x{})", self.size.width, self.size.height)
    }
}

/// The byte of a colour value in [-1, 1]: truncated, not rounded, as in the reference.
pub fn to_u8(value: f32) -> u8 {
    ((value + 1.0) / 2.0 * 255.0).clamp(0.0, 255.0) as u8
}

/// The frames of `video` (3, F, H, W), RGB in [-1, 1], as bytes (H, W, 3) each.
pub fn frames_to_rgb(video: &Tensor) -> candle_core::Result<Vec<Vec<u8>>> {
    let (channels, frames, height, width) = video.dims4()?;
    if channels != 3 {
        candle_core::bail!("a video has {channels} channels, expected 3")
    }
    let area = height * width;
    let values = video.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let frame = |f: usize| {
        (0..area)
            .flat_map(|i| (0..3).map(move |c| (c, i)))
            .map(|(c, i)| to_u8(values[(c * frames + f) * area + i]))
            .collect()
    };
    Ok((0..frames).into_par_iter().map(frame).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_survives_the_way_to_a_tensor_and_back() {
        let rgb: Vec<u8> = (0..=255).cycle().take(16 * 24 * 3).collect();
        let portrait = Portrait::from_rgb(Size { height: 16, width: 24 }, rgb.clone()).unwrap();
        let tensor = portrait.to_tensor(&Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [3, 1, 16, 24]);
        let video = Tensor::cat(&[&tensor, &tensor], 1).unwrap();
        for frame in frames_to_rgb(&video).unwrap() {
            // Truncation may lose one step where the float is a hair below the whole number.
            assert!(frame.iter().zip(&rgb).all(|(a, b)| b - a <= 1));
        }
    }

    #[test]
    fn bytes_are_truncated_and_clipped() {
        let bytes = [-1.5, -1.0, 0.0, 0.999, 1.0, 7.0, f32::NAN].map(to_u8);
        assert_eq!(bytes, [0, 0, 127, 254, 255, 255, 0]);
    }

    #[test]
    fn pixels_must_be_as_many_as_the_size_says() {
        assert!(Portrait::from_rgb(Size { height: 2, width: 2 }, vec![0; 11]).is_none());
        assert!(Portrait::from_rgb(Size { height: 0, width: 2 }, vec![]).is_none());
    }
}
