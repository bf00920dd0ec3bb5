//! Which audio a window of video hears: pure index arithmetic, and the gathering by it.
//!
//! Every video frame hears five frames of audio features: its own and two on either side
//! (`wan/multitalk.py` of MeiGen-AI/InfiniteTalk at 0107cd9). Frames before the start and after the end
//! repeat the first and the last one; before a window that runs past the end is gathered, the features are
//! extended by their own mirror image ([`mirror_tail`]).

use candle_core::{Result, Tensor, bail};

/// Audio frames that one video frame hears.
pub const CONTEXT_FRAMES: usize = 5;

/// Audio frames on either side of a video frame's own.
const REACH: usize = CONTEXT_FRAMES / 2;

/// Mirrored frames beyond the end of the last window: its last frame looks ahead by `REACH`, and the
/// reference adds one more.
const MIRROR_MARGIN: usize = REACH + 1;

/// Frames of video that `samples` of 16 kHz audio last in the reference, at 25 per second: rounded down.
pub fn whole_frames(samples: usize) -> usize {
    // The order of operations is the reference's, in f64.
    (samples as f64 / 16000.0 * 25.0) as usize
}

/// The audio frames that each of `frames` video frames from `start` on hears, of `total` there are.
pub fn indices(start: usize, frames: usize, total: usize) -> Vec<[usize; CONTEXT_FRAMES]> {
    let last = total.saturating_sub(1);
    (start..start + frames)
        .map(|centre| std::array::from_fn(|offset| (centre + offset).saturating_sub(REACH).min(last)))
        .collect()
}

/// Appends the mirror image of the end to `embeds` (N, layers, C) when a window that ends before frame
/// `end` reaches or passes their end: `end − N + 3` frames, the last one first, but no more than there are.
pub fn mirror_tail(embeds: &Tensor, end: usize) -> Result<Tensor> {
    let total = embeds.dim(0)?;
    if end < total {
        return Ok(embeds.clone());
    }
    let mirrored = (end - total + MIRROR_MARGIN).min(total);
    let order: Vec<u32> = (total - mirrored..total).rev().map(|i| i as u32).collect();
    let tail = embeds.index_select(&Tensor::new(order, embeds.device())?, 0)?;
    Tensor::cat(&[embeds, &tail], 0)
}

/// The audio features of a window of `frames` video frames from `start` on, one entry of `audio_embeds`
/// (N, layers, C) per person; the result is (P, F, 5, layers, C).
pub fn gather(audio_embeds: &[Tensor], start: usize, frames: usize) -> Result<Tensor> {
    let persons = audio_embeds.iter().map(|embeds| {
        let (total, layers, channels) = embeds.dims3()?;
        if total == 0 {
            bail!("a person's audio features have no frame");
        }
        let rows: Vec<u32> = indices(start, frames, total).as_flattened().iter().map(|&i| i as u32).collect();
        let rows = Tensor::new(rows, embeds.device())?;
        embeds.index_select(&rows, 0)?.reshape((frames, CONTEXT_FRAMES, layers, channels))
    });
    Tensor::stack(&persons.collect::<Result<Vec<_>>>()?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn ramp(frames: usize) -> Tensor {
        Tensor::arange(0f32, frames as f32, &Device::Cpu).unwrap().reshape((frames, 1, 1)).unwrap()
    }

    fn values(xs: &Tensor) -> Vec<f32> {
        xs.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn both_ends_repeat_their_frame() {
        assert_eq!(indices(0, 2, 3), [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2]]);
        assert_eq!(indices(4, 1, 3), [[2; 5]]);
        assert_eq!(indices(7, 1, 100), [[5, 6, 7, 8, 9]]);
    }

    #[test]
    fn the_mirror_starts_with_the_last_frame() {
        assert_eq!(values(&mirror_tail(&ramp(5), 6).unwrap()), [0., 1., 2., 3., 4., 4., 3., 2., 1.]);
        assert_eq!(values(&mirror_tail(&ramp(5), 5).unwrap()), [0., 1., 2., 3., 4., 4., 3., 2.]);
        assert_eq!(values(&mirror_tail(&ramp(5), 4).unwrap()), [0., 1., 2., 3., 4.]);
    }

    #[test]
    fn the_mirror_is_no_longer_than_what_it_shows() {
        assert_eq!(values(&mirror_tail(&ramp(2), 81).unwrap()), [0., 1., 1., 0.]);
    }

    #[test]
    fn persons_of_different_length_share_a_window() {
        let window = gather(&[ramp(10), ramp(3)], 1, 4).unwrap();
        assert_eq!(window.dims(), [2, 4, 5, 1, 1]);
        assert_eq!(values(&window)[35..], [2.0; 5]);
        assert!(gather(&[ramp(0)], 0, 1).is_err());
    }

    #[test]
    fn frames_are_counted_as_the_reference_does() {
        let counted: Vec<_> = [639, 640, 15999, 16000, 51840].map(whole_frames).into();
        assert_eq!(counted, [0, 1, 24, 25, 81]);
    }
}
