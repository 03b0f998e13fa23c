// What the host side of every CPU operator shares: dtype names, the thread pool, the ordered reduction.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../common/rows.h"
#include "simd/column_sum.h"

namespace fastdistill {

inline Scalar scalar_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Scalar::float32;
        case ScalarType::Double:
            return Scalar::float64;
        case ScalarType::BFloat16:
            return Scalar::bfloat16;
        case ScalarType::Half:
            return Scalar::float16;
        default:
            STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
    }
}

// Rows per thread below which waking a thread costs more than it saves.
inline int64_t grain(int64_t channels) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, channels));
}

// Whether a contiguous result is better written around the caches: too large to be found there afterwards,
// and with rows that start at cache lines.
bool streams(const Tensor& out);

// Asks for huge pages under a result so large that the C allocator takes it fresh from the kernel every time:
// a fault for every 4 KiB would cost more than the operator.
void use_huge_pages(Tensor& result);

inline Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    Tensor result = torch::stable::new_empty(like, sizes);
    use_huge_pages(result);
    return result;
}

// Chunks of a batch element's tokens that are summed apart. A function of the shape alone, never of the
// number of threads, so that the sums do not depend on it.
inline int64_t chunks_of(const Rows& rows) {
    const int64_t at_least_16_rows = (rows.tokens + 15) / 16,
                  enough_for_64_threads = 64 / std::max<int64_t>(1, rows.batch);
    return std::max<int64_t>(1, std::min(at_least_16_rows, enough_for_64_threads));
}

inline int64_t rows_per_chunk(const Rows& rows, int64_t chunks) {
    return std::max<int64_t>(1, rows.tokens / chunks);
}

// Adds up the partial sums of several modulations, accumulators of shape (B, chunks, outs, D), in the order
// of the chunks: over the chunks of a batch element, or of all where the modulation is shared by the batch.
void sum_over_tokens(const Tensor& partials, int64_t chunks, const Rows& rows, const Rows& modulation,
                     std::initializer_list<const Tensor*> outs);

}  // namespace fastdistill
