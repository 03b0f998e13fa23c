// modulate and gated_residual_modulate on CUDA, forward and backward: arguments, launches, registration.
#include "adaln.cuh"

#include "../common/adaln_ops.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

struct Cuda {
    template <bool RESIDUAL>
    static AdalnResult forward(const Tensor& x, const AdalnResidual& residual, const Tensor& scale,
                               const Tensor& shift, double eps) {
        const Tensor &y = residual.y, &gate = residual.gate;
        const Rows rows = rows_of(x, "x"), y_rows = rows_like(y, x, "y");
        const Rows gate_rows = modulation_of(gate, x, "gate"), scale_rows = modulation_of(scale, x, "scale"),
                   shift_rows = modulation_of(shift, x, "shift");
        const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

        AdalnResult result = new_adaln_result<RESIDUAL>(x, rows, gate, scale, shift);
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

    template <Adaln KIND>
    static AdalnGradients backward(const Tensor& grad, const Tensor& x, const AdalnOther& other,
                                   const Tensor& scale, const Tensor& stats, bool modulation_grads) {
        constexpr bool RESIDUAL = KIND == Adaln::residual;
        const Tensor &y = other.y, &gate = other.gate;
        const Rows rows = rows_of(x, "x"), grad_rows = rows_like(grad, x, "grad"),
                   y_rows = rows_like(y, x, "y"), other_rows = rows_like(other.grad, x, "other grad");
        const Rows scale_rows = modulation_of(scale, x, "scale"), gate_rows = modulation_of(gate, x, "gate");
        check_same_modulation(gate, gate_rows, scale, scale_rows);
        check_stats(stats, x, rows);
        const int32_t device = x.get_device_index();
        const torch::stable::accelerator::DeviceGuard guard(device);
        const ModulationGrad modulation = modulation_grad(modulation_grads, scale_rows);
        const bool summed = modulation == ModulationGrad::summed;
        const int64_t chunks = chunks_of(rows, device), kinds = RESIDUAL ? 3 : 2;

        AdalnGradients result = new_adaln_gradients<RESIDUAL>(x, scale, modulation_grads);
        const int64_t partial_sizes[] = {summed ? rows.batch * chunks * kinds * rows.channels : 0};
        Tensor partials = torch::stable::new_empty(x, {partial_sizes, 1}, ScalarType::Float);

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
                                 rows_aligned(scale, scale_rows, N) &&
                                 rows_aligned(other.grad, other_rows, N) && rows_aligned(y, y_rows, N) &&
                                 rows_aligned(gate, gate_rows, N);
            if (rows.batch > 0 && rows.channels > 0)
                with_modulation(modulation, [&](auto constant) {
                    constexpr ModulationGrad MODULATION = decltype(constant)::value;
                    launch(aligned ? adaln_backward<T, M, N, KIND, MODULATION>
                                   : adaln_backward<T, M, 1, KIND, MODULATION>,
                           dim3(chunks, rows.batch), THREADS,
                           summed ? kinds * rows.channels * sizeof(float) : 0, stream, args);
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
};

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    AdalnOps<Cuda>::implement(m);
}

}  // namespace
}  // namespace fastdistill::cuda
