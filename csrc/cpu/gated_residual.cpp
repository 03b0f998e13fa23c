// x + gate * y on the CPU, forward and backward. The formula and the shapes:
// fastdistill/ops/gated_residual.py.
#include "simd/gated_residual.h"

#include <tuple>

#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, double clip) {
    const Rows rows = rows_of(x, "x");
    Tensor out = new_result(x, x.sizes());
    const GatedResidualForward args{rows.operand(x),
                                    rows_like(y, x, "y").operand(y),
                                    modulation_of(gate, x, "gate").operand(gate),
                                    out.mutable_data_ptr(),
                                    rows.tokens,
                                    rows.channels,
                                    clip,
                                    streams(out)};
    const auto kernel =
        FASTDISTILL_BEST(gated_residual_kernels)(scalar_of(x, "x"), scalar_of(gate, "gate")).forward;
    parallel_for(0, rows.count(), grain(rows.channels),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& y, const Tensor& gate,
                                                   bool gate_grad) {
    const Rows rows = rows_of(y, "y"), gate_rows = modulation_of(gate, y, "gate");
    const bool summed = gate_grad && gate_rows.tokens == 1;
    const int64_t chunks = chunks_of(rows);
    Tensor dy = new_result(y, y.sizes()),
           dgate = gate_grad ? new_empty(gate, gate.sizes()) : nothing_like(gate);
    const int64_t partial_sizes[] = {summed ? rows.batch * chunks * rows.channels : 0};
    Tensor partials = new_empty(y, {partial_sizes, 1}, accumulator_of(y.scalar_type()));
    const GatedResidualBackward args{rows_like(grad, y, "grad").operand(grad),
                                     rows.operand(y),
                                     gate_rows.operand(gate),
                                     dy.mutable_data_ptr(),
                                     dgate.mutable_data_ptr(),
                                     partials.mutable_data_ptr(),
                                     rows.tokens,
                                     rows.channels,
                                     chunks,
                                     modulation_grad(gate_grad, gate_rows),
                                     streams(dy)};
    const auto kernel =
        FASTDISTILL_BEST(gated_residual_kernels)(scalar_of(y, "y"), scalar_of(gate, "gate")).backward;
    parallel_for(0, rows.batch * chunks, grain(rows.channels * rows_per_chunk(rows, chunks)),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    if (summed) sum_over_tokens(partials, chunks, rows, gate_rows, {&dgate});
    return {dy, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("gated_residual", TORCH_BOX(&gated_residual));
    m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
}

}  // namespace
}  // namespace fastdistill
