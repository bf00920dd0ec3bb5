//! A ceiling for constant-quality encoding.
//!
//! A constant quantiser keeps the quality even and lets the bitrate follow the picture: 1–3 Mbit/s for
//! a talking head. Noise would take 113 Mbit/s. The guard leaves the quantiser alone below the ceiling
//! and raises it above.

/// What two seconds of video may take: 8 Mbit/s.
const WINDOW_BYTES: u64 = 2 * 8_000_000 / 8;

/// The coarsest quantiser the guard asks for; H.264 ends at 51.
pub(super) const MAX_QUANTIZER: u8 = 48;

/// Watches the sizes of the last two seconds of frames and tells the next quantiser.
///
/// Six quantiser steps halve the bitrate, so a frame of `size` bytes at quantiser `q` would have taken
/// about `size · (9/8)^(q − base)` at `base` (the sixth root of 2 is 1.1225). The guard adds up these
/// estimates over the window and takes the finest quantiser at which the sum fits. It works in integers
/// so that the same frames make the same file on every machine.
#[derive(Debug)]
pub(super) struct BitrateGuard {
    base: u8,
    quantizer: u8,
    /// Bytes each recent frame would have taken at `base`, oldest overwritten first.
    costs: Vec<u64>,
    next: usize,
}

impl BitrateGuard {
    pub(super) fn new(base: u8) -> Self {
        Self { base, quantizer: base, costs: vec![0; super::GOP_FRAMES as usize], next: 0 }
    }

    /// The quantiser for the next frame.
    pub(super) fn quantizer(&self) -> u8 {
        self.quantizer
    }

    /// Takes the size of the frame just made at [`Self::quantizer`].
    pub(super) fn observe(&mut self, size_bytes: usize) {
        let steps = self.base..self.quantizer;
        self.costs[self.next] = steps.fold(size_bytes as u64, |cost, _| cost + cost / 8);
        self.next = (self.next + 1) % self.costs.len();
        let mut window: u64 = self.costs.iter().sum();
        self.quantizer = self.base;
        while window > WINDOW_BYTES && self.quantizer < MAX_QUANTIZER {
            window = window * 8 / 9;
            self.quantizer += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames that would take `at_base` bytes at the base quantiser; returns (bytes, quantiser) of each.
    fn run(guard: &mut BitrateGuard, at_base: u64, frames: usize) -> Vec<(u64, u8)> {
        let encode = |guard: &mut BitrateGuard| {
            let quantizer = guard.quantizer();
            let size = (guard.base..quantizer).fold(at_base, |size, _| size * 8 / 9);
            guard.observe(size as usize);
            (size, quantizer)
        };
        (0..frames).map(|_| encode(guard)).collect()
    }

    #[test]
    fn a_talking_head_never_touches_the_quantiser() {
        let mut guard = BitrateGuard::new(20);
        assert!(run(&mut guard, 3_000_000 / 8 / 25, 500).iter().all(|&(_, quantizer)| quantizer == 20));
    }

    #[test]
    fn noise_settles_below_the_ceiling_and_calm_restores_the_quality() {
        let mut guard = BitrateGuard::new(20);
        let noise = run(&mut guard, 113_000_000 / 8 / 25, 200);
        let settled: u64 = noise[150..].iter().map(|&(size, _)| size).sum();
        assert!((WINDOW_BYTES * 8 / 10..=WINDOW_BYTES).contains(&settled), "{settled}");
        assert_eq!(noise[199].1, noise[150].1, "no oscillation");
        let calm = run(&mut guard, 5_000, 60);
        assert_eq!(calm[59].1, 20);
    }

    #[test]
    fn the_quantiser_has_an_end() {
        let mut guard = BitrateGuard::new(18);
        for _ in 0..100 {
            guard.observe(50_000_000);
        }
        assert_eq!(guard.quantizer(), MAX_QUANTIZER);
    }
}
