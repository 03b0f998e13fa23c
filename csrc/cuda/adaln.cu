// modulate and gated_residual_modulate on CUDA, forward and backward: arguments, launches, registration.
#include "adaln.cuh"

#include <tuple>

#include "launch.h"

namespace fastdistill::cuda {
namespace {

using torch::stable::new_empty;

// What gated_residual_modulate has beside modulate.
struct Residual {
    const Tensor &y, &gate;
    double clip;
};

struct Forward {
    Tensor h, out, stats;
};

template <bool RESIDUAL>
Forward forward(const Tensor& x, const Residual& residual, const Tensor& scale, const Tensor& shift,
                double eps) {
    const Tensor &y = residual.y, &gate = residual.gate;
    const Rows rows = rows_of(x, "x"), y_rows = rows_like(y, x, "y");
    const Rows gate_rows = modulation_of(gate, x, "gate"), scale_rows = modulation_of(scale, x, "scale"),
               shift_rows = modulation_of(shift, x, "shift");
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type(), "gate: expected the dtype of scale");
    STD_TORCH_CHECK(shift.scalar_type() == scale.scalar_type(), "shift: expected the dtype of scale");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

    Forward result{RESIDUAL ? new_empty(x, x.sizes()) : x, new_empty(x, x.sizes()), new_stats(x, rows)};
    if (rows.count() == 0) return result;
    float* mean = static_cast<float*>(result.stats.mutable_data_ptr());
    AdalnForward args{};
    args.x = rows.operand(x);
    args.y = y_rows.operand(y);
    args.gate = gate_rows.operand(gate);
    args.scale = scale_rows.operand(scale);
    args.shift = shift_rows.operand(shift);
    args.h = RESIDUAL ? result.h.mutable_data_ptr() : nullptr;
    args.out = result.out.mutable_data_ptr();
    args.mean = mean;
    args.rstd = mean + rows.count();
    args.tokens = rows.tokens;
    args.channels = rows.channels;
    args.eps = static_cast<float>(eps);
    args.clip = static_cast<float>(residual.clip);
    with_types(x, scale, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(x, rows, N) && rows_aligned(y, y_rows, N) &&
                             rows_aligned(gate, gate_rows, N) && rows_aligned(scale, scale_rows, N) &&
                             rows_aligned(shift, shift_rows, N);
        launch(aligned ? adaln_forward<T, M, N, RESIDUAL> : adaln_forward<T, M, 1, RESIDUAL>,
               dim3(rows.count()), THREADS, rows.channels * sizeof(float),
               current_stream(x.get_device_index()), args);
    });
    return result;
}

// What their backward has beside that of modulate: a second gradient of out, or what follows from h.
struct OtherBackward {
    const Tensor &grad, &y, &gate;
    double clip;
};

struct Backward {
    Tensor dx, dy, dgate, dscale, dshift;
};

