// Row kernels of activation_concat.
#pragma once

#include "../../common/activation.h"
#include "capability.h"

namespace fastdistill {

struct ActivationKernels {
    void (*forward)(const ActivationForward&, int64_t first_row, int64_t last_row);
    void (*backward)(const ActivationBackward&, int64_t first_row, int64_t last_row);
};

#define FASTDISTILL_DECLARE(capability)                                    \
    namespace capability {                                                 \
    ActivationKernels activation_kernels(Scalar y, Activation activation); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
