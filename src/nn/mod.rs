//! What two or more networks share. Every operation takes and returns tensors in the dtype of its input
//! and computes in f32 inside; activations are channels-last: tokens (B, L, D), heads (B, L, N, D),
//! video (B, T, H, W, C), audio (B, L, C).

mod activation;
mod attention;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod kernels;
mod linear;
mod norm;
pub mod rope;
pub mod timestep;
pub mod trace;
mod unit_norm;
pub mod work;

pub use activation::{gelu_erf, gelu_tanh, silu};
pub use attention::{Mask, attention};
pub use conv::{Conv1d, Conv2d, Conv3d, Padding2d};
pub use linear::Linear;
pub use norm::{LayerNorm, RmsNorm, Sum, layer_norm_modulated, residual_gate, sum_and_layer_norm_modulated};
pub use unit_norm::{unit_norm, unit_norm_silu};
