// FlashAttention 3 for Hopper, with the one shape that Talkie needs: bf16, heads of 128 channels, no mask.
// The headers are those that the crate candle-flash-attn-v3 ships (Dao-AILab/flash-attention, BSD-3).
#include "talkie.h"

// Both versions of the headers call their types alike.
#define flash flash3
#define Flash_fwd_params Flash3_params
#define Qkv_params Flash3_qkv_params

#include "utils.h"
// The headers end the process at an error; here it is told to the caller.
static thread_local cudaError_t first_error;
static void note(cudaError_t error) {
    if (first_error == cudaSuccess) first_error = error;
}
#undef CHECK_CUDA
#define CHECK_CUDA(call) note(call)
#include "flash_fwd_launch_template.h"

template <int CLUSTER> static void run(Flash3_params &params, cudaStream_t stream) {
    using Traits = Flash_fwd_kernel_traits<128, 128, 176, 12, 2, false, CLUSTER, cutlass::bfloat16_t, false>;
    run_flash_fwd<Traits, false, false, flash::FixedSeqLenTraits, flash::FixedSeqLenTraits>(params, stream);
}

extern "C" int talkie_attention_sm90(const TalkieAttention *args, cudaStream_t stream) {
    Flash3_params params = {};
    params.q_ptr = args->q, params.k_ptr = args->k, params.v_ptr = args->v, params.o_ptr = args->out;
    params.softmax_lse_ptr = args->lse;
    params.q_batch_stride = args->q_strides[0], params.q_row_stride = args->q_strides[1], params.q_head_stride = args->q_strides[2];
    params.k_batch_stride = args->k_strides[0], params.k_row_stride = args->k_strides[1], params.k_head_stride = args->k_strides[2];
    params.v_batch_stride = args->v_strides[0], params.v_row_stride = args->v_strides[1], params.v_head_stride = args->v_strides[2];
    params.o_head_stride = 128, params.o_row_stride = 128LL * args->heads, params.o_batch_stride = params.o_row_stride * args->q_len;
    params.b = params.b_k = args->batch, params.h = params.h_k = args->heads, params.h_h_k_ratio = 1;
    params.seqlen_q = args->q_len, params.seqlen_k = args->k_len, params.d = params.d_rounded = 128;
    params.seqlen_q_rounded = (args->q_len + 127) / 128 * 128, params.seqlen_k_rounded = (args->k_len + 127) / 128 * 128;
    params.scale_softmax = args->scale, params.scale_softmax_log2 = args->scale * float(M_LOG2E);
    params.p_dropout = params.rp_dropout = 1, params.scale_softmax_rp_dropout = args->scale;
    params.is_bf16 = true;
    params.window_size_left = params.window_size_right = -1;
    params.page_block_size = -1;
    first_error = cudaSuccess;
    // Two blocks of rows share keys and values where there is an even number of them.
    if (cutlass::ceil_div(args->q_len, 128) % 2 == 0) run<2>(params, stream);
    else run<1>(params, stream);
    return first_error;
}
