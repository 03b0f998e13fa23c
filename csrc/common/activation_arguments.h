// The checks of activation_concat's arguments, for every device.
#pragma once

#include <optional>

#include "activation.h"
#include "rows.h"

namespace fastdistill {

inline Activation activation_of(bool gated) {
    return gated ? Activation::swiglu : Activation::gelu;
}

inline int64_t activated_channels(const Rows& y, bool gated) {
    STD_TORCH_CHECK(!gated || y.channels % 2 == 0, "y: expected an even number of channels");
    return gated ? y.channels / 2 : y.channels;
}

// Rows of x beside y, of no channels where there is none.
inline Rows rows_before(const std::optional<Tensor>& x, const Tensor& y) {
    const Rows of_y = rows_of(y, "y");
    if (!x) return {of_y.batch, of_y.tokens, 0, 0, 0};
    const Rows rows = rows_of(*x, "x");
    STD_TORCH_CHECK(rows.batch == of_y.batch && rows.tokens == of_y.tokens && x->dim() == y.dim(),
                    "x: expected the batch and tokens of y");
    STD_TORCH_CHECK(x->scalar_type() == y.scalar_type(), "x: expected the dtype of y");
    check_same_device(*x, y, "x");
    return rows;
}

// Makes a tensor of the rows of y with so many channels, by `make(like, sizes)`.
template <class Make>
Tensor with_channels(const Tensor& y, const Rows& rows, int64_t channels, Make&& make) {
    const int64_t sizes[] = {y.dim() == 3 ? rows.batch : rows.tokens, y.dim() == 3 ? rows.tokens : channels,
                             channels};
    return make(y, torch::headeronly::IntHeaderOnlyArrayRef{sizes, static_cast<size_t>(y.dim())});
}

inline Rows gradient_rows(const Tensor& grad, const Tensor& y, const Rows& rows, int64_t channels) {
    const Rows of_grad = rows_of(grad, "grad");
    STD_TORCH_CHECK(of_grad.batch == rows.batch && of_grad.tokens == rows.tokens &&
                        of_grad.channels == channels && grad.scalar_type() == y.scalar_type(),
                    "grad: expected the shape and dtype of the activation");
    check_same_device(grad, y, "grad");
    return of_grad;
}

}  // namespace fastdistill
