// LN(x) * (1 + scale) + shift on CUDA, forward and backward: arguments, launches, registration.
#include <algorithm>
#include <tuple>

#include "launch.h"
#include "modulate.cuh"

namespace fastdistill::cuda {
namespace {

using torch::stable::new_empty;

RowStrides strides_of(const Rows& rows) {
    return {rows.batch_stride, rows.token_stride};
}

// Calls run(T{}, M{}) with the device types of x and of scale.
template <class Run>
void with_types(const Tensor& x, const Tensor& modulation, Run&& run) {
    const ScalarType type = x.scalar_type(), wide = modulation.scalar_type();
    STD_TORCH_CHECK(wide == type || wide == ScalarType::Float, "scale: expected the dtype of x, or float32");
    const bool is_wide = wide == ScalarType::Float;
    if (type == ScalarType::Float) return run(float{}, float{});
    if (type == ScalarType::BFloat16 && is_wide) return run(__nv_bfloat16{}, float{});
    if (type == ScalarType::BFloat16) return run(__nv_bfloat16{}, __nv_bfloat16{});
    if (type == ScalarType::Half && is_wide) return run(__half{}, float{});
    if (type == ScalarType::Half) return run(__half{}, __half{});
    STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
}

std::tuple<Tensor, Tensor> modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
    const Rows rows = rows_of(x, "x");
    const Rows scale_rows = modulation_of(scale, x, "scale"), shift_rows = modulation_of(shift, x, "shift");
    check_same_device(scale, x, "scale");
    check_same_device(shift, x, "shift");
    STD_TORCH_CHECK(shift.scalar_type() == scale.scalar_type(), "shift: expected the dtype of scale");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

    Tensor out = new_empty(x, x.sizes());
    const int64_t stats_sizes[] = {2, x.dim() == 3 ? rows.batch : rows.tokens, rows.tokens};
    Tensor stats = new_empty(x, {stats_sizes, static_cast<size_t>(x.dim())}, ScalarType::Float);
    if (rows.count() == 0) return {out, stats};

    float* mean = static_cast<float*>(stats.mutable_data_ptr());
    const ModulateForward args{x.const_data_ptr(),
                               scale.const_data_ptr(),
                               shift.const_data_ptr(),
                               out.mutable_data_ptr(),
                               mean,
                               mean + rows.count(),
                               rows.tokens,
                               rows.channels,
                               strides_of(rows),
                               strides_of(scale_rows),
                               strides_of(shift_rows),
                               static_cast<float>(eps)};
    const cudaStream_t stream = current_stream(x.get_device_index());
    with_types(x, scale, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(x, rows, N) && rows_aligned(scale, scale_rows, N) &&
                             rows_aligned(shift, shift_rows, N);
        launch(aligned ? modulate_forward<T, M, N> : modulate_forward<T, M, 1>, dim3(rows.count()), THREADS,
               rows.channels * sizeof(float), stream, args);
    });
    return {out, stats};
}

template <class T, class M, ModulationGrad MODULATION>
void launch_backward(const ModulateBackward& args, bool aligned, dim3 grid, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const size_t bytes = MODULATION == ModulationGrad::summed ? 2 * args.channels * sizeof(float) : 0;
    launch(aligned ? modulate_backward<T, M, N, MODULATION> : modulate_backward<T, M, 1, MODULATION>, grid,
           THREADS, bytes, stream, args);
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                     const Tensor& stats, bool modulation_grads) {
    const Rows rows = rows_of(x, "x"), grad_rows = rows_of(grad, "grad");
    const Rows scale_rows = modulation_of(scale, x, "scale");
    check_same_rows(grad, x, "grad");
    for (const Tensor* t : {&grad, &scale, &stats}) check_same_device(*t, x, "grad, scale, stats");
    STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
    STD_TORCH_CHECK(stats.numel() == 2 * rows.count() && stats.is_contiguous() &&
                        stats.scalar_type() == ScalarType::Float,
                    "stats: expected the contiguous statistics that modulate returned");
    STD_TORCH_CHECK(rows.batch <= 65535, "x: expected a batch of at most 65535");
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);

    const bool per_token = modulation_grads && scale_rows.tokens > 1, summed = modulation_grads && !per_token;
    // Two blocks for every multiprocessor; the same on every call, so the sums are too.
    const int64_t wanted = 2 * multiprocessors(device) / std::max<int64_t>(1, rows.batch);
    const int64_t chunks = std::max<int64_t>(1, std::min((rows.tokens + 3) / 4, wanted));

    Tensor dx = new_empty(x, x.sizes());
    const int64_t nothing[] = {0}, partial_sizes[] = {summed ? rows.batch * chunks * 2 * rows.channels : 0};
    Tensor dscale = modulation_grads ? new_empty(scale, scale.sizes()) : new_empty(scale, {nothing, 1});
    Tensor dshift = new_empty(dscale, dscale.sizes());
    Tensor partials = new_empty(x, {partial_sizes, 1}, ScalarType::Float);

    const float* mean = static_cast<const float*>(stats.const_data_ptr());
    float* partial = static_cast<float*>(partials.mutable_data_ptr());
    const ModulateBackward args{grad.const_data_ptr(),
                                x.const_data_ptr(),
                                scale.const_data_ptr(),
                                mean,
                                mean + rows.count(),
                                dx.mutable_data_ptr(),
                                dscale.mutable_data_ptr(),
                                dshift.mutable_data_ptr(),
                                partial,
                                rows.tokens,
                                rows.channels,
                                strides_of(grad_rows),
                                strides_of(rows),
                                strides_of(scale_rows)};
    const cudaStream_t stream = current_stream(device);
    with_types(x, scale, [&](auto t, auto m) {
        using T = decltype(t);
        using M = decltype(m);
        constexpr int N = 16 / sizeof(T);
        const bool aligned = rows_aligned(x, rows, N) && rows_aligned(grad, grad_rows, N) &&
                             rows_aligned(scale, scale_rows, N);
        const dim3 grid(chunks, rows.batch);
        const bool any = rows.batch > 0 && rows.channels > 0;
        if (any && summed) launch_backward<T, M, ModulationGrad::summed>(args, aligned, grid, stream);
        if (any && per_token) launch_backward<T, M, ModulationGrad::per_token>(args, aligned, grid, stream);
        if (any && !modulation_grads)
            launch_backward<T, M, ModulationGrad::none>(args, aligned, grid, stream);
        if (!summed || scale.numel() == 0) return;

        const bool per_batch = scale_rows.batch == rows.batch;
        const int64_t groups = per_batch ? rows.batch : 1, count = per_batch ? chunks : rows.batch * chunks;
        const dim3 columns((rows.channels + THREADS - 1) / THREADS, groups);
        for (auto [from, to] : {std::pair(partial, &dscale), std::pair(partial + rows.channels, &dshift)})
            launch(column_sum<M>, columns, THREADS, 0, stream, from, static_cast<M*>(to->mutable_data_ptr()),
                   count, 2 * rows.channels, rows.channels);
    });
    return {dx, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("modulate", TORCH_BOX(&modulate));
    m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
}

}  // namespace
}  // namespace fastdistill::cuda
