// Device code of the DMD loss over (B, N): B samples of N contiguous elements. Free of torch. T is the type
// of the tensors; N elements are loaded at once (1 when the samples are not aligned).
#pragma once

#include "../common/samples.h"
#include "device.cuh"

namespace fastdistill::cuda {

// real, and real - critic as far as it counts, at one place of one sample.
template <class T, int N, bool GUIDED, bool MASKED>
__device__ inline void real_and_difference(const DmdOperands& in, int64_t b, int64_t i, float (&real)[N],
                                           float (&difference)[N]) {
    load(real, in.cond.at<T>(b, i));
    if constexpr (GUIDED) {
        float uncond[N];
        load(uncond, in.uncond.at<T>(b, i));
#pragma unroll
        for (int j = 0; j < N; ++j) real[j] = uncond[j] + float(in.guidance) * (real[j] - uncond[j]);
    }
    load(difference, in.critic.at<T>(b, i));
#pragma unroll
    for (int j = 0; j < N; ++j) {
        difference[j] = real[j] - difference[j];
        if (in.finite && !isfinite(difference[j])) difference[j] = 0.f;
        if (MASKED && !in.mask.at<bool>(b, i)[j]) difference[j] = 0.f;
    }
}

// Grid (chunks, B). Partials (B, chunks, 3): sum |real - target|, sum (real - critic)^2, count, the last two
// inside the mask.
template <class T, int N, bool GUIDED, bool MASKED>
__global__ void __launch_bounds__(THREADS)
    dmd_reduce(DmdOperands in, float* partials, int64_t elements, int64_t chunk) {
    const int64_t b = blockIdx.y, first = blockIdx.x * chunk, end = min(first + chunk, elements);
    float of_x = in.a, of_noise = in.b;
    if (in.coefficients) {
        of_x = static_cast<const float*>(in.coefficients)[2 * b];
        of_noise = static_cast<const float*>(in.coefficients)[2 * b + 1];
    }
    float norm = 0.f, square = 0.f, count = 0.f;
    float real[N], difference[N], x[N], noise[N];
    for (int64_t i = first + int64_t(threadIdx.x) * N; i < end; i += THREADS * N) {
        real_and_difference<T, N, GUIDED, MASKED>(in, b, i, real, difference);
        load(x, in.x.at<T>(b, i));
        load(noise, in.noise.at<T>(b, i));
#pragma unroll
        for (int j = 0; j < N; ++j) {
            norm += fabsf(real[j] - (of_x * x[j] + of_noise * noise[j]));
            square += difference[j] * difference[j];
            if (MASKED) count += in.mask.at<bool>(b, i)[j] ? 1.f : 0.f;
        }
    }
    const Sums sums = block_sums<THREADS>(norm, square);
    if constexpr (MASKED)
        count = block_sums<THREADS>(count, 0.f).a;
    else
        count = end - first;
    if (threadIdx.x == 0) {
        float* partial = partials + 3 * (b * gridDim.x + blockIdx.x);
        partial[0] = sums.a;
        partial[1] = sums.b;
        partial[2] = count;
    }
}

// The sum over the chunks of a sample of its partials of one kind; the same in every lane of the warp.
__device__ inline double sum_of_chunks(const float* partials, int64_t b, int64_t chunks, int kind) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x % 32; chunk < chunks; chunk += 32)
        sum += partials[3 * (b * chunks + chunk) + kind];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

// One block; a warp combines the chunks of every eighth sample.
__global__ void __launch_bounds__(THREADS)
    dmd_finish(const float* partials, const float* weight, float* loss, float* factors, int64_t batch,
               int64_t chunks, int64_t elements, double sign, int64_t normaliser, double eps, bool finite) {
    constexpr int WARPS = THREADS / 32;
    const bool leads = threadIdx.x % 32 == 0;
    double whole = 0, count = 0;
    for (int64_t b = threadIdx.x / 32; b < batch; b += WARPS) {
        whole += sum_of_chunks(partials, b, chunks, 0);
        count += sum_of_chunks(partials, b, chunks, 2);
    }
    whole = block_sum_double(leads ? whole : 0.);
    count = fmax(block_sum_double(leads ? count : 0.), 1.);
    double sum = 0;
    for (int64_t b = threadIdx.x / 32; b < batch; b += WARPS) {
        const double norm = sum_of_chunks(partials, b, chunks, 0),
                     square = sum_of_chunks(partials, b, chunks, 1);
        double mean = 1;
        if (normaliser == NORMALISE_SAMPLE) mean = norm / elements + eps;
        if (normaliser == NORMALISE_BATCH) mean = whole / (elements * batch) + eps;
        double factor = sign * (weight ? weight[b] : 1.f) / mean;
        if (finite && !isfinite(factor)) factor = 0;
        if (leads) factors[b] = static_cast<float>(factor / count);
        sum += factor * factor * square;
    }
    sum = block_sum_double(leads ? sum : 0.);
    if (threadIdx.x == 0) *loss = static_cast<float>(0.5 * sum / count);
}

// Grid (chunks, B).
template <class T, int N, bool GUIDED, bool MASKED>
__global__ void __launch_bounds__(THREADS)
    dmd_backward(DmdOperands in, const float* grad, const float* factors, T* dx, int64_t elements,
                 int64_t chunk) {
    const int64_t b = blockIdx.y, first = blockIdx.x * chunk, end = min(first + chunk, elements);
    const float factor = *grad * factors[b];
    float real[N], difference[N];
    for (int64_t i = first + int64_t(threadIdx.x) * N; i < end; i += THREADS * N) {
        real_and_difference<T, N, GUIDED, MASKED>(in, b, i, real, difference);
#pragma unroll
        for (int j = 0; j < N; ++j) difference[j] *= factor;
        store(dx + b * elements + i, difference);
    }
}

}  // namespace fastdistill::cuda
