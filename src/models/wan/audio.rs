//! The audio projector: windows of audio features to audio tokens.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::Config;
use crate::nn::{LayerNorm, Linear, trace};

/// Projects the audio features around the frames of each latent frame to `context_tokens` tokens. The first
/// latent frame is one video frame; the others cover `vae_scale` frames each.
#[derive(Debug)]
pub(super) struct AudioProjector {
    proj1: Linear,
    proj1_vf: Linear,
    proj2: Linear,
    proj3: Linear,
    norm: LayerNorm,
    window: usize,
    vae_scale: usize,
    context_tokens: usize,
    feature: (usize, usize), // blocks, channels
}

/// Added to the variance in the norm of the audio tokens: the default of PyTorch's layer.
const NORM_EPS: f64 = 1e-5;

impl AudioProjector {
    /// Loads `proj1`, `proj1_vf`, `proj2`, `proj3` and `norm` below `vb`.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let feature_len = cfg.audio_blocks * cfg.audio_channels;
        let slots = cfg.audio_window + cfg.vae_scale - 1;
        let hidden = cfg.intermediate_dim;
        Ok(Self {
            proj1: Linear::new(cfg.audio_window * feature_len, hidden, vb.pp("proj1"))?,
            proj1_vf: Linear::new(slots * feature_len, hidden, vb.pp("proj1_vf"))?,
            proj2: Linear::new(hidden, hidden, vb.pp("proj2"))?,
            proj3: Linear::new(hidden, cfg.context_tokens * cfg.output_dim, vb.pp("proj3"))?,
            norm: LayerNorm::new(cfg.output_dim, NORM_EPS, vb.pp("norm"))?,
            window: cfg.audio_window,
            vae_scale: cfg.vae_scale,
            context_tokens: cfg.context_tokens,
            feature: (cfg.audio_blocks, cfg.audio_channels),
        })
    }

    /// Maps `audio` (P, F, window, blocks, channels) of F = vae_scale·n + 1 frames to the tokens of
    /// T = n + 1 latent frames: (T, P * context_tokens, output_dim), the first person's first.
    pub fn forward(&self, audio: &Tensor) -> Result<Tensor> {
        let (persons, frames, window, blocks, channels) = audio.dims5()?;
        if (window, (blocks, channels)) != (self.window, self.feature) {
            bail!(
                "audio windows are (…, {window}, {blocks}, {channels}), expected (…, {}, {}, {})",
                self.window,
                self.feature.0,
                self.feature.1
            )
        }
        if frames % self.vae_scale != 1 {
            bail!("audio windows cover {frames} frames, expected {}n + 1", self.vae_scale)
        }
        let first = audio.narrow(1, 0, 1)?;
        let latter = self.latter(audio)?;
        trace::record(|| "audio_proj_in_first".to_owned(), &first);
        trace::record(|| "audio_proj_in_latter".to_owned(), &latter);
        let first = self.proj1.forward(&first.flatten_from(2)?)?.relu()?; // (P, 1, hidden)
        let latter = self.proj1_vf.forward(&latter.flatten_from(2)?)?.relu()?; // (P, T - 1, hidden)
        let xs = Tensor::cat(&[first, latter], 1)?;
        let xs = self.proj3.forward(&self.proj2.forward(&xs)?.relu()?)?; // (P, T, tokens * output_dim)
        let (_, latent_frames, width) = xs.dims3()?;
        let xs = xs.reshape((persons, latent_frames, self.context_tokens, width / self.context_tokens))?;
        let dtype = xs.dtype();
        let xs = self.norm.forward(&xs.to_dtype(DType::F32)?)?.to_dtype(dtype)?;
        trace::record(|| "audio_proj_out".to_owned(), &xs);
        xs.transpose(0, 1)?.flatten(1, 2)
    }

    /// The features of the latent frames after the first, (P, T - 1, window + vae_scale - 1, blocks, channels):
    /// of a group's first frame those up to its centre, of its last frame those from its centre on, of the
    /// frames between only the centre.
    fn latter(&self, audio: &Tensor) -> Result<Tensor> {
        let (persons, frames, window, blocks, channels) = audio.dims5()?;
        let (scale, centre) = (self.vae_scale, window / 2);
        let groups = audio.narrow(1, 1, frames - 1)?.contiguous()?;
        // The group index joins the person's: candle knows up to six dimensions here.
        let groups = groups.reshape((persons * ((frames - 1) / scale), scale, window, blocks, channels))?;
        let slots =
            |frame: usize, start: usize, len: usize| groups.get_on_dim(1, frame)?.narrow(1, start, len);
        let mut parts = vec![slots(0, 0, centre + 1)?];
        for frame in 1..scale - 1 {
            parts.push(slots(frame, centre, 1)?);
        }
        parts.push(slots(scale - 1, centre, window - centre)?);
        let latter = Tensor::cat(&parts, 1)?;
        latter.reshape((persons, (frames - 1) / scale, window + scale - 1, blocks, channels))
    }
}
