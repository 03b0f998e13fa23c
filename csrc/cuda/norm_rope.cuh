// Device code of the RMS norm and the rotation of heads. Free of torch.
//
// A launch serves several tensors of heads, its parts. A warp owns a head; a lane holds ITEMS * PAIRS of its
// pairs in registers, their first channels in a and their second ones in b, so that one code serves both
// pairings. PAIRS are loaded at once (1 where they are not aligned).
#pragma once

#include "../common/norm_rope.h"
#include "device.cuh"

namespace fastdistill::cuda {

// Queries, keys and values of two streams.
constexpr int MAX_PARTS = 6;

// Part i has the blocks from first_block[i] to first_block[i + 1].
template <class Part>
struct NormRopeParts {
    Part part[MAX_PARTS];
    int64_t first_block[MAX_PARTS + 1];
    int count;
    float eps;

    __device__ int index(int64_t block) const {
        int i = 0;
        while (i + 1 < count && block >= first_block[i + 1]) ++i;
        return i;
    }
};

// The two channels of a lane's pairs.
template <int ITEMS, int PAIRS>
struct Lane {
    float a[ITEMS][PAIRS], b[ITEMS][PAIRS];

    static __device__ int64_t first_pair(int item) { return (int64_t(item) * 32 + threadIdx.x % 32) * PAIRS; }

    // What lies beyond the head reads as zero.
    template <bool ADJACENT, class T>
    __device__ void read(const T* head, int64_t half) {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const int64_t pair = first_pair(item);
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) a[item][j] = b[item][j] = 0.f;
            if (pair >= half) continue;
            if constexpr (ADJACENT && PAIRS == 1) {
                a[item][0] = to_float(head[2 * pair]);
                b[item][0] = to_float(head[2 * pair + 1]);
            } else if constexpr (ADJACENT) {
                float both[2 * PAIRS];
                load(both, head + 2 * pair);
#pragma unroll
                for (int j = 0; j < PAIRS; ++j) a[item][j] = both[2 * j], b[item][j] = both[2 * j + 1];
            } else {
                load(a[item], head + pair);
                load(b[item], head + half + pair);
            }
        }
    }

    // `absent` where there is no table.
    template <bool ADJACENT>
    __device__ void read_table(const void* table, float absent, int64_t stride, bool compact, int64_t token,
                               int64_t half) {
        if (!table) {
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
#pragma unroll
                for (int j = 0; j < PAIRS; ++j) a[item][j] = b[item][j] = absent;
            return;
        }
        const float* row = static_cast<const float*>(table) + token * stride;
        if (!compact) return read<ADJACENT>(row, half);
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                const int64_t pair = first_pair(item) + j;
                a[item][j] = b[item][j] = pair < half ? row[pair] : 0.f;
            }
    }

    template <bool ADJACENT, class T>
    __device__ void write(T* head, int64_t half) const {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const int64_t pair = first_pair(item);
            if (pair >= half) continue;
            if constexpr (ADJACENT) {
                float both[2 * PAIRS];
#pragma unroll
                for (int j = 0; j < PAIRS; ++j) both[2 * j] = a[item][j], both[2 * j + 1] = b[item][j];
                store(head + 2 * pair, both);
            } else {
                store(head + pair, a[item]);
                store(head + half + pair, b[item]);
            }
        }
    }
};

// run(item, j) for every pair of a lane.
template <int ITEMS, int PAIRS, class Run>
__device__ inline void for_pairs(Run&& run) {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item)
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) run(item, j);
}

// The same in every lane.
__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

template <int ITEMS, int PAIRS>
__device__ inline float reciprocal_root(const Lane<ITEMS, PAIRS>& x, int64_t size, float eps) {
    float square = 0.f;
    for_pairs<ITEMS, PAIRS>([&](int i, int j) { square += x.a[i][j] * x.a[i][j] + x.b[i][j] * x.b[i][j]; });
    return 1.f / sqrtf(warp_sum(square) / size + eps);
}

template <bool ADJACENT, int ITEMS, int PAIRS>
__device__ inline void read_position(Lane<ITEMS, PAIRS>& cos, Lane<ITEMS, PAIRS>& sin, const RopeTable& table,
                                     int64_t token, int64_t half) {
    cos.template read_table<ADJACENT>(table.cos, 1.f, table.cos_stride, table.compact, token, half);
    sin.template read_table<ADJACENT>(table.sin, 0.f, table.sin_stride, table.compact, token, half);
}

