// x + gate * y on CUDA, forward and backward: arguments, launches, registration.
#include "gated_residual.cuh"

#include <tuple>

#include "launch.h"

namespace fastdistill::cuda {
namespace {

using torch::stable::new_empty;

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, double clip) {
    const Rows rows = rows_of(x, "x"), y_rows = rows_like(y, x, "y"),
               gate_rows = modulation_of(gate, x, "gate");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Tensor out = new_empty(x, x.sizes());
    if (rows.count() == 0) return out;
    const GatedResidualForward args{rows.operand(x),         y_rows.operand(y), gate_rows.operand(gate),
                                    out.mutable_data_ptr(),  rows.tokens,       rows.channels,
                                    static_cast<float>(clip)};
    with_types(x, gate, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned =
            rows_aligned(x, rows, N) && rows_aligned(y, y_rows, N) && rows_aligned(gate, gate_rows, N);
        launch(aligned ? residual_forward<T, M, N> : residual_forward<T, M, 1>, dim3(rows.count()), THREADS,
               0, current_stream(x.get_device_index()), args);
    });
    return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& y, const Tensor& gate,
                                                   bool gate_grad) {
    const Rows rows = rows_of(y, "y"), grad_rows = rows_like(grad, y, "grad");
    const Rows gate_rows = modulation_of(gate, y, "gate");
    const int32_t device = y.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const ModulationGrad modulation = modulation_grad(gate_grad, gate_rows);
    const bool summed = modulation == ModulationGrad::summed;
    const int64_t chunks = chunks_of(rows, device);

    Tensor dy = new_empty(y, y.sizes()),
           dgate = gate_grad ? new_empty(gate, gate.sizes()) : nothing_like(gate);
    const int64_t partial_sizes[] = {summed ? rows.batch * chunks * rows.channels : 0};
    Tensor partials = new_empty(y, {partial_sizes, 1}, ScalarType::Float);
    float* partial = static_cast<float*>(partials.mutable_data_ptr());
    const GatedResidualBackward args{grad_rows.operand(grad),
                                     rows.operand(y),
                                     gate_rows.operand(gate),
                                     dy.mutable_data_ptr(),
                                     dgate.mutable_data_ptr(),
                                     partial,
                                     rows.tokens,
                                     rows.channels};
    const cudaStream_t stream = current_stream(device);
    with_types(y, gate, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned =
            rows_aligned(grad, grad_rows, N) && rows_aligned(y, rows, N) && rows_aligned(gate, gate_rows, N);
        const int64_t columns = THREADS * (aligned ? N : 1);
        const dim3 grid(chunks, rows.batch, (rows.channels + columns - 1) / columns);
        if (rows.batch > 0 && rows.channels > 0)
            with_modulation(modulation, [&](auto constant) {
                constexpr ModulationGrad MODULATION = decltype(constant)::value;
                launch(
                    aligned ? residual_backward<T, M, N, MODULATION> : residual_backward<T, M, 1, MODULATION>,
                    grid, THREADS, 0, stream, args);
            });
        if (summed) sum_over_tokens<M>(partial, chunks, rows, gate_rows, {&dgate}, stream);
    });
    return {dy, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("gated_residual", TORCH_BOX(&gated_residual));
    m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
