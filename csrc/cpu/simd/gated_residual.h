// Row kernels of x + gate * y.
#pragma once

#include "../../common/operand.h"
#include "capability.h"

namespace fastdistill {

struct GatedResidualForward {
    Operand x, y, gate;
    void* out;
    int64_t tokens, channels;
    double clip;
    bool stream;
};

struct GatedResidualBackward {
    Operand grad, y, gate;
    void *dy, *dgate;  // contiguous; dgate per_token only
    void* partials;    // summed: accumulators (B, chunks, D)
    int64_t tokens, channels, chunks;
    ModulationGrad modulation;
    bool stream;
};

struct GatedResidualKernels {
    void (*forward)(const GatedResidualForward&, int64_t first_row, int64_t last_row);
    // One task is one chunk of the tokens of one batch element: task = b * chunks + chunk.
    void (*backward)(const GatedResidualBackward&, int64_t first_task, int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                                 \
    namespace capability {                                              \
    GatedResidualKernels gated_residual_kernels(Scalar x, Scalar gate); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
