// Vectors of the widest registers this file is compiled for, by GNU vector extensions, so that one source
// serves AVX-512, AVX2, SSE2 and NEON. Arithmetic is in an accumulator type A (float or double); storage may
// be 16 bit.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTDISTILL_INLINE inline __attribute__((always_inline))

namespace fastdistill {
namespace {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class A>
constexpr int LANES = REGISTER_BYTES / sizeof(A);

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(REGISTER_BYTES)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(REGISTER_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;

typedef uint32_t U32 __attribute__((vector_size(REGISTER_BYTES)));
typedef uint64_t U64 __attribute__((vector_size(REGISTER_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(REGISTER_BYTES / 2)));

// How much of a vector lies inside the row: all of it, or its first `count` lanes.
struct Full {
    static constexpr int count(int lanes) { return lanes; }
};
struct Tail {
    int lanes_inside;
    int count(int) const { return lanes_inside; }
};

template <class V, class T>
FASTDISTILL_INLINE V bit_copy(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(V));
    return v;
}

// The intrinsics are one instruction where g++ 12 makes five of __builtin_convertvector.
FASTDISTILL_INLINE U32 widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<U32>(_mm512_cvtepu16_epi32(bit_copy<__m256i>(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(bit_copy<__m128i>(p)));
#else
    return __builtin_convertvector(bit_copy<U16>(p), U32);
#endif
}

FASTDISTILL_INLINE void narrow(uint16_t* p, U32 v) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    const __m256i i = reinterpret_cast<__m256i>(v);
    const __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
#else
    const U16 bits = __builtin_convertvector(v, U16);
#endif
    __builtin_memcpy(p, &bits, sizeof(bits));
}

FASTDISTILL_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
    // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    const uint32_t wide = body << 13, magic = 0x77800000;
    const float scaled = bit_copy<float>(&wide) * bit_copy<float>(&magic);
    const uint32_t bits = body >= 0x7c00 ? (wide | 0x7f800000) : bit_copy<uint32_t>(&scaled);
    const uint32_t result = bits | sign;
    return bit_copy<float>(&result);
}

FASTDISTILL_INLINE uint16_t float_to_half(float f) {
    const uint32_t u = bit_copy<uint32_t>(&f), sign = (u >> 16) & 0x8000, body = u & 0x7fffffff;
    if (body > 0x7f800000) return sign | 0x7e00;
    if (body >= 0x477ff000) return sign | 0x7c00;
    if (body < 0x38800000) {  // subnormal: adding 0.5 lets the float adder round to a multiple of 2^-24
        const float shifted = bit_copy<float>(&body) + 0.5f;
        return sign | (bit_copy<uint32_t>(&shifted) - 0x3f000000);
    }
    return sign | ((body - 0x38000000 + 0xfff + ((body >> 13) & 1)) >> 13);
}

FASTDISTILL_INLINE Vec<float> load(const float* p, Full) {
    return bit_copy<Vec<float>>(p);
}
FASTDISTILL_INLINE Vec<double> load(const double* p, Full) {
    return bit_copy<Vec<double>>(p);
}
FASTDISTILL_INLINE Vec<float> load(const bfloat16* p, Full) {
    return reinterpret_cast<Vec<float>>(widen(&p->bits) << 16);
}
FASTDISTILL_INLINE Vec<float> load(const float16* p, Full) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(bit_copy<__m256i>(p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(bit_copy<__m128i>(p));
#else
    Vec<float> v;
    for (int i = 0; i < LANES<float>; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
}

FASTDISTILL_INLINE void store(float* p, Vec<float> v, Full) {
    __builtin_memcpy(p, &v, sizeof(v));
}
FASTDISTILL_INLINE void store(double* p, Vec<double> v, Full) {
    __builtin_memcpy(p, &v, sizeof(v));
}
FASTDISTILL_INLINE void store(bfloat16* p, Vec<float> v, Full) {
    const U32 u = reinterpret_cast<U32>(v);
    const U32 nearest_even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U32 quiet_nan = U32{} + 0x7fc0;
    narrow(&p->bits, v == v ? nearest_even : quiet_nan);
}
FASTDISTILL_INLINE void store(float16* p, Vec<float> v, Full) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &bits, sizeof(bits));
#elif defined(__F16C__)
    const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &bits, sizeof(bits));
#else
    for (int i = 0; i < LANES<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// A store that goes around the caches: without it, writing a line reads it from memory first. For results too
// large to be still in cache when they are read, at addresses aligned to the register.
template <class T>
FASTDISTILL_INLINE void stream(T* p, Vec<Accumulator<T>> v) {
    alignas(REGISTER_BYTES) T whole[LANES<Accumulator<T>>];
    store(whole, v, Full{});
#if defined(__AVX2__)
    if constexpr (sizeof(whole) == 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_copy<__m512i>(whole));
#endif
    } else if constexpr (sizeof(whole) == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_copy<__m256i>(whole));
    } else {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_copy<__m128i>(whole));
    }
#else
    __builtin_memcpy(p, whole, sizeof(whole));
#endif
}
// Other threads read the result after they have synchronised in the ordinary way, which streaming stores
// ignore.
FASTDISTILL_INLINE void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

