// modulate and gated_residual_modulate on the CPU, forward and backward. The formulas and the shapes:
// fastdistill/ops/modulate.py and gated_residual_modulate.py.
#include "simd/adaln.h"

#include "../common/adaln_ops.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::parallel_for;

struct Cpu {
    template <bool RESIDUAL>
    static AdalnResult forward(const Tensor& x, const AdalnResidual& residual, const Tensor& scale,
                               const Tensor& shift, double eps) {
        const Tensor &y = residual.y, &gate = residual.gate;
        const Rows rows = rows_of(x, "x");

        AdalnResult result = new_adaln_result<RESIDUAL>(x, rows, gate, scale, shift);
        use_huge_pages(result.out);
        if constexpr (RESIDUAL) use_huge_pages(result.h);
        char* stats = static_cast<char*>(result.stats.mutable_data_ptr());
        AdalnForward args{};
        args.x = rows.operand(x);
        args.y = rows_like(y, x, "y").operand(y);
        args.gate = modulation_of(gate, x, "gate").operand(gate);
        args.scale = modulation_of(scale, x, "scale").operand(scale);
        args.shift = modulation_of(shift, x, "shift").operand(shift);
        args.h = RESIDUAL ? result.h.mutable_data_ptr() : nullptr;
        args.out = result.out.mutable_data_ptr();
        args.mean = stats;
        args.rstd = stats + rows.count() * result.stats.element_size();
        args.tokens = rows.tokens;
        args.channels = rows.channels;
        args.eps = eps;
        args.clip = residual.clip;
        args.stream = streams(result.out);
        constexpr Adaln KIND = RESIDUAL ? Adaln::residual : Adaln::single;
        const auto kernel =
            FASTDISTILL_BEST(adaln_kernels)(scalar_of(x, "x"), scalar_of(scale, "scale"), KIND).forward;
        parallel_for(0, rows.count(), grain(rows.channels),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        return result;
    }

    template <Adaln KIND>
    static AdalnGradients backward(const Tensor& grad, const Tensor& x, const AdalnOther& other,
                                   const Tensor& scale, const Tensor& stats, bool modulation_grads) {
        constexpr bool RESIDUAL = KIND == Adaln::residual;
        const Tensor &y = other.y, &gate = other.gate;
        const Rows rows = rows_of(x, "x");
        const Rows scale_rows = modulation_of(scale, x, "scale"), gate_rows = modulation_of(gate, x, "gate");
        check_same_modulation(gate, gate_rows, scale, scale_rows);
        check_stats(stats, x, rows);
        const ModulationGrad modulation = modulation_grad(modulation_grads, scale_rows);
        const bool summed = modulation == ModulationGrad::summed;
        const int64_t chunks = chunks_of(rows), kinds = RESIDUAL ? 3 : 2;

        AdalnGradients result = new_adaln_gradients<RESIDUAL>(x, scale, modulation_grads);
        use_huge_pages(result.dx);
        use_huge_pages(result.dy);
        const int64_t partial_sizes[] = {summed ? rows.batch * chunks * kinds * rows.channels : 0};
        Tensor partials = torch::stable::new_empty(x, {partial_sizes, 1}, stats.scalar_type());

        const char* statistics = static_cast<const char*>(stats.const_data_ptr());
        AdalnBackward args{};
        args.grad = rows_like(grad, x, "grad").operand(grad);
        args.x = rows.operand(x);
        args.scale = scale_rows.operand(scale);
        args.other_grad = rows_like(other.grad, x, "other grad").operand(other.grad);
        args.y = rows_like(y, x, "y").operand(y);
        args.gate = gate_rows.operand(gate);
        args.mean = statistics;
        args.rstd = statistics + rows.count() * stats.element_size();
        args.dx = result.dx.mutable_data_ptr();
        args.dy = result.dy.mutable_data_ptr();
        args.dscale = result.dscale.mutable_data_ptr();
        args.dshift = result.dshift.mutable_data_ptr();
        args.dgate = result.dgate.mutable_data_ptr();
        args.partials = partials.mutable_data_ptr();
        args.tokens = rows.tokens;
        args.channels = rows.channels;
        args.chunks = chunks;
        args.clip = other.clip;
        args.modulation = modulation;
        args.stream = streams(result.dx);
        const auto kernel =
            FASTDISTILL_BEST(adaln_kernels)(scalar_of(x, "x"), scalar_of(scale, "scale"), KIND).backward;
        parallel_for(0, rows.batch * chunks, grain(rows.channels * rows_per_chunk(rows, chunks)),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        if (summed && RESIDUAL)
            sum_over_tokens(partials, chunks, rows, scale_rows,
                            {&result.dscale, &result.dshift, &result.dgate});
        if (summed && !RESIDUAL)
            sum_over_tokens(partials, chunks, rows, scale_rows, {&result.dscale, &result.dshift});
        return result;
    }
};

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    AdalnOps<Cpu>::implement(m);
}

}  // namespace
}  // namespace fastdistill
