// modulate and gated_residual_modulate on the CPU, forward and backward. The formulas and the shapes:
// fastdistill/ops/modulate.py and gated_residual_modulate.py.
#include "simd/adaln.h"

#include <tuple>

#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

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
    const Rows rows = rows_of(x, "x");
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type(), "gate: expected the dtype of scale");
    STD_TORCH_CHECK(shift.scalar_type() == scale.scalar_type(), "shift: expected the dtype of scale");

    Forward result{RESIDUAL ? new_empty(x, x.sizes()) : x, new_empty(x, x.sizes()), new_stats(x, rows)};
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
    const Rows rows = rows_of(x, "x");
    const Rows scale_rows = modulation_of(scale, x, "scale"), gate_rows = modulation_of(gate, x, "gate");
    STD_TORCH_CHECK(gate.scalar_type() == scale.scalar_type() && gate_rows.tokens == scale_rows.tokens &&
                        gate_rows.batch == scale_rows.batch,
                    "gate: expected the shape and dtype of scale");
    check_stats(stats, x, rows);
    const ModulationGrad modulation = modulation_grad(modulation_grads, scale_rows);
    const bool summed = modulation == ModulationGrad::summed;
    const int64_t chunks = chunks_of(rows), kinds = RESIDUAL ? 3 : 2;

    const auto new_modulation = [&](bool wanted) {
        return wanted ? new_empty(scale, scale.sizes()) : nothing_like(scale);
    };
    Backward result{new_empty(x, x.sizes()), RESIDUAL ? new_empty(x, x.sizes()) : nothing_like(x),
                    new_modulation(modulation_grads && RESIDUAL), new_modulation(modulation_grads),
                    new_modulation(modulation_grads)};
    const int64_t partial_sizes[] = {summed ? rows.batch * chunks * kinds * rows.channels : 0};
    Tensor partials = new_empty(x, {partial_sizes, 1}, stats.scalar_type());

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
        sum_over_tokens(partials, chunks, rows, scale_rows, {&result.dscale, &result.dshift, &result.dgate});
    if (summed && !RESIDUAL)
        sum_over_tokens(partials, chunks, rows, scale_rows, {&result.dscale, &result.dshift});
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

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("modulate", TORCH_BOX(&modulate));
    m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
    m.impl("modulate_for_two", TORCH_BOX(&modulate));
    m.impl("modulate_for_two_backward", TORCH_BOX(&modulate_for_two_backward));
    m.impl("gated_residual_modulate", TORCH_BOX(&gated_residual_modulate));
    m.impl("gated_residual_modulate_backward", TORCH_BOX(&gated_residual_modulate_backward));
}

}  // namespace
}  // namespace fastdistill
