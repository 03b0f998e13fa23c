// CUDA C++ as plain C++: the blocks of a grid run one after the other, the
// threads of a block as fibers that give way at barriers. For tests of device
// code on machines without a GPU; see scheduler.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks take turns, so their threads share what is static
#define FASTDISTILL_DYNAMIC_SHARED(name) float4* name = static_cast<float4*>(emulation::dynamic_shared())

struct alignas(16) float4 {
    float x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

void* dynamic_shared();
void sync_block();
// Leaves a value for the other lanes of the warp, waits for theirs, and takes
// that of one of them.
void exchange(void* value, size_t bytes, unsigned lane);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

}  // namespace emulation

inline void __syncthreads() {
    emulation::sync_block();
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) std::abort();
    emulation::exchange(&value, sizeof(T), (threadIdx.x % 32) ^ unsigned(offset));
    return value;
}

using std::isfinite;
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) {
    return "";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 2;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        [&] { kernel(arguments...); });
    return cudaSuccess;
}
