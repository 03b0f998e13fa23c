// A (B, S, D) argument as kernels on every device see it. Strides count elements, a broadcast axis has stride
// 0, offsets are 64 bit. Free of torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTDISTILL_EVERYWHERE __host__ __device__ __forceinline__
#else
#define FASTDISTILL_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace fastdistill {

struct Operand {
    const void* data;
    int64_t batch_stride, token_stride;

    template <class T>
    FASTDISTILL_EVERYWHERE const T* row(int64_t batch, int64_t token) const {
        return static_cast<const T*>(data) + batch * batch_stride + token * token_stride;
    }
};

// What the adaptive layer norm stands behind: nothing, with one gradient coming in or, forked, two; or the
// gated residual that makes what is normalised.
enum class Adaln { single, forked, residual };

// Where the gradients of a modulation go: nowhere, summed over tokens into partials, or one row per token.
enum class ModulationGrad { none, summed, per_token };

}  // namespace fastdistill
