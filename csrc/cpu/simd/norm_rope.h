// Kernels of the RMS norm and the rotation of heads.
#pragma once

#include "../../common/norm_rope.h"
#include "capability.h"

namespace fastdistill {

struct NormRopeKernels {
    // All heads of a token are one row: row = b * tokens + s.
    void (*forward)(const NormRopeForward&, double eps, int64_t first_row, int64_t last_row);
    // One task is one of the chunks of all rows.
    void (*backward)(const NormRopeBackward&, double eps, int64_t chunks, int64_t first_task,
                     int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                                        \
    namespace capability {                                                     \
    NormRopeKernels norm_rope_kernels(Scalar x, Scalar weight, bool adjacent); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
