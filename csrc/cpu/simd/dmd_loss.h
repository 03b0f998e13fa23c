// Kernels of the DMD loss over (B, N): B samples of N contiguous elements.
#pragma once

#include "../../common/samples.h"
#include "capability.h"

namespace fastdistill {

struct DmdReduce {
    DmdOperands in;
    double* partials;  // (B, chunks, 3): sum |real - target|, sum (real - critic)^2, count, the last two
                       // inside the mask
    int64_t elements, chunk, chunks;
};

struct DmdBackward {
    DmdOperands in;       // cond, uncond, critic and mask
    const void* factors;  // (B) accumulators: dx = upstream * factors[b] * (real - critic)
    double upstream;
    void* dx;  // contiguous
    int64_t elements, chunk, chunks;
};

struct DmdKernels {
    // One task is one chunk of one sample: task = b * chunks + chunk.
    void (*reduce)(const DmdReduce&, int64_t first_task, int64_t last_task);
    void (*backward)(const DmdBackward&, int64_t first_task, int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                         \
    namespace capability {                                      \
    DmdKernels dmd_kernels(Scalar x, bool guided, bool masked); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
