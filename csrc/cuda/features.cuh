// Device code that compares two tensors of (B, S, D) rows. Free of torch. T and N as in adaln.cuh.
#pragma once

#include "../common/features.h"
#include "device.cuh"

namespace fastdistill::cuda {

constexpr int KD_PARTIALS = 6;

struct FeatureReduce {
    FeaturePair in;
    float* partials;  // (B, chunks, KD_PARTIALS)
    float* stats;  // cosine: written, (3, rows): 1 / |s|, (|s| - |t|) / |t|, squared distance of s / |s| and
                   // t / |t|; masked_mse: read, (4, B): mean and limit of student, of teacher
};

struct FeatureBackward {
    FeaturePair in;
    const float *grad, *stats;
    float factor;
    void* dstudent;
};

// The squared distance of two rows after each is brought to norm one: see csrc/cpu/simd/features.cpp. Every
// thread of the block receives it.
struct UnitDistance {
    float square, of_student, of_teacher;  // squared difference of the rows as they are; their norms
    float inverse, longer, squared;        // 1 / |s|, (|s| - |t|) / |t|, the distance
};

template <class T, int N>
__device__ inline UnitDistance unit_distance(const T* student, const T* teacher, int64_t size) {
    float f[N], g[N], difference = 0.f, product = 0.f, of_student = 0.f, of_teacher = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < size; i += THREADS * N) {
        load(f, student + i);
        load(g, teacher + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float d = f[j] - g[j];
            difference += d * d;
            product += d * (f[j] + g[j]);
            of_student += f[j] * f[j];
            of_teacher += g[j] * g[j];
        }
    }
    const Sums apart_sums = block_sums<THREADS>(difference, product),
               squares = block_sums<THREADS>(of_student, of_teacher);
    const float norm_s = sqrtf(squares.a), norm_t = sqrtf(squares.b);
    const float a = fmaxf(norm_s, float(MIN_NORM)), b = fmaxf(norm_t, float(MIN_NORM));
    const bool normal = a == norm_s && b == norm_t;
    const float apart = normal ? apart_sums.b / (a + b) : a - b;
    const float against = normal ? -apart : squares.b / b - squares.a / a;
    return {apart_sums.a, norm_s,    norm_t,
            1.f / a,      apart / b, fmaxf((apart_sums.a + apart * against) / (a * b), 0.f)};
}

// Grid (chunks, B). Partials: pivot, sum and sum of squares of what is left of it, for student and teacher.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) feature_moments(FeatureReduce a) {
    const int64_t b = blockIdx.y, D = a.in.channels;
    const int64_t first = blockIdx.x * a.in.tokens / gridDim.x,
                  end = (blockIdx.x + int64_t(1)) * a.in.tokens / gridDim.x;
    float* partial = a.partials + (b * gridDim.x + blockIdx.x) * KD_PARTIALS;
    float v[N];
    for (int which = 0; which < 2; ++which, partial += 3) {
        const Operand& operand = which ? a.in.teacher : a.in.student;
        // The mean of the first row is near that of the chunk, so the squares of what is left do not cancel.
        float of_first = 0.f;
        for (int64_t i = int64_t(threadIdx.x) * N; i < D && first < end; i += THREADS * N) {
            load(v, operand.row<T>(b, first) + i);
#pragma unroll
            for (int j = 0; j < N; ++j) of_first += v[j];
        }
        const float pivot = block_sums<THREADS>(of_first, 0.f).a / D;
        float sum = 0.f, square = 0.f;
        for (int64_t s = first; s < end; ++s)
            for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
                load(v, operand.row<T>(b, s) + i);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    sum += v[j] - pivot;
                    square += (v[j] - pivot) * (v[j] - pivot);
                }
            }
        const Sums sums = block_sums<THREADS>(sum, square);
        if (threadIdx.x == 0) {
            partial[0] = pivot;
            partial[1] = sums.a;
            partial[2] = sums.b;
        }
    }
}

// One thread for each sample and each of student and teacher: mean and standard deviation from the moments of
// the chunks, in their order.
__global__ void feature_finish_moments(FeaturePair in, const float* partials, int64_t chunks, float* stats) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, b = index / 2, which = index % 2;
    if (b >= in.batch) return;
    double count = 0, mean = 0, square = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* p = partials + (b * chunks + chunk) * KD_PARTIALS + 3 * which;
        const double n = ((chunk + 1) * in.tokens / chunks - chunk * in.tokens / chunks) * in.channels;
        if (n == 0) continue;
        const double sum = p[1], apart = p[0] + sum / n - mean, both = count + n;
        square += p[2] - sum * sum / n + apart * apart * count * n / both;
        mean += apart * n / both;
        count = both;
    }
    stats[2 * which * in.batch + b] = static_cast<float>(mean);
    stats[(2 * which + 1) * in.batch + b] = static_cast<float>(MASK_SIGMAS * sqrt(square / fmax(1., count)));
}

