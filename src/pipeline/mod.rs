//! From loaded networks and decoded inputs to an encoded video.

pub mod color;
mod generate;
mod guidance;
mod infinitetalk;
mod load;
mod plan;
mod progress;
mod settings;
pub mod teacache;
pub mod windows;

pub use generate::{Inputs, Timings, Video, num_frames};
pub use guidance::{Apg, Branch, Combine, Guidance, orthogonal};
pub use infinitetalk::{Conditioning, Control, Networks, Noise, Sampling, WindowMaker, generate_windows};
pub use load::{LoadOptions, Pipeline, stored_files};
pub use plan::{Plan, Window};
pub use progress::{Cancel, Progress, Stage};
pub use settings::{FPS, Settings};
