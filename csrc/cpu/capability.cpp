#include "simd/capability.h"

#include <cstdlib>
#include <cstring>

namespace fastdistill {
namespace {

const char* const NAMES[] = {"portable", "avx2", "avx512"};

Capability detect() {
    int best = 0;
#if defined(FASTDISTILL_X86_SIMD)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        best = 2;
#endif
    if (const char* wanted = std::getenv("FASTDISTILL_CPU_CAPABILITY")) {
        for (int i = 0; i < best; ++i)
            if (std::strcmp(wanted, NAMES[i]) == 0) return static_cast<Capability>(i);
    }
    return static_cast<Capability>(best);
}

}  // namespace

Capability capability() {
    static const Capability detected = detect();
    return detected;
}

}  // namespace fastdistill

// Read by fastdistill.info() through ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastdistill_cpu_capability() {
    return fastdistill::NAMES[static_cast<int>(fastdistill::capability())];
}
