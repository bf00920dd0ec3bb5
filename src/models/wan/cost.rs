//! What one pass costs: operations and bytes, from the shapes alone.

use candle_core::DType;

use super::Config;

/// Bytes of scores that the attention composed of candle's operations holds, three tensors of them.
const COMPOSED_SCORES: u64 = 3 * (1 << 28);

/// The sizes of one generation that the DiT sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Latent frames, rows and columns of a window.
    pub latents: (usize, usize, usize),
    /// Rows of the image encoder.
    pub image_rows: usize,
    /// One or two persons.
    pub persons: usize,
    /// What the network computes in.
    pub dtype: DType,
    /// Whether the CPU's own kernels run; else candle's operations are composed.
    pub on_cpu: bool,
}

impl Config {
    /// Tokens of latents (T, h, w).
    pub fn tokens(&self, (frames, height, width): (usize, usize, usize)) -> usize {
        let [_, rows, cols] = self.patch_size;
        frames * (height / rows) * (width / cols)
    }

    /// Multiplications and additions of one pass over `tokens` tokens: those of the blocks' linear layers and
    /// attentions, which are all but a thousandth.
    pub fn forward_flops(&self, tokens: usize, image_rows: usize) -> f64 {
        let (l, d) = (tokens as f64, self.dim as f64);
        // q, k, v, o; q, o of the text and image attention; q, proj of the audio attention; the two of the FFN.
        let linear = 2.0 * l * d * (8.0 * d + 2.0 * self.ffn_dim as f64);
        let keys = l + (self.text_len + image_rows + self.context_tokens) as f64;
        self.num_layers as f64 * (linear + 4.0 * l * keys * d)
    }

    /// The most bytes that are alive in one pass beside the weights and what [`Config::kept_bytes`] counts.
    ///
    /// With X the bytes of all tokens (L · D), H those of the hidden layer (L · ffn_dim), counted in
    /// `Block::forward`: in the self-attention there are the embedded tokens, the residual stream, its normalised rows,
    /// q, k, v, the keys transposed and the result, 8 X; in the feed-forward layer the embedded tokens, the residual
    /// stream before and within the block, normalised rows or result, and hidden rows, 4 X + H. Composed of candle's
    /// operations, the self-attention also holds q, k and v in f32 and its result twice, and the feed-forward layer its
    /// hidden rows twice.
    pub fn forward_bytes(&self, extent: &Extent) -> u64 {
        let tokens = self.tokens(extent.latents) as u64;
        let (dim, hidden) = (self.dim as u64, self.ffn_dim as u64);
        let size = extent.dtype.size_in_bytes() as u64;
        let (xs, hs, xs_f32) = (tokens * dim * size, tokens * hidden * size, tokens * dim * 4);
        let rotation = tokens * self.head_dim() as u64 * 4;
        rotation
            + match extent.on_cpu {
                true => (8 * xs).max(4 * xs + hs),
                false => (8 * xs + 3 * xs_f32 + COMPOSED_SCORES).max(4 * xs + 2 * hs),
            }
    }

    /// Bytes of keys and values that a window keeps: of text and image for each of `prompts` prompts, and of the
    /// audio, heard and silent.
    pub fn kept_bytes(&self, extent: &Extent, prompts: usize) -> u64 {
        let (frames, ..) = extent.latents;
        let context = prompts * (self.text_len + extent.image_rows);
        let audio = frames * self.context_tokens * (extent.persons + 1);
        (2 * self.num_layers * (context + audio) * self.dim * extent.dtype.size_in_bytes()) as u64
    }

    /// Bytes of one tensor of all tokens: what TeaCache keeps for each guidance pass.
    pub fn token_bytes(&self, extent: &Extent) -> u64 {
        (self.tokens(extent.latents) * self.dim * extent.dtype.size_in_bytes()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both are published for this project's reference: 1.825 PFLOP at 32,760 tokens, and 0.95 in linear layers plus
    /// 0.92 in the attention at 640 × 640 × 81.
    #[test]
    fn operations_are_those_that_were_counted_before() {
        let cfg = Config::infinitetalk_14b();
        let pflop = |latents| cfg.forward_flops(cfg.tokens(latents), 257) / 1e15;
        assert_eq!(cfg.tokens((21, 60, 104)), 32_760);
        assert!((pflop((21, 60, 104)) - 1.825).abs() < 0.005, "{}", pflop((21, 60, 104)));
        assert_eq!(cfg.tokens((21, 80, 80)), 33_600);
        assert!((pflop((21, 80, 80)) - (0.95 + 0.92)).abs() < 0.03, "{}", pflop((21, 80, 80)));
    }
}
