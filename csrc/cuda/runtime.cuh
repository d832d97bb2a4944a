// The host side of every kernel: device and stream, launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../operations/checks.h"

namespace frskd::cuda {

constexpr int64_t kMaxBlocks = 2147483647;  // of a one-dimensional grid

inline int64_t ceil_divide(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

// Makes the tensors' device current for the launches of one operation.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : device_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device_, &handle_));
  }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

 private:
  int32_t device_;
  CUDAGuardHandle handle_ = nullptr;
};

template <typename Parameters>
void launch(
    void (*kernel)(Parameters),
    int64_t blocks,
    int threads,
    int64_t shared_bytes,  // dynamic shared memory of a block
    cudaStream_t stream,
    const std::remove_const_t<Parameters>& parameters) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(
      blocks <= kMaxBlocks, "the tensors need a grid of ", blocks, " blocks, but CUDA allows ", kMaxBlocks,
      "; split the batch.");
  // A block has 48 KB without asking for more, static shared memory (below 1 KB where a kernel has both) included.
  constexpr int64_t kFreeBytes = 47 * 1024;
  if (shared_bytes > kFreeBytes) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  configuration.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&configuration, kernel, parameters));
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls function(Tag<T>{}) with the C++ type of `dtype`, which is checked.
template <typename Function>
void dispatch_floating(ScalarType dtype, Function&& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(Tag<double>{});
    case ScalarType::Float:
      return function(Tag<float>{});
    case ScalarType::Half:
      return function(Tag<torch::headeronly::Half>{});
    default:
      return function(Tag<torch::headeronly::BFloat16>{});
  }
}

}  // namespace frskd::cuda
