// activation_concat as kernels on every device see it. Free of torch.
#pragma once

#include "operand.h"

namespace fastdistill {

// gelu: y of `size` channels, the tanh form of GELU. swiglu: y of 2 * size channels, silu of its first half
// times its second.
enum class Activation { gelu, swiglu };

// gelu(y) = y / (1 + exp(-y (GELU_LINEAR + GELU_CUBIC y^2))), which is 0.5 y (1 + tanh(...)).
constexpr double GELU_LINEAR = 1.5957691216057308, GELU_CUBIC = 0.07135481627260025;

struct ActivationForward {
    Operand x, y;
    void* out;                     // contiguous, rows of `before` + `size` channels
    int64_t tokens, before, size;  // channels of x, of the activation
};

struct ActivationBackward {
    Operand grad, y;
    void* dy;  // contiguous
    int64_t tokens, size;
};

}  // namespace fastdistill