// Grid (chunks, B). Partials: the sum of the loss; relative_mse also the sum of teacher^2.
template <class T, int N, FeatureKd KIND>
__global__ void __launch_bounds__(THREADS) feature_reduce(FeatureReduce a) {
    const int64_t b = blockIdx.y, D = a.in.channels, rows = a.in.batch * a.in.tokens;
    const int64_t first = blockIdx.x * a.in.tokens / gridDim.x,
                  end = (blockIdx.x + int64_t(1)) * a.in.tokens / gridDim.x;
    constexpr bool MASKED = KIND == FeatureKd::masked_mse;
    float loss = 0.f, teacher_square = 0.f, f[N], g[N];
    float mean_s = 0.f, limit_s = 0.f, mean_t = 0.f, limit_t = 0.f;
    if constexpr (MASKED) {
        mean_s = a.stats[b];
        limit_s = a.stats[a.in.batch + b];
        mean_t = a.stats[2 * a.in.batch + b];
        limit_t = a.stats[3 * a.in.batch + b];
    }
    for (int64_t s = first; s < end; ++s) {
        const T *student = a.in.student.row<T>(b, s), *teacher = a.in.teacher.row<T>(b, s);
        if constexpr (KIND == FeatureKd::cosine) {
            const UnitDistance distance = unit_distance<T, N>(student, teacher, D);
            if (threadIdx.x == 0) {
                const int64_t row = b * a.in.tokens + s;
                a.stats[row] = distance.inverse;
                a.stats[rows + row] = distance.longer;
                a.stats[2 * rows + row] = distance.squared;
                loss += distance.squared;
            }
        } else {
            for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
                load(f, student + i);
                load(g, teacher + i);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    if constexpr (MASKED) {
                        if (!(fabsf(f[j] - mean_s) < limit_s)) f[j] = 0.f;
                        if (!(fabsf(g[j] - mean_t) < limit_t)) g[j] = 0.f;
                    }
                    loss += (f[j] - g[j]) * (f[j] - g[j]);
                    if constexpr (KIND == FeatureKd::relative_mse) teacher_square += g[j] * g[j];
                }
            }
        }
    }
    const Sums sums = block_sums<THREADS>(loss, teacher_square);
    if (threadIdx.x == 0) {
        float* partial = a.partials + (b * gridDim.x + blockIdx.x) * KD_PARTIALS;
        partial[0] = sums.a;
        partial[1] = sums.b;
    }
}

// One block. `of`: what the loss is a mean over.
__global__ void __launch_bounds__(THREADS) feature_finish(const float* partials, int64_t count, double of,
                                                          bool relative, float* loss, float* stats) {
    double sum = 0, teacher_square = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) {
        sum += partials[i * KD_PARTIALS];
        teacher_square += partials[i * KD_PARTIALS + 1];
    }
    sum = block_sum_double(sum);
    teacher_square = block_sum_double(teacher_square);
    if (threadIdx.x > 0) return;
    *loss = static_cast<float>(count == 0 ? 0. : sum / (relative ? teacher_square : of));
    if (relative) *stats = static_cast<float>(2 / teacher_square);
}

// One block per row.
template <class T, int N, FeatureKd KIND>
__global__ void __launch_bounds__(THREADS) feature_backward(FeatureBackward a) {
    const int64_t row = blockIdx.x, b = row / a.in.tokens, s = row % a.in.tokens, D = a.in.channels;
    const int64_t rows = a.in.batch * a.in.tokens, B = a.in.batch;
    const T *student = a.in.student.row<T>(b, s), *teacher = a.in.teacher.row<T>(b, s);
    T* out = static_cast<T*>(a.dstudent) + row * D;
    float factor = *a.grad * a.factor, longer = 0.f, half = 0.f, f[N], g[N];
    if constexpr (KIND == FeatureKd::relative_mse) factor *= *a.stats;
    if constexpr (KIND == FeatureKd::cosine) {
        factor *= a.stats[row] * a.stats[row];
        longer = a.stats[rows + row];
        half = a.stats[2 * rows + row] / 2;
    }
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += THREADS * N) {
        load(f, student + i);
        load(g, teacher + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if constexpr (KIND == FeatureKd::cosine) {
                // s / |s| - t / |t| = (s - t - t * longer) / |s|, less its part along s.
                f[j] = (f[j] - g[j] - g[j] * longer - f[j] * half) * factor;
            } else if constexpr (KIND == FeatureKd::masked_mse) {
                const float kept = fabsf(g[j] - a.stats[2 * B + b]) < a.stats[3 * B + b] ? g[j] : 0.f;
                f[j] = fabsf(f[j] - a.stats[b]) < a.stats[B + b] ? (f[j] - kept) * factor : 0.f;
            } else {
                f[j] = (f[j] - g[j]) * factor;
            }
        }
        store(out + i, f);
    }
}

// One block per row: cosine, mean squared difference, norm before, norm after.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) feature_statistics(FeaturePair in, float* out) {
    const int64_t row = blockIdx.x, b = row / in.tokens, s = row % in.tokens, rows = in.batch * in.tokens;
    const UnitDistance distance =
        unit_distance<T, N>(in.student.row<T>(b, s), in.teacher.row<T>(b, s), in.channels);
    if (threadIdx.x > 0) return;
    out[row] = 1.f - distance.squared / 2;
    out[rows + row] = distance.square / in.channels;
    out[2 * rows + row] = distance.of_student;
    out[3 * rows + row] = distance.of_teacher;
}

}  // namespace fastdistill::cuda
