// The DMD loss on the CPU, forward and backward. The formula and the shapes: fastdistill/ops/dmd_loss.py.
#include "simd/dmd_loss.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dmd_arguments.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// Elements of a sample that one task sums in float32, before partial sums meet in float64: few enough that
// the narrowest vectors add 128 to each lane. A function of nothing, so that the sums depend on the shape
// alone.
constexpr int64_t CHUNK = 2048;

int64_t chunks_of(int64_t elements) {
    return (elements + CHUNK - 1) / CHUNK;
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
    const int64_t batch = x.size(0), elements = elements_of(x), chunks = chunks_of(elements);
    if (coefficients) in.coefficients = accumulators(*coefficients, x, 2 * batch, "coefficients");

    std::vector<double> partials(batch * chunks * 3);
    const auto kernel =
        FASTDISTILL_BEST(dmd_kernels)(scalar_of(x, "x"), uncond.has_value(), mask.has_value()).reduce;
    const DmdReduce args{in, partials.data(), elements, CHUNK, chunks};
    parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

    std::vector<double> norm(batch), square(batch);
    double whole = 0, count = 0;
    for (int64_t s = 0; s < batch; ++s) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const double* partial = &partials[3 * (s * chunks + chunk)];
            norm[s] += partial[0];
            square[s] += partial[1];
            count += partial[2];
        }
        whole += norm[s];
    }
    count = std::max(count, 1.);

    const ScalarType accumulator = accumulator_of(x.scalar_type());
    const int64_t sizes[] = {batch};
    const auto rank = [&](size_t dims) { return torch::headeronly::IntHeaderOnlyArrayRef(sizes, dims); };
    Tensor loss = new_empty(x, rank(0), accumulator), factors = new_empty(x, rank(1), accumulator);
    const void* weights = weight ? accumulators(*weight, x, batch, "weight") : nullptr;
    const auto fill = [&](auto type) {
        using A = decltype(type);
        double sum = 0;
        for (int64_t s = 0; s < batch; ++s) {
            double mean = 1;
            if (normaliser == NORMALISE_SAMPLE) mean = norm[s] / elements + eps;
            if (normaliser == NORMALISE_BATCH) mean = whole / (elements * batch) + eps;
            double factor = sign * (weights ? static_cast<const A*>(weights)[s] : A(1)) / mean;
            if (finite && !std::isfinite(factor)) factor = 0;
            static_cast<A*>(factors.mutable_data_ptr())[s] = A(factor / count);
            sum += factor * factor * square[s];
        }
        *static_cast<A*>(loss.mutable_data_ptr()) = A(0.5 * sum / count);
    };
    accumulator == ScalarType::Double ? fill(double{}) : fill(float{});
    return {loss, factors};
}

Tensor dmd_loss_backward(const Tensor& grad, const Tensor& cond, const std::optional<Tensor>& uncond,
                         const Tensor& critic, const std::optional<Tensor>& mask, const Tensor& factors,
                         double guidance, bool finite) {
    const DmdOperands in = dmd_operands(cond, cond, uncond, critic, mask, guidance, finite);
    const int64_t batch = cond.size(0), elements = elements_of(cond), chunks = chunks_of(elements);
    const void* upstream = accumulators(grad, cond, 1, "grad");
    const bool wide = cond.scalar_type() == ScalarType::Double;
    Tensor dx = new_empty(cond, cond.sizes());
    const DmdBackward args{
        in,
        accumulators(factors, cond, batch, "factors"),
        wide ? *static_cast<const double*>(upstream) : *static_cast<const float*>(upstream),
        dx.mutable_data_ptr(),
        elements,
        CHUNK,
        chunks};
    const auto kernel =
        FASTDISTILL_BEST(dmd_kernels)(scalar_of(cond, "cond"), uncond.has_value(), mask.has_value()).backward;
    parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("dmd_loss", TORCH_BOX(&dmd_loss));
    m.impl("dmd_loss_backward", TORCH_BOX(&dmd_loss_backward));
}

}  // namespace
}  // namespace fastdistill
