// The RMS norm and the rotation of heads on CUDA, forward and backward: arguments, launches, registration.
#include "norm_rope.cuh"

#include "../common/norm_rope_ops.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

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

bool multiple_of(const void* data, size_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Two pairs are four channels where they are adjacent, and two in either half.
template <class Data>
bool pairs_aligned(const HeadRows<Data>& rows, size_t element) {
    return multiple_of(rows.data, 4 * element) && rows.batch_stride % 4 == 0 && rows.token_stride % 4 == 0 &&
           rows.head_stride % 4 == 0;
}

// What forward and backward read beside the heads.
template <class Part>
bool rest_aligned(const Part& p, size_t weight_element) {
    const RopeTable& t = p.table;
    const bool table = t.compact || (multiple_of(t.cos, 16) && multiple_of(t.sin, 16) &&
                                     t.cos_stride % 4 == 0 && t.sin_stride % 4 == 0);
    return p.size % 4 == 0 && table && multiple_of(p.weight, 4 * weight_element);
}

template <class Part>
int64_t heads_in(const Part& p) {
    return p.batch * p.tokens * p.heads;
}

constexpr int64_t WARPS = THREADS / 32;

struct Cuda {
    static Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
        return torch::stable::new_empty(like, sizes);
    }

    static void forward(const Tensor& like, const Tensor& weight, const std::vector<NormRopeForward>& parts,
                        double eps, bool adjacent) {
        NormRopeParts<NormRopeForward> args{};
        args.eps = static_cast<float>(eps);
        bool aligned = true;
        int64_t blocks = 0;
        for (const NormRopeForward& part : parts) {
            aligned = aligned && pairs_aligned(part.x, like.element_size()) &&
                      pairs_aligned(part.out, like.element_size()) &&
                      rest_aligned(part, weight.element_size());
            args.part[args.count] = part;
            args.first_block[args.count++] = blocks;
            blocks += (heads_in(part) + WARPS - 1) / WARPS;
        }
        args.first_block[args.count] = blocks;
        if (blocks == 0) return;
        const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
        const cudaStream_t stream = current_stream(like.get_device_index());
        with_types(like, weight, [&](auto t, auto m) {
            using T = decltype(t);
            using M = decltype(m);
            launch(adjacent ? kernel_for<ForwardKernel, T, M, true>(aligned, parts[0].size)
                            : kernel_for<ForwardKernel, T, M, false>(aligned, parts[0].size),
                   dim3(blocks), THREADS, 0, stream, args);
        });
    }

    static void backward(const Tensor& like, const Tensor& weight, std::vector<NormRopePart> parts,
                         double eps, bool adjacent) {
        constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 8;
        const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
        const int32_t device = like.get_device_index();
        const cudaStream_t stream = current_stream(device);
        NormRopeParts<NormRopeBackward> args{};
        args.eps = static_cast<float>(eps);
        bool aligned = true, weight_grads = false;
        int64_t blocks = 0, all_heads = 0;
        for (const NormRopePart& part : parts) all_heads += heads_in(part.arguments);
        // As many blocks for a part as are its share of the heads.
        const int64_t wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device);
        for (const auto& [part, dweight] : parts) {
            aligned = aligned && pairs_aligned(part.x, like.element_size()) &&
                      pairs_aligned(part.grad, like.element_size()) &&
                      pairs_aligned(part.dx, like.element_size()) &&
                      rest_aligned(part, weight.element_size());
            weight_grads = weight_grads || dweight;
            const int64_t heads = heads_in(part), share = wanted * heads / std::max<int64_t>(1, all_heads);
            args.part[args.count] = part;
            args.first_block[args.count++] = blocks;
            blocks += std::max<int64_t>(1, std::min((heads + WARPS - 1) / WARPS, share));
        }
        args.first_block[args.count] = blocks;
        const int64_t size = parts[0].arguments.size, partial_sizes[] = {weight_grads ? blocks * size : 0};
        Tensor partials = torch::stable::new_empty(like, {partial_sizes, 1}, ScalarType::Float);
        float* partial = weight_grads ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
        for (int i = 0; i < args.count; ++i)
            args.part[i].partials = parts[i].dweight ? partial + args.first_block[i] * size : nullptr;
        with_types(like, weight, [&](auto t, auto m) {
            using T = decltype(t);
            using M = decltype(m);
            launch(adjacent ? kernel_for<BackwardKernel, T, M, true>(aligned, size)
                            : kernel_for<BackwardKernel, T, M, false>(aligned, size),
                   dim3(blocks), THREADS, weight_grads ? WARPS * size * sizeof(float) : 0, stream, args);
            for (int i = 0; i < args.count; ++i)
                if (parts[i].dweight)
                    sum_over_tokens<M>(static_cast<const float*>(args.part[i].partials),
                                       args.first_block[i + 1] - args.first_block[i], {1, 1, size, 0, 0},
                                       {1, 1, size, 0, 0}, {parts[i].dweight}, stream);
        });
    }
};

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    NormRopeOps<Cuda>::implement(m);
}

}  // namespace
}  // namespace fastdistill::cuda
