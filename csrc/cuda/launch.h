// What every CUDA launcher needs: the current stream of the tensor's device, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/rows.h"

// Weak, because only a CUDA build of torch has it: the library must also load beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fastdistill::cuda {

inline void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(int32_t device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    return count;
}

// Launches `kernel` with `bytes` of dynamic shared memory, raising its limit above the default 48 KiB when it
// must.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int threads, size_t bytes, cudaStream_t stream, Args... args) {
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)),
              "x: D is too large for this GPU's shared memory");
    kernel<<<grid, threads, bytes, stream>>>(args...);
    check(cudaGetLastError(), "kernel launch");
}

// Whether rows of this tensor may be read `elements` at a time.
inline bool rows_aligned(const Tensor& t, const Rows& rows, int64_t elements) {
    const size_t bytes = std::min<size_t>(16, elements * t.element_size());
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0 && rows.channels % elements == 0 &&
           rows.batch_stride % elements == 0 && rows.token_stride % elements == 0;
}

}  // namespace fastdistill::cuda
