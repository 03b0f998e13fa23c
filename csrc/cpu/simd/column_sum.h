// The second stage of every deterministic reduction over tokens: rows of partial sums are added in their
// order.
#pragma once

#include "capability.h"

namespace fastdistill {

struct ColumnSum {
    const void* partials;  // accumulators, `count` rows of `stride` elements
    void* out;             // `size` elements of the output type
    int64_t count, stride, size;
};

using ColumnSumKernel = void (*)(const ColumnSum&);

#define FASTDISTILL_DECLARE(capability)            \
    namespace capability {                         \
    ColumnSumKernel column_sum_kernel(Scalar out); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
