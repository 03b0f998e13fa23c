// Row kernels of modulate and of gated_residual_modulate, which differ by what is normalised: x, or h = x +
// gate * y.
#pragma once

#include "../../common/operand.h"
#include "capability.h"

namespace fastdistill {

struct AdalnForward {
    Operand x, scale, shift;
    Operand y, gate;  // of a residual
    void *h, *out;    // contiguous; h of a residual
    void *mean, *rstd;
    int64_t tokens, channels;
    double eps, clip;
    bool stream;  // write out by streaming stores: it is large, and its rows are aligned
};

struct AdalnBackward {
    Operand grad, x, scale;  // x is what was normalised
    Operand other_grad;      // forked: the second gradient of out; residual: that of h
    Operand y, gate;         // of a residual
    const void *mean, *rstd;
    void *dx, *dy;                  // contiguous; dy of a residual
    void *dscale, *dshift, *dgate;  // per_token: like x, contiguous
    void* partials;                 // summed: accumulators (B, chunks, 2 or 3, D): dscale, dshift, dgate
    int64_t tokens, channels, chunks;
    double clip;
    ModulationGrad modulation;
    bool stream;  // the same for dx and dy
};

struct AdalnKernels {
    void (*forward)(const AdalnForward&, int64_t first_row, int64_t last_row);
    // One task is one chunk of the tokens of one batch element: task = b * chunks + chunk.
    void (*backward)(const AdalnBackward&, int64_t first_task, int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                                  \
    namespace capability {                                               \
    AdalnKernels adaln_kernels(Scalar x, Scalar modulation, Adaln kind); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
