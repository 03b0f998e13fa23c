// Kernels of the RMS norm and the rotation of heads, for one of q and k.
#pragma once

#include "../../common/operand.h"
#include "capability.h"

namespace fastdistill {

struct NormRopeForward {
    HeadOperand x;
    const void* weight;
    RopeTable table;
    void* out;  // contiguous
    int64_t tokens, heads, size;
    double eps;
};

struct NormRopeBackward {
    HeadOperand grad, x;
    const void* weight;
    RopeTable table;
    void* dx;        // contiguous
    void* partials;  // accumulators (chunks, d), or null where no gradient of the weight is wanted
    int64_t batch, tokens, heads, size, chunks;
    double eps;
};

struct NormRopeKernels {
    // All heads of a token are one row: row = b * tokens + s.
    void (*forward)(const NormRopeForward&, int64_t first_row, int64_t last_row);
    // One task is one chunk of all rows.
    void (*backward)(const NormRopeBackward&, int64_t first_task, int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                                        \
    namespace capability {                                                     \
    NormRopeKernels norm_rope_kernels(Scalar x, Scalar weight, bool adjacent); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
