//! The networks of InfiniteTalk. They know tensors and [`candle_nn::VarBuilder`] only: no paths, no
//! downloads, no tokenizer, and no other network.

pub mod clip_vision;
pub mod umt5;
pub mod wan;
pub mod wan_vae;
pub mod wav2vec2;
