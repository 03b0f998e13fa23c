// The RMS norm and the rotation of heads on the CPU, forward and backward. The formulas and the shapes:
// fastdistill/ops/qk_norm_rope.py and joint_qk_norm_rope.py.
#include "simd/norm_rope.h"

#include "../common/norm_rope_ops.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::parallel_for;

struct Cpu {
    static Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
        return fastdistill::new_result(like, sizes);
    }

    static NormRopeKernels kernels(const Tensor& like, const Tensor& weight, bool adjacent) {
        return FASTDISTILL_BEST(norm_rope_kernels)(scalar_of(like, "q"), scalar_of(weight, "weight"),
                                                   adjacent);
    }

    static void forward(const Tensor& like, const Tensor& weight, const std::vector<NormRopeForward>& parts,
                        double eps, bool adjacent) {
        const auto kernel = kernels(like, weight, adjacent).forward;
        for (const NormRopeForward& part : parts)
            parallel_for(0, part.batch * part.tokens, grain(part.heads * part.size),
                         [&](int64_t begin, int64_t end) { kernel(part, eps, begin, end); });
    }

    static void backward(const Tensor& like, const Tensor& weight, std::vector<NormRopePart> parts,
                         double eps, bool adjacent) {
        const auto kernel = kernels(like, weight, adjacent).backward;
        for (auto& [part, dweight] : parts) {
            const Rows rows{1, part.batch * part.tokens, part.size, 0, 0};
            const int64_t chunks = chunks_of(rows);
            const int64_t partial_sizes[] = {dweight ? chunks * part.size : 0};
            Tensor partials =
                torch::stable::new_empty(like, {partial_sizes, 1}, accumulator_of(like.scalar_type()));
            part.partials = dweight ? partials.mutable_data_ptr() : nullptr;
            parallel_for(0, chunks, grain(part.heads * part.size * rows_per_chunk(rows, chunks)),
                         [&](int64_t begin, int64_t end) { kernel(part, eps, chunks, begin, end); });
            if (dweight) sum_over_tokens(partials, chunks, rows, {1, 1, part.size, 0, 0}, {dweight});
        }
    }
};

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    NormRopeOps<Cpu>::implement(m);
}

}  // namespace
}  // namespace fastdistill
