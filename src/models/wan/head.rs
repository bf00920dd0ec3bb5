//! Latents to patches, and tokens back to latents.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::Config;
use crate::nn::{Linear, layer_norm_modulated, trace};

/// Cuts `xs` (C, T, h, w) into one patch per token, in (frame, row, column) order with channels fastest inside
/// the patch: (1, L, patch rows * patch columns * C).
pub(super) fn patchify(xs: &Tensor, (patch_rows, patch_cols): (usize, usize)) -> Result<Tensor> {
    let (channels, frames, height, width) = xs.dims4()?;
    if height % patch_rows != 0 || width % patch_cols != 0 {
        bail!("latents of {height} × {width} do not divide into patches of {patch_rows} × {patch_cols}")
    }
    let (rows, cols) = (height / patch_rows, width / patch_cols);
    let xs = xs.reshape((channels * frames * rows, patch_rows, cols, patch_cols))?;
    let xs = xs.transpose(1, 2)?.contiguous()?; // (C·T·rows, cols, patch rows, patch cols)
    let patch_len = patch_rows * patch_cols;
    let xs = xs.reshape((channels, frames * rows * cols, patch_len))?.permute((1, 2, 0))?.contiguous()?;
    xs.reshape((1, frames * rows * cols, patch_len * channels))
}

/// The inverse of [`patchify`] for tokens on `grid` (T, rows, columns).
pub(super) fn unpatchify(
    xs: &Tensor,
    (frames, rows, cols): (usize, usize, usize),
    (patch_rows, patch_cols): (usize, usize),
) -> Result<Tensor> {
    let patch_len = patch_rows * patch_cols;
    let channels = xs.dim(2)? / patch_len;
    let xs = xs.reshape((frames * rows * cols, patch_len, channels))?.permute((2, 0, 1))?.contiguous()?;
    let xs = xs.reshape((channels * frames * rows, cols, patch_rows, patch_cols))?;
    xs.transpose(1, 2)?.contiguous()?.reshape((channels, frames, rows * patch_rows, cols * patch_cols))
}

/// Projects tokens back to latent patches under AdaLN modulation.
#[derive(Debug)]
pub(super) struct Head {
    head: Linear,
    modulation: Tensor, // (1, 2, D)
    eps: f64,
    patch: (usize, usize),
}

impl Head {
    /// Loads `modulation` and `head.{weight,bias}` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let [_, patch_rows, patch_cols] = cfg.patch_size;
        Ok(Self {
            head: Linear::new(cfg.dim, cfg.out_dim * patch_rows * patch_cols, vb.pp("head"))?,
            modulation: vb.get((1, 2, cfg.dim), "modulation")?,
            eps: cfg.eps,
            patch: (patch_rows, patch_cols),
        })
    }

    /// Maps tokens `xs` (1, L, D) on `grid` and the timestep embedding `temb` (1, D) to the velocity
    /// (out_dim, T, h, w). All of it is f32.
    pub fn forward(&self, xs: &Tensor, temb: &Tensor, grid: (usize, usize, usize)) -> Result<Tensor> {
        let modulation = self.modulation.to_dtype(DType::F32)?.broadcast_add(&temb.unsqueeze(1)?)?;
        let (shift, scale) = (modulation.narrow(1, 0, 1)?, modulation.narrow(1, 1, 1)?);
        let xs = layer_norm_modulated(&xs.to_dtype(DType::F32)?, &shift, &scale, self.eps)?;
        let patches = self.head.forward(&xs)?;
        trace::record(|| "head_out".to_owned(), &patches);
        unpatchify(&patches, grid, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn unpatchify_undoes_patchify() {
        for (shape, patch) in [((3, 2, 4, 6), (2, 2)), ((1, 3, 6, 2), (3, 1)), ((5, 1, 2, 8), (1, 4))] {
            let xs = Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
            let grid = (shape.1, shape.2 / patch.0, shape.3 / patch.1);
            let back = unpatchify(&patchify(&xs, patch).unwrap(), grid, patch).unwrap();
            assert_eq!(back.dims(), xs.dims());
            let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&back), values(&xs));
        }
        let xs = Tensor::zeros((1, 1, 5, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(patchify(&xs, (2, 2)).unwrap_err().to_string().contains("5 × 4"));
    }

    #[test]
    fn a_patch_holds_its_rows_and_columns_with_channels_fastest() {
        let xs = Tensor::arange(0f32, 16., &Device::Cpu).unwrap().reshape((2, 1, 2, 4)).unwrap();
        let patches = patchify(&xs, (2, 2)).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(patches[0], [0., 8., 1., 9., 4., 12., 5., 13.]);
        assert_eq!(patches[1], [2., 10., 3., 11., 6., 14., 7., 15.]);
    }
}
