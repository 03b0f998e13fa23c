// Device code of activation_concat. Free of torch. A block serves one row, a thread N channels at a time.
#pragma once

#include "../common/activation.h"
#include "device.cuh"

namespace fastdistill::cuda {

// 1 / (1 + exp(-v)), and what is left of it to 1, which a difference would round away.
struct Sigmoid {
    float value, rest;
    __device__ explicit Sigmoid(float v) {
        const float e = expf(fminf(-v, 88.f));  // finite
        value = 1.f / (1.f + e);
        rest = e * value;
    }
};

template <class T, int N, Activation ACTIVATION>
__global__ void __launch_bounds__(THREADS) activation_forward(ActivationForward a) {
    const int64_t index = blockIdx.x, b = index / a.tokens, s = index % a.tokens;
    T* out = static_cast<T*>(a.out) + index * (a.before + a.size);
    float v[N], w[N];
    for (int64_t i = int64_t(threadIdx.x) * N; i < a.before; i += THREADS * N) {
        load(v, a.x.row<T>(b, s) + i);
        store(out + i, v);
    }
    const T* y = a.y.row<T>(b, s);
    for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += THREADS * N) {
        load(v, y + i);
        if constexpr (ACTIVATION == Activation::gelu) {
#pragma unroll
            for (int j = 0; j < N; ++j)
                v[j] *= Sigmoid(v[j] * (float(GELU_LINEAR) + float(GELU_CUBIC) * v[j] * v[j])).value;
        } else {
            load(w, y + a.size + i);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] *= Sigmoid(v[j]).value * w[j];
        }
        store(out + a.before + i, v);
    }
}

template <class T, int N, Activation ACTIVATION>
__global__ void __launch_bounds__(THREADS) activation_backward(ActivationBackward a) {
    const int64_t index = blockIdx.x, b = index / a.tokens, s = index % a.tokens;
    T* dy = static_cast<T*>(a.dy) + index * (ACTIVATION == Activation::gelu ? a.size : 2 * a.size);
    const T *y = a.y.row<T>(b, s), *grad = a.grad.row<T>(b, s);
    float v[N], w[N], g[N];
    for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += THREADS * N) {
        load(v, y + i);
        load(g, grad + i);
        if constexpr (ACTIVATION == Activation::gelu) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float square = v[j] * v[j];
                const Sigmoid p(v[j] * (float(GELU_LINEAR) + float(GELU_CUBIC) * square));
                const float slope = float(GELU_LINEAR) + float(3 * GELU_CUBIC) * square;
                g[j] *= p.value + v[j] * p.value * p.rest * slope;
            }
        } else {
            load(w, y + a.size + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const Sigmoid p(v[j]);
                const float of_value = g[j] * v[j] * p.value;
                g[j] *= w[j] * (p.value + v[j] * p.value * p.rest);
                w[j] = of_value;
            }
            store(dy + a.size + i, w);
        }
        store(dy + i, g);
    }
}

}  // namespace fastdistill::cuda
