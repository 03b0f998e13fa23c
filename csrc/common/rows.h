// What every kernel of a (B, S, D) tensor needs to know about an argument: sizes, strides, and that they are
// sane. Friendly messages come from Python; these checks keep a direct call of the op from reading out of
// bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "operand.h"

namespace fastdistill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums and statistics are fp32, and fp64 for fp64.
inline ScalarType accumulator_of(ScalarType type) {
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Strides count elements; a broadcast axis has stride 0. The last axis has stride 1.
struct Rows {
    int64_t batch, tokens, channels;
    int64_t batch_stride, token_stride;

    int64_t count() const { return batch * tokens; }
    Operand operand(const Tensor& t) const { return {t.const_data_ptr(), batch_stride, token_stride}; }
};

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(t.device() == x.device(), name, ": expected on the device of x");
}

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
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() ||
                        (t.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                    name, ": expected the dtype of x, or float32");
    check_same_device(t, x, name);
    if (rows.batch == 1) rows.batch_stride = 0;
    if (rows.tokens == 1) rows.token_stride = 0;
    return rows;
}

// A tensor of the shape, dtype and device of x.
inline Rows rows_like(const Tensor& t, const Tensor& x, const char* name) {
    const Rows a = rows_of(t, name), b = rows_of(x, "x");
    STD_TORCH_CHECK(a.batch == b.batch && a.tokens == b.tokens && a.channels == b.channels, name,
                    ": expected the shape of x");
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
    check_same_device(t, x, name);
    return a;
}

inline ModulationGrad modulation_grad(bool wanted, const Rows& modulation) {
    if (!wanted) return ModulationGrad::none;
    return modulation.tokens == 1 ? ModulationGrad::summed : ModulationGrad::per_token;
}

// The statistics that a forward op saved for its backward: contiguous, two accumulators for each row.
inline void check_stats(const Tensor& stats, const Tensor& x, const Rows& rows) {
    STD_TORCH_CHECK(stats.numel() == 2 * rows.count() && stats.is_contiguous() &&
                        stats.scalar_type() == accumulator_of(x.scalar_type()),
                    "stats: expected the contiguous statistics that the forward op returned");
    check_same_device(stats, x, "stats");
}

// Makes them: shape (2, ...) before the rows of x.
inline Tensor new_stats(const Tensor& x, const Rows& rows) {
    const int64_t sizes[] = {2, x.dim() == 3 ? rows.batch : rows.tokens, rows.tokens};
    return torch::stable::new_empty(x, {sizes, static_cast<size_t>(x.dim())},
                                    accumulator_of(x.scalar_type()));
}

// An empty tensor for a result that was not asked for.
inline Tensor nothing_like(const Tensor& t) {
    const int64_t sizes[] = {0};
    return torch::stable::new_empty(t, {sizes, 1});
}

}  // namespace fastdistill
