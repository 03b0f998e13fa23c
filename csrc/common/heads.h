// What a kernel of (B, S, H, d) tensors needs to know about its arguments. Friendly messages come from
// Python; these checks keep a direct call of the op from reading out of bounds.
#pragma once

#include <optional>

#include "norm_rope.h"
#include "rows.h"

namespace fastdistill {

struct Heads {
    int64_t batch, tokens, heads, size;
    int64_t batch_stride, token_stride, head_stride, offset;  // of the first element

    int64_t count() const { return batch * tokens * heads; }
    HeadOperand operand(const Tensor& t) const {
        return {static_cast<const char*>(t.const_data_ptr()) + offset * int64_t(t.element_size()),
                batch_stride, token_stride, head_stride};
    }
    HeadResult result(Tensor& t) const {
        return {static_cast<char*>(t.mutable_data_ptr()) + offset * int64_t(t.element_size()), batch_stride,
                token_stride, head_stride};
    }
    // Its tokens from `first` on.
    Heads part(int64_t first, int64_t count) const {
        Heads some = *this;
        some.tokens = count;
        some.offset += first * token_stride;
        return some;
    }
    // The sums over all heads of an op on heads are those over the tokens of one batch element of as many
    // rows.
    Rows summed() const { return {1, batch * tokens, size, 0, 0}; }
};

inline Heads checked(const Heads& heads, const Tensor& t, const char* name) {
    check_last_stride(t, name);
    STD_TORCH_CHECK(heads.size > 0 && heads.size % 2 == 0 && heads.size <= MAX_HEAD_SIZE, name,
                    ": expected an even head size of at most ", MAX_HEAD_SIZE);
    return heads;
}

inline Heads heads_of(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected (B, S, H, d)");
    return checked({t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), 0}, t,
                   name);
}

// The queries, keys or values (which: 0, 1, 2) of a packed (B, S, 3, H, d).
inline Heads packed_heads(const Tensor& t, int64_t which, const char* name) {
    STD_TORCH_CHECK(t.dim() == 5 && t.size(2) == 3, name, ": expected (B, S, 3, H, d)");
    return checked({t.size(0), t.size(1), t.size(3), t.size(4), t.stride(0), t.stride(1), t.stride(3),
                    which * t.stride(2)},
                   t, name);
}

inline void check_like(const Tensor& t, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
    check_same_device(t, q, name);
}

inline void check_same_heads(const Heads& a, const Heads& b, const char* name) {
    STD_TORCH_CHECK(a.batch == b.batch && a.tokens == b.tokens && a.heads == b.heads && a.size == b.size,
                    name,
                    ": expected the batch, tokens, heads and head size of the tensor that it belongs to");
}

// The contiguous weight of a norm over d, in the dtype of q or float32, and that of `other`.
inline const void* head_weight(const Tensor& weight, const Tensor& other, const Tensor& q, int64_t size,
                               const char* name) {
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == size && weight.is_contiguous(), name,
                    ": expected a contiguous (d)");
    STD_TORCH_CHECK(
        weight.scalar_type() == other.scalar_type() &&
            (weight.scalar_type() == q.scalar_type() ||
             (weight.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double)),
        name, ": expected the dtype of q, or float32, all weights alike");
    check_same_device(weight, q, name);
    return weight.const_data_ptr();
}

// The rows from `first` on of tables of accumulators, (S, d) or (S, d / 2), for `tokens` tokens in all.
inline RopeTable rope_table(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                            const Tensor& q, int64_t tokens, int64_t size, int64_t first = 0) {
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither");
    if (!cos) return {};
    STD_TORCH_CHECK(cos->dim() == 2 && sin->dim() == 2 && cos->size(0) == tokens && sin->size(0) == tokens &&
                        cos->size(1) == sin->size(1) && (cos->size(1) == size || cos->size(1) == size / 2),
                    "cos, sin: expected (S, d) or (S, d / 2)");
    const auto row = [&](const Tensor& t) {
        check_last_stride(t, "cos, sin");
        STD_TORCH_CHECK(t.scalar_type() == accumulator_of(q.scalar_type()),
                        "cos, sin: expected accumulators");
        check_same_device(t, q, "cos, sin");
        return static_cast<const char*>(t.const_data_ptr()) + first * t.stride(0) * int64_t(t.element_size());
    };
    return {row(*cos), row(*sin), cos->stride(0), sin->stride(0), cos->size(1) != size};
}

}  // namespace fastdistill
