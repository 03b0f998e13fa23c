// Device code of modulate. The formula and the shapes: fastdistill/ops/modulate.py. Free of torch.
//
// T is the type of x, M that of scale and shift; N elements are loaded at once (1 when the rows are not
// aligned). The columns of a thread are the same for every row, so its part of a row buffer in shared memory
// needs no barrier.
#pragma once

#include "device.cuh"

namespace fastdistill::cuda {

constexpr int THREADS = 256;

// Strides count elements; a broadcast axis has stride 0.
struct RowStrides {
    int64_t batch, token;
};

struct ModulateForward {
    const void *x, *scale, *shift;
    void* out;
    float *mean, *rstd;
    int64_t tokens, channels;
    RowStrides x_strides, scale_strides, shift_strides;
    float eps;
};

struct ModulateBackward {
    const void *grad, *x, *scale;
    const float *mean, *rstd;
    void *dx, *dscale, *dshift;
    float* partials;  // (B, chunks, 2, D) when the gradients are summed over tokens
    int64_t tokens, channels;
    RowStrides grad_strides, x_strides, scale_strides;
};

// One block per row. x is read once, into shared memory: D floats.
template <class T, class M, int N>
__global__ void __launch_bounds__(THREADS) modulate_forward(ModulateForward a) {
    extern __shared__ float4 shared[];
    float* row = reinterpret_cast<float*>(shared);
    const int64_t index = blockIdx.x, b = index / a.tokens, s = index % a.tokens, D = a.channels;
    const T* x = static_cast<const T*>(a.x) + b * a.x_strides.batch + s * a.x_strides.token;
    const M* scale = static_cast<const M*>(a.scale) + b * a.scale_strides.batch + s * a.scale_strides.token;
    const M* shift = static_cast<const M*>(a.shift) + b * a.shift_strides.batch + s * a.shift_strides.token;
    T* out = static_cast<T*>(a.out) + index * D;
    float v[N], m[N], h[N];

    float sum = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(v, x + i);
        store(row + i, v);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += v[j];
    }
    const float mean = block_sums<THREADS>(sum, 0.f).a / D;

    float square = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(v, row + i);
#pragma unroll
        for (int j = 0; j < N; ++j) square += (v[j] - mean) * (v[j] - mean);
    }
    const float rstd = 1.f / sqrtf(block_sums<THREADS>(square, 0.f).a / D + a.eps);

    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(v, row + i);
        load(m, scale + i);
        load(h, shift + i);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * rstd * (1.f + m[j]) + h[j];
        store(out + i, v);
    }
    if (threadIdx.x == 0) {
        a.mean[index] = mean;
        a.rstd[index] = rstd;
    }
}

enum class ModulationGrad { none, summed, per_token };

// Grid (chunks, B): a block walks one chunk of the tokens of one batch element. x and grad are read from
// memory once; the second visit to a row finds it in L1 or L2. Sums for dscale and dshift stay in shared
// memory: 2 D floats.
template <class T, class M, int N, ModulationGrad MODULATION>
__global__ void __launch_bounds__(THREADS) modulate_backward(ModulateBackward a) {
    extern __shared__ float4 shared[];
    const int64_t b = blockIdx.y, chunk = blockIdx.x, chunks = gridDim.x, D = a.channels;
    float *dscale_sum = reinterpret_cast<float*>(shared), *dshift_sum = dscale_sum + D;
    float v[N], dy[N], m[N], p[N], q[N];

    if constexpr (MODULATION == ModulationGrad::summed) {
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N)
            for (int j = 0; j < N; ++j) dscale_sum[i + j] = dshift_sum[i + j] = 0.f;
    }

    for (int64_t s = chunk * a.tokens / chunks; s < (chunk + 1) * a.tokens / chunks; ++s) {
        const int64_t index = b * a.tokens + s;
        const T* grad = static_cast<const T*>(a.grad) + b * a.grad_strides.batch + s * a.grad_strides.token;
        const T* x = static_cast<const T*>(a.x) + b * a.x_strides.batch + s * a.x_strides.token;
        const M* scale =
            static_cast<const M*>(a.scale) + b * a.scale_strides.batch + s * a.scale_strides.token;
        T* dx = static_cast<T*>(a.dx) + index * D;
        const float mean = a.mean[index], rstd = a.rstd[index];

        float sum_g = 0.f, sum_gn = 0.f;
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
            load(v, x + i);
            load(dy, grad + i);
            load(m, scale + i);
            if constexpr (MODULATION == ModulationGrad::summed) {
                load(p, dscale_sum + i);
                load(q, dshift_sum + i);
            }
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float normed = (v[j] - mean) * rstd, g = dy[j] * (1.f + m[j]);
                sum_g += g;
                sum_gn += g * normed;
                if constexpr (MODULATION == ModulationGrad::summed) {
                    p[j] += dy[j] * normed;
                    q[j] += dy[j];
                } else {
                    p[j] = dy[j] * normed;
                }
            }
            if constexpr (MODULATION == ModulationGrad::summed) {
                store(dscale_sum + i, p);
                store(dshift_sum + i, q);
            }
            if constexpr (MODULATION == ModulationGrad::per_token) {
                store(static_cast<M*>(a.dscale) + index * D + i, p);
                store(static_cast<M*>(a.dshift) + index * D + i, dy);
            }
        }
        const Sums sums = block_sums<THREADS>(sum_g, sum_gn);
        const float mean_g = sums.a / D, mean_gn = sums.b / D;

        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
            load(v, x + i);
            load(dy, grad + i);
            load(m, scale + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float normed = (v[j] - mean) * rstd, g = dy[j] * (1.f + m[j]);
                v[j] = (g - mean_g - normed * mean_gn) * rstd;
            }
            store(dx + i, v);
        }
    }

    if constexpr (MODULATION == ModulationGrad::summed) {
        float* partial = a.partials + (b * chunks + chunk) * 2 * D;
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N)
            for (int j = 0; j < N; ++j) {
                partial[i + j] = dscale_sum[i + j];
                partial[D + i + j] = dshift_sum[i + j];
            }
    }
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
