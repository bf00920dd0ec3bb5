// Just enough of CUDA for a C++ compiler to run kernels/fused.cu on a processor: one block after the other, a thread for
// each thread of a block. What is found here is wrong arithmetic and wrong indices, not what a GPU alone does wrong.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__ static
#define __device__ static
#define __shared__ static
#define __launch_bounds__(...)

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum CUresult { CUDA_SUCCESS = 0 };
inline CUresult cuGetErrorName(CUresult, const char **name) { return *name = "CUDA_ERROR_INVALID_VALUE", CUDA_SUCCESS; }

struct Index { unsigned x; };
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

constexpr unsigned LANES = 32;
struct Block {
    std::barrier<> all;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<float> lanes;
    explicit Block(unsigned threads) : all(threads), lanes(threads) {
        for (unsigned w = 0; w < threads / LANES; w++) warps.push_back(std::make_unique<std::barrier<>>(LANES));
    }
};
inline Block *block;

inline void __syncthreads() { block->all.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    std::barrier<> &warp = *block->warps[threadIdx.x / LANES];
    block->lanes[threadIdx.x] = value;
    warp.arrive_and_wait();
    const float other = block->lanes[threadIdx.x ^ mask];
    warp.arrive_and_wait();
    return other;
}

inline void emulate(unsigned blocks, unsigned threads, const std::function<void()> &kernel) {
    for (unsigned b = 0; b < blocks; b++) {
        Block current(threads);
        block = &current;
        std::vector<std::thread> running;
        for (unsigned t = 0; t < threads; t++)
            running.emplace_back([=, &kernel] {
                threadIdx.x = t, blockIdx.x = b, blockDim.x = threads, gridDim.x = blocks;
                kernel();
            });
        for (std::thread &thread : running) thread.join();
    }
}

struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __bfloat162float(__nv_bfloat16 from) {
    const uint32_t bits = uint32_t(from.bits) << 16;
    float to;
    std::memcpy(&to, &bits, 4);
    return to;
}
inline __nv_bfloat16 __float2bfloat16_rn(float from) {
    uint32_t bits;
    std::memcpy(&bits, &from, 4);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)}; // to the nearest, to even between two
}
inline float2 __bfloat1622float2(__nv_bfloat162 from) { return {__bfloat162float(from.x), __bfloat162float(from.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
