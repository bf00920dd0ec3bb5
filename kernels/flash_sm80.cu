// FlashAttention 2, with the one shape that Talkie needs: bf16, heads of 128 channels, no mask. For Ampere and Ada, and
// as PTX for what comes after Hopper.
// The headers are those that the crate candle-flash-attn ships (Dao-AILab/flash-attention, BSD-3).
#include "talkie.h"

// Both versions of the headers call their types alike.
#define flash flash2
#define Flash_fwd_params Flash2_params
#define Qkv_params Flash2_qkv_params

#include "error.h"
// The headers drop errors; here they are told to the caller.
static thread_local cudaError_t first_error;
static void note(cudaError_t error) {
    if (first_error == cudaSuccess) first_error = error;
}
#undef C10_CUDA_CHECK
#define C10_CUDA_CHECK(call) note(call)
#include "flash_fwd_launch_template.h"

template <int KEYS> static void run(Flash2_params &params, cudaStream_t stream) {
    run_flash_fwd<Flash_fwd_kernel_traits<128, 128, KEYS, 4, false, false, cutlass::bfloat16_t>, false, false>(params, stream);
}

extern "C" int talkie_attention_sm80(const TalkieAttention *args, cudaStream_t stream) {
    Flash2_params params = {};
    params.q_ptr = args->q, params.k_ptr = args->k, params.v_ptr = args->v, params.o_ptr = args->out;
    params.softmax_lse_ptr = args->lse;
    params.q_batch_stride = args->q_strides[0], params.q_row_stride = args->q_strides[1], params.q_head_stride = args->q_strides[2];
    params.k_batch_stride = args->k_strides[0], params.k_row_stride = args->k_strides[1], params.k_head_stride = args->k_strides[2];
    params.v_batch_stride = args->v_strides[0], params.v_row_stride = args->v_strides[1], params.v_head_stride = args->v_strides[2];
    params.o_head_stride = 128, params.o_row_stride = 128LL * args->heads, params.o_batch_stride = params.o_row_stride * args->q_len;
    params.b = args->batch, params.h = params.h_k = args->heads, params.h_h_k_ratio = 1;
    params.seqlen_q = args->q_len, params.seqlen_k = args->k_len, params.d = params.d_rounded = 128;
    params.seqlen_q_rounded = (args->q_len + 127) / 128 * 128, params.seqlen_k_rounded = (args->k_len + 127) / 128 * 128;
    params.total_q = args->batch * args->q_len;
    params.scale_softmax = args->scale, params.scale_softmax_log2 = args->scale * float(M_LOG2E);
    params.p_dropout = params.rp_dropout = 1, params.scale_softmax_rp_dropout = args->scale;
    params.p_dropout_in_uint8_t = 255;
    params.is_bf16 = true;
    params.window_size_left = params.window_size_right = -1;
    params.is_seqlens_k_cumulative = true;
    params.num_splits = 1;
    int device = 0, shared = 0;
    first_error = cudaGetDevice(&device);
    note(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (first_error != cudaSuccess) return first_error;
    // Multiprocessors with 100 KB of shared memory (8.6, 8.9, 12.x) hold two blocks with the smaller tile:
    // FlashAttention's own choice.
    if (shared < 128 * 1024) run<32>(params, stream);
    else run<64>(params, stream);
    return first_error;
}

extern "C" int talkie_attention(const TalkieAttention *args, cudaStream_t stream) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    return major == 9 ? talkie_attention_sm90(args, stream) : talkie_attention_sm80(args, stream);
}
