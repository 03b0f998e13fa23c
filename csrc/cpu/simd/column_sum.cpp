#include "column_sum.h"

#include "vec.h"

namespace fastdistill {
namespace {

template <class T>
void column_sum(const ColumnSum& a) {
    using A = Accumulator<T>;
    const A* partials = static_cast<const A*>(a.partials);
    sweep<A, 1>(a.size, [&](int64_t i, auto extent, int) {
        Vec<A> sum = {};
        for (int64_t row = 0; row < a.count; ++row) sum += load(partials + row * a.stride + i, extent);
        store(static_cast<T*>(a.out) + i, sum, extent);
    });
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

ColumnSumKernel column_sum_kernel(Scalar out) {
    switch (out) {
        case Scalar::float32:
            return column_sum<float>;
        case Scalar::float64:
            return column_sum<double>;
        case Scalar::bfloat16:
            return column_sum<bfloat16>;
        case Scalar::float16:
            return column_sum<float16>;
    }
    return nullptr;
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
