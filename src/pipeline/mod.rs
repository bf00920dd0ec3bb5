//! From a request, decoded inputs and weight files to an encoded video.
//!
//! [`Pipeline`] plans how a video fits into memory ([`MemoryPlan`]), has the networks loaded that it does not keep, and
//! works with each as soon as it is there: voices, prompts and portrait are encoded while the DiT is being read.

pub mod color;
mod generate;
mod guidance;
mod infinitetalk;
mod load;
mod memory;
mod plan;
mod progress;
mod settings;
mod shelf;
mod supply;
pub mod teacache;
mod texts;
pub mod windows;

pub use generate::{Inputs, Job, Loading, Pipeline, Timings, Video, num_frames};
pub use guidance::{Apg, Branch, Combine, Guidance, orthogonal};
pub use infinitetalk::{
    Conditioning, Control, Generated, Networks, Noise, Reference, Sampling, WindowMaker, generate_windows,
};
pub use memory::{Activations, Budget, Extent, MEMORY_PLAN, MemoryPlan, Place, Rung, Weights};
pub use plan::{Plan, Window};
pub use progress::{Cancel, LoadProgress, Progress, Stage};
pub use settings::{FPS, Settings};
