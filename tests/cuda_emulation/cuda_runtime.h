// Stands in for CUDA's header when the tests compile csrc/cuda with a plain C++ compiler. Every CUDA thread is a fiber;
// they meet at barriers and shuffles as on a device, and the blocks run one after the other (emulation.cpp). What a
// device would let pass is an error here: a barrier or shuffle that some thread does not reach, or a misaligned wide
// access.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

extern dim3 thread_index, block_index;

void barrier(int line);
void exchange(unsigned mask, void* value, size_t bytes, int lane_offset, int line);
void check_alignment(const void* pointer, size_t bytes);
void run_grid(const cudaLaunchConfig_t& configuration, const void* kernel, const std::function<void()>& thread);

template <typename T>
T shuffle_xor(unsigned mask, T value, int lane_offset, int line) {
  exchange(mask, &value, sizeof(T), lane_offset, line);
  return value;
}

template <typename T>
T load(const T* pointer) {
  check_alignment(pointer, sizeof(T));
  return *pointer;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define __syncthreads() emulation::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lane_offset) emulation::shuffle_xor(mask, value, lane_offset, __LINE__)
#define __ldg(pointer) emulation::load(pointer)
#define __ldcs(pointer) emulation::load(pointer)

inline int min(int a, int b) { return a < b ? a : b; }

cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulation::run_grid(*configuration, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
  return cudaSuccess;
}
