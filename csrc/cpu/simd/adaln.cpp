#include "adaln.h"

#include "vec.h"

namespace fastdistill {
namespace {

// Rows that share one update of the sums over tokens, as many as the register file holds sums for.
constexpr int ROWS = REGISTER_BYTES == 64 ? 4 : 2;

template <class T, class M, bool RESIDUAL, bool STREAM>
void forward_rows(const AdalnForward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t D = a.channels;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        const T* x = a.x.row<T>(b, s);
        const M *scale = a.scale.row<M>(b, s), *shift = a.shift.row<M>(b, s);
        T* out = static_cast<T*>(a.out) + row * D;

        if constexpr (RESIDUAL) {
            const T* y = a.y.row<T>(b, s);
            const M* gate = a.gate.row<M>(b, s);
            T* h = static_cast<T*>(a.h) + row * D;
            sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
                store(h + i,
                      clamp<A>(load(x + i, extent) + load(gate + i, extent) * load(y + i, extent), a.clip),
                      extent);
            });
            x = h;  // its rounded values: what the caller and the backward pass see
        }

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

template <class T, class M, bool RESIDUAL>
void forward(const AdalnForward& a, int64_t first_row, int64_t last_row) {
    return a.stream ? forward_rows<T, M, RESIDUAL, true>(a, first_row, last_row)
                    : forward_rows<T, M, RESIDUAL, false>(a, first_row, last_row);
}

template <class A>
struct Sums {
    A *dscale, *dshift, *dgate;
};

template <class A, class Extent>
FASTDISTILL_INLINE void add_to(A* sum, Vec<A> v, Extent extent) {
    store(sum, load(sum, extent) + v, extent);
}

// With n = (x - mean) * rstd and g = grad * (1 + scale), x being h of a residual:
//   dx = rstd * (g - mean(g) - n * mean(g * n)) + that of h,  dscale = sum grad * n,  dshift = sum grad,
//   dy = gate * dx,  dgate = sum dx * y.
template <class T, class M, Adaln KIND, ModulationGrad MODULATION, bool STREAM, int N>
FASTDISTILL_INLINE void backward_rows(const AdalnBackward& a, int64_t b, int64_t s,
                                      Sums<Accumulator<T>> sums) {
    using A = Accumulator<T>;
    constexpr bool RESIDUAL = KIND == Adaln::residual;
    const int64_t D = a.channels, row = b * a.tokens + s;
    const T *grad[N], *x[N], *other_grad[N], *y[N];
    const M *scale[N], *gate[N];
    A mean[N], rstd[N];
    for (int r = 0; r < N; ++r) {
        grad[r] = a.grad.row<T>(b, s + r);
        x[r] = a.x.row<T>(b, s + r);
        scale[r] = a.scale.row<M>(b, s + r);
        mean[r] = static_cast<const A*>(a.mean)[row + r];
        rstd[r] = static_cast<const A*>(a.rstd)[row + r];
        if constexpr (KIND != Adaln::single) other_grad[r] = a.other_grad.row<T>(b, s + r);
        if constexpr (RESIDUAL) {
            y[r] = a.y.row<T>(b, s + r);
            gate[r] = a.gate.row<M>(b, s + r);
        }
    }

    const auto incoming = [&](int r, int64_t i, auto extent) {
        const Vec<A> dout = load(grad[r] + i, extent);
        if constexpr (KIND == Adaln::forked) return dout + load(other_grad[r] + i, extent);
        return dout;
    };

    Vec<A> sum_g[N] = {}, sum_gn[N] = {};
    sweep<A, 1>(D, [&](int64_t i, auto extent, int) {
        Vec<A> dscale = {}, dshift = {};
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
            const Vec<A> dout = incoming(r, i, extent);
            const Vec<A> normed = (load(x[r] + i, extent) - mean[r]) * rstd[r];
            const Vec<A> g = dout * (load(scale[r] + i, extent) + A(1));
            sum_g[r] += g;
            sum_gn[r] += g * normed;
            if constexpr (MODULATION == ModulationGrad::per_token) {
                store(static_cast<M*>(a.dscale) + (row + r) * D + i, dout * normed, extent);
                store(static_cast<M*>(a.dshift) + (row + r) * D + i, dout, extent);
            }
            if constexpr (MODULATION == ModulationGrad::summed) {
                dscale += dout * normed;
                dshift += dout;
            }
        }
        if constexpr (MODULATION == ModulationGrad::summed) {
            add_to(sums.dscale + i, dscale, extent);
            add_to(sums.dshift + i, dshift, extent);
        }
    });

