// Device code of x + gate * y. Free of torch. T, M and N as in adaln.cuh.
#pragma once

#include "device.cuh"

namespace fastdistill::cuda {

struct GatedResidualForward {
    Operand x, y, gate;
    void* out;
    int64_t tokens, channels;
    float clip;
};

struct GatedResidualBackward {
    Operand grad, y, gate;
    void *dy, *dgate;
    float* partials;  // (B, chunks, D) when the gradient of gate is summed over tokens
    int64_t tokens, channels;
};

// One block per row.
template <class T, class M, int N>
__global__ void __launch_bounds__(THREADS) residual_forward(GatedResidualForward a) {
    const int64_t index = blockIdx.x, b = index / a.tokens, s = index % a.tokens, D = a.channels;
    const T *x = a.x.row<T>(b, s), *y = a.y.row<T>(b, s);
    const M* gate = a.gate.row<M>(b, s);
    T* out = static_cast<T*>(a.out) + index * D;
    float v[N], w[N], m[N];
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(v, x + i);
        load(w, y + i);
        load(m, gate + i);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = clamp(v[j] + m[j] * w[j], a.clip);
        store(out + i, v);
    }
}

// Grid (chunks, B, column blocks): a thread owns N columns of a chunk of tokens, and their sums in registers.
template <class T, class M, int N, ModulationGrad MODULATION>
__global__ void __launch_bounds__(THREADS) residual_backward(GatedResidualBackward a) {
    const int64_t b = blockIdx.y, chunk = blockIdx.x, chunks = gridDim.x, D = a.channels;
    const int64_t i = (int64_t(blockIdx.z) * THREADS + threadIdx.x) * N;
    if (i >= D) return;
    float dout[N], w[N], m[N], sum[N] = {};
    for (int64_t s = chunk * a.tokens / chunks; s < (chunk + 1) * a.tokens / chunks; ++s) {
        const int64_t index = b * a.tokens + s;
        load(dout, a.grad.row<T>(b, s) + i);
        load(w, a.y.row<T>(b, s) + i);
        load(m, a.gate.row<M>(b, s) + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            m[j] *= dout[j];
            w[j] *= dout[j];
            sum[j] += w[j];
        }
        store(static_cast<T*>(a.dy) + index * D + i, m);
        if constexpr (MODULATION == ModulationGrad::per_token)
            store(static_cast<M*>(a.dgate) + index * D + i, w);
    }
    if constexpr (MODULATION == ModulationGrad::summed) {
        float* partial = a.partials + (b * chunks + chunk) * D + i;
#pragma unroll
        for (int j = 0; j < N; ++j) partial[j] = sum[j];
    }
}

}  // namespace fastdistill::cuda
