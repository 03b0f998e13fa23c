// Files in this folder are compiled once per instruction set, each time into the namespace
// FASTDISTILL_CAPABILITY, and the host code picks one at run time. They include nothing of the C++ library or
// of torch: an inline function compiled for AVX-512 must never be the copy that the linker keeps for
// everybody.
#pragma once

#include <cstdint>

#if defined(FASTDISTILL_X86_SIMD)
#define FASTDISTILL_FOR_EACH_CAPABILITY(DO) DO(portable) DO(avx2) DO(avx512)
#define FASTDISTILL_BEST(function)                                                                      \
    (::fastdistill::capability() == ::fastdistill::Capability::avx512 ? ::fastdistill::avx512::function \
     : ::fastdistill::capability() == ::fastdistill::Capability::avx2 ? ::fastdistill::avx2::function   \
                                                                      : ::fastdistill::portable::function)
#else
#define FASTDISTILL_FOR_EACH_CAPABILITY(DO) DO(portable)
#define FASTDISTILL_BEST(function) ::fastdistill::portable::function
#endif

namespace fastdistill {

enum class Capability { portable, avx2, avx512 };

// The widest instruction set of this machine, or the narrower one named by FASTDISTILL_CPU_CAPABILITY.
Capability capability();

enum class Scalar { float32, float64, bfloat16, float16 };

}  // namespace fastdistill
