// What the DMD loss needs to know about its arguments on every device. Friendly messages come from Python;
// these checks keep a direct call of the op from reading out of bounds.
#pragma once

#include <optional>

#include "rows.h"
#include "samples.h"

namespace fastdistill {

inline int64_t elements_of(const Tensor& x) {
    int64_t elements = 1;
    for (int64_t axis = 1; axis < x.dim(); ++axis) elements *= x.size(axis);
    return elements;
}

// A tensor of the shape, dtype and device of x whose samples are contiguous.
inline Samples samples_of(const Tensor& t, const Tensor& x, const char* name, bool same_dtype = true) {
    STD_TORCH_CHECK(x.dim() >= 1 && t.dim() == x.dim(), name, ": expected the shape of x");
    int64_t dense = 1;
    for (int64_t axis = t.dim() - 1; axis >= 0; --axis) {
        STD_TORCH_CHECK(t.size(axis) == x.size(axis), name, ": expected the shape of x");
        STD_TORCH_CHECK(axis == 0 || t.size(axis) == 1 || t.stride(axis) == dense || x.numel() == 0, name,
                        ": expected contiguous samples");
        dense *= t.size(axis);
    }
    STD_TORCH_CHECK(!same_dtype || t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
    check_same_device(t, x, name);
    return {t.const_data_ptr(), t.stride(0)};
}

// The data of a contiguous tensor of `count` accumulators.
inline const void* accumulators(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
    STD_TORCH_CHECK(
        t.numel() == count && t.is_contiguous() && t.scalar_type() == accumulator_of(x.scalar_type()), name,
        ": expected a contiguous tensor of ", count, " accumulators");
    check_same_device(t, x, name);
    return t.const_data_ptr();
}

inline DmdOperands dmd_operands(const Tensor& x, const Tensor& cond, const std::optional<Tensor>& uncond,
                                const Tensor& critic, const std::optional<Tensor>& mask, double guidance,
                                bool finite) {
    DmdOperands in{};
    in.cond = samples_of(cond, x, "cond");
    in.critic = samples_of(critic, x, "critic");
    in.uncond = uncond ? samples_of(*uncond, x, "uncond") : Samples{};
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
        in.mask = samples_of(*mask, x, "mask", false);
    }
    in.guidance = guidance;
    in.finite = finite;
    return in;
}

}  // namespace fastdistill
