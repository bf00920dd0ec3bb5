//! Parity with the reference implementation: every tensor of the golden folder against our networks.
//!
//! The folder is `$TALKIE_GOLDENS`, else the lean copy in `tests/golden`. Dimensions, seeds, buckets and
//! settings come from that folder, none from this code.

mod audio;
mod clip;
mod coverage;
mod dit;
mod image;
mod kernels;
mod lora;
mod manifest;
mod memory;
mod peak;
mod pipeline;
mod prepared;
mod quant;
mod random;
mod rooms;
mod samplers;
mod studio;
mod support;
mod umt5;
mod vae;
mod warm;
mod wav2vec2;
mod weights;

#[global_allocator]
static ALLOCATOR: peak::Counting = peak::Counting;