template <class T, class M, int ITEMS, int PAIRS, bool ADJACENT>
__global__ void __launch_bounds__(THREADS)
    norm_rope_forward(const __grid_constant__ NormRopeParts<NormRopeForward> parts) {
    const int which = parts.index(blockIdx.x);
    const NormRopeForward& p = parts.part[which];
    const int64_t block = blockIdx.x - parts.first_block[which], half = p.size / 2;
    const int64_t index = block * (THREADS / 32) + threadIdx.x / 32, row = index / p.heads;
    if (row >= p.batch * p.tokens) return;
    const int64_t b = row / p.tokens, s = row % p.tokens, h = index % p.heads;
    Lane<ITEMS, PAIRS> x;
    x.template read<ADJACENT>(p.x.row<T>(b, s, h), half);
    if (p.weight) {
        Lane<ITEMS, PAIRS> weight, cos, sin;
        weight.template read<ADJACENT>(static_cast<const M*>(p.weight), half);
        read_position<ADJACENT>(cos, sin, p.table, s, half);
        const float rstd = reciprocal_root(x, p.size, parts.eps);
        for_pairs<ITEMS, PAIRS>([&](int i, int j) {
            const float a = x.a[i][j] * rstd * weight.a[i][j], b = x.b[i][j] * rstd * weight.b[i][j];
            x.a[i][j] = a * cos.a[i][j] - b * sin.a[i][j];
            x.b[i][j] = b * cos.b[i][j] + a * sin.b[i][j];
        });
    }
    x.template write<ADJACENT>(p.out.row<T>(b, s, h), half);
}

// A block walks one chunk of all heads of its part. The sums for the weight stay in registers until the warps
// are added in their order.
template <class T, class M, int ITEMS, int PAIRS, bool ADJACENT>
__global__ void __launch_bounds__(THREADS)
    norm_rope_backward(const __grid_constant__ NormRopeParts<NormRopeBackward> parts) {
    constexpr int WARPS = THREADS / 32;
    FASTDISTILL_DYNAMIC_SHARED(shared);
    const int which = parts.index(blockIdx.x);
    const NormRopeBackward& p = parts.part[which];
    const int64_t half = p.size / 2, warp = threadIdx.x / 32, count = p.batch * p.tokens * p.heads;
    const int64_t chunks = parts.first_block[which + 1] - parts.first_block[which];
    const int64_t chunk = blockIdx.x - parts.first_block[which];
    const int64_t first = chunk * count / chunks, end = (chunk + 1) * count / chunks;
    Lane<ITEMS, PAIRS> weight, dweight{};
    if (p.weight) weight.template read<ADJACENT>(static_cast<const M*>(p.weight), half);
    for (int64_t index = first + warp; index < end; index += WARPS) {
        const int64_t row = index / p.heads, b = row / p.tokens, s = row % p.tokens, h = index % p.heads;
        Lane<ITEMS, PAIRS> g;
        g.template read<ADJACENT>(p.grad.row<T>(b, s, h), half);
        if (p.weight) {
            Lane<ITEMS, PAIRS> x, cos, sin;
            x.template read<ADJACENT>(p.x.row<T>(b, s, h), half);
            read_position<ADJACENT>(cos, sin, p.table, s, half);
            const float rstd = reciprocal_root(x, p.size, parts.eps);
            float along = 0.f;
            for_pairs<ITEMS, PAIRS>([&](int i, int j) {
                x.a[i][j] *= rstd;
                x.b[i][j] *= rstd;
                const float a = g.a[i][j] * cos.a[i][j] + g.b[i][j] * sin.b[i][j];
                const float b = g.b[i][j] * cos.b[i][j] - g.a[i][j] * sin.a[i][j];
                dweight.a[i][j] += a * x.a[i][j];
                dweight.b[i][j] += b * x.b[i][j];
                g.a[i][j] = a * weight.a[i][j];
                g.b[i][j] = b * weight.b[i][j];
                along += g.a[i][j] * x.a[i][j] + g.b[i][j] * x.b[i][j];
            });
            const float mean = warp_sum(along) / p.size;
            for_pairs<ITEMS, PAIRS>([&](int i, int j) {
                g.a[i][j] = (g.a[i][j] - x.a[i][j] * mean) * rstd;
                g.b[i][j] = (g.b[i][j] - x.b[i][j] * mean) * rstd;
            });
        }
        g.template write<ADJACENT>(p.dx.row<T>(b, s, h), half);
    }
    if (!p.partials) return;
    float* of_warps = reinterpret_cast<float*>(shared);
    dweight.template write<ADJACENT>(of_warps + warp * p.size, half);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < p.size; i += THREADS) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; ++w) sum += of_warps[w * p.size + i];
        static_cast<float*>(p.partials)[chunk * p.size + i] = sum;
    }
}

}  // namespace fastdistill::cuda
