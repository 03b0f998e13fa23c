// A student's features beside a teacher's, as kernels on every device see them. Free of torch.
#pragma once

#include "operand.h"

namespace fastdistill {

// The order of KINDS in fastdistill/ops/feature_kd_loss.py.
enum class FeatureKd : int64_t { mse, relative_mse, cosine, masked_mse };

constexpr double MIN_NORM = 1e-6;   // below which a token is not brought to norm one
constexpr double MASK_SIGMAS = 2.;  // masked_mse leaves out what is further from the sample's mean

struct FeaturePair {
    Operand student, teacher;
    int64_t batch, tokens, channels;
};

}  // namespace fastdistill