template <bool STREAM, class T, class Extent>
FASTDISTILL_INLINE void write(T* p, Vec<Accumulator<T>> v, Extent extent) {
    if constexpr (STREAM && std::is_same_v<Extent, Full>) {
        stream(p, v);
    } else {
        store(p, v, extent);
    }
}

// Lanes outside the row read as zero and are never written.
template <class T>
FASTDISTILL_INLINE Vec<Accumulator<T>> load(const T* p, Tail tail) {
    T whole[LANES<Accumulator<T>>] = {};
    for (int i = 0; i < tail.lanes_inside; ++i) whole[i] = p[i];
    return load(whole, Full{});
}
template <class T>
FASTDISTILL_INLINE void store(T* p, Vec<Accumulator<T>> v, Tail tail) {
    T whole[LANES<Accumulator<T>>];
    store(whole, v, Full{});
    for (int i = 0; i < tail.lanes_inside; ++i) p[i] = whole[i];
}

template <class A>
FASTDISTILL_INLINE Vec<A> keep_inside(Vec<A> v, Full) {
    return v;
}
template <class A>
FASTDISTILL_INLINE Vec<A> keep_inside(Vec<A> v, Tail tail) {
    for (int i = tail.lanes_inside; i < LANES<A>; ++i) v[i] = 0;
    return v;
}

// To [-limit, limit]; NaN stays NaN.
template <class A>
FASTDISTILL_INLINE Vec<A> clamp(Vec<A> v, double limit) {
    const Vec<A> high = Vec<A>{} + A(limit);
    v = v > high ? high : v;
    return v < -high ? -high : v;
}
// The gradient of clamp, given its result: none where that lies on the limit.
template <class A>
FASTDISTILL_INLINE Vec<A> keep_below(Vec<A> grad, Vec<A> clamped, double limit) {
    const Vec<A> high = Vec<A>{} + A(limit);
    const Vec<A> kept = clamped >= high ? Vec<A>{} : grad;
    return clamped <= -high ? Vec<A>{} : kept;
}

// exp(v) to a unit in the last place, between the smallest and the largest normal number: 2^n times a
// polynomial (Cephes' expf) of what v is more than n log 2.
FASTDISTILL_INLINE Vec<float> exponential(Vec<float> v) {
    const Vec<float> low = Vec<float>{} - 87.33f, high = Vec<float>{} + 88.37f;
    v = v > high ? high : v;
    v = v < low ? low : v;
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Vec<float> rounded = v * 1.44269504f + ROUND, n = rounded - ROUND;
    const Vec<float> r = v - n * 0.693359375f - n * -2.12194440e-4f;
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Vec<float> mantissa = p * (r * r) + r + 1.f;
    return reinterpret_cast<Vec<float>>(reinterpret_cast<U32>(mantissa) +
                                        (reinterpret_cast<U32>(rounded) << 23));
}
FASTDISTILL_INLINE Vec<double> exponential(Vec<double> v) {
    for (int i = 0; i < LANES<double>; ++i) v[i] = __builtin_exp(v[i]);
    return v;
}

// (b, a, d, c, ...) of (a, b, c, d, ...).
FASTDISTILL_INLINE Vec<float> swap_pairs(Vec<float> v) {
    const U64 pairs = reinterpret_cast<U64>(v);
    return reinterpret_cast<Vec<float>>((pairs << 32) | (pairs >> 32));
}
FASTDISTILL_INLINE Vec<double> swap_pairs(Vec<double> v) {
    Vec<double> swapped;
    for (int i = 0; i < LANES<double>; ++i) swapped[i] = v[i ^ 1];
    return swapped;
}

template <int WIDTH, class A>
FASTDISTILL_INLINE A sum_halves(A* lanes) {
    for (int i = 0; i < WIDTH; ++i) lanes[i] += lanes[i + WIDTH];
    if constexpr (WIDTH > 1) return sum_halves<WIDTH / 2>(lanes);
    return lanes[0];
}
template <class A>
FASTDISTILL_INLINE A sum_lanes(Vec<A> v) {
    A lanes[LANES<A>];
    __builtin_memcpy(lanes, &v, sizeof(v));
    return sum_halves<LANES<A> / 2>(lanes);
}

// body(offset, extent, slot) over a row of `size` elements. `slot` cycles through 0..SLOTS-1: separate
// accumulators hide the latency of the adder.
template <class A, int SLOTS, class Body>
FASTDISTILL_INLINE void sweep(int64_t size, Body&& body) {
    constexpr int W = LANES<A>;
    int64_t i = 0;
    for (; i + SLOTS * W <= size; i += SLOTS * W) {
#pragma GCC unroll 8
        for (int slot = 0; slot < SLOTS; ++slot) body(i + slot * W, Full{}, slot);
    }
    for (; i + W <= size; i += W) body(i, Full{}, 0);
    if (i < size) body(i, Tail{static_cast<int>(size - i)}, 0);
}

}  // namespace
}  // namespace fastdistill
