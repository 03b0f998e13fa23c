// Row kernels of modulate. Strides count elements, a broadcast axis has stride 0, offsets are 64 bit.
#pragma once

#include "capability.h"

namespace fastdistill {

struct ModulateForward {
    const void *x, *scale, *shift;
    void *out, *mean, *rstd;
    int64_t tokens, channels;
    int64_t x_batch_stride, x_token_stride;
    int64_t scale_batch_stride, scale_token_stride, shift_batch_stride, shift_token_stride;
    double eps;
    bool stream;  // write out by streaming stores: it is large, and its rows are aligned
};

// Where the gradients of scale and shift go: nowhere, summed over tokens into partials, or one row per token.
enum class ModulationGrad { none, summed, per_token };

struct ModulateBackward {
    const void *grad, *x, *scale, *mean, *rstd;
    void* dx;
    void *dscale, *dshift;  // per_token: like x, contiguous
    void* partials;         // summed: accumulators of shape (B, chunks, 2, D), dscale then dshift
    int64_t tokens, channels, chunks;
    int64_t grad_batch_stride, grad_token_stride, x_batch_stride, x_token_stride;
    int64_t scale_batch_stride, scale_token_stride;
    ModulationGrad modulation;
    bool stream;  // the same for dx
};

struct ModulateKernels {
    void (*forward)(const ModulateForward&, int64_t first_row, int64_t last_row);
    // One task is one chunk of the tokens of one batch element: task = b * chunks + chunk.
    void (*backward)(const ModulateBackward&, int64_t first_task, int64_t last_task);
};

#define FASTDISTILL_DECLARE(capability)                            \
    namespace capability {                                         \
    ModulateKernels modulate_kernels(Scalar x, Scalar modulation); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
