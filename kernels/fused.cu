// What lies between the matrix products: norms, gates, biases, activations and rotary embeddings, each one pass over
// device memory. Loads and stores are 16 bytes wide; all arithmetic is f32.
#include <cuda.h>
#include <cuda_bf16.h>
#include "talkie.h"

namespace {

// 16 bytes of a tensor.
template <typename T> struct Vector {
    static constexpr int LEN = 16 / sizeof(T);
    float values[LEN];
};

__device__ float round_to(float x, __nv_bfloat16) { return __bfloat162float(__float2bfloat16_rn(x)); }
__device__ float round_to(float x, float) { return x; }

__device__ Vector<__nv_bfloat16> load(const __nv_bfloat16 *from) {
    uint4 raw = *reinterpret_cast<const uint4 *>(from);
    const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&raw);
    Vector<__nv_bfloat16> to;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __bfloat1622float2(pairs[i]);
        to.values[2 * i] = pair.x;
        to.values[2 * i + 1] = pair.y;
    }
    return to;
}

__device__ Vector<float> load(const float *from) {
    float4 raw = *reinterpret_cast<const float4 *>(from);
    return {raw.x, raw.y, raw.z, raw.w};
}

__device__ void store(__nv_bfloat16 *to, const Vector<__nv_bfloat16> &from) {
    uint4 raw;
    __nv_bfloat162 *pairs = reinterpret_cast<__nv_bfloat162 *>(&raw);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(from.values[2 * i], from.values[2 * i + 1]);
    *reinterpret_cast<uint4 *>(to) = raw;
}

__device__ void store(float *to, const Vector<float> &from) {
    *reinterpret_cast<float4 *>(to) = make_float4(from.values[0], from.values[1], from.values[2], from.values[3]);
}

constexpr int THREADS = 256, WARP = 32;

__device__ float warp_sum(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    return x;
}

// The sum over the block, the same in every thread.
__device__ float block_sum(float x) {
    __shared__ float sums[THREADS / WARP];
    x = warp_sum(x);
    __syncthreads(); // what was read of an earlier sum has been read
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) sum += sums[i];
    return sum;
}

__device__ float gelu_tanh(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(u));
}

__device__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// A block keeps a row in registers: V vectors a thread, at most.
template <typename T, int V> __global__ void __launch_bounds__(THREADS) layer_norm(TalkieLayerNorm args) {
    constexpr int LEN = Vector<T>::LEN;
    const long long start = (long long)blockIdx.x * args.dim;
    const float *gate = (const float *)args.gate, *weight = (const float *)args.weight, *bias = (const float *)args.bias;
    Vector<T> row[V];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * THREADS + threadIdx.x) * LEN;
        if (at >= args.dim) continue;
        row[v] = load((const T *)args.xs + start + at);
        if (args.ys) {
            Vector<T> ys = load((const T *)args.ys + start + at);
#pragma unroll
            for (int i = 0; i < LEN; i++) {
                float added = gate ? ys.values[i] * gate[at + i] : ys.values[i];
                row[v].values[i] = round_to(row[v].values[i] + added, T());
            }
            store((T *)args.sums + start + at, row[v]);
        }
#pragma unroll
        for (int i = 0; i < LEN; i++) sum += row[v].values[i];
    }
    const float mean = block_sum(sum) / args.dim;
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
        if ((v * THREADS + threadIdx.x) * LEN >= args.dim) continue;
#pragma unroll
        for (int i = 0; i < LEN; i++) {
            row[v].values[i] -= mean;
            squares += row[v].values[i] * row[v].values[i];
        }
    }
    const float factor = rsqrtf(block_sum(squares) / args.dim + args.eps);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * THREADS + threadIdx.x) * LEN;
        if (at >= args.dim) continue;
#pragma unroll
        for (int i = 0; i < LEN; i++) {
            float x = row[v].values[i] * factor;
            if (args.round) x = round_to(x, T());
            row[v].values[i] = x * weight[at + i] + bias[at + i];
        }
        store((T *)args.out + start + at, row[v]);
    }
}

