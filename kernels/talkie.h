// What the kernels offer to Rust; src/nn/cuda/ffi.rs declares the same. Every function launches on `stream`, waits for
// nothing and returns a cudaError_t, whose values are those of the driver's CUresult.
#pragma once
#include <cuda_runtime.h>

extern "C" {

// An element of a tensor: bf16, or f32.
enum TalkieDtype { TALKIE_BF16 = 0, TALKIE_F32 = 1 };

// Softmax attention without a mask, bf16 with heads of 128 channels. Strides are in elements; channels are adjacent.
struct TalkieAttention {
    void *q, *k, *v; // (batch, length, heads, 128)
    void *out;       // (batch, q_len, heads, 128), contiguous
    void *lse;       // (batch, heads, q_len) in f32, scratch
    long long q_strides[3], k_strides[3], v_strides[3]; // batch, row, head
    int batch, heads, q_len, k_len;
    float scale;
};
int talkie_attention(const TalkieAttention *args, cudaStream_t stream);
// For compute capability 9.0, and for all others from 8.0 on.
int talkie_attention_sm90(const TalkieAttention *args, cudaStream_t stream);
int talkie_attention_sm80(const TalkieAttention *args, cudaStream_t stream);

// A 3D convolution as an implicit matrix product, channels last; f32 is multiplied as TF32. All is contiguous.
struct TalkieConv {
    void *xs;     // (batch, frames, height, width, in)
    void *weight; // (out, kernel[0], kernel[1], kernel[2], in)
    void *bias;   // (out)
    void *out;    // (batch, out_size[0], out_size[1], out_size[2], out)
    int batch, size[3], in_channels, out_channels, kernel[3], stride[3];
    int padding[3]; // zeros before the first frame, row and column; those behind the last follow from out_size
    int out_size[3];
    int dtype;
};
int talkie_conv(const TalkieConv *args, cudaStream_t stream);

// Rows of `dim` values, each divided by its deviation after its mean was subtracted: out = norm(xs) * weight + bias.
// With `ys`, the rows are sums = xs + ys * gate instead of xs, and are written too. weight, bias and gate are f32 (dim);
// gate may be null, for 1. `round` rounds the normalised values to the tensor's dtype before weight and bias.
struct TalkieLayerNorm {
    void *xs, *ys, *gate, *sums, *weight, *bias, *out;
    int rows, dim;
    float eps;
    int round, dtype;
};
int talkie_layer_norm(const TalkieLayerNorm *args, cudaStream_t stream);

// Rows of `dim` values divided by their root mean square, rounded, times weight, rounded, and then turned: channel pairs
// of heads of `head_dim` channels, by cos and sin (tokens, head_dim / 2) in f32, where row i is token i % tokens. A null
// weight (dim, f32) leaves the norm out, a null cos the rotation.
struct TalkieRmsRope {
    void *xs, *weight, *cos, *sin, *out;
    int rows, dim, head_dim, tokens;
    float eps;
    int dtype;
};
int talkie_rms_rope(const TalkieRmsRope *args, cudaStream_t stream);

// out = xs + ys * gate over rows of `dim` values, gate f32 (dim).
struct TalkieGate {
    void *xs, *ys, *gate, *out;
    int rows, dim, dtype;
};
int talkie_gate(const TalkieGate *args, cudaStream_t stream);

// In place: xs = xs + bias over rows of `dim` values, rounded, then with `gelu` the tanh approximation of GELU.
struct TalkieBias {
    void *xs, *bias;
    int rows, dim, gelu, dtype;
};
int talkie_bias(const TalkieBias *args, cudaStream_t stream);

// Rows of `dim` values scaled to length 1, times scale (dim, f32), then with `silu` that activation.
struct TalkieUnitNorm {
    void *xs, *scale, *out;
    long long rows;
    int dim, silu, dtype;
};
int talkie_unit_norm(const TalkieUnitNorm *args, cudaStream_t stream);

// The driver's name of an error, as candle reports it; "CUDA_ERROR_UNKNOWN" where it has none.
const char *talkie_error_name(int error);
}
