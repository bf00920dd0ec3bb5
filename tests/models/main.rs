//! Parity with the reference implementation: every tensor of the golden folder against our networks.
//!
//! The folder is `$TALKIE_GOLDENS`, else the lean copy in `tests/golden`. Dimensions, seeds, buckets and
//! settings come from that folder, none from this code.

mod audio;
mod clip;
mod coverage;
mod dit;
mod image;
mod lora;
mod manifest;
mod pipeline;
mod quant;
mod random;
mod rooms;
mod samplers;
mod support;
mod umt5;
mod vae;
mod wav2vec2;
