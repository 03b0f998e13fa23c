// Included before every CUDA source: registers it for CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_runtime.h>

namespace torch::stable::accelerator {
struct NoGuard {
    explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define DeviceGuard NoGuard
#define CUDA CPU
