// activation_concat on the CPU, forward and backward. The formulas and the shapes:
// fastdistill/ops/activation_concat.py.
#include "simd/activation.h"

#include "../common/activation_arguments.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::parallel_for;

Tensor activation_concat(const Tensor& y, const std::optional<Tensor>& x, bool gated) {
    const Rows rows = rows_of(y, "y"), before = rows_before(x, y);
    const int64_t size = activated_channels(rows, gated);
    Tensor out = with_channels(y, rows, before.channels + size, new_result);
    const ActivationForward args{x ? before.operand(*x) : Operand{},
                                 rows.operand(y),
                                 out.mutable_data_ptr(),
                                 rows.tokens,
                                 before.channels,
                                 size};
    const auto kernel = FASTDISTILL_BEST(activation_kernels)(scalar_of(y, "y"), activation_of(gated)).forward;
    parallel_for(0, rows.count(), grain(before.channels + size),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return out;
}

Tensor activation_concat_backward(const Tensor& grad, const Tensor& y, bool gated) {
    const Rows rows = rows_of(y, "y");
    const int64_t size = activated_channels(rows, gated);
    Tensor dy = new_result(y, y.sizes());
    const ActivationBackward args{gradient_rows(grad, y, rows, size).operand(grad), rows.operand(y),
                                  dy.mutable_data_ptr(), rows.tokens, size};
    const auto kernel =
        FASTDISTILL_BEST(activation_kernels)(scalar_of(y, "y"), activation_of(gated)).backward;
    parallel_for(0, rows.count(), grain(rows.channels),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return dy;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("activation_concat", TORCH_BOX(&activation_concat));
    m.impl("activation_concat_backward", TORCH_BOX(&activation_concat_backward));
}

}  // namespace
}  // namespace fastdistill
