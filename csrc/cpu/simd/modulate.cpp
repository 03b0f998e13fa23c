#include "modulate.h"

#include "vec.h"

namespace fastdistill {
namespace {

// Rows that share one update of the dscale/dshift accumulators, as many as the register file holds sums for.
constexpr int ROWS = REGISTER_BYTES == 64 ? 4 : 2;

template <class T, class M, bool STREAM>
void forward_rows(const ModulateForward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t D = a.channels;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        const T* x = static_cast<const T*>(a.x) + b * a.x_batch_stride + s * a.x_token_stride;
        const M* scale = static_cast<const M*>(a.scale) + b * a.scale_batch_stride + s * a.scale_token_stride;
        const M* shift = static_cast<const M*>(a.shift) + b * a.shift_batch_stride + s * a.shift_token_stride;
        T* out = static_cast<T*>(a.out) + row * D;

        // Two passes for the variance: the row is in cache, and E[x^2] - E[x]^2 cancels.
        Vec<A> sum[4] = {};
        sweep<A, 4>(D, [&](int64_t i, auto extent, int slot) { sum[slot] += load(x + i, extent); });
        const A mean = sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) / A(D);

        Vec<A> square[4] = {};
        sweep<A, 4>(D, [&](int64_t i, auto extent, int slot) {
            const Vec<A> centred = keep_inside<A>(load(x + i, extent) - mean, extent);
            square[slot] += centred * centred;
        });
        const A variance = sum_lanes<A>((square[0] + square[1]) + (square[2] + square[3])) / A(D);
        const A rstd = A(1) / (sizeof(A) == 8 ? A(__builtin_sqrt(variance + a.eps))
                                              : A(__builtin_sqrtf(float(variance) + float(a.eps))));

        sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
            const Vec<A> normed = (load(x + i, extent) - mean) * rstd;
            write<STREAM>(out + i, normed * (load(scale + i, extent) + A(1)) + load(shift + i, extent),
                          extent);
        });
        static_cast<A*>(a.mean)[row] = mean;
        static_cast<A*>(a.rstd)[row] = rstd;
    }
    if constexpr (STREAM) stream_fence();
}

template <class T, class M>
void forward(const ModulateForward& a, int64_t first_row, int64_t last_row) {
    return a.stream ? forward_rows<T, M, true>(a, first_row, last_row)
                    : forward_rows<T, M, false>(a, first_row, last_row);
}

// With n = (x - mean) * rstd and g = grad * (1 + scale):
//   dx = rstd * (g - mean(g) - n * mean(g * n)),  dscale = sum grad * n,  dshift = sum grad.
template <class T, class M, ModulationGrad MODULATION, bool STREAM, int N>
FASTDISTILL_INLINE void backward_rows(const ModulateBackward& a, int64_t b, int64_t s,
                                      Accumulator<T>* dscale_sum, Accumulator<T>* dshift_sum) {
    using A = Accumulator<T>;
    const int64_t D = a.channels, row = b * a.tokens + s;
    const T *grad[N], *x[N];
    const M* scale[N];
    A mean[N], rstd[N];
    for (int r = 0; r < N; ++r) {
        grad[r] = static_cast<const T*>(a.grad) + b * a.grad_batch_stride + (s + r) * a.grad_token_stride;
        x[r] = static_cast<const T*>(a.x) + b * a.x_batch_stride + (s + r) * a.x_token_stride;
        scale[r] = static_cast<const M*>(a.scale) + b * a.scale_batch_stride + (s + r) * a.scale_token_stride;
        mean[r] = static_cast<const A*>(a.mean)[row + r];
        rstd[r] = static_cast<const A*>(a.rstd)[row + r];
    }

    Vec<A> sum_g[N] = {}, sum_gn[N] = {};
    sweep<A, 1>(D, [&](int64_t i, auto extent, int) {
        Vec<A> dscale = {}, dshift = {};
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
            const Vec<A> dy = load(grad[r] + i, extent);
            const Vec<A> normed = (load(x[r] + i, extent) - mean[r]) * rstd[r];
            const Vec<A> g = dy * (load(scale[r] + i, extent) + A(1));
            sum_g[r] += g;
            sum_gn[r] += g * normed;
            if constexpr (MODULATION == ModulationGrad::per_token) {
                store(static_cast<M*>(a.dscale) + (row + r) * D + i, dy * normed, extent);
                store(static_cast<M*>(a.dshift) + (row + r) * D + i, dy, extent);
            }
            if constexpr (MODULATION == ModulationGrad::summed) {
                dscale += dy * normed;
                dshift += dy;
            }
        }
        if constexpr (MODULATION == ModulationGrad::summed) {
            store(dscale_sum + i, load(dscale_sum + i, extent) + dscale, extent);
            store(dshift_sum + i, load(dshift_sum + i, extent) + dshift, extent);
        }
    });

    for (int r = 0; r < N; ++r) {
        const A mean_g = sum_lanes<A>(sum_g[r]) / A(D), mean_gn = sum_lanes<A>(sum_gn[r]) / A(D);
        T* dx = static_cast<T*>(a.dx) + (row + r) * D;
        sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
            const Vec<A> normed = (load(x[r] + i, extent) - mean[r]) * rstd[r];
            const Vec<A> g = load(grad[r] + i, extent) * (load(scale[r] + i, extent) + A(1));
            write<STREAM>(dx + i, (g - mean_g - normed * mean_gn) * rstd[r], extent);
        });
    }
}

