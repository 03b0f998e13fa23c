// What a kernel of (B, S, H, d) tensors needs to know about its arguments. Friendly messages come from
// Python; these checks keep a direct call of the op from reading out of bounds.
#pragma once

#include "rows.h"

namespace fastdistill {

struct Heads {
    int64_t batch, tokens, heads, size;
    int64_t batch_stride, token_stride, head_stride;

    int64_t count() const { return batch * tokens * heads; }
    HeadOperand operand(const Tensor& t) const {
        return {t.const_data_ptr(), batch_stride, token_stride, head_stride};
    }
    // The sums over all heads of an op on heads are those over the tokens of one batch element of as many
    // rows.
    Rows summed() const { return {1, batch * tokens, size, 0, 0}; }
};

inline Heads heads_of(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected (B, S, H, d)");
    check_last_stride(t, name);
    STD_TORCH_CHECK(t.size(3) > 0 && t.size(3) % 2 == 0 && t.size(3) <= MAX_HEAD_SIZE, name,
                    ": expected an even head size of at most ", MAX_HEAD_SIZE);
    return {t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2)};
}

// A tensor of the batch, tokens, head size, dtype and device of q.
inline Heads heads_like(const Tensor& t, const Tensor& q, int64_t heads, const char* name) {
    const Heads a = heads_of(t, name), b = heads_of(q, "q");
    STD_TORCH_CHECK(a.batch == b.batch && a.tokens == b.tokens && a.size == b.size && a.heads == heads, name,
                    ": expected the shape of q");
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
    check_same_device(t, q, name);
    return a;
}

// The contiguous weight of a norm over d, in the dtype of q or float32.
inline const void* head_weight(const Tensor& weight, const Tensor& other, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == q.size(3) && weight.is_contiguous(), name,
                    ": expected a contiguous (d)");
    STD_TORCH_CHECK(
        weight.scalar_type() == other.scalar_type() &&
            (weight.scalar_type() == q.scalar_type() ||
             (weight.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double)),
        name, ": expected the dtype of q, or float32, both weights alike");
    check_same_device(weight, q, name);
    return weight.const_data_ptr();
}

// A table of accumulators, (S, d) or (S, d / 2).
inline RopeTable rope_table(const Tensor& cos, const Tensor& sin, const Tensor& q) {
    const int64_t d = q.size(3);
    STD_TORCH_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == q.size(1) &&
                        sin.size(0) == q.size(1) && cos.size(1) == sin.size(1) &&
                        (cos.size(1) == d || cos.size(1) == d / 2),
                    "cos, sin: expected (S, d) or (S, d / 2)");
    for (const Tensor* t : {&cos, &sin}) {
        check_last_stride(*t, "cos, sin");
        STD_TORCH_CHECK(t->scalar_type() == accumulator_of(q.scalar_type()),
                        "cos, sin: expected accumulators");
        check_same_device(*t, q, "cos, sin");
    }
    return {cos.const_data_ptr(), sin.const_data_ptr(), cos.stride(0), sin.stride(0), cos.size(1) != d};
}

}  // namespace fastdistill
