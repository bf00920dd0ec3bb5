//! What a chunk leaves for the next one.

use candle_core::{Result, Tensor};

/// Frames of the past for each layer that looks at them. Layers take their slots in the order in which they run,
/// which is the same for every chunk.
#[derive(Default)]
pub(super) struct Cache {
    slots: Vec<Option<Tensor>>,
    next: usize,
    chunks: usize,
}

impl Cache {
    /// Begins the next chunk: slots are handed out from the first again.
    pub(super) fn start_chunk(&mut self) {
        self.next = 0;
        self.chunks += 1;
    }

    /// Whether this is the clip's first chunk, of one frame.
    pub(super) fn is_first_chunk(&self) -> bool {
        self.chunks <= 1
    }

    /// The slot of the layer that runs now.
    pub(super) fn slot(&mut self) -> &mut Option<Tensor> {
        if self.next == self.slots.len() {
            self.slots.push(None);
        }
        self.next += 1;
        &mut self.slots[self.next - 1]
    }
}

/// The last `len` frames of `past` (1, P, H, W, C) followed by `xs` (1, T, H, W, C), or all where there are fewer.
/// The result does not keep a longer `xs` alive, and is not alive beside a `past` of which it holds nothing.
pub(super) fn last_frames(past: Option<Tensor>, xs: &Tensor, len: usize) -> Result<Tensor> {
    let frames = xs.dim(1)?;
    if frames > len {
        drop(past);
        return xs.narrow(1, frames - len, len)?.force_contiguous();
    }
    match past {
        Some(past) if frames < len => {
            let kept = past.dim(1)?.min(len - frames);
            Tensor::cat(&[&past.narrow(1, past.dim(1)? - kept, kept)?, xs], 1)
        }
        _ => Ok(xs.clone()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn frames(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (1, values.len(), 1, 1, 1), &Device::Cpu).unwrap()
    }

    fn values(xs: &Tensor) -> Vec<f32> {
        xs.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_last_frames_are_of_the_chunk_and_before_it_of_the_past() -> Result<()> {
        let past = frames(&[1.0, 2.0]);
        assert_eq!(values(&last_frames(None, &frames(&[3.0]), 2)?), [3.0]);
        assert_eq!(values(&last_frames(Some(past.clone()), &frames(&[3.0]), 2)?), [2.0, 3.0]);
        assert_eq!(values(&last_frames(Some(past.clone()), &frames(&[3.0, 4.0]), 2)?), [3.0, 4.0]);
        assert_eq!(values(&last_frames(Some(past.clone()), &frames(&[3.0, 4.0, 5.0, 6.0]), 2)?), [5.0, 6.0]);
        assert_eq!(values(&last_frames(Some(past.clone()), &frames(&[3.0, 4.0]), 1)?), [4.0]);
        Ok(())
    }

    #[test]
    fn slots_are_handed_out_in_the_same_order_for_every_chunk() {
        let mut cache = Cache::default();
        cache.start_chunk();
        assert!(cache.is_first_chunk());
        *cache.slot() = Some(frames(&[1.0]));
        assert!(cache.slot().is_none());
        cache.start_chunk();
        assert!(!cache.is_first_chunk());
        assert!(cache.slot().is_some());
        assert!(cache.slot().is_none());
    }
}
