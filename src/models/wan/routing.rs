//! Which speaker a video token shows, and the rotary position that follows from it.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::ops::softmax_last_dim;

use super::Config;
use crate::nn::rope::Rope;
use crate::nn::{Mask, attention};

/// Scores of one block of rows in [`ref_attn_map_rounded`] at most, over all heads: 256 MB in f32.
const MAX_SCORES: usize = 1 << 26;

/// How much each token looks at each class of the first latent frame: queries `q` and keys `k`
/// (1, L, N, head_dim) after norm and rotation, 0/1 `masks` (classes, S) over the S tokens of that frame,
/// to (classes, L) in the dtype of `q`. The value is the softmax over the S keys, averaged over the class's mask
/// and over heads. The reference averages two halves of the heads, so that it leaves out the last of an odd
/// number, and so do we.
pub fn ref_attn_map(q: &Tensor, k: &Tensor, masks: &Tensor) -> Result<Tensor> {
    let (_, _, num_heads, head_dim) = q.dims4()?;
    let (classes, frame_len) = masks.dims2()?;
    let heads = num_heads / 2 * 2;
    if heads == 0 {
        bail!("the attention map averages two halves of the heads, and there is one head")
    }
    let masks = masks.to_dtype(DType::F32)?;
    // A class without tokens has the value 0, not 0 / 0.
    let counts = masks.sum_keepdim(D::Minus1)?.maximum(1f32)?; // (classes, 1)
    let scale = 1.0 / (head_dim as f64).sqrt();
    let (q, k) = (q.narrow(2, 0, heads)?, k.narrow(1, 0, frame_len)?.narrow(2, 0, heads)?);
    if q.dtype() != DType::F32 {
        let scaled = (q.to_dtype(DType::F32)? * scale)?.to_dtype(q.dtype())?;
        return ref_attn_map_rounded(&scaled, &k, &masks, &counts);
    }
    // An average of a mask under a softmax is an attention whose values are the mask.
    let values = masks.broadcast_div(&counts)?.t()?.reshape((1, frame_len, 1, classes))?;
    let values = values.broadcast_as((1, frame_len, heads, classes))?.contiguous()?;
    let map = attention(&q, &k, &values, scale, &Mask::None)?; // (1, L, heads, classes)
    map.mean(2)?.squeeze(0)?.t()?.contiguous()
}

/// [`ref_attn_map`] of scaled bf16 queries, rounded to bf16 wherever the reference rounds: which class is the
/// largest decides a token's position, and with three digits many are close.
fn ref_attn_map_rounded(q: &Tensor, k: &Tensor, masks: &Tensor, counts: &Tensor) -> Result<Tensor> {
    let (dtype, (_, len, heads, _)) = (q.dtype(), q.dims4()?);
    let round = |xs: Tensor| xs.to_dtype(dtype)?.to_dtype(DType::F32);
    let heads_first = |xs: &Tensor| xs.squeeze(0)?.transpose(0, 1)?.contiguous()?.to_dtype(DType::F32);
    let (q, k) = (heads_first(q)?, heads_first(k)?.t()?.contiguous()?); // (N, L, head_dim), (N, head_dim, S)
    let (masks, counts) = (masks.t()?.contiguous()?, round(counts.t()?)?); // (S, classes), (1, classes)
    let rows = (MAX_SCORES / (heads * masks.dim(0)?)).clamp(1, len);
    let mut blocks = Vec::new();
    for start in (0..len).step_by(rows) {
        let q = q.narrow(1, start, rows.min(len - start))?;
        let probs = round(softmax_last_dim(&round(q.contiguous()?.matmul(&k)?)?)?)?; // (N, rows, S)
        let sums = round(probs.broadcast_matmul(&masks)?)?; // (N, rows, classes)
        let maps = round(sums.broadcast_div(&counts)?)?;
        let half = |i: usize| {
            round((round(maps.narrow(0, i * heads / 2, heads / 2)?.sum(0)?)? / (heads / 2) as f64)?)
        };
        blocks.push((round((half(0)? + half(1)?)?)? / 2.0)?); // (rows, classes)
    }
    Tensor::cat(&blocks, 0)?.t()?.contiguous()?.to_dtype(dtype)
}

