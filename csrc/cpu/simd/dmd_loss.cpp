#include "dmd_loss.h"

#include "vec.h"

namespace fastdistill {
namespace {

template <class A>
FASTDISTILL_INLINE Vec<A> absolute(Vec<A> v) {
    return v < Vec<A>{} ? -v : v;
}

// v - v is 0 where v is finite and NaN elsewhere.
template <class A>
FASTDISTILL_INLINE Vec<A> finite_or_zero(Vec<A> v) {
    return v - v == Vec<A>{} ? v : Vec<A>{};
}

template <class A, class Extent>
FASTDISTILL_INLINE Vec<A> load_mask(const bool* p, Extent extent) {
    Vec<A> v = {};
    for (int i = 0; i < extent.count(LANES<A>); ++i) v[i] = p[i] ? A(1) : A(0);
    return v;
}

// The parts of the formula at one place of one sample.
template <class T, bool GUIDED, bool MASKED>
struct Place {
    using A = Accumulator<T>;
    const T *cond, *uncond, *critic;
    const bool* mask;
    A guidance;
    bool finite;

    FASTDISTILL_INLINE Place(const DmdOperands& in, int64_t b, int64_t first)
        : cond(in.cond.at<T>(b, first)),
          uncond(in.uncond.at<T>(b, first)),
          critic(in.critic.at<T>(b, first)),
          mask(in.mask.at<bool>(b, first)),
          guidance(A(in.guidance)),
          finite(in.finite) {}

    template <class Extent>
    FASTDISTILL_INLINE Vec<A> real(int64_t i, Extent extent) const {
        const Vec<A> c = load(cond + i, extent);
        if constexpr (!GUIDED) return c;
        const Vec<A> u = load(uncond + i, extent);
        return u + guidance * (c - u);
    }
    template <class Extent>
    FASTDISTILL_INLINE Vec<A> difference(Vec<A> real, int64_t i, Extent extent) const {
        Vec<A> d = real - load(critic + i, extent);
        if (finite) d = finite_or_zero<A>(d);
        if constexpr (MASKED) d = load_mask<A>(mask + i, extent) > Vec<A>{} ? d : Vec<A>{};
        return d;
    }
};

template <class T, bool GUIDED, bool MASKED>
void reduce(const DmdReduce& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, first = task % a.chunks * a.chunk;
        const int64_t size = a.elements - first < a.chunk ? a.elements - first : a.chunk;
        const Place<T, GUIDED, MASKED> place(a.in, b, first);
        const T *x = a.in.x.at<T>(b, first), *noise = a.in.noise.at<T>(b, first);
        A of_x = A(a.in.a), of_noise = A(a.in.b);
        if (a.in.coefficients) {
            of_x = static_cast<const A*>(a.in.coefficients)[2 * b];
            of_noise = static_cast<const A*>(a.in.coefficients)[2 * b + 1];
        }
        Vec<A> norm[2] = {}, square[2] = {}, count = {};
        sweep<A, 2>(size, [&](int64_t i, auto extent, int slot) {
            const Vec<A> real = place.real(i, extent);
            norm[slot] +=
                absolute<A>(real - (of_x * load(x + i, extent) + of_noise * load(noise + i, extent)));
            const Vec<A> d = place.difference(real, i, extent);
            square[slot] += d * d;
            if constexpr (MASKED) count += load_mask<A>(place.mask + i, extent);
        });
        double* partial = a.partials + 3 * task;
        partial[0] = sum_lanes<A>(norm[0] + norm[1]);
        partial[1] = sum_lanes<A>(square[0] + square[1]);
        partial[2] = MASKED ? double(sum_lanes<A>(count)) : double(size);
    }
}

template <class T, bool GUIDED, bool MASKED>
void backward(const DmdBackward& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, first = task % a.chunks * a.chunk;
        const int64_t size = a.elements - first < a.chunk ? a.elements - first : a.chunk;
        const Place<T, GUIDED, MASKED> place(a.in, b, first);
        const A factor = A(a.upstream) * static_cast<const A*>(a.factors)[b];
        T* dx = static_cast<T*>(a.dx) + b * a.elements + first;
        sweep<A, 2>(size, [&](int64_t i, auto extent, int) {
            store(dx + i, factor * place.difference(place.real(i, extent), i, extent), extent);
        });
    }
}

template <class T>
DmdKernels kernels(bool guided, bool masked) {
    if (guided && masked) return {reduce<T, true, true>, backward<T, true, true>};
    if (guided) return {reduce<T, true, false>, backward<T, true, false>};
    if (masked) return {reduce<T, false, true>, backward<T, false, true>};
    return {reduce<T, false, false>, backward<T, false, false>};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

DmdKernels dmd_kernels(Scalar x, bool guided, bool masked) {
    switch (x) {
        case Scalar::float32:
            return kernels<float>(guided, masked);
        case Scalar::float64:
            return kernels<double>(guided, masked);
        case Scalar::bfloat16:
            return kernels<bfloat16>(guided, masked);
        case Scalar::float16:
            return kernels<float16>(guided, masked);
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
