#include "norm_rope.h"

#include "vec.h"

namespace fastdistill {
namespace {

// The cosines and sines of a position, one for each channel; the sine carries the sign with which the other
// channel of the pair comes in: out = n * cos + partner(n) * sin.
template <class A>
struct Position {
    A cos[MAX_HEAD_SIZE], sin[MAX_HEAD_SIZE];

    // No angle: what a part without a table keeps.
    FASTDISTILL_INLINE explicit Position(int64_t size) {
        for (int64_t i = 0; i < size; ++i) cos[i] = 1, sin[i] = 0;
    }

    template <bool ADJACENT>
    FASTDISTILL_INLINE void read(const RopeTable& table, int64_t token, int64_t size) {
        if (!table.cos) return;
        const A* of_cos = static_cast<const A*>(table.cos) + token * table.cos_stride;
        const A* of_sin = static_cast<const A*>(table.sin) + token * table.sin_stride;
        const int64_t half = size / 2;
        for (int64_t pair = 0; pair < half; ++pair) {
            const int64_t a = ADJACENT ? 2 * pair : pair, b = ADJACENT ? a + 1 : a + half;
            cos[a] = of_cos[table.compact ? pair : a];
            cos[b] = of_cos[table.compact ? pair : b];
            sin[a] = -of_sin[table.compact ? pair : a];
            sin[b] = of_sin[table.compact ? pair : b];
        }
    }
};

// body(offset, extent, partner) over a head, where partner(p) is the other channel of the pair of every lane
// of p.
template <class A, bool ADJACENT, class Body>
FASTDISTILL_INLINE void sweep_pairs(int64_t size, Body&& body) {
    if constexpr (ADJACENT) {
        sweep<A, 1>(size, [&](int64_t i, auto extent, int) {
            body(i, extent, [&](const A* p) { return swap_pairs(load(p + i, extent)); });
        });
    } else {
        const int64_t half = size / 2;
        for (int64_t first = 0; first < size; first += half)
            sweep<A, 1>(half, [&](int64_t j, auto extent, int) {
                body(first + j, extent, [&](const A* p) { return load(p + half - first + j, extent); });
            });
    }
}

template <class A, class T>
FASTDISTILL_INLINE A reciprocal_root(const T* x, int64_t size, double eps) {
    Vec<A> square[4] = {};
    sweep<A, 4>(size, [&](int64_t i, auto extent, int slot) {
        const Vec<A> v = load(x + i, extent);
        square[slot] += v * v;
    });
    const A mean = sum_lanes<A>((square[0] + square[1]) + (square[2] + square[3])) / A(size);
    return A(1) /
           (sizeof(A) == 8 ? A(__builtin_sqrt(mean + eps)) : A(__builtin_sqrtf(float(mean) + float(eps))));
}

// The heads of rows [first_row, last_row) as they are.
template <class T>
void copy(const HeadOperand& x, const HeadResult& out, int64_t tokens, int64_t heads, int64_t size,
          int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row)
        for (int64_t h = 0; h < heads; ++h)
            __builtin_memcpy(out.row<T>(row / tokens, row % tokens, h),
                             x.row<T>(row / tokens, row % tokens, h), size * sizeof(T));
}

template <class T, class M, bool ADJACENT>
void forward(const NormRopeForward& a, double eps, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t d = a.size;
    if (!a.weight) return copy<T>(a.x, a.out, a.tokens, a.heads, d, first_row, last_row);
    const M* weight = static_cast<const M*>(a.weight);
    Position<A> position(d);
    A normed[MAX_HEAD_SIZE];
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        position.template read<ADJACENT>(a.table, s, d);
        for (int64_t h = 0; h < a.heads; ++h) {
            const T* x = a.x.row<T>(b, s, h);
            T* out = a.out.row<T>(b, s, h);
            const A rstd = reciprocal_root<A>(x, d, eps);
            sweep<A, 2>(d, [&](int64_t i, auto extent, int) {
                store(normed + i, load(x + i, extent) * rstd * load(weight + i, extent), extent);
            });
            sweep_pairs<A, ADJACENT>(d, [&](int64_t i, auto extent, auto partner) {
                store(out + i,
                      load(normed + i, extent) * load(position.cos + i, extent) +
                          partner(normed) * load(position.sin + i, extent),
                      extent);
            });
        }
    }
}