/// Moves `xs` from the range `source` (low, high) to the range `target`.
pub fn normalize_and_scale(xs: &Tensor, source: (f64, f64), target: (f64, f64)) -> Result<Tensor> {
    let unit = ((xs - source.0)? / (source.1 - source.0 + 1e-8))?;
    (unit * (target.1 - target.0))? + target.0
}

/// Masks and rotary positions of two speakers.
#[derive(Debug)]
pub(super) struct Routing {
    masks: Tensor, // (3, S)
    positions: Positions,
    head_dim: usize,
}

/// The rotary positions of speakers and background.
#[derive(Clone, Copy, Debug)]
pub(super) struct Positions {
    speakers: [(f64, f64); 2],
    background: f64,
}

impl Positions {
    /// The first speaker's range begins at 0, the second's ends at `class_range`, the background lies between.
    pub fn new(cfg: &Config) -> Self {
        let (range, interval) = (cfg.class_range as f64, cfg.class_interval as f64);
        Self {
            speakers: [(0.0, interval), (range - interval, range)],
            background: (cfg.class_range / 2) as f64,
        }
    }

    /// The rotation of audio keys: `tokens` of the first speaker, then as many of the second, each in the
    /// middle of the speaker's range.
    pub fn keys(&self, tokens: usize, head_dim: usize, device: &Device) -> Result<Rope> {
        let middle = |(low, high): (f64, f64)| vec![((low + high) / 2.0) as f32; tokens];
        let positions: Vec<f32> = self.speakers.iter().flat_map(|&range| middle(range)).collect();
        Rope::positions(&Tensor::new(positions, device)?, head_dim)
    }

    /// The position of each token by its column of `map` (3, L): the class with the largest value decides
    /// (the first of equals), and a speaker's value is stretched over the speaker's range: (L) in the dtype of
    /// `map`, as in the reference.
    pub fn queries(&self, map: &Tensor) -> Result<Tensor> {
        let class = |i: usize| map.get(i);
        let stretched = |i: usize| {
            let xs = class(i)?;
            let (low, high) = (xs.min_keepdim(0)?, xs.max_keepdim(0)?);
            let unit = xs.broadcast_sub(&low)?.broadcast_div(&((high - low)? + 1e-8)?)?;
            let (start, end) = self.speakers[i];
            (unit * (end - start))? + start
        };
        let (first, second, background) = (class(0)?, class(1)?, class(2)?);
        let otherwise = second.ge(&background)?.where_cond(
            &stretched(1)?,
            &Tensor::full(self.background as f32, second.shape(), second.device())?.to_dtype(map.dtype())?,
        )?;
        first.ge(&second.maximum(&background)?)?.where_cond(&stretched(0)?, &otherwise)
    }
}

impl Routing {
    /// `masks` (3, h, w) of person 1, person 2 and background, in latents, for tokens of `rows` × `cols`. Where
    /// a token covers several latents, the first one counts.
    pub fn new(cfg: &Config, masks: &Tensor, (rows, cols): (usize, usize)) -> Result<Self> {
        let [_, patch_rows, patch_cols] = cfg.patch_size;
        let expected = (3, rows * patch_rows, cols * patch_cols);
        if masks.dims3()? != expected {
            bail!("the masks of the speakers are {:?}, expected {expected:?}", masks.dims())
        }
        let masks = masks.reshape((3, rows, patch_rows, cols, patch_cols))?;
        let masks = masks.narrow(2, 0, 1)?.narrow(4, 0, 1)?.reshape((3, rows * cols))?;
        let masks = masks.gt(&masks.zeros_like()?)?.to_dtype(DType::F32)?;
        Ok(Self { masks, positions: Positions::new(cfg), head_dim: cfg.head_dim() })
    }