// x is what was normalised.
template <Adaln KIND>
Backward backward(const Tensor& grad, const Tensor& x, const OtherBackward& other, const Tensor& scale,
                  const Tensor& stats, bool modulation_grads) {
    constexpr bool RESIDUAL = KIND == Adaln::residual;
    const Tensor &y = other.y, &gate = other.gate;
    const Rows rows = rows_of(x, "x"), grad_rows = rows_like(grad, x, "grad"), y_rows = rows_like(y, x, "y"),
               other_rows = rows_like(other.grad, x, "other grad");
    const Rows scale_rows = modulation_of(scale, x, "scale"), gate_rows = modulation_of(gate, x, "gate");
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type() && gate_rows.tokens == scale_rows.tokens &&
                        gate_rows.batch == scale_rows.batch,
                    "gate: expected the shape and dtype of scale");
    check_stats(stats, x, rows);
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const ModulationGrad modulation = modulation_grad(modulation_grads, scale_rows);
    const bool summed = modulation == ModulationGrad::summed;
    const int64_t chunks = chunks_of(rows, device), kinds = RESIDUAL ? 3 : 2;

    const auto new_modulation = [&](bool wanted) {
        return wanted ? new_empty(scale, scale.sizes()) : nothing_like(scale);
    };
    Backward result{new_empty(x, x.sizes()), RESIDUAL ? new_empty(x, x.sizes()) : nothing_like(x),
                    new_modulation(modulation_grads && RESIDUAL), new_modulation(modulation_grads),
                    new_modulation(modulation_grads)};
    const int64_t partial_sizes[] = {summed ? rows.batch * chunks * kinds * rows.channels : 0};
    Tensor partials = new_empty(x, {partial_sizes, 1}, ScalarType::Float);

    const float* mean = static_cast<const float*>(stats.const_data_ptr());
    AdalnBackward args{};
    args.grad = grad_rows.operand(grad);
    args.x = rows.operand(x);
    args.scale = scale_rows.operand(scale);
    args.other_grad = other_rows.operand(other.grad);
    args.y = y_rows.operand(y);
    args.gate = gate_rows.operand(gate);
    args.mean = mean;
    args.rstd = mean + rows.count();
    args.dx = result.dx.mutable_data_ptr();
    args.dy = result.dy.mutable_data_ptr();
    args.dscale = result.dscale.mutable_data_ptr();
    args.dshift = result.dshift.mutable_data_ptr();
    args.dgate = result.dgate.mutable_data_ptr();
    args.partials = static_cast<float*>(partials.mutable_data_ptr());
    args.tokens = rows.tokens;
    args.channels = rows.channels;
    args.clip = static_cast<float>(other.clip);
    const cudaStream_t stream = current_stream(device);
    with_types(x, scale, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(x, rows, N) && rows_aligned(grad, grad_rows, N) &&
                             rows_aligned(scale, scale_rows, N) && rows_aligned(other.grad, other_rows, N) &&
                             rows_aligned(y, y_rows, N) && rows_aligned(gate, gate_rows, N);
        if (rows.batch > 0 && rows.channels > 0)
            with_modulation(modulation, [&](auto constant) {
                constexpr ModulationGrad MODULATION = decltype(constant)::value;
                launch(aligned ? adaln_backward<T, M, N, KIND, MODULATION>
                               : adaln_backward<T, M, 1, KIND, MODULATION>,
                       dim3(chunks, rows.batch), THREADS, summed ? kinds * rows.channels * sizeof(float) : 0,
                       stream, args);
            });
        if (summed && RESIDUAL)
            sum_over_tokens<M>(args.partials, chunks, rows, scale_rows,
                               {&result.dscale, &result.dshift, &result.dgate}, stream);
        if (summed && !RESIDUAL)
            sum_over_tokens<M>(args.partials, chunks, rows, scale_rows, {&result.dscale, &result.dshift},
                               stream);
    });
    return result;
}

std::tuple<Tensor, Tensor> modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
    // Without a residual the kernel reads nothing of it.
    Forward result = forward<false>(x, {x, scale, 0.}, scale, shift, eps);
    return {result.out, result.stats};
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                     const Tensor& stats, bool modulation_grads) {
    Backward result = backward<Adaln::single>(grad, x, {grad, x, scale, 0.}, scale, stats, modulation_grads);
    return {result.dx, result.dscale, result.dshift};
}

std::tuple<Tensor, Tensor, Tensor> modulate_for_two_backward(const Tensor& grad, const Tensor& second,
                                                             const Tensor& x, const Tensor& scale,
                                                             const Tensor& stats, bool modulation_grads) {
    Backward result =
        backward<Adaln::forked>(grad, x, {second, x, scale, 0.}, scale, stats, modulation_grads);
    return {result.dx, result.dscale, result.dshift};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_modulate(const Tensor& x, const Tensor& y,
                                                           const Tensor& gate, const Tensor& scale,
                                                           const Tensor& shift, double eps, double clip) {
    Forward result = forward<true>(x, {y, gate, clip}, scale, shift, eps);
    return {result.h, result.out, result.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulate_backward(
    const Tensor& grad_h, const Tensor& grad_out, const Tensor& h, const Tensor& y, const Tensor& gate,
    const Tensor& scale, const Tensor& stats, double clip, bool modulation_grads) {
    Backward result =
        backward<Adaln::residual>(grad_out, h, {grad_h, y, gate, clip}, scale, stats, modulation_grads);
    return {result.dx, result.dy, result.dgate, result.dscale, result.dshift};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("modulate", TORCH_BOX(&modulate));
    m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
    m.impl("modulate_for_two", TORCH_BOX(&modulate));
    m.impl("modulate_for_two_backward", TORCH_BOX(&modulate_for_two_backward));
    m.impl("gated_residual_modulate", TORCH_BOX(&gated_residual_modulate));
    m.impl("gated_residual_modulate_backward", TORCH_BOX(&gated_residual_modulate_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