template <typename T, int V> __global__ void __launch_bounds__(THREADS) rms_rope(TalkieRmsRope args) {
    constexpr int LEN = Vector<T>::LEN;
    const long long start = (long long)blockIdx.x * args.dim;
    const float *weight = (const float *)args.weight;
    Vector<T> row[V];
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * THREADS + threadIdx.x) * LEN;
        if (at >= args.dim) continue;
        row[v] = load((const T *)args.xs + start + at);
#pragma unroll
        for (int i = 0; i < LEN; i++) squares += row[v].values[i] * row[v].values[i];
    }
    const float factor = weight ? rsqrtf(block_sum(squares) / args.dim + args.eps) : 1;
    const int half = args.head_dim / 2;
    const long long token = (long long)(blockIdx.x % args.tokens) * half;
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * THREADS + threadIdx.x) * LEN;
        if (at >= args.dim) continue;
        if (weight) {
#pragma unroll
            for (int i = 0; i < LEN; i++) {
                row[v].values[i] = round_to(round_to(row[v].values[i] * factor, T()) * weight[at + i], T());
            }
        }
        if (args.cos) {
            const long long angle = token + at % args.head_dim / 2;
#pragma unroll
            for (int i = 0; i < LEN; i += 2) {
                const float c = ((const float *)args.cos)[angle + i / 2], s = ((const float *)args.sin)[angle + i / 2];
                const float re = row[v].values[i], im = row[v].values[i + 1];
                row[v].values[i] = re * c - im * s;
                row[v].values[i + 1] = re * s + im * c;
            }
        }
        store((T *)args.out + start + at, row[v]);
    }
}

template <typename T> __global__ void gate(TalkieGate args, long long vectors) {
    constexpr int LEN = Vector<T>::LEN;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < vectors; i += (long long)gridDim.x * blockDim.x) {
        Vector<T> xs = load((const T *)args.xs + i * LEN), ys = load((const T *)args.ys + i * LEN);
        const float *gate = (const float *)args.gate + i * LEN % args.dim;
#pragma unroll
        for (int k = 0; k < LEN; k++) xs.values[k] += ys.values[k] * gate[k];
        store((T *)args.out + i * LEN, xs);
    }
}

template <typename T, bool GELU> __global__ void bias(TalkieBias args, long long vectors) {
    constexpr int LEN = Vector<T>::LEN;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < vectors; i += (long long)gridDim.x * blockDim.x) {
        Vector<T> xs = load((const T *)args.xs + i * LEN), bias = load((const T *)args.bias + i * LEN % args.dim);
#pragma unroll
        for (int k = 0; k < LEN; k++) {
            xs.values[k] += bias.values[k];
            if (GELU) xs.values[k] = gelu_tanh(round_to(xs.values[k], T()));
        }
        store((T *)args.xs + i * LEN, xs);
    }
}

// A warp takes a row: pixels have few channels.
template <typename T, int V> __global__ void __launch_bounds__(THREADS) unit_norm(TalkieUnitNorm args) {
    constexpr int LEN = Vector<T>::LEN;
    const int lane = threadIdx.x % WARP;
    const float *scale = (const float *)args.scale;
    const long long row = (long long)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= args.rows) return;
    Vector<T> xs[V];
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * WARP + lane) * LEN;
        if (at >= args.dim) continue;
        xs[v] = load((const T *)args.xs + row * args.dim + at);
#pragma unroll
        for (int i = 0; i < LEN; i++) squares += xs[v].values[i] * xs[v].values[i];
    }
    const float factor = 1.0f / fmaxf(sqrtf(warp_sum(squares)), 1e-12f);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int at = (v * WARP + lane) * LEN;
        if (at >= args.dim) continue;
