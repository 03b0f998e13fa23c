// A (B, ...) argument as B samples of contiguous elements, as kernels on every device see it. Free of torch.
#pragma once

#include "operand.h"

namespace fastdistill {

struct Samples {
    const void* data;
    int64_t stride;  // elements between samples

    template <class T>
    FASTDISTILL_EVERYWHERE const T* at(int64_t sample, int64_t element) const {
        return static_cast<const T*>(data) + sample * stride + element;
    }
};

constexpr int64_t NORMALISE_SAMPLE = 0, NORMALISE_BATCH = 1;  // else not at all

// The arguments of the DMD loss. real = uncond + guidance * (cond - uncond), or cond; target = a x + b noise,
// with a and b of each sample from `coefficients` (B, 2) if there are any.
struct DmdOperands {
    Samples x, noise, cond, uncond, critic, mask;
    const void* coefficients;  // accumulators
    double a, b, guidance;
    bool finite;  // differences that are not finite count as zero
};

}  // namespace fastdistill
