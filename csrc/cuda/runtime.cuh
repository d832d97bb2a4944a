// The host side of every kernel: checks, device and stream, launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace frskd::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Calls function(Tag<T>{}) with the C++ type of `dtype`.
template <typename Function>
void dispatch_floating(ScalarType dtype, const char* name, Function&& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(Tag<double>{});
    case ScalarType::Float:
      return function(Tag<float>{});
    case ScalarType::Half:
      return function(Tag<torch::headeronly::Half>{});
    case ScalarType::BFloat16:
      return function(Tag<torch::headeronly::BFloat16>{});
    default:
      STD_TORCH_CHECK(
          false, name, " has dtype ", torch::headeronly::toString(dtype),
          ", but float32, bfloat16, float16 or float64 was wanted.");
  }
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + ")";
}

inline std::string name_of(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline void check_device(const Tensor& tensor, const std::string& name, const Tensor& first) {
  STD_TORCH_CHECK(tensor.defined(), name, " is an undefined tensor, but a CUDA tensor was wanted.");
  STD_TORCH_CHECK(tensor.is_cuda(), name, " is not on a CUDA device, but the CUDA kernels need it there.");
  STD_TORCH_CHECK(
      tensor.get_device_index() == first.get_device_index(), name, " is on CUDA device ", tensor.get_device_index(),
      ", but device ", first.get_device_index(), ", that of the first tensor, was wanted.");
}

inline void check_dtype(const Tensor& tensor, const std::string& name, ScalarType wanted) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == wanted, name, " has dtype ", torch::headeronly::toString(dtype), ", but ",
      torch::headeronly::toString(wanted), " was wanted.");
}

// Outputs, and inputs that the kernels index without strides.
inline void check_contiguous(
    const Tensor& tensor, const std::string& name, const Tensor& first, ScalarType dtype, std::vector<int64_t> shape) {
  check_device(tensor, name, first);
  check_dtype(tensor, name, dtype);
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    same = same && tensor.size(static_cast<int64_t>(axis)) == shape[axis];
    wanted += (axis ? ", " : "") + std::to_string(shape[axis]);
  }
  STD_TORCH_CHECK(same, name, " has shape ", shape_of(tensor), ", but ", wanted, ") was wanted.");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous, but a contiguous tensor was wanted.");
}

inline void check_same_shape(
    const Tensor& tensor, const std::string& name, const Tensor& like, const std::string& like_name) {
  bool same = tensor.dim() == like.dim();
  for (int64_t axis = 0; same && axis < like.dim(); ++axis) same = tensor.size(axis) == like.size(axis);
  STD_TORCH_CHECK(
      same, name, " has shape ", shape_of(tensor), ", but ", shape_of(like), ", that of ", like_name, ", was wanted.");
}

inline void check_count(size_t count, const char* name, size_t wanted) {
  STD_TORCH_CHECK(count == wanted, name, " has ", count, " tensors, but ", wanted, " were wanted.");
}

}  // namespace frskd::cuda
