// What the operators that compare two sets of features need to know about their arguments.
#pragma once

#include "features.h"
#include "rows.h"

namespace fastdistill {

inline FeaturePair feature_pair(const Tensor& student, const Tensor& teacher) {
    const Rows rows = rows_of(student, "student");
    return {rows.operand(student), rows_like(teacher, student, "teacher").operand(teacher), rows.batch,
            rows.tokens, rows.channels};
}

inline FeatureKd feature_kind(int64_t kind) {
    STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(FeatureKd::masked_mse),
                    "kind: expected 0 to 3");
    return static_cast<FeatureKd>(kind);
}

// How many accumulators the forward op keeps for the backward: see FeatureReduce for their meaning;
// relative_mse keeps 2 / sum teacher^2.
inline int64_t kept_for_backward(FeatureKd kind, const FeaturePair& in) {
    switch (kind) {
        case FeatureKd::mse:
            return 0;
        case FeatureKd::relative_mse:
            return 1;
        case FeatureKd::cosine:
            return 3 * in.batch * in.tokens;
        case FeatureKd::masked_mse:
            return 4 * in.batch;
    }
    return 0;
}

inline Tensor new_accumulators(const Tensor& x, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(x, {sizes.begin(), sizes.size()}, accumulator_of(x.scalar_type()));
}

inline void check_kept(const Tensor& stats, FeatureKd kind, const FeaturePair& in, const Tensor& student) {
    STD_TORCH_CHECK(stats.numel() == kept_for_backward(kind, in) && stats.is_contiguous() &&
                        stats.scalar_type() == accumulator_of(student.scalar_type()),
                    "stats: expected the contiguous statistics that the forward op returned");
    check_same_device(stats, student, "stats");
}

inline void check_upstream(const Tensor& grad, const Tensor& x) {
    STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == accumulator_of(x.scalar_type()),
                    "grad: expected one accumulator");
    check_same_device(grad, x, "grad");
}

}  // namespace fastdistill
