// activation_concat on CUDA, forward and backward: arguments, launches, registration.
#include "activation.cuh"

#include "../common/activation_arguments.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::new_empty(like, sizes);
}

Tensor activation_concat(const Tensor& y, const std::optional<Tensor>& x, bool gated) {
    const Rows rows = rows_of(y, "y"), before = rows_before(x, y);
    const int64_t size = activated_channels(rows, gated);
    const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
    Tensor out = with_channels(y, rows, before.channels + size, empty);
    if (rows.count() == 0) return out;
    const ActivationForward args{x ? before.operand(*x) : Operand{},
                                 rows.operand(y),
                                 out.mutable_data_ptr(),
                                 rows.tokens,
                                 before.channels,
                                 size};
    with_type(y, [&](auto t) {
        using T = decltype(t);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(y, rows, N) && size % N == 0 && (!x || rows_aligned(*x, before, N));
        const auto kernel = [&](auto n) {
            constexpr int WIDTH = decltype(n)::value;
            return gated ? activation_forward<T, WIDTH, Activation::swiglu>
                         : activation_forward<T, WIDTH, Activation::gelu>;
        };
        launch(aligned ? kernel(std::integral_constant<int, N>{}) : kernel(std::integral_constant<int, 1>{}),
               dim3(rows.count()), THREADS, 0, current_stream(y.get_device_index()), args);
    });
    return out;
}

Tensor activation_concat_backward(const Tensor& grad, const Tensor& y, bool gated) {
    const Rows rows = rows_of(y, "y");
    const int64_t size = activated_channels(rows, gated);
    const Rows grad_rows = gradient_rows(grad, y, rows, size);
    const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
    Tensor dy = torch::stable::new_empty(y, y.sizes());
    if (rows.count() == 0) return dy;
    const ActivationBackward args{grad_rows.operand(grad), rows.operand(y), dy.mutable_data_ptr(),
                                  rows.tokens, size};
    with_type(y, [&](auto t) {
        using T = decltype(t);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(y, rows, N) && size % N == 0 && rows_aligned(grad, grad_rows, N);
        const auto kernel = [&](auto n) {
            constexpr int WIDTH = decltype(n)::value;
            return gated ? activation_backward<T, WIDTH, Activation::swiglu>
                         : activation_backward<T, WIDTH, Activation::gelu>;
        };
        launch(aligned ? kernel(std::integral_constant<int, N>{}) : kernel(std::integral_constant<int, 1>{}),
               dim3(rows.count()), THREADS, 0, current_stream(y.get_device_index()), args);
    });
    return dy;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("activation_concat", TORCH_BOX(&activation_concat));
    m.impl("activation_concat_backward", TORCH_BOX(&activation_concat_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
