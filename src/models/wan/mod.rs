//! The DiT: noisy latents, condition latents, text, image and audio to the velocity of the latents.
//!
//! Wan 2.1's image-to-video transformer (arXiv 2503.20314) with the audio layers of InfiniteTalk
//! (arXiv 2508.14033), after `wan/modules/multitalk_model.py` and `wan/modules/attention.py` of
//! MeiGen-AI/InfiniteTalk at 0107cd9. Weights: the union of `diffusion_pytorch_model-*.safetensors` of
//! Wan2.1-I2V-14B-480P and `infinitetalk.safetensors`.
//!
//! Where we differ, and why:
//! - keys and values of text, image and audio are made once ([`Model::encode_context`],
//!   [`Model::encode_audio`]), not at every step;
//! - the attention map that tells speakers apart is made only when there are two, and as an attention whose
//!   values are the masks, so that no matrix of tokens × tokens exists;
//! - a speaker whose mask is empty has the value 0 in that map, where the reference divides by zero;
//! - rotary angles are made in f64 and applied in f32, where the reference rotates in f64;
//! - blocks may come from elsewhere one by one ([`Model::with_streamed_blocks`]), for devices that do not hold them all;
//! - caching between steps lives in `pipeline::teacache`, which calls [`Model::embed`], [`Model::blocks`] and
//!   [`Model::head`] one by one.

mod attention;
mod audio;
mod block;
mod blocks;
mod config;
mod cost;
mod head;
mod model;
mod routing;

pub use blocks::BlockSource;
pub use config::Config;
pub use cost::Extent;
pub use model::{Audio, Context, Embedded, Model};
pub use routing::{normalize_and_scale, ref_attn_map};
