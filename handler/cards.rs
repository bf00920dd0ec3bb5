//! GPUs that a video can be made on: what they can do, and what they cost.

use talkie::pipeline::Budget;

/// Where the prices are from. They change; the page has today's.
pub const PRICE_SOURCE: &str = "https://docs.runpod.io/serverless/pricing, flex workers";
/// When they were read.
pub const PRICES_READ: &str = "2026-11-27";

/// The share of its rate that a card is taken to reach until it has been measured: what this project asks of an H200
/// (45 % of the matrix products' rate in the DiT), taken for all others as well.
const EFFICIENCY: f64 = 0.45;

/// Host memory of such a worker is not known beforehand; what of it a plan needs stands in the plan.
const HOST_BYTES: u64 = u64::MAX;

/// One kind of GPU.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    /// Its name.
    pub name: &'static str,
    /// RunPod's name for the pool that it is in.
    pub pool: &'static str,
    /// Bytes of memory that it is sold with; a little more is there.
    pub memory_bytes: u64,
    /// Dense bf16 products with f32 sums, in 10¹² operations a second: NVIDIA's data sheets, for Hopper the rate that
    /// large products reach.
    pub tflops: f64,
    /// Dollars for a second of a worker.
    pub usd_per_second: f64,
}

/// The cards, the smallest first.
pub const CARDS: [Card; 5] = [
    Card { name: "RTX 4090", pool: "ADA_24", memory_bytes: 24 * GB, tflops: 165.0, usd_per_second: 0.00031 },
    Card { name: "L40S", pool: "ADA_48_PRO", memory_bytes: 48 * GB, tflops: 362.0, usd_per_second: 0.00053 },
    Card { name: "A100", pool: "AMPERE_80", memory_bytes: 80 * GB, tflops: 312.0, usd_per_second: 0.00076 },
    Card { name: "H100", pool: "ADA_80_PRO", memory_bytes: 80 * GB, tflops: 790.0, usd_per_second: 0.00116 },
    Card { name: "H200", pool: "HOPPER_141", memory_bytes: 141 * GB, tflops: 790.0, usd_per_second: 0.00155 },
];

const GB: u64 = 1_000_000_000;

impl Card {
    /// What of its memory a video may use.
    pub fn budget(&self) -> Budget {
        Budget::of_gpu(self.memory_bytes, HOST_BYTES)
    }

    /// Seconds for this much work, until it is measured.
    pub fn seconds(&self, work: &Work) -> f64 {
        work.seconds(self.tflops * 1e12 * EFFICIENCY)
    }
}

/// Operations of a video.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Of the DiT, in bf16.
    pub dit: f64,
    /// Of the video autoencoder, in f32, for which tensor cores take twice as long.
    pub vae: f64,
}

impl Work {
    /// At so many operations of the DiT a second.
    pub fn seconds(&self, rate: f64) -> f64 {
        (self.dit + 2.0 * self.vae) / rate
    }
}