    /// The attention map (3, L) of self-attention's queries and keys, and the rotation of the audio queries.
    pub fn queries(&self, q: &Tensor, k: &Tensor) -> Result<(Tensor, Rope)> {
        let map = ref_attn_map(q, k, &self.masks)?;
        let rope = Rope::positions(&self.positions.queries(&map)?, self.head_dim)?;
        Ok((map, rope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(map: &[[f32; 3]; 3]) -> Vec<f32> {
        let map = Tensor::new(map, &Device::Cpu).unwrap();
        Positions::new(&Config::infinitetalk_14b()).queries(&map).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_largest_class_decides_and_the_first_of_equals() {
        assert_eq!(positions(&[[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.2, 0.9]]), [4.0, 24.0, 12.0]);
        // All equal: the first speaker, at the start of the range as nothing stands out.
        assert_eq!(positions(&[[0.5; 3]; 3]), [0.0; 3]);
        // The second speaker and the background equal.
        assert_eq!(positions(&[[0.0; 3], [0.5; 3], [0.5; 3]]), [20.0; 3]);
    }

    #[test]
    fn a_class_without_tokens_is_never_chosen() {
        let q = Tensor::randn(0f32, 1., (1, 6, 2, 4), &Device::Cpu).unwrap();
        let masks = Tensor::new(&[[1f32, 1., 0.], [0., 0., 0.], [0., 0., 1.]], &Device::Cpu).unwrap();
        let map = ref_attn_map(&q, &q, &masks).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(map[1], [0.0; 6]);
        assert!(map[0].iter().chain(&map[2]).all(|v| *v > 0.0));
    }

    #[test]
    fn with_full_masks_everything_is_the_first_speaker() {
        let device = &Device::Cpu;
        let q = Tensor::randn(0f32, 1., (1, 12, 4, 8), device).unwrap();
        let k = Tensor::randn(0f32, 1., (1, 12, 4, 8), device).unwrap();
        let full = Tensor::ones((1, 6), DType::F32, device).unwrap();
        let masks = Tensor::cat(&[&full, &full, &full.zeros_like().unwrap()], 0).unwrap();
        let map = ref_attn_map(&q, &k, &masks).unwrap();
        let rows = map.to_vec2::<f32>().unwrap();
        assert_eq!(rows[0], rows[1]);
        assert!(rows[0].iter().all(|v| (v - 1.0 / 6.0).abs() < 1e-6), "{rows:?}");
        let cfg = Config::infinitetalk_14b();
        let positions = Positions::new(&cfg).queries(&map).unwrap().to_vec1::<f32>().unwrap();
        assert!(positions.iter().all(|p| (0.0..=cfg.class_interval as f32).contains(p)), "{positions:?}");
    }

    #[test]
    fn an_odd_head_is_left_out_and_one_alone_is_refused() {
        let device = &Device::Cpu;
        let q = Tensor::randn(0f32, 1., (1, 4, 3, 8), device).unwrap();
        let masks = Tensor::new(&[[1f32, 0.], [0., 1.]], device).unwrap();
        let two = q.narrow(2, 0, 2).unwrap();
        let values = |q: &Tensor| ref_attn_map(q, q, &masks).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&q), values(&two));
        let one = q.narrow(2, 0, 1).unwrap();
        assert!(ref_attn_map(&one, &one, &masks).is_err());
    }

    #[test]
    fn rounding_where_the_reference_does_changes_the_map_by_no_more_than_that() {
        let device = &Device::Cpu;
        let q = Tensor::randn(0f32, 1., (1, 10, 4, 8), device).unwrap().to_dtype(DType::BF16).unwrap();
        let masks = Tensor::new(&[[1f32, 1., 0., 0.], [0., 0., 1., 0.], [0., 0., 0., 1.]], device).unwrap();
        let rounded = ref_attn_map(&q, &q, &masks).unwrap();
        assert_eq!(rounded.dtype(), DType::BF16);
        let exact = ref_attn_map(&q.to_dtype(DType::F32).unwrap(), &q.to_dtype(DType::F32).unwrap(), &masks);
        let difference = (rounded.to_dtype(DType::F32).unwrap() - exact.unwrap()).unwrap().abs().unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-2);
    }

    #[test]
    fn keys_lie_in_the_middle_of_the_speakers_ranges() {
        let keys = Positions::new(&Config::infinitetalk_14b()).keys(2, 8, &Device::Cpu).unwrap();
        let expected =
            Rope::positions(&Tensor::new(&[2f32, 2., 22., 22.], &Device::Cpu).unwrap(), 8).unwrap();
        let xs = Tensor::randn(0f32, 1., (1, 4, 3, 8), &Device::Cpu).unwrap();
        let values = |rope: &Rope| rope.rotate(&xs).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&keys), values(&expected));
    }
}
