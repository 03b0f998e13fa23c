// feature_kd_loss and block_statistics on the CPU. The formulas and the shapes:
// fastdistill/ops/feature_kd_loss.py and block_statistics.py.
#include "simd/features.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/feature_arguments.h"
#include "host.h"

namespace fastdistill {
namespace {

using torch::stable::parallel_for;

// Mean and standard deviation of each sample from the moments of its chunks about their pivots, in their
// order.
template <class A>
void finish_moments(const double* partials, const FeaturePair& in, int64_t chunks, A* stats) {
    for (int64_t b = 0; b < in.batch; ++b)
        for (const int64_t which : {0, 1}) {
            double count = 0, mean = 0, square = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const double* p = partials + (b * chunks + chunk) * KD_PARTIALS + 3 * which;
                const double n =
                    ((chunk + 1) * in.tokens / chunks - chunk * in.tokens / chunks) * in.channels;
                if (n == 0) continue;
                const double of_chunk = p[0] + p[1] / n, apart = of_chunk - mean, both = count + n;
                square += p[2] - p[1] * p[1] / n + apart * apart * count * n / both;
                mean += apart * n / both;
                count = both;
            }
            stats[2 * which * in.batch + b] = A(mean);
            stats[(2 * which + 1) * in.batch + b] = A(MASK_SIGMAS * std::sqrt(square / std::max(1., count)));
        }
}

std::tuple<Tensor, Tensor> feature_kd_loss(const Tensor& student, const Tensor& teacher, int64_t kind_index) {
    const FeatureKd kind = feature_kind(kind_index);
    const FeaturePair in = feature_pair(student, teacher);
    const Rows rows = rows_of(student, "student");
    const int64_t chunks = chunks_of(rows);
    Tensor loss = new_accumulators(student, {}),
           stats = new_accumulators(student, {kept_for_backward(kind, in)});
    std::vector<double> partials(in.batch * chunks * KD_PARTIALS);
    const FeatureReduce args{in, chunks, partials.data(), stats.mutable_data_ptr()};
    const FeatureKernels kernels = FASTDISTILL_BEST(feature_kernels)(scalar_of(student, "student"), kind);
    const auto over_tasks = [&](auto kernel) {
        parallel_for(0, in.batch * chunks, grain(in.channels * rows_per_chunk(rows, chunks)),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    };
    const auto run = [&](auto type) {
        using A = decltype(type);
        A* kept = static_cast<A*>(stats.mutable_data_ptr());
        if (kind == FeatureKd::masked_mse) {
            over_tasks(kernels.moments);
            finish_moments(partials.data(), in, chunks, kept);
        }
        over_tasks(kernels.reduce);
        double sum = 0, teacher_square = 0;
        for (int64_t task = 0; task < in.batch * chunks; ++task) {
            sum += partials[task * KD_PARTIALS];
            teacher_square += partials[task * KD_PARTIALS + 1];
        }
        const double of = kind == FeatureKd::cosine ? rows.count() : rows.count() * rows.channels;
        double mean = sum / std::max(1., of);
        if (kind == FeatureKd::relative_mse) {
            mean = of > 0 ? sum / teacher_square : 0.;
            *kept = A(2 / teacher_square);
        }
        *static_cast<A*>(loss.mutable_data_ptr()) = A(mean);
    };
    student.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
    return {loss, stats};
}

Tensor feature_kd_loss_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const Tensor& stats, int64_t kind_index) {
    const FeatureKd kind = feature_kind(kind_index);
    const FeaturePair in = feature_pair(student, teacher);
    check_kept(stats, kind, in, student);
    check_upstream(grad, student);
    const auto value = [&](const Tensor& t) {
        const void* data = t.const_data_ptr();
        return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                     : double(*static_cast<const float*>(data));
    };
    const double of = kind == FeatureKd::cosine ? in.batch * in.tokens : in.batch * in.tokens * in.channels;
    const double factor = kind == FeatureKd::relative_mse ? value(stats) : 2 / std::max(1., of);
    Tensor dstudent = new_result(student, student.sizes());
    const FeatureBackward args{in, stats.const_data_ptr(), value(grad) * factor, dstudent.mutable_data_ptr(),
                               streams(dstudent)};
    const auto kernel = FASTDISTILL_BEST(feature_kernels)(scalar_of(student, "student"), kind).backward;
    parallel_for(0, in.batch * in.tokens, grain(in.channels),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return dstudent;
}

Tensor block_statistics(const Tensor& before, const Tensor& after) {
    const FeaturePair in = feature_pair(before, after);
    Tensor out = before.dim() == 3 ? new_accumulators(before, {4, in.batch, in.tokens})
                                   : new_accumulators(before, {4, in.tokens});
    const BlockStatistics args{in, out.mutable_data_ptr()};
    const auto kernel =
        FASTDISTILL_BEST(feature_kernels)(scalar_of(before, "before"), FeatureKd::cosine).statistics;
    parallel_for(0, in.batch * in.tokens, grain(in.channels),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
    m.impl("feature_kd_loss", TORCH_BOX(&feature_kd_loss));
    m.impl("feature_kd_loss_backward", TORCH_BOX(&feature_kd_loss_backward));
    m.impl("block_statistics", TORCH_BOX(&block_statistics));
}

}  // namespace
}  // namespace fastdistill
