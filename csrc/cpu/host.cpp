#include "host.h"

namespace fastdistill {

void sum_partials(const void* partials, size_t accumulator_bytes, int64_t count, int64_t stride,
                  const Tensor& out, int64_t groups, int64_t size) {
    constexpr int64_t BLOCK = 512;
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    const ColumnSumKernel kernel = FASTDISTILL_BEST(column_sum_kernel)(scalar_of(out, "out"));
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    const char* partial_data = static_cast<const char*>(partials);
    const size_t out_bytes = out.element_size();
    torch::stable::parallel_for(
        0, groups * blocks, grain(BLOCK * std::max<int64_t>(1, count)), [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t group = task / blocks, first = task % blocks * BLOCK;
                kernel({partial_data + (group * count * stride + first) * accumulator_bytes,
                        out_data + (group * size + first) * out_bytes, count, stride,
                        std::min(BLOCK, size - first)});
            }
        });
}

}  // namespace fastdistill
