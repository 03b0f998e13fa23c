// LN(x) * (1 + scale) + shift on the CPU, forward and backward. The formula and the shapes:
// fastdistill/ops/modulate.py.
#include "simd/modulate.h"

#include <tuple>

#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

void check_dtypes(const Tensor& x, const Tensor& modulation, const char* name) {
    STD_TORCH_CHECK(
        modulation.scalar_type() == x.scalar_type() ||
            (modulation.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
        name, ": expected the dtype of x, or float32");
}

std::tuple<Tensor, Tensor> modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
    const Rows rows = rows_of(x, "x");
    const Rows scale_rows = modulation_of(scale, x, "scale"), shift_rows = modulation_of(shift, x, "shift");
    check_dtypes(x, scale, "scale");
    STD_TORCH_CHECK(shift.scalar_type() == scale.scalar_type(), "shift: expected the dtype of scale");
    check_same_device(scale, x, "scale");
    check_same_device(shift, x, "shift");

    Tensor out = new_empty(x, x.sizes());
    const int64_t stats_sizes[] = {2, x.dim() == 3 ? rows.batch : rows.tokens, rows.tokens};
    Tensor stats = new_empty(x, {stats_sizes, static_cast<size_t>(x.dim())}, accumulator_of(x.scalar_type()));
    char* mean = static_cast<char*>(stats.mutable_data_ptr());

    const ModulateForward args{x.const_data_ptr(),
                               scale.const_data_ptr(),
                               shift.const_data_ptr(),
                               out.mutable_data_ptr(),
                               mean,
                               mean + rows.count() * stats.element_size(),
                               rows.tokens,
                               rows.channels,
                               rows.batch_stride,
                               rows.token_stride,
                               scale_rows.batch_stride,
                               scale_rows.token_stride,
                               shift_rows.batch_stride,
                               shift_rows.token_stride,
                               eps,
                               streams(out)};
    const auto kernel =
        FASTDISTILL_BEST(modulate_kernels)(scalar_of(x, "x"), scalar_of(scale, "scale")).forward;
    parallel_for(0, rows.count(), grain(rows.channels),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                     const Tensor& stats, bool modulation_grads) {
    const Rows rows = rows_of(x, "x"), grad_rows = rows_of(grad, "grad");
    const Rows scale_rows = modulation_of(scale, x, "scale");
    check_same_rows(grad, x, "grad");
    check_dtypes(x, scale, "scale");
    STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
    const ScalarType accumulator = accumulator_of(x.scalar_type());
    STD_TORCH_CHECK(
        stats.numel() == 2 * rows.count() && stats.is_contiguous() && stats.scalar_type() == accumulator,
        "stats: expected the contiguous statistics that modulate returned");
    for (const Tensor* t : {&grad, &scale, &stats}) check_same_device(*t, x, "grad, scale, stats");
    const char* mean = static_cast<const char*>(stats.const_data_ptr());

    ModulationGrad modulation = ModulationGrad::none;
    if (modulation_grads)
        modulation = scale_rows.tokens > 1 ? ModulationGrad::per_token : ModulationGrad::summed;
    const bool summed = modulation == ModulationGrad::summed;
    const int64_t chunks = chunks_of(rows);

    Tensor dx = new_empty(x, x.sizes());
    const int64_t nothing[] = {0}, partial_sizes[] = {summed ? rows.batch * chunks * 2 * rows.channels : 0};
    Tensor dscale = modulation_grads ? new_empty(scale, scale.sizes()) : new_empty(scale, {nothing, 1});
    Tensor dshift = new_empty(dscale, dscale.sizes());
    Tensor partials = new_empty(x, {partial_sizes, 1}, accumulator);

    const ModulateBackward args{grad.const_data_ptr(),
                                x.const_data_ptr(),
                                scale.const_data_ptr(),
                                mean,
                                mean + rows.count() * stats.element_size(),
                                dx.mutable_data_ptr(),
                                dscale.mutable_data_ptr(),
                                dshift.mutable_data_ptr(),
                                partials.mutable_data_ptr(),
                                rows.tokens,
                                rows.channels,
                                chunks,
                                grad_rows.batch_stride,
                                grad_rows.token_stride,
                                rows.batch_stride,
                                rows.token_stride,
                                scale_rows.batch_stride,
                                scale_rows.token_stride,
                                modulation,
                                streams(dx)};
    const auto kernel =
        FASTDISTILL_BEST(modulate_kernels)(scalar_of(x, "x"), scalar_of(scale, "scale")).backward;
    const int64_t rows_per_task = std::max<int64_t>(1, rows.tokens / chunks);
    parallel_for(0, rows.batch * chunks, grain(rows.channels * rows_per_task),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

    if (summed) {
        const bool per_batch = scale_rows.batch == rows.batch;
        const int64_t groups = per_batch ? rows.batch : 1, count = per_batch ? chunks : rows.batch * chunks;
        const char* data = static_cast<const char*>(partials.const_data_ptr());
        const size_t bytes = partials.element_size();
        sum_partials(data, bytes, count, 2 * rows.channels, dscale, groups, rows.channels);
        sum_partials(data + rows.channels * bytes, bytes, count, 2 * rows.channels, dshift, groups,
                     rows.channels);
    }
    return {dx, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("modulate", TORCH_BOX(&modulate));
    m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
}

}  // namespace
}  // namespace fastdistill