#pragma unroll
        for (int i = 0; i < LEN; i++) {
            float x = xs[v].values[i] * factor * scale[at + i];
            xs[v].values[i] = args.silu ? silu(x) : x;
        }
        store((T *)args.out + row * args.dim + at, xs[v]);
    }
}

// Vectors that each of `threads` holds of a row.
template <typename T> int per_thread(int dim, int threads) {
    return (dim + Vector<T>::LEN * threads - 1) / (Vector<T>::LEN * threads);
}

// Blocks of a kernel whose threads step through all vectors: enough to fill any card several times.
int blocks_for(long long vectors) {
    const long long blocks = (vectors + THREADS - 1) / THREADS;
    return (int)(blocks < 16384 ? blocks : 16384);
}

template <typename T> int launch(const TalkieLayerNorm &args, cudaStream_t stream) {
    switch (per_thread<T>(args.dim, THREADS)) {
    case 1: layer_norm<T, 1><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 2: layer_norm<T, 2><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 3: layer_norm<T, 3><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 4: layer_norm<T, 4><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 5: layer_norm<T, 5><<<args.rows, THREADS, 0, stream>>>(args); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

template <typename T> int launch(const TalkieRmsRope &args, cudaStream_t stream) {
    switch (per_thread<T>(args.dim, THREADS)) {
    case 1: rms_rope<T, 1><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 2: rms_rope<T, 2><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 3: rms_rope<T, 3><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 4: rms_rope<T, 4><<<args.rows, THREADS, 0, stream>>>(args); break;
    case 5: rms_rope<T, 5><<<args.rows, THREADS, 0, stream>>>(args); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

template <typename T> int launch(const TalkieUnitNorm &args, cudaStream_t stream) {
    const unsigned blocks = (unsigned)((args.rows + THREADS / WARP - 1) / (THREADS / WARP));
    switch (per_thread<T>(args.dim, WARP)) {
    case 1: unit_norm<T, 1><<<blocks, THREADS, 0, stream>>>(args); break;
    case 2: unit_norm<T, 2><<<blocks, THREADS, 0, stream>>>(args); break;
    case 3: unit_norm<T, 3><<<blocks, THREADS, 0, stream>>>(args); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

template <typename T> int launch(const TalkieGate &args, cudaStream_t stream) {
    const long long vectors = (long long)args.rows * args.dim / Vector<T>::LEN;
    gate<T><<<blocks_for(vectors), THREADS, 0, stream>>>(args, vectors);
    return cudaGetLastError();
}

template <typename T> int launch(const TalkieBias &args, cudaStream_t stream) {
    const long long vectors = (long long)args.rows * args.dim / Vector<T>::LEN;
    if (args.gelu) bias<T, true><<<blocks_for(vectors), THREADS, 0, stream>>>(args, vectors);
    else bias<T, false><<<blocks_for(vectors), THREADS, 0, stream>>>(args, vectors);
    return cudaGetLastError();
}

template <typename Args> int dispatch(const Args *args, cudaStream_t stream) {
    switch (args->dtype) {
    case TALKIE_BF16: return launch<__nv_bfloat16>(*args, stream);
    case TALKIE_F32: return launch<float>(*args, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

extern "C" int talkie_layer_norm(const TalkieLayerNorm *args, cudaStream_t stream) { return dispatch(args, stream); }
extern "C" int talkie_rms_rope(const TalkieRmsRope *args, cudaStream_t stream) { return dispatch(args, stream); }
extern "C" int talkie_gate(const TalkieGate *args, cudaStream_t stream) { return dispatch(args, stream); }
extern "C" int talkie_bias(const TalkieBias *args, cudaStream_t stream) { return dispatch(args, stream); }
extern "C" int talkie_unit_norm(const TalkieUnitNorm *args, cudaStream_t stream) { return dispatch(args, stream); }

extern "C" const char *talkie_error_name(int error) {
    const char *name = nullptr;
    return cuGetErrorName(CUresult(error), &name) == CUDA_SUCCESS && name ? name : "CUDA_ERROR_UNKNOWN";
}