    A mean_g[N], mean_gn[N];
    for (int r = 0; r < N; ++r) {
        mean_g[r] = sum_lanes<A>(sum_g[r]) / A(D);
        mean_gn[r] = sum_lanes<A>(sum_gn[r]) / A(D);
    }
    const auto input_grad = [&](int r, int64_t i, auto extent) {
        const Vec<A> normed = (load(x[r] + i, extent) - mean[r]) * rstd[r];
        const Vec<A> g = incoming(r, i, extent) * (load(scale[r] + i, extent) + A(1));
        return (g - mean_g[r] - normed * mean_gn[r]) * rstd[r];
    };
    T *dx = static_cast<T*>(a.dx) + row * D, *dy = static_cast<T*>(a.dy) + row * D;
    if constexpr (RESIDUAL) {
        sweep<A, 1>(D, [&](int64_t i, auto extent, int) {
            Vec<A> dgate = {};
#pragma GCC unroll 4
            for (int r = 0; r < N; ++r) {
                const Vec<A> dh = keep_below<A>(input_grad(r, i, extent) + load(other_grad[r] + i, extent),
                                                load(x[r] + i, extent), a.clip);
                const Vec<A> of_gate = dh * load(y[r] + i, extent);
                write<STREAM>(dx + r * D + i, dh, extent);
                write<STREAM>(dy + r * D + i, dh * load(gate[r] + i, extent), extent);
                if constexpr (MODULATION == ModulationGrad::per_token)
                    store(static_cast<M*>(a.dgate) + (row + r) * D + i, of_gate, extent);
                dgate += of_gate;
            }
            if constexpr (MODULATION == ModulationGrad::summed) add_to(sums.dgate + i, dgate, extent);
        });
    } else {
        for (int r = 0; r < N; ++r)
            sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
                write<STREAM>(dx + r * D + i, input_grad(r, i, extent), extent);
            });
    }
}

template <class T, class M, Adaln KIND, ModulationGrad MODULATION, bool STREAM>
void backward_tasks(const AdalnBackward& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    constexpr int64_t SUMS = KIND == Adaln::residual ? 3 : 2;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, chunk = task % a.chunks, D = a.channels;
        const int64_t end = (chunk + 1) * a.tokens / a.chunks;
        Sums<A> sums{};
        if constexpr (MODULATION == ModulationGrad::summed) {
            A* partials = static_cast<A*>(a.partials) + task * SUMS * D;
            for (int64_t i = 0; i < SUMS * D; ++i) partials[i] = 0;
            sums = {partials, partials + D, partials + 2 * D};
        }
        int64_t s = chunk * a.tokens / a.chunks;
        for (; s + ROWS <= end; s += ROWS) backward_rows<T, M, KIND, MODULATION, STREAM, ROWS>(a, b, s, sums);
        for (; s < end; ++s) backward_rows<T, M, KIND, MODULATION, STREAM, 1>(a, b, s, sums);
    }
}

template <class T, class M, Adaln KIND, bool STREAM>
void backward_modulation(const AdalnBackward& a, int64_t first_task, int64_t last_task) {
    switch (a.modulation) {
        case ModulationGrad::none:
            return backward_tasks<T, M, KIND, ModulationGrad::none, STREAM>(a, first_task, last_task);
        case ModulationGrad::summed:
            return backward_tasks<T, M, KIND, ModulationGrad::summed, STREAM>(a, first_task, last_task);
        case ModulationGrad::per_token:
            return backward_tasks<T, M, KIND, ModulationGrad::per_token, STREAM>(a, first_task, last_task);
    }
}

template <class T, class M, Adaln KIND>
void backward(const AdalnBackward& a, int64_t first_task, int64_t last_task) {
    if (!a.stream) return backward_modulation<T, M, KIND, false>(a, first_task, last_task);
    backward_modulation<T, M, KIND, true>(a, first_task, last_task);
    stream_fence();
}

template <class T, class M>
AdalnKernels kernels(Adaln kind) {
    switch (kind) {
        case Adaln::single:
            return {forward<T, M, false>, backward<T, M, Adaln::single>};
        case Adaln::forked:
            return {forward<T, M, false>, backward<T, M, Adaln::forked>};
        case Adaln::residual:
            return {forward<T, M, true>, backward<T, M, Adaln::residual>};
    }
    return {};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

AdalnKernels adaln_kernels(Scalar x, Scalar modulation, Adaln kind) {
    const bool wide = modulation == Scalar::float32;
    switch (x) {
        case Scalar::float32:
            return kernels<float, float>(kind);
        case Scalar::float64:
            return kernels<double, double>(kind);
        case Scalar::bfloat16:
            return wide ? kernels<bfloat16, float>(kind) : kernels<bfloat16, bfloat16>(kind);
        case Scalar::float16:
            return wide ? kernels<float16, float>(kind) : kernels<float16, float16>(kind);
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
