// Device code shared by the CUDA kernels: 16-byte vectors of storage types, ordered block sums. Free of
// torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/operand.h"

// The memory that the launch asked for, shared by a block. Tests that run device code on a CPU have their
// own.
#if !defined(FASTDISTILL_DYNAMIC_SHARED)
#define FASTDISTILL_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

namespace fastdistill::cuda {

constexpr int THREADS = 256;

__device__ inline float to_float(float v) {
    return v;
}
__device__ inline float to_float(__half v) {
    return __half2float(v);
}
__device__ inline float to_float(__nv_bfloat16 v) {
    return __bfloat162float(v);
}

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
    return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

// N consecutive elements as float; the pointer must be aligned to all of them.
template <int N, class T>
__device__ inline void load(float (&to)[N], const T* from) {
    // At most 16 bytes fit one load; a float32 modulation beside 8 bfloat16 takes two.
    constexpr int AT_ONCE = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
        const auto pack = *reinterpret_cast<const Pack<T, AT_ONCE>*>(from + i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) to[i + j] = to_float(pack.v[j]);
    }
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
    constexpr int AT_ONCE = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
        Pack<T, AT_ONCE> pack;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) pack.v[j] = from_float<T>(from[i + j]);
        *reinterpret_cast<Pack<T, AT_ONCE>*>(to + i) = pack;
    }
}

template <int N>
__device__ inline void add_to(float* sum, const float (&v)[N]) {
    float total[N];
    load(total, sum);
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] += v[j];
    store(sum, total);
}

// To [-limit, limit]; NaN stays NaN.
__device__ inline float clamp(float v, float limit) {
    return v > limit ? limit : v < -limit ? -limit : v;
}

struct Sums {
    float a, b;
};

// The sums of a and b over the block, in an order that depends only on the block's size; every thread
// receives them.
template <int THREADS>
__device__ inline Sums block_sums(float a, float b) {
    static_assert(THREADS % 32 == 0, "whole warps");
    constexpr int WARPS = THREADS / 32;
    __shared__ Sums of_warp[WARPS];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, offset);
        b += __shfl_xor_sync(0xffffffffu, b, offset);
    }
    __syncthreads();  // of_warp may still be read from the previous call
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = {a, b};
    __syncthreads();
    Sums total{0.f, 0.f};
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        total.a += of_warp[warp].a;
        total.b += of_warp[warp].b;
    }
    return total;
}

// The sum of v over the block, in an order that depends on nothing; every thread receives it.
__device__ inline double block_sum_double(double v) {
    __shared__ double of_thread[THREADS];
    __syncthreads();  // of_thread may still be read from the previous call
    of_thread[threadIdx.x] = v;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    }
    __syncthreads();
    return of_thread[0];
}

// out[g, i] = sum over j of partials[g, j, i] in the order of j. Grid (column blocks, groups).
template <class M>
__global__ void __launch_bounds__(THREADS)
    column_sum(const float* partials, M* out, int64_t count, int64_t stride, int64_t size) {
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, group = blockIdx.y;
    if (i >= size) return;
    float sum = 0.f;
    for (int64_t j = 0; j < count; ++j) sum += partials[(group * count + j) * stride + i];
    out[group * size + i] = from_float<M>(sum);
}

}  // namespace fastdistill::cuda
