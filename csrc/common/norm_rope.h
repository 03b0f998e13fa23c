// The RMS norm and the rotation of heads as kernels on every device see them. Free of torch.
#pragma once

#include <type_traits>

#include "operand.h"

namespace fastdistill {

constexpr int64_t MAX_HEAD_SIZE = 512;

// A (B, S, H, d) argument (Data: const void*) or result (void*). Strides count elements, the last axis has
// stride 1.
template <class Data>
struct HeadRows {
    Data data;
    int64_t batch_stride, token_stride, head_stride;

    template <class T>
    FASTDISTILL_EVERYWHERE auto row(int64_t batch, int64_t token, int64_t head) const {
        constexpr bool CONSTANT = std::is_const_v<std::remove_pointer_t<Data>>;
        using Pointer = std::conditional_t<CONSTANT, const T*, T*>;
        return static_cast<Pointer>(data) + batch * batch_stride + token * token_stride + head * head_stride;
    }
};
using HeadOperand = HeadRows<const void*>;
using HeadResult = HeadRows<void*>;

// The cosines and sines of every position: accumulators, one for each channel or, compact, for each pair.
// Without cos nothing is rotated.
struct RopeTable {
    const void *cos, *sin;
    int64_t cos_stride, sin_stride;
    bool compact;
};

// One of the tensors of heads that an op takes: queries, keys or values of one stream. Without a weight it is
// copied as it is.
struct NormRopeForward {
    HeadOperand x;
    const void* weight;
    RopeTable table;
    HeadResult out;
    int64_t batch, tokens, heads, size;
};

struct NormRopeBackward {
    HeadOperand grad, x;
    const void* weight;
    RopeTable table;
    HeadResult dx;
    void* partials;  // accumulators (chunks, d), or null where no gradient of the weight is wanted
    int64_t batch, tokens, heads, size;
};

}  // namespace fastdistill
