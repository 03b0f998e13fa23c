#include "host.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdistill {

bool streams(const Tensor& out) {
    // Half of the last-level cache that a core of today's servers reaches; what the system reports for it is
    // unreliable in virtual machines. Measured for modulate at 4608 x 3072 float32, forward and
    // backward: 12.0 ms without, 10.3 with. The half lines that 16-bit results fill at a time gain nothing.
    constexpr int64_t LARGE = 16 << 20, LINE = 64;
    const int64_t element = out.element_size();
    return element >= 4 && out.numel() * element >= LARGE && out.size(-1) * element % LINE == 0 &&
           reinterpret_cast<uintptr_t>(out.const_data_ptr()) % LINE == 0;
}

void use_huge_pages([[maybe_unused]] Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Above 32 MiB glibc always maps anew. Measured with its defaults for modulate at 4608 x 3072 float32,
    // forward and backward: 46 ms without, 16 with. It is advice: a kernel without huge pages ignores it.
    constexpr uintptr_t ALWAYS_MAPPED = 32 << 20, PAGE = 2 << 20;
    const uintptr_t bytes = result.numel() * result.element_size();
    if (bytes < ALWAYS_MAPPED) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, end = (begin + bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void sum_over_tokens(const Tensor& partials, int64_t chunks, const Rows& rows, const Rows& modulation,
                     std::initializer_list<const Tensor*> outs) {
    constexpr int64_t BLOCK = 512;
    const int64_t D = rows.channels, stride = outs.size() * D, blocks = (D + BLOCK - 1) / BLOCK;
    const int64_t groups = modulation.batch, count = rows.batch * chunks / std::max<int64_t>(1, groups);
    const size_t bytes = partials.element_size();
    const char* data = static_cast<const char*>(partials.const_data_ptr());
    for (const Tensor* out : outs) {
        const ColumnSumKernel kernel = FASTDISTILL_BEST(column_sum_kernel)(scalar_of(*out, "modulation"));
        char* out_data = static_cast<char*>(out->mutable_data_ptr());
        const size_t out_bytes = out->element_size();
        torch::stable::parallel_for(
            0, groups * blocks, grain(BLOCK * std::max<int64_t>(1, count)), [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) {
                    const int64_t group = task / blocks, first = task % blocks * BLOCK;
                    kernel({data + (group * count * stride + first) * bytes,
                            out_data + (group * D + first) * out_bytes, count, stride,
                            std::min(BLOCK, D - first)});
                }
            });
        data += D * bytes;
    }
}

}  // namespace fastdistill
