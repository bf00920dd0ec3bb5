//! Talkie's inference library: weight files, a portrait, a voice and a prompt in; video frames and an
//! encoded MP4 out.
//!
//! ```text
//!  voice ──decode──► 16 kHz ──wav2vec2──► audio_embeds ─┐
//!  prompt ─tokenize─► ids ────UMT5──────► context ──────┤   per window          encoder thread
//!  portrait ─bucket─► frame ──CLIP──────► image_embeds ─┼─► DiT × steps ─► VAE ─► colour ─► H.264 ─┐
//!                       └─────VAE───────► latents ──────┘      ▲                    │              ├─► MP4
//!                                                              └── motion frames ◄──┘   voice ─AAC─┘
//! ```
//!
//! The library opens no socket and reads no environment variable: `handler`, the service around it, does.
//!
//! | module | holds |
//! |---|---|
//! | [`request`] | what a caller may ask for, with units, ranges and defaults |
//! | [`registry`] | `models.toml`: which networks, files, dtypes and defaults a model consists of |
//! | [`prepared`] | weights converted once: bf16 or fp8, LoRA merged, in load order |
//! | [`weights`] | weight files → tensors, strictly; LoRA merge; quantised layouts; seeded random weights |
//! | [`text_cleaning`] | prompt → text without entities, mojibake and stray characters |
//! | [`tokenizer`] | cleaned prompt → UMT5 ids |
//! | [`models`] | the networks: Wan DiT with audio adapter, Wan VAE, UMT5, CLIP ViT-H, wav2vec2 |
//! | [`nn`] | what two or more networks share |
//! | [`scheduler`] | time steps and the Euler rule |
//! | [`pipeline`] | loading in order, the memory plan, the window loop, guidance, caching, colour matching, progress |
//! | [`media`] | audio and images in, H.264 + AAC in MP4 out |

pub mod device;
mod error;
pub mod media;
pub mod models;
pub mod nn;
pub mod pipeline;
pub mod prepared;
pub mod registry;
pub mod request;
pub mod scheduler;
pub mod text_cleaning;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, ErrorKind, Result};
