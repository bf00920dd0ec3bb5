//! Where each person is in the picture.

use candle_core::{Device, Result, Tensor};

use super::{Size, resize};
use crate::{Error, ErrorKind};

/// Pixels of the video per latent, and latents per token, along each side.
const LATENT_STRIDE: usize = 8;
const TOKEN_STRIDE: usize = 2;

/// Share of the picture that is left free at each edge of a default mask.
pub const DEFAULT_FACE_SCALE: f64 = 0.05;

/// Three planes over the portrait, 1 where they hold: first person, second person, background.
pub struct PersonMasks {
    source: Size,
    planes: [Vec<u8>; 3],
}

/// A rectangle of portrait pixels: `[row_min, col_min, row_max, col_max]`, the maxima excluded.
pub type Rectangle = [usize; 4];

impl PersonMasks {
    /// One person: all three planes are 1 everywhere, as in the reference.
    pub fn one(source: Size) -> Self {
        let plane = vec![1; source.height * source.width];
        Self { source, planes: [plane.clone(), plane.clone(), plane] }
    }

    /// Two persons side by side: each half of the picture without `face_scale` of it at every edge.
    pub fn halves(source: Size, face_scale: f64) -> Self {
        let Size { height, width } = source;
        let (rows, half) = (height as f64, (width / 2) as f64);
        let (near, far) = (face_scale, 1.0 - face_scale);
        let rectangle = |offset: f64| {
            [rows * near, half * near + offset, rows * far, half * far + offset].map(|edge| edge as usize)
        };
        Self::from_rectangles(source, [rectangle(0.0), rectangle(half)])
    }

    /// Two persons where the caller says they are.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when a rectangle holds no pixel or leaves the picture.
    pub fn from_boxes(source: Size, boxes: [Rectangle; 2]) -> crate::Result<Self> {
        for [row_min, col_min, row_max, col_max] in boxes {
            let holds = row_min < row_max && col_min < col_max;
            if !holds || row_max > source.height || col_max > source.width {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "a `bbox` is [{row_min}, {col_min}, {row_max}, {col_max}], expected [row_min, col_min, \
                         row_max, col_max] with pixels inside the picture of {} rows and {} columns",
                        source.height, source.width
                    ),
                ));
            }
        }
        Ok(Self::from_rectangles(source, boxes))
    }

    fn from_rectangles(source: Size, rectangles: [Rectangle; 2]) -> Self {
        let [first, second] = rectangles.map(|[row_min, col_min, row_max, col_max]| {
            let mut plane = vec![0u8; source.height * source.width];
            let lines = plane.chunks_exact_mut(source.width).take(row_max).skip(row_min);
            lines.for_each(|line| line[col_min..col_max].fill(1));
            plane
        });
        let background = first.iter().zip(&second).map(|(a, b)| u8::from(a + b == 0)).collect();
        Self { source, planes: [first, second, background] }
    }

    /// The planes in portrait pixels, each (H, W) of 0 and 1: first person, second person, background.
    pub fn planes(&self) -> &[Vec<u8>; 3] {
        &self.planes
    }

    /// The masks over the latents of a video of size `target`, (3, h, w) of 0 and 1.
    pub fn latents(&self, target: Size, device: &Device) -> Result<Tensor> {
        let (grid, planes) = self.fitted(target, target.over(LATENT_STRIDE));
        Tensor::from_vec(planes, (3, grid.height, grid.width), device)
    }

    /// The masks over the tokens of a frame of a video of size `target`, (3, tokens) of 0 and 1, row by row.
    pub fn tokens(&self, target: Size, device: &Device) -> Result<Tensor> {
        let latents = target.over(LATENT_STRIDE);
        let (_, planes) = self.fitted(target, latents);
        let grid = latents.over(TOKEN_STRIDE);
        let tokens: Vec<f32> = planes
            .chunks_exact(latents.height * latents.width)
            .flat_map(|plane| {
                let columns = resize::nearest(latents.width, grid.width);
                resize::nearest(latents.height, grid.height)
                    .flat_map(move |y| columns.clone().map(move |x| plane[y * latents.width + x]))
            })
            .collect();
        Tensor::from_vec(tokens, (3, grid.height * grid.width), device)
    }

    /// Laid over `target` as the portrait is, then taken down to `grid`; every step takes nearest pixels.
    fn fitted(&self, target: Size, grid: Size) -> (Size, Vec<f32>) {
        let cover = resize::Cover::new(self.source, target);
        let pick = |source: usize, scaled: usize, offset: usize, kept: usize, out: usize| -> Vec<usize> {
            let cropped: Vec<usize> = resize::nearest(source, scaled).skip(offset).take(kept).collect();
            resize::nearest(kept, out).map(|i| cropped[i]).collect()
        };
        let rows = pick(self.source.height, cover.scaled.height, cover.top, target.height, grid.height);
        let columns = pick(self.source.width, cover.scaled.width, cover.left, target.width, grid.width);
        let value = |plane: &Vec<u8>| -> Vec<f32> {
            let line = |&y: &usize| &plane[y * self.source.width..][..self.source.width];
            rows.iter().map(line).flat_map(|line| columns.iter().map(|&x| f32::from(line[x]))).collect()
        };
        (grid, self.planes.iter().flat_map(value).collect())
    }
}

impl Size {
    fn over(self, stride: usize) -> Self {
        Self { height: self.height / stride, width: self.width / stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQUARE: Size = Size { height: 64, width: 64 };

    fn values(xs: Tensor) -> Vec<f32> {
        xs.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn one_person_is_everywhere() {
        let masks = PersonMasks::one(SQUARE);
        assert_eq!(values(masks.latents(SQUARE, &Device::Cpu).unwrap()), [1.0; 3 * 64]);
        assert_eq!(values(masks.tokens(SQUARE, &Device::Cpu).unwrap()), [1.0; 3 * 16]);
    }

    #[test]
    fn each_pixel_belongs_to_one_person_or_to_the_background() {
        let masks = PersonMasks::halves(Size { height: 71, width: 93 }, DEFAULT_FACE_SCALE);
        let [first, second, background] = masks.planes();
        for i in 0..first.len() {
            assert_eq!(first[i] + second[i] + background[i], 1);
        }
        let left = first.iter().filter(|&&v| v == 1).count();
        assert_eq!(left, second.iter().filter(|&&v| v == 1).count());
    }

    #[test]
    fn a_box_lands_where_its_pixels_go() {
        let masks = PersonMasks::from_boxes(SQUARE, [[0, 0, 32, 64], [32, 0, 64, 64]]).unwrap();
        let tokens = values(masks.tokens(SQUARE, &Device::Cpu).unwrap());
        let expected: Vec<f32> = [[1.0; 8], [0.0; 8], [0.0; 8], [1.0; 8], [0.0; 8], [0.0; 8]].concat();
        assert_eq!(tokens, expected);
    }

    #[test]
    fn boxes_without_pixels_or_outside_are_refused() {
        for bbox in [[5, 5, 5, 9], [9, 5, 5, 9], [0, 0, 65, 9], [0, 0, 9, 65]] {
            let error = PersonMasks::from_boxes(SQUARE, [bbox, [0, 0, 1, 1]]).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains("bbox"), "{error}");
        }
    }
}
