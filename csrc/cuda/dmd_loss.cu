// The DMD loss on CUDA, forward and backward: arguments, launches, registration.
#include "dmd_loss.cuh"

#include <tuple>

#include "../common/dmd_arguments.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

using torch::stable::new_empty;

// Elements of a sample that one block sums: 512 blocks for the latents of eight 1024 x 1024 images.
constexpr int64_t CHUNK = 4096;

dim3 grid_of(const Tensor& x, int64_t elements) {
    STD_TORCH_CHECK(x.size(0) <= 65535, "x: expected a batch of at most 65535");
    return dim3((elements + CHUNK - 1) / CHUNK, x.size(0));
}

// Calls run(guided, masked) with both as types.
template <class Run>
void with_flags(bool guided, bool masked, Run&& run) {
    using std::false_type, std::true_type;
    if (guided && masked) return run(true_type{}, true_type{});
    if (guided) return run(true_type{}, false_type{});
    if (masked) return run(false_type{}, true_type{});
    run(false_type{}, false_type{});
}

// Whether the samples may be read `elements` at a time.
bool aligned(const Samples& samples, int64_t elements, size_t element_size) {
    return reinterpret_cast<uintptr_t>(samples.data) % (elements * element_size) == 0 &&
           samples.stride % elements == 0;
}

std::tuple<Tensor, Tensor> dmd_loss(const Tensor& x, const Tensor& noise, const Tensor& cond,
                                    const std::optional<Tensor>& uncond, const Tensor& critic,
                                    const std::optional<Tensor>& coefficients,
                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& mask,
                                    double guidance, double a, double b, double sign, int64_t normaliser,
                                    double eps, bool finite) {
    DmdOperands in = dmd_operands(x, cond, uncond, critic, mask, guidance, finite);
    in.x = samples_of(x, x, "x");
    in.noise = samples_of(noise, x, "noise");
    in.a = a;
    in.b = b;
    const int64_t batch = x.size(0), elements = elements_of(x);
    if (coefficients) in.coefficients = accumulators(*coefficients, x, 2 * batch, "coefficients");
    const float* weights =
        weight ? static_cast<const float*>(accumulators(*weight, x, batch, "weight")) : nullptr;
    const dim3 grid = grid_of(x, elements);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x.get_device_index());

    const int64_t sizes[] = {batch}, partial_sizes[] = {batch * grid.x * 3};
    const auto rank = [&](size_t dims) { return torch::headeronly::IntHeaderOnlyArrayRef(sizes, dims); };
    Tensor loss = new_empty(x, rank(0), ScalarType::Float),
           factors = new_empty(x, rank(1), ScalarType::Float);
    Tensor partials = new_empty(x, {partial_sizes, 1}, ScalarType::Float);
    float* partial = static_cast<float*>(partials.mutable_data_ptr());
    if (batch * elements > 0)
        with_type(x, [&](auto t) {
            using T = decltype(t);
            constexpr int N = 16 / sizeof(T);
            bool wide = elements % N == 0;
            for (const Samples* s : {&in.x, &in.noise, &in.cond, &in.uncond, &in.critic})
                wide = wide && aligned(*s, N, sizeof(T));
            with_flags(uncond.has_value(), mask.has_value(), [&](auto guided, auto masked) {
                constexpr bool GUIDED = guided.value, MASKED = masked.value;
                launch(wide ? dmd_reduce<T, N, GUIDED, MASKED> : dmd_reduce<T, 1, GUIDED, MASKED>, grid,
                       THREADS, 0, stream, in, partial, elements, CHUNK);
            });
        });
    launch(dmd_finish, dim3(1), THREADS, 0, stream, static_cast<const float*>(partial), weights,
           static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(factors.mutable_data_ptr()),
           batch, static_cast<int64_t>(grid.x), elements, sign, normaliser, eps, finite);
    return {loss, factors};
}

Tensor dmd_loss_backward(const Tensor& grad, const Tensor& cond, const std::optional<Tensor>& uncond,
                         const Tensor& critic, const std::optional<Tensor>& mask, const Tensor& factors,
                         double guidance, bool finite) {
    const DmdOperands in = dmd_operands(cond, cond, uncond, critic, mask, guidance, finite);
    const int64_t elements = elements_of(cond);
    const float* upstream = static_cast<const float*>(accumulators(grad, cond, 1, "grad"));
    const float* scales = static_cast<const float*>(accumulators(factors, cond, cond.size(0), "factors"));
    const torch::stable::accelerator::DeviceGuard guard(cond.get_device_index());
    Tensor dx = new_empty(cond, cond.sizes());
    if (dx.numel() == 0) return dx;
    with_type(cond, [&](auto t) {
        using T = decltype(t);
        constexpr int N = 16 / sizeof(T);
        bool wide = elements % N == 0;
        for (const Samples* s : {&in.cond, &in.uncond, &in.critic}) wide = wide && aligned(*s, N, sizeof(T));
        with_flags(uncond.has_value(), mask.has_value(), [&](auto guided, auto masked) {
            constexpr bool GUIDED = guided.value, MASKED = masked.value;
            launch(wide ? dmd_backward<T, N, GUIDED, MASKED> : dmd_backward<T, 1, GUIDED, MASKED>,
                   grid_of(cond, elements), THREADS, 0, current_stream(cond.get_device_index()), in, upstream,
                   scales, static_cast<T*>(dx.mutable_data_ptr()), elements, CHUNK);
        });
    });
    return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("dmd_loss", TORCH_BOX(&dmd_loss));
    m.impl("dmd_loss_backward", TORCH_BOX(&dmd_loss_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
