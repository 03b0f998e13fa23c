#include "activation.h"

#include "vec.h"

namespace fastdistill {
namespace {

// 1 / (1 + exp(-v)), and what is left of it to 1, which a difference would round away.
template <class A>
struct Sigmoid {
    Vec<A> value, rest;
    FASTDISTILL_INLINE explicit Sigmoid(Vec<A> v) {
        const Vec<A> e = exponential(-v);
        value = A(1) / (e + A(1));
        rest = e * value;
    }
};

template <class T, Activation ACTIVATION>
void forward(const ActivationForward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        T* out = static_cast<T*>(a.out) + row * (a.before + a.size);
        if (a.before) __builtin_memcpy(out, a.x.row<T>(b, s), a.before * sizeof(T));
        out += a.before;
        const T* y = a.y.row<T>(b, s);
        sweep<A, 2>(a.size, [&](int64_t i, auto extent, int) {
            const Vec<A> v = load(y + i, extent);
            if constexpr (ACTIVATION == Activation::gelu) {
                const Sigmoid<A> p(v * (A(GELU_LINEAR) + A(GELU_CUBIC) * (v * v)));
                store(out + i, v * p.value, extent);
            } else {
                store(out + i, v * Sigmoid<A>(v).value * load(y + a.size + i, extent), extent);
            }
        });
    }
}

// With p the sigmoid: of gelu, p + y p (1 - p) (GELU_LINEAR + 3 GELU_CUBIC y^2); of silu, p + y p (1 - p).
template <class T, Activation ACTIVATION>
void backward(const ActivationBackward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t channels = ACTIVATION == Activation::gelu ? a.size : 2 * a.size;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.tokens, s = row % a.tokens;
        T* dy = static_cast<T*>(a.dy) + row * channels;
        const T *y = a.y.row<T>(b, s), *grad = a.grad.row<T>(b, s);
        sweep<A, 2>(a.size, [&](int64_t i, auto extent, int) {
            const Vec<A> v = load(y + i, extent), g = load(grad + i, extent);
            if constexpr (ACTIVATION == Activation::gelu) {
                const Vec<A> square = v * v;
                const Sigmoid<A> p(v * (A(GELU_LINEAR) + A(GELU_CUBIC) * square));
                const Vec<A> slope = A(GELU_LINEAR) + A(3 * GELU_CUBIC) * square;
                store(dy + i, g * (p.value + v * p.value * p.rest * slope), extent);
            } else {
                const Sigmoid<A> p(v);
                store(dy + i, g * load(y + a.size + i, extent) * (p.value + v * p.value * p.rest), extent);
                store(dy + a.size + i, g * (v * p.value), extent);
            }
        });
    }
}

template <class T>
ActivationKernels kernels(Activation activation) {
    if (activation == Activation::gelu) return {forward<T, Activation::gelu>, backward<T, Activation::gelu>};
    return {forward<T, Activation::swiglu>, backward<T, Activation::swiglu>};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

ActivationKernels activation_kernels(Scalar y, Activation activation) {
    switch (y) {
        case Scalar::float32:
            return kernels<float>(activation);
        case Scalar::float64:
            return kernels<double>(activation);
        case Scalar::bfloat16:
            return kernels<bfloat16>(activation);
        case Scalar::float16:
            return kernels<float16>(activation);
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
