// The RMS norm and the rotation of query and key heads on CUDA, forward and backward: arguments, launches,
// registration.
#include "qk_norm_rope.cuh"

#include <tuple>

#include "../common/heads.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

using torch::stable::new_empty;

// A kernel for the widest pairs that the arguments allow, and the fewest of them in a lane.
template <template <class, class, int, int, bool> class Kernel, class T, class M, bool ADJACENT>
auto kernel_for(bool aligned, int64_t size) {
    if (aligned && size <= 128) return Kernel<T, M, 1, 2, ADJACENT>::run;
    if (aligned && size <= 256) return Kernel<T, M, 2, 2, ADJACENT>::run;
    if (aligned) return Kernel<T, M, 4, 2, ADJACENT>::run;
    return Kernel<T, M, 8, 1, ADJACENT>::run;
}

template <class T, class M, int ITEMS, int PAIRS, bool ADJACENT>
struct ForwardKernel {
    static constexpr auto run = norm_rope_forward<T, M, ITEMS, PAIRS, ADJACENT>;
};
template <class T, class M, int ITEMS, int PAIRS, bool ADJACENT>
struct BackwardKernel {
    static constexpr auto run = norm_rope_backward<T, M, ITEMS, PAIRS, ADJACENT>;
};

// Two pairs are four channels where they are adjacent, and two in either half.
bool pairs_aligned(const Tensor& t, const Heads& heads) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (4 * t.element_size()) == 0 &&
           heads.size % 4 == 0 && heads.batch_stride % 4 == 0 && heads.token_stride % 4 == 0 &&
           heads.head_stride % 4 == 0;
}

bool table_aligned(const RopeTable& table) {
    const auto aligned = [&](const void* data, int64_t stride) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
    };
    return table.compact || (aligned(table.cos, table.cos_stride) && aligned(table.sin, table.sin_stride));
}

bool weight_aligned(const Tensor& weight) {
    return reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % (4 * weight.element_size()) == 0;
}

Tensor forward(const Tensor& x, const Heads& heads, const Tensor& weight, const RopeTable& table, double eps,
               bool adjacent) {
    Tensor out = new_empty(x, x.sizes());
    if (heads.count() == 0) return out;
    const NormRopeForward args{heads.operand(x),
                               weight.const_data_ptr(),
                               table,
                               out.mutable_data_ptr(),
                               heads.tokens,
                               heads.heads,
                               heads.size,
                               heads.count(),
                               static_cast<float>(eps)};
    constexpr int64_t WARPS = THREADS / 32;
    const bool aligned = pairs_aligned(x, heads) && table_aligned(table) && weight_aligned(weight);
    with_types(x, weight, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        launch(adjacent ? kernel_for<ForwardKernel, T, M, true>(aligned, heads.size)
                        : kernel_for<ForwardKernel, T, M, false>(aligned, heads.size),
               dim3((heads.count() + WARPS - 1) / WARPS), THREADS, 0, current_stream(x.get_device_index()),
               args);
    });
    return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Heads& grad_heads, const Tensor& x,
                                    const Heads& heads, const Tensor& weight, const RopeTable& table,
                                    double eps, bool adjacent, bool weight_grads) {
    const int32_t device = x.get_device_index();
    constexpr int64_t WARPS = THREADS / 32, BLOCKS_PER_MULTIPROCESSOR = 4;
    const int64_t chunks = std::max<int64_t>(
        1,
        std::min((heads.count() + WARPS - 1) / WARPS, BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device)));
    const int64_t partial_sizes[] = {weight_grads ? chunks * heads.size : 0};
    Tensor dx = new_empty(x, x.sizes()),
           dweight = weight_grads ? new_empty(weight, weight.sizes()) : nothing_like(weight),
           partials = new_empty(x, {partial_sizes, 1}, ScalarType::Float);
    float* partial = weight_grads ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
    const NormRopeBackward args{grad_heads.operand(grad),
                                heads.operand(x),
                                weight.const_data_ptr(),
                                table,
                                dx.mutable_data_ptr(),
                                partial,
                                heads.tokens,
                                heads.heads,
                                heads.size,
                                heads.count(),
                                static_cast<float>(eps)};
    const bool aligned = pairs_aligned(x, heads) && pairs_aligned(grad, grad_heads) && table_aligned(table) &&
                         weight_aligned(weight);
    const cudaStream_t stream = current_stream(device);
    with_types(x, weight, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        launch(adjacent ? kernel_for<BackwardKernel, T, M, true>(aligned, heads.size)
                        : kernel_for<BackwardKernel, T, M, false>(aligned, heads.size),
               dim3(chunks), THREADS, weight_grads ? WARPS * heads.size * sizeof(float) : 0, stream, args);
        if (weight_grads)
            sum_over_tokens<M>(partial, chunks, heads.summed(), {1, 1, heads.size, 0, 0}, {&dweight}, stream);
    });
    return {dx, dweight};
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                        const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                        double eps, bool adjacent) {
    const Heads q_heads = heads_of(q, "q"), k_heads = heads_like(k, q, k.size(2), "k");
    head_weight(q_weight, q_weight, q, "q_weight");
    head_weight(k_weight, q_weight, q, "k_weight");
    const RopeTable table = rope_table(cos, sin, q);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    return {forward(q, q_heads, q_weight, table, eps, adjacent),
            forward(k, k_heads, k_weight, table, eps, adjacent)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                                 const Tensor& q, const Tensor& k,
                                                                 const Tensor& q_weight,
                                                                 const Tensor& k_weight, const Tensor& cos,
                                                                 const Tensor& sin, double eps, bool adjacent,
                                                                 bool weight_grads) {
    const Heads q_heads = heads_of(q, "q"), k_heads = heads_like(k, q, k.size(2), "k");
    const Heads grad_q_heads = heads_like(grad_q, q, q_heads.heads, "grad_q"),
                grad_k_heads = heads_like(grad_k, q, k_heads.heads, "grad_k");
    head_weight(q_weight, q_weight, q, "q_weight");
    head_weight(k_weight, q_weight, q, "k_weight");
    const RopeTable table = rope_table(cos, sin, q);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const auto [dq, dq_weight] =
        backward(grad_q, grad_q_heads, q, q_heads, q_weight, table, eps, adjacent, weight_grads);
    const auto [dk, dk_weight] =
        backward(grad_k, grad_k_heads, k, k_heads, k_weight, table, eps, adjacent, weight_grads);
    return {dq, dk, dq_weight, dk_weight};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
    m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
