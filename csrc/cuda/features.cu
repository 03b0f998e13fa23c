// feature_kd_loss and block_statistics on CUDA: arguments, launches, registration.
#include "features.cuh"

#include <tuple>

#include "../common/feature_arguments.h"
#include "launch.h"

namespace fastdistill::cuda {
namespace {

// Reading alone needs more blocks than reading and writing to keep the memory busy.
constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 8;

bool pair_aligned(const Tensor& student, const Tensor& teacher, int64_t elements) {
    return rows_aligned(student, rows_of(student, "student"), elements) &&
           rows_aligned(teacher, rows_of(teacher, "teacher"), elements);
}

// Calls run(constant) with the kind as a type.
template <class Run>
void with_kind(FeatureKd kind, Run&& run) {
    switch (kind) {
        case FeatureKd::mse:
            return run(std::integral_constant<FeatureKd, FeatureKd::mse>{});
        case FeatureKd::relative_mse:
            return run(std::integral_constant<FeatureKd, FeatureKd::relative_mse>{});
        case FeatureKd::cosine:
            return run(std::integral_constant<FeatureKd, FeatureKd::cosine>{});
        case FeatureKd::masked_mse:
            return run(std::integral_constant<FeatureKd, FeatureKd::masked_mse>{});
    }
}

// What the loss is a mean over: tokens or elements.
double terms(FeatureKd kind, const FeaturePair& in) {
    const int64_t rows = in.batch * in.tokens;
    return std::max<int64_t>(1, kind == FeatureKd::cosine ? rows : rows * in.channels);
}

std::tuple<Tensor, Tensor> feature_kd_loss(const Tensor& student, const Tensor& teacher, int64_t kind_index) {
    const FeatureKd kind = feature_kind(kind_index);
    const FeaturePair in = feature_pair(student, teacher);
    const Rows rows = rows_of(student, "student");
    const int32_t device = student.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const int64_t chunks = rows.count() > 0 ? chunks_of(rows, device, BLOCKS_PER_MULTIPROCESSOR) : 0;

    Tensor loss = new_accumulators(student, {}),
           stats = new_accumulators(student, {kept_for_backward(kind, in)}),
           partials = new_accumulators(student, {in.batch * chunks * KD_PARTIALS});
    float* kept = static_cast<float*>(stats.mutable_data_ptr());
    const FeatureReduce args{in, static_cast<float*>(partials.mutable_data_ptr()), kept};
    if (kind == FeatureKd::masked_mse && chunks == 0) torch::stable::zero_(stats);
    if (chunks > 0)
        with_type(student, [&](auto t) {
            using T = decltype(t);
            constexpr int N = 16 / sizeof(T);
            const bool aligned = pair_aligned(student, teacher, N);
            const dim3 grid(chunks, in.batch);
            if (kind == FeatureKd::masked_mse) {
                launch(aligned ? feature_moments<T, N> : feature_moments<T, 1>, grid, THREADS, 0, stream,
                       args);
                launch(feature_finish_moments, dim3((2 * in.batch + THREADS - 1) / THREADS), THREADS, 0,
                       stream, in, args.partials, chunks, kept);
            }
            with_kind(kind, [&](auto constant) {
                constexpr FeatureKd KIND = decltype(constant)::value;
                launch(aligned ? feature_reduce<T, N, KIND> : feature_reduce<T, 1, KIND>, grid, THREADS, 0,
                       stream, args);
            });
        });
    launch(feature_finish, dim3(1), THREADS, 0, stream, args.partials, in.batch * chunks, terms(kind, in),
           kind == FeatureKd::relative_mse, static_cast<float*>(loss.mutable_data_ptr()), kept);
    return {loss, stats};
}

Tensor feature_kd_loss_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const Tensor& stats, int64_t kind_index) {
    const FeatureKd kind = feature_kind(kind_index);
    const FeaturePair in = feature_pair(student, teacher);
    check_kept(stats, kind, in, student);
    check_upstream(grad, student);
    const int32_t device = student.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor dstudent = torch::stable::new_empty(student, student.sizes());
    if (in.batch * in.tokens == 0) return dstudent;
    const double factor = kind == FeatureKd::relative_mse ? 1. : 2 / terms(kind, in);
    const FeatureBackward args{in, static_cast<const float*>(grad.const_data_ptr()),
                               static_cast<const float*>(stats.const_data_ptr()), static_cast<float>(factor),
                               dstudent.mutable_data_ptr()};
    with_type(student, [&](auto t) {
        using T = decltype(t);
        constexpr int N = 16 / sizeof(T);
        with_kind(kind, [&](auto constant) {
            constexpr FeatureKd KIND = decltype(constant)::value;
            launch(pair_aligned(student, teacher, N) ? feature_backward<T, N, KIND>
                                                     : feature_backward<T, 1, KIND>,
                   dim3(in.batch * in.tokens), THREADS, 0, current_stream(device), args);
        });
    });
    return dstudent;
}

Tensor block_statistics(const Tensor& before, const Tensor& after) {
    const FeaturePair in = feature_pair(before, after);
    const int32_t device = before.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor out = before.dim() == 3 ? new_accumulators(before, {4, in.batch, in.tokens})
                                   : new_accumulators(before, {4, in.tokens});
    if (in.batch * in.tokens == 0) return out;
    with_type(before, [&](auto t) {
        using T = decltype(t);
        constexpr int N = 16 / sizeof(T);
        launch(pair_aligned(before, after, N) ? feature_statistics<T, N> : feature_statistics<T, 1>,
               dim3(in.batch * in.tokens), THREADS, 0, current_stream(device), in,
               static_cast<float*>(out.mutable_data_ptr()));
    });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
    m.impl("feature_kd_loss", TORCH_BOX(&feature_kd_loss));
    m.impl("feature_kd_loss_backward", TORCH_BOX(&feature_kd_loss_backward));
    m.impl("block_statistics", TORCH_BOX(&block_statistics));
}

}  // namespace
}  // namespace fastdistill::cuda
