// The RMS norm and the rotation of query and key heads on the CPU, forward and backward. The formula and the
// shapes: fastdistill/ops/qk_norm_rope.py.
#include "simd/qk_norm_rope.h"

#include <tuple>

#include "../common/heads.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                        const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                        double eps, bool adjacent) {
    const auto kernel =
        FASTDISTILL_BEST(norm_rope_kernels)(scalar_of(q, "q"), scalar_of(q_weight, "q_weight"), adjacent)
            .forward;
    const auto run = [&](const Tensor& x, const Heads& heads, const void* weight) {
        Tensor out = new_empty(x, x.sizes());
        const NormRopeForward args{heads.operand(x),
                                   weight,
                                   rope_table(cos, sin, q),
                                   out.mutable_data_ptr(),
                                   heads.tokens,
                                   heads.heads,
                                   heads.size,
                                   eps};
        parallel_for(0, heads.batch * heads.tokens, grain(heads.heads * heads.size),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        return out;
    };
    const Heads q_heads = heads_of(q, "q"), k_heads = heads_like(k, q, k.size(2), "k");
    return {run(q, q_heads, head_weight(q_weight, q_weight, q, "q_weight")),
            run(k, k_heads, head_weight(k_weight, q_weight, q, "k_weight"))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                                 const Tensor& q, const Tensor& k,
                                                                 const Tensor& q_weight,
                                                                 const Tensor& k_weight, const Tensor& cos,
                                                                 const Tensor& sin, double eps, bool adjacent,
                                                                 bool weight_grads) {
    const auto kernel =
        FASTDISTILL_BEST(norm_rope_kernels)(scalar_of(q, "q"), scalar_of(q_weight, "q_weight"), adjacent)
            .backward;
    const auto run = [&](const Tensor& grad, const Tensor& x, const Tensor& weight, const char* name) {
        const Heads heads = heads_like(x, q, x.size(2), name);
        const Rows rows = heads.summed();
        const int64_t chunks = chunks_of(rows);
        const int64_t partial_sizes[] = {weight_grads ? chunks * heads.size : 0};
        Tensor dx = new_empty(x, x.sizes()),
               dweight = weight_grads ? new_empty(weight, weight.sizes()) : nothing_like(weight),
               partials = new_empty(x, {partial_sizes, 1}, accumulator_of(x.scalar_type()));
        const NormRopeBackward args{heads_like(grad, q, heads.heads, "grad").operand(grad),
                                    heads.operand(x),
                                    head_weight(weight, q_weight, q, name),
                                    rope_table(cos, sin, q),
                                    dx.mutable_data_ptr(),
                                    weight_grads ? partials.mutable_data_ptr() : nullptr,
                                    heads.batch,
                                    heads.tokens,
                                    heads.heads,
                                    heads.size,
                                    chunks,
                                    eps};
        parallel_for(0, chunks, grain(heads.heads * heads.size * rows_per_chunk(rows, chunks)),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        if (weight_grads) sum_over_tokens(partials, chunks, rows, {1, 1, heads.size, 0, 0}, {&dweight});
        return std::pair{dx, dweight};
    };
    const auto [dq, dq_weight] = run(grad_q, q, q_weight, "q");
    const auto [dk, dk_weight] = run(grad_k, k, k_weight, "k");
    return {dq, dk, dq_weight, dk_weight};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
    m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}

}  // namespace
}  // namespace fastdistill
