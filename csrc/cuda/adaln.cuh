// Device code of modulate and of gated_residual_modulate, which differ by what is normalised: x, or h = x +
// gate * y. Free of torch.
//
// T is the type of x, M that of gate, scale and shift; N elements are loaded at once (1 when the rows are not
// aligned). The columns of a thread are the same for every row, so its part of a row buffer in shared memory
// needs no barrier.
#pragma once

#include "device.cuh"

namespace fastdistill::cuda {

struct AdalnForward {
    Operand x, scale, shift;
    Operand y, gate;  // of a residual
    void *h, *out;    // h of a residual
    float *mean, *rstd;
    int64_t tokens, channels;
    float eps, clip;
};

struct AdalnBackward {
    Operand grad, x, scale;  // x is what was normalised
    Operand other_grad;      // forked: the second gradient of out; residual: that of h
    Operand y, gate;         // of a residual
    const float *mean, *rstd;
    void *dx, *dy, *dscale, *dshift, *dgate;  // dy and dgate of a residual
    float*
        partials;  // (B, chunks, 2 or 3, D) when the gradients are summed over tokens: dscale, dshift, dgate
    int64_t tokens, channels;
    float clip;
};

// One block per row. What is normalised is read once, into shared memory: D floats.
template <class T, class M, int N, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS) adaln_forward(AdalnForward a) {
    FASTDISTILL_DYNAMIC_SHARED(shared);
    float* row = reinterpret_cast<float*>(shared);
    const int64_t index = blockIdx.x, b = index / a.tokens, s = index % a.tokens, D = a.channels;
    const T *x = a.x.row<T>(b, s), *y = a.y.row<T>(b, s);
    const M *scale = a.scale.row<M>(b, s), *shift = a.shift.row<M>(b, s), *gate = a.gate.row<M>(b, s);
    T *out = static_cast<T*>(a.out) + index * D, *h = static_cast<T*>(a.h) + index * D;
    float v[N], m[N], w[N];

    float sum = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(v, x + i);
        if constexpr (RESIDUAL) {
            load(w, y + i);
            load(m, gate + i);
#pragma unroll
            // Rounded, as the caller and the backward pass see it.
            for (int j = 0; j < N; ++j) v[j] = to_float(from_float<T>(clamp(v[j] + m[j] * w[j], a.clip)));
            store(h + i, v);
        }
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
        load(w, shift + i);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * rstd * (1.f + m[j]) + w[j];
        store(out + i, v);
    }
    if (threadIdx.x == 0) {
        a.mean[index] = mean;
        a.rstd[index] = rstd;
    }
}

// Grid (chunks, B): a block walks one chunk of the tokens of one batch element. x and grad are read from
// memory once; the second visit to a row finds it in L1 or L2. Sums over tokens stay in shared memory: 2 D
// floats, 3 D of a residual.
template <class T, class M, int N, Adaln KIND, ModulationGrad MODULATION>
__global__ void __launch_bounds__(THREADS) adaln_backward(AdalnBackward a) {
    constexpr bool SUMMED = MODULATION == ModulationGrad::summed,
                   PER_TOKEN = MODULATION == ModulationGrad::per_token;
    constexpr bool RESIDUAL = KIND == Adaln::residual;
    constexpr int SUMS = RESIDUAL ? 3 : 2;
    FASTDISTILL_DYNAMIC_SHARED(shared);
    const int64_t b = blockIdx.y, chunk = blockIdx.x, chunks = gridDim.x, D = a.channels;
    float *dscale_sum = reinterpret_cast<float*>(shared), *dshift_sum = dscale_sum + D,
          *dgate_sum = dshift_sum + D;
    float v[N], dout[N], m[N], w[N];

    if constexpr (SUMMED) {
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N)
            for (int j = 0; j < N; ++j)
                for (int kind = 0; kind < SUMS; ++kind) dscale_sum[kind * D + i + j] = 0.f;
    }

    for (int64_t s = chunk * a.tokens / chunks; s < (chunk + 1) * a.tokens / chunks; ++s) {
        const int64_t index = b * a.tokens + s;
        const T *grad = a.grad.row<T>(b, s), *x = a.x.row<T>(b, s);
        const T *other_grad = a.other_grad.row<T>(b, s), *y = a.y.row<T>(b, s);
        const M *scale = a.scale.row<M>(b, s), *gate = a.gate.row<M>(b, s);
        T *dx = static_cast<T*>(a.dx) + index * D, *dy = static_cast<T*>(a.dy) + index * D;
        const float mean = a.mean[index], rstd = a.rstd[index];

        const auto incoming = [&](int64_t i) {
            load(dout, grad + i);
            if constexpr (KIND == Adaln::forked) {
                load(w, other_grad + i);
#pragma unroll
                for (int j = 0; j < N; ++j) dout[j] += w[j];
            }
        };

        float sum_g = 0.f, sum_gn = 0.f;
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
            load(v, x + i);
            incoming(i);
            load(m, scale + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float normed = (v[j] - mean) * rstd, g = dout[j] * (1.f + m[j]);
                sum_g += g;
                sum_gn += g * normed;
                w[j] = dout[j] * normed;
            }
            if constexpr (SUMMED) {
                add_to(dscale_sum + i, w);
                add_to(dshift_sum + i, dout);
            }
            if constexpr (PER_TOKEN) {
                store(static_cast<M*>(a.dscale) + index * D + i, w);
                store(static_cast<M*>(a.dshift) + index * D + i, dout);
            }
        }
        const Sums sums = block_sums<THREADS>(sum_g, sum_gn);
        const float mean_g = sums.a / D, mean_gn = sums.b / D;

        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
            float h[N];
            load(h, x + i);
            incoming(i);
            load(m, scale + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float normed = (h[j] - mean) * rstd, g = dout[j] * (1.f + m[j]);
                v[j] = (g - mean_g - normed * mean_gn) * rstd;
            }
            if constexpr (RESIDUAL) {
                load(w, other_grad + i);
                load(m, gate + i);
                load(dout, y + i);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    v[j] = fabsf(h[j]) >= a.clip ? 0.f : v[j] + w[j];
                    m[j] *= v[j];
                    dout[j] *= v[j];
                }
                store(dy + i, m);
                if constexpr (SUMMED) add_to(dgate_sum + i, dout);
                if constexpr (PER_TOKEN) store(static_cast<M*>(a.dgate) + index * D + i, dout);
            }
            store(dx + i, v);
        }
    }

    if constexpr (SUMMED) {
        float* partial = a.partials + (b * chunks + chunk) * SUMS * D;
        for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N)
            for (int j = 0; j < N; ++j)
                for (int kind = 0; kind < SUMS; ++kind)
                    partial[kind * D + i + j] = dscale_sum[kind * D + i + j];
    }
}

}  // namespace fastdistill::cuda
