//! `kernels/talkie.h` in Rust.

use std::ffi::{c_char, c_int, c_longlong, c_void};

pub(super) const BF16: c_int = 0;
pub(super) const F32: c_int = 1;

#[repr(C)]
pub(super) struct Attention {
    pub q: *mut c_void,
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub out: *mut c_void,
    pub lse: *mut c_void,
    pub q_strides: [c_longlong; 3],
    pub k_strides: [c_longlong; 3],
    pub v_strides: [c_longlong; 3],
    pub batch: c_int,
    pub heads: c_int,
    pub q_len: c_int,
    pub k_len: c_int,
    pub scale: f32,
}

#[repr(C)]
pub(super) struct Conv {
    pub xs: *mut c_void,
    pub weight: *mut c_void,
    pub bias: *mut c_void,
    pub out: *mut c_void,
    pub batch: c_int,
    pub size: [c_int; 3],
    pub in_channels: c_int,
    pub out_channels: c_int,
    pub kernel: [c_int; 3],
    pub stride: [c_int; 3],
    pub padding: [c_int; 3],
    pub out_size: [c_int; 3],
    pub dtype: c_int,
}

#[repr(C)]
pub(super) struct LayerNorm {
    pub xs: *mut c_void,
    pub ys: *mut c_void,
    pub gate: *mut c_void,
    pub sums: *mut c_void,
    pub weight: *mut c_void,
    pub bias: *mut c_void,
    pub out: *mut c_void,
    pub rows: c_int,
    pub dim: c_int,
    pub eps: f32,
    pub round: c_int,
    pub dtype: c_int,
}

#[repr(C)]
pub(super) struct RmsRope {
    pub xs: *mut c_void,
    pub weight: *mut c_void,
    pub cos: *mut c_void,
    pub sin: *mut c_void,
    pub out: *mut c_void,
    pub rows: c_int,
    pub dim: c_int,
    pub head_dim: c_int,
    pub tokens: c_int,
    pub eps: f32,
    pub dtype: c_int,
}

#[repr(C)]
pub(super) struct Gate {
    pub xs: *mut c_void,
    pub ys: *mut c_void,
    pub gate: *mut c_void,
    pub out: *mut c_void,
    pub rows: c_int,
    pub dim: c_int,
    pub dtype: c_int,
}

#[repr(C)]
pub(super) struct Bias {
    pub xs: *mut c_void,
    pub bias: *mut c_void,
    pub rows: c_int,
    pub dim: c_int,
    pub gelu: c_int,
    pub dtype: c_int,
}

#[repr(C)]
pub(super) struct UnitNorm {
    pub xs: *mut c_void,
    pub scale: *mut c_void,
    pub out: *mut c_void,
    pub rows: c_longlong,
    pub dim: c_int,
    pub silu: c_int,
    pub dtype: c_int,
}

/// `cudaStream_t`, which is the driver's stream.
pub(super) type Stream = *mut c_void;

unsafe extern "C" {
    pub(super) fn talkie_attention(args: *const Attention, stream: Stream) -> c_int;
    pub(super) fn talkie_conv(args: *const Conv, stream: Stream) -> c_int;
    pub(super) fn talkie_layer_norm(args: *const LayerNorm, stream: Stream) -> c_int;
    pub(super) fn talkie_rms_rope(args: *const RmsRope, stream: Stream) -> c_int;
    pub(super) fn talkie_gate(args: *const Gate, stream: Stream) -> c_int;
    pub(super) fn talkie_bias(args: *const Bias, stream: Stream) -> c_int;
    pub(super) fn talkie_unit_norm(args: *const UnitNorm, stream: Stream) -> c_int;
    pub(super) fn talkie_error_name(error: c_int) -> *const c_char;
}
