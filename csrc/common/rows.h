// What every kernel of a (B, S, D) tensor needs to know about an argument: sizes, strides, and that they are
// sane. Friendly messages come from Python; these checks keep a direct call of the op from reading out of
// bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace fastdistill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Strides count elements; a broadcast axis has stride 0. The last axis has stride 1.
struct Rows {
    int64_t batch, tokens, channels;
    int64_t batch_stride, token_stride;

    int64_t count() const { return batch * tokens; }
};

inline void check_last_stride(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() > 0 && (t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0), name,
                    ": the last dimension must be contiguous");
}

// A (B, S, D) tensor, or (S, D) as a batch of one.
inline Rows rows_of(const Tensor& t, const char* name) {
    const int64_t dim = t.dim();
    STD_TORCH_CHECK(dim == 2 || dim == 3, name, ": expected (B, S, D) or (S, D), got ", dim, " dimensions");
    check_last_stride(t, name);
    const bool batched = dim == 3;
    return {batched ? t.size(0) : 1, t.size(dim - 2), t.size(dim - 1), batched ? t.stride(0) : 0,
            t.stride(dim - 2)};
}

// A (D), (B, D), (B, 1, D) or (B, S, D) tensor that modulates the rows of x; next to an (S, D) x, (S, D).
inline Rows modulation_of(const Tensor& t, const Tensor& x, const char* name) {
    const Rows of = rows_of(x, "x");
    check_last_stride(t, name);
    const int64_t dim = t.dim();
    const bool token_axis = dim == 3 || (dim == 2 && x.dim() == 2);
    const bool batch_axis = dim == 3 || (dim == 2 && x.dim() == 3);
    Rows rows{batch_axis ? t.size(0) : 1, token_axis ? t.size(dim - 2) : 1, t.size(dim - 1),
              batch_axis ? t.stride(0) : 0, token_axis ? t.stride(dim - 2) : 0};
    STD_TORCH_CHECK(dim <= x.dim() && rows.channels == of.channels &&
                        (rows.batch == 1 || rows.batch == of.batch) &&
                        (rows.tokens == 1 || (rows.tokens == of.tokens && rows.batch == of.batch)),
                    name, ": expected (D), (B, D), (B, 1, D) or (B, S, D) for x of shape (B, S, D)");
    if (rows.batch == 1) rows.batch_stride = 0;
    if (rows.tokens == 1) rows.token_stride = 0;
    return rows;
}

inline void check_same_rows(const Tensor& t, const Tensor& x, const char* name) {
    const Rows a = rows_of(t, name), b = rows_of(x, "x");
    STD_TORCH_CHECK(a.batch == b.batch && a.tokens == b.tokens && a.channels == b.channels, name,
                    ": expected the shape of x");
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(t.device() == x.device(), name, ": expected on the device of x");
}

// Sums and statistics are fp32, and fp64 for fp64.
inline ScalarType accumulator_of(ScalarType type) {
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fastdistill
