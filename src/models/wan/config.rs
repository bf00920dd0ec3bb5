//! Dimensions of the DiT.

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

/// Dimensions and switches of the DiT, under the reference's names. A field that is missing where a config is
/// read has the value of [`Config::infinitetalk_14b`]; keys that are not listed here are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default = "Config::infinitetalk_14b")]
pub struct Config {
    /// Only "i2v" is supported.
    pub model_type: String,
    /// Frames, rows and columns of one token, in latents; one frame only.
    pub patch_size: [usize; 3],
    /// Rows to which the text is padded with zeros.
    pub text_len: usize,
    /// Channels in: noisy latents, 4 of mask, latents of the condition.
    pub in_dim: usize,
    /// Width of the tokens.
    pub dim: usize,
    /// Hidden width of the feed-forward layers.
    pub ffn_dim: usize,
    /// Width of the sinusoidal timestep embedding.
    pub freq_dim: usize,
    /// Width of the text rows.
    pub text_dim: usize,
    /// Latent channels out.
    pub out_dim: usize,
    /// Attention heads; `dim / num_heads` is even.
    pub num_heads: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Only [-1, -1], attention over everything, is supported.
    pub window_size: [i64; 2],
    /// Whether queries and keys are normalised; only true is supported.
    pub qk_norm: bool,
    /// Whether the input of the text and image attention is normalised with weights; only true is supported.
    pub cross_attn_norm: bool,
    /// Added to the variance in the norms of the blocks and the head.
    pub eps: f64,
    /// Width of the image rows.
    pub clip_dim: usize,
    /// Feature frames around each video frame; odd.
    pub audio_window: usize,
    /// Layers of the audio encoder.
    pub audio_blocks: usize,
    /// Width of one audio feature.
    pub audio_channels: usize,
    /// Hidden width of the audio projector.
    pub intermediate_dim: usize,
    /// Width of the audio tokens.
    pub output_dim: usize,
    /// Audio tokens of each person and latent frame.
    pub context_tokens: usize,
    /// Video frames of one latent frame, at least 2.
    pub vae_scale: usize,
    /// Whether the input of the audio attention is normalised with weights; only true is supported.
    pub norm_input_visual: bool,
    /// Whether the audio tokens are normalised; only true is supported.
    pub norm_output_audio: bool,
    /// End of the range of rotary positions that tells speakers apart: the second's end there.
    pub class_range: usize,
    /// Rotary positions of one speaker.
    pub class_interval: usize,
}

impl Config {
    /// Wan 2.1 I2V 14B with the audio layers of InfiniteTalk.
    pub fn infinitetalk_14b() -> Self {
        Self {
            model_type: "i2v".to_owned(),
            patch_size: [1, 2, 2],
            text_len: 512,
            in_dim: 36,
            dim: 5120,
            ffn_dim: 13824,
            freq_dim: 256,
            text_dim: 4096,
            out_dim: 16,
            num_heads: 40,
            num_layers: 40,
            window_size: [-1, -1],
            qk_norm: true,
            cross_attn_norm: true,
            eps: 1e-6,
            clip_dim: 1280,
            audio_window: 5,
            audio_blocks: 12,
            audio_channels: 768,
            intermediate_dim: 512,
            output_dim: 768,
            context_tokens: 32,
            vae_scale: 4,
            norm_input_visual: true,
            norm_output_audio: true,
            class_range: 24,
            class_interval: 4,
        }
    }

    /// Channels of one attention head.
    pub fn head_dim(&self) -> usize {
        self.dim / self.num_heads
    }

    /// Fails, naming the field, where a value is one that this network does not implement.
    pub(super) fn validate(&self) -> Result<()> {
        let Self { dim, num_heads, patch_size, audio_window, vae_scale, freq_dim, .. } = self;
        if self.model_type != "i2v" {
            bail!("`model_type` is {:?}, only \"i2v\" is supported", self.model_type)
        }
        for (name, value) in [
            ("qk_norm", self.qk_norm),
            ("cross_attn_norm", self.cross_attn_norm),
            ("norm_input_visual", self.norm_input_visual),
            ("norm_output_audio", self.norm_output_audio),
        ] {
            if !value {
                bail!("`{name}` is false, only true is supported")
            }
        }
        if self.window_size != [-1, -1] {
            bail!("`window_size` is {:?}, only [-1, -1] is supported", self.window_size)
        }
        if patch_size[0] != 1 || patch_size.contains(&0) {
            bail!("`patch_size` is {patch_size:?}, expected one frame and at least one row and column")
        }
        if *num_heads == 0 || dim % num_heads != 0 || (dim / num_heads) % 2 != 0 {
            bail!("`dim` is {dim} with {num_heads} heads, expected an even number of channels per head")
        }
        if freq_dim % 2 != 0 || *freq_dim == 0 {
            bail!("`freq_dim` is {freq_dim}, expected an even number")
        }
        if audio_window % 2 == 0 {
            bail!("`audio_window` is {audio_window}, expected an odd number")
        }
        if *vae_scale < 2 {
            bail!("`vae_scale` is {vae_scale}, expected at least 2")
        }
        if self.class_interval > self.class_range {
            bail!(
                "`class_interval` is {}, more than `class_range`, {}",
                self.class_interval,
                self.class_range
            )
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    #[test]
    fn refuses_what_it_does_not_implement_by_name() {
        assert!(Config::infinitetalk_14b().validate().is_ok());
        type Change = fn(&mut Config);
        let broken: [(&str, Change); 10] = [
            ("model_type", |c| c.model_type = "t2v".to_owned()),
            ("qk_norm", |c| c.qk_norm = false),
            ("norm_output_audio", |c| c.norm_output_audio = false),
            ("window_size", |c| c.window_size = [4, 4]),
            ("patch_size", |c| c.patch_size = [2, 2, 2]),
            ("dim", |c| c.num_heads = 7),
            ("freq_dim", |c| c.freq_dim = 255),
            ("audio_window", |c| c.audio_window = 4),
            ("vae_scale", |c| c.vae_scale = 1),
            ("class_interval", |c| c.class_interval = 25),
        ];
        for (name, change) in broken {
            let mut cfg = Config::infinitetalk_14b();
            change(&mut cfg);
            let message = cfg.validate().expect_err(name).to_string();
            assert!(message.contains(&format!("`{name}`")), "{name}: {message}");
        }
    }

    #[test]
    fn missing_fields_are_those_of_the_checkpoint_and_unknown_ones_are_ignored() {
        let cfg: Config = serde_json::from_str(r#"{"dim": 80, "weight_init": false}"#).unwrap();
        assert_eq!(cfg, Config { dim: 80, ..Config::infinitetalk_14b() });
    }
}
