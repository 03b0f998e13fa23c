// What every CUDA launcher needs: the current stream of the tensor's device, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>

#include "../common/rows.h"
#include "device.cuh"

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
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

// Calls run(T{}) with the device type of x.
template <class Run>
void with_type(const Tensor& x, Run&& run) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return run(float{});
        case ScalarType::BFloat16:
            return run(__nv_bfloat16{});
        case ScalarType::Half:
            return run(__half{});
        default:
            STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
    }
}

// Calls run(T{}, M{}) with the device types of x and of its modulation.
template <class Run>
void with_types(const Tensor& x, const Tensor& modulation, Run&& run) {
    const ScalarType type = x.scalar_type();
    const bool is_wide = modulation.scalar_type() == ScalarType::Float;
    if (type == ScalarType::Float) return run(float{}, float{});
    if (type == ScalarType::BFloat16 && is_wide) return run(__nv_bfloat16{}, float{});
    if (type == ScalarType::BFloat16) return run(__nv_bfloat16{}, __nv_bfloat16{});
    if (type == ScalarType::Half && is_wide) return run(__half{}, float{});
    if (type == ScalarType::Half) return run(__half{}, __half{});
    STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
}

// Calls run(constant) with the three values of ModulationGrad as types.
template <class Run>
void with_modulation(ModulationGrad modulation, Run&& run) {
    switch (modulation) {
        case ModulationGrad::none:
            return run(std::integral_constant<ModulationGrad, ModulationGrad::none>{});
        case ModulationGrad::summed:
            return run(std::integral_constant<ModulationGrad, ModulationGrad::summed>{});
        case ModulationGrad::per_token:
            return run(std::integral_constant<ModulationGrad, ModulationGrad::per_token>{});
    }
}

// Chunks of a batch element's tokens that are summed apart, for so many blocks on every multiprocessor. The
// same on every call, so the sums are too.
inline int64_t chunks_of(const Rows& rows, int32_t device, int64_t blocks = 2) {
    STD_TORCH_CHECK(rows.batch <= 65535, "x: expected a batch of at most 65535");
    const int64_t wanted = blocks * multiprocessors(device) / std::max<int64_t>(1, rows.batch);
    return std::max<int64_t>(1, std::min((rows.tokens + 3) / 4, wanted));
}

// Adds up the partial sums of several modulations, floats of shape (B, chunks, outs, D), in the order of the
// chunks: over the chunks of a batch element, or of all where the modulation is shared by the batch.
template <class M>
void sum_over_tokens(const float* partials, int64_t chunks, const Rows& rows, const Rows& modulation,
                     std::initializer_list<const Tensor*> outs, cudaStream_t stream) {
    const int64_t D = rows.channels, groups = modulation.batch;
    if (groups * D == 0) return;
    const dim3 columns((D + THREADS - 1) / THREADS, groups);
    for (const Tensor* out : outs) {
        launch(column_sum<M>, columns, THREADS, 0, stream, partials, static_cast<M*>(out->mutable_data_ptr()),
               rows.batch * chunks / groups, static_cast<int64_t>(outs.size()) * D, D);
        partials += D;
    }
}

// Whether rows of this tensor may be read `elements` at a time.
inline bool rows_aligned(const Tensor& t, const Rows& rows, int64_t elements) {
    const size_t bytes = std::min<size_t>(16, elements * t.element_size());
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0 && rows.channels % elements == 0 &&
           rows.batch_stride % elements == 0 && rows.token_stride % elements == 0;
}

}  // namespace fastdistill::cuda