template <class T, class M, ModulationGrad MODULATION, bool STREAM>
void backward_tasks(const ModulateBackward& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, chunk = task % a.chunks;
        const int64_t end = (chunk + 1) * a.tokens / a.chunks;
        A *dscale_sum = nullptr, *dshift_sum = nullptr;
        if constexpr (MODULATION == ModulationGrad::summed) {
            dscale_sum = static_cast<A*>(a.partials) + task * 2 * a.channels;
            dshift_sum = dscale_sum + a.channels;
            for (int64_t i = 0; i < 2 * a.channels; ++i) dscale_sum[i] = 0;
        }
        int64_t s = chunk * a.tokens / a.chunks;
        for (; s + ROWS <= end; s += ROWS)
            backward_rows<T, M, MODULATION, STREAM, ROWS>(a, b, s, dscale_sum, dshift_sum);
        for (; s < end; ++s) backward_rows<T, M, MODULATION, STREAM, 1>(a, b, s, dscale_sum, dshift_sum);
    }
}

template <class T, class M, bool STREAM>
void backward_modulation(const ModulateBackward& a, int64_t first_task, int64_t last_task) {
    switch (a.modulation) {
        case ModulationGrad::none:
            return backward_tasks<T, M, ModulationGrad::none, STREAM>(a, first_task, last_task);
        case ModulationGrad::summed:
            return backward_tasks<T, M, ModulationGrad::summed, STREAM>(a, first_task, last_task);
        case ModulationGrad::per_token:
            return backward_tasks<T, M, ModulationGrad::per_token, STREAM>(a, first_task, last_task);
    }
}

template <class T, class M>
void backward(const ModulateBackward& a, int64_t first_task, int64_t last_task) {
    if (!a.stream) return backward_modulation<T, M, false>(a, first_task, last_task);
    backward_modulation<T, M, true>(a, first_task, last_task);
    stream_fence();
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

ModulateKernels modulate_kernels(Scalar x, Scalar modulation) {
    const bool wide = modulation == Scalar::float32;
    switch (x) {
        case Scalar::float32:
            return {forward<float, float>, backward<float, float>};
        case Scalar::float64:
            return {forward<double, double>, backward<double, double>};
        case Scalar::bfloat16:
            if (wide) return {forward<bfloat16, float>, backward<bfloat16, float>};
            return {forward<bfloat16, bfloat16>, backward<bfloat16, bfloat16>};
        case Scalar::float16:
            if (wide) return {forward<float16, float>, backward<float16, float>};
            return {forward<float16, float16>, backward<float16, float16>};
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