// With m = x * rstd and g = the gradient turned back, of m * weight:
//   dx = rstd * (g w - m * mean(g w m)),  dweight = sum g m.
template <class T, class M, bool ADJACENT>
void backward(const NormRopeBackward& a, double eps, int64_t chunks, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    const int64_t d = a.size, rows = a.batch * a.tokens;
    if (!a.weight)
        return copy<T>(a.grad, a.dx, a.tokens, a.heads, d, first_task * rows / chunks,
                       last_task * rows / chunks);
    const M* weight = static_cast<const M*>(a.weight);
    Position<A> position(d);
    A of_cos[MAX_HEAD_SIZE], of_sin[MAX_HEAD_SIZE], of_token[MAX_HEAD_SIZE], dweight[MAX_HEAD_SIZE];
    for (int64_t task = first_task; task < last_task; ++task) {
        for (int64_t i = 0; i < d; ++i) dweight[i] = 0;
        for (int64_t row = task * rows / chunks; row < (task + 1) * rows / chunks; ++row) {
            const int64_t b = row / a.tokens, s = row % a.tokens;
            position.template read<ADJACENT>(a.table, s, d);
            // Added up by token first: shorter sums lose fewer digits.
            for (int64_t i = 0; i < d; ++i) of_token[i] = 0;
            for (int64_t h = 0; h < a.heads; ++h) {
                const T *grad = a.grad.row<T>(b, s, h), *x = a.x.row<T>(b, s, h);
                T* dx = a.dx.row<T>(b, s, h);
                const A rstd = reciprocal_root<A>(x, d, eps);
                sweep<A, 2>(d, [&](int64_t i, auto extent, int) {
                    const Vec<A> dout = load(grad + i, extent);
                    store(of_cos + i, dout * load(position.cos + i, extent), extent);
                    store(of_sin + i, dout * load(position.sin + i, extent), extent);
                });
                // The transposed rotation: what a channel gave to its partner comes back from there.
                Vec<A> along = {};
                sweep_pairs<A, ADJACENT>(d, [&](int64_t i, auto extent, auto partner) {
                    const Vec<A> g = load(of_cos + i, extent) + partner(of_sin);
                    const Vec<A> m = load(x + i, extent) * rstd, gm = g * m;
                    const Vec<A> gw = g * load(weight + i, extent);
                    store(of_token + i, load(of_token + i, extent) + gm, extent);
                    store(of_cos + i, gw, extent);
                    along += gw * m;
                });
                const A mean = sum_lanes<A>(along) / A(d);
                sweep<A, 2>(d, [&](int64_t i, auto extent, int) {
                    const Vec<A> m = load(x + i, extent) * rstd;
                    store(dx + i, (load(of_cos + i, extent) - m * mean) * rstd, extent);
                });
            }
            for (int64_t i = 0; i < d; ++i) dweight[i] += of_token[i];
        }
        if (a.partials)
            for (int64_t i = 0; i < d; ++i) static_cast<A*>(a.partials)[task * d + i] = dweight[i];
    }
}

template <class T, class M>
NormRopeKernels kernels(bool adjacent) {
    if (adjacent) return {forward<T, M, true>, backward<T, M, true>};
    return {forward<T, M, false>, backward<T, M, false>};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

NormRopeKernels norm_rope_kernels(Scalar x, Scalar weight, bool adjacent) {
    const bool wide = weight == Scalar::float32;
    switch (x) {
        case Scalar::float32:
            return kernels<float, float>(adjacent);
        case Scalar::float64:
            return kernels<double, double>(adjacent);
        case Scalar::bfloat16:
            return wide ? kernels<bfloat16, float>(adjacent) : kernels<bfloat16, bfloat16>(adjacent);
        case Scalar::float16:
            return wide ? kernels<float16, float>(adjacent) : kernels<float16, float16>(adjacent);
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
