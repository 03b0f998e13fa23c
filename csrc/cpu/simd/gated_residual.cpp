#include "gated_residual.h"

#include "vec.h"

namespace fastdistill {
namespace {

// Rows that share one update of the sum over tokens.
constexpr int ROWS = 4;

template <class T, class M, bool STREAM>
void forward_rows(const GatedResidualForward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        const T *x = a.x.row<T>(b, s), *y = a.y.row<T>(b, s);
        const M* gate = a.gate.row<M>(b, s);
        T* out = static_cast<T*>(a.out) + row * a.channels;
        sweep<A, 2>(a.channels, [&](int64_t i, auto extent, int) {
            const Vec<A> sum = load(x + i, extent) + load(gate + i, extent) * load(y + i, extent);
            write<STREAM>(out + i, clamp<A>(sum, a.clip), extent);
        });
    }
    if constexpr (STREAM) stream_fence();
}

template <class T, class M>
void forward(const GatedResidualForward& a, int64_t first_row, int64_t last_row) {
    return a.stream ? forward_rows<T, M, true>(a, first_row, last_row)
                    : forward_rows<T, M, false>(a, first_row, last_row);
}

// dy = gate * grad, dgate = sum grad * y.
template <class T, class M, ModulationGrad MODULATION, bool STREAM, int N>
FASTDISTILL_INLINE void backward_rows(const GatedResidualBackward& a, int64_t b, int64_t s,
                                      Accumulator<T>* sum) {
    using A = Accumulator<T>;
    const int64_t D = a.channels, row = b * a.tokens + s;
    const T *grad[N], *y[N];
    const M* gate[N];
    for (int r = 0; r < N; ++r) {
        grad[r] = a.grad.row<T>(b, s + r);
        y[r] = a.y.row<T>(b, s + r);
        gate[r] = a.gate.row<M>(b, s + r);
    }
    T* dy = static_cast<T*>(a.dy) + row * D;
    sweep<A, 1>(D, [&](int64_t i, auto extent, int) {
        Vec<A> dgate = {};
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
            const Vec<A> dout = load(grad[r] + i, extent), of_gate = dout * load(y[r] + i, extent);
            write<STREAM>(dy + r * D + i, dout * load(gate[r] + i, extent), extent);
            if constexpr (MODULATION == ModulationGrad::per_token)
                store(static_cast<M*>(a.dgate) + (row + r) * D + i, of_gate, extent);
            dgate += of_gate;
        }
        if constexpr (MODULATION == ModulationGrad::summed)
            store(sum + i, load(sum + i, extent) + dgate, extent);
    });
}

template <class T, class M, ModulationGrad MODULATION, bool STREAM>
void backward_tasks(const GatedResidualBackward& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, chunk = task % a.chunks, end = (chunk + 1) * a.tokens / a.chunks;
        A* sum = nullptr;
        if constexpr (MODULATION == ModulationGrad::summed) {
            sum = static_cast<A*>(a.partials) + task * a.channels;
            for (int64_t i = 0; i < a.channels; ++i) sum[i] = 0;
        }
        int64_t s = chunk * a.tokens / a.chunks;
        for (; s + ROWS <= end; s += ROWS) backward_rows<T, M, MODULATION, STREAM, ROWS>(a, b, s, sum);
        for (; s < end; ++s) backward_rows<T, M, MODULATION, STREAM, 1>(a, b, s, sum);
    }
    if constexpr (STREAM) stream_fence();
}

template <class T, class M, bool STREAM>
void backward_modulation(const GatedResidualBackward& a, int64_t first_task, int64_t last_task) {
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
void backward(const GatedResidualBackward& a, int64_t first_task, int64_t last_task) {
    return a.stream ? backward_modulation<T, M, true>(a, first_task, last_task)
                    : backward_modulation<T, M, false>(a, first_task, last_task);
}

template <class T, class M>
GatedResidualKernels kernels() {
    return {forward<T, M>, backward<T, M>};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

GatedResidualKernels gated_residual_kernels(Scalar x, Scalar gate) {
    const bool wide = gate == Scalar::float32;
    switch (x) {
        case Scalar::float32:
            return kernels<float, float>();
        case Scalar::float64:
            return kernels<double, double>();
        case Scalar::bfloat16:
            return wide ? kernels<bfloat16, float>() : kernels<bfloat16, bfloat16>();
        case Scalar::float16:
            return wide ? kernels<float16, float>() : kernels<float16, float16>();
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
