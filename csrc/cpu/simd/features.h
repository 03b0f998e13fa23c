// Kernels that compare two tensors of (B, S, D) rows.
#pragma once

#include "../../common/features.h"
#include "capability.h"

namespace fastdistill {

constexpr int64_t KD_PARTIALS = 6;

struct FeatureReduce {
    FeaturePair in;
    int64_t chunks;
    double* partials;  // (B, chunks, KD_PARTIALS)
    void* stats;  // cosine: written, (3, rows): 1 / |s|, (|s| - |t|) / |t|, squared distance of s / |s| and t
                  // / |t|; masked_mse: read, (4, B): mean and limit of student, of teacher
};

struct FeatureBackward {
    FeaturePair in;
    const void* stats;
    double factor;
    void* dstudent;  // contiguous
    bool stream;     // whether it is written around the caches
};

struct BlockStatistics {
    FeaturePair in;
    void* out;  // accumulators (4, rows): cosine, mean squared difference, norm before, norm after
};

struct FeatureKernels {
    // One task is one chunk of the tokens of one batch element: task = b * chunks + chunk.
    // Partials: pivot, sum and sum of squares of what is left of it, for student and teacher.
    void (*moments)(const FeatureReduce&, int64_t first_task, int64_t last_task);
    // Partials: the sum of the loss; relative_mse also the sum of teacher^2.
    void (*reduce)(const FeatureReduce&, int64_t first_task, int64_t last_task);
    void (*backward)(const FeatureBackward&, int64_t first_row, int64_t last_row);
    void (*statistics)(const BlockStatistics&, int64_t first_row, int64_t last_row);
};

#define FASTDISTILL_DECLARE(capability)                       \
    namespace capability {                                    \
    FeatureKernels feature_kernels(Scalar x, FeatureKd kind); \
    }
FASTDISTILL_FOR_EACH_CAPABILITY(FASTDISTILL_DECLARE)
#undef FASTDISTILL_DECLARE

}  // namespace fastdistill
