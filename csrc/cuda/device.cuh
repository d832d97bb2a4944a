// Building blocks of the kernels: number types, wide loads and stores, sums over warps and blocks.
// Every sum has a fixed order, so a result has the same bits on every run. Shuffles name all 32 lanes; a kernel must
// reach them with every thread of the block.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace frskd::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Half types and float accumulate in float, double in double.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of one 16-byte access.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float power(float base, float exponent) { return powf(base, exponent); }
__device__ __forceinline__ double power(double base, double exponent) { return pow(base, exponent); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

template <typename A>
__device__ __forceinline__ A negative_infinity() {
  return -static_cast<A>(INFINITY);
}

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(NAN);
}

// kCount consecutive elements, loaded and stored by one instruction of 8 or 16 bytes.
template <typename T, int kCount>
struct Pack {
  T values[kCount];
};

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Reads data that this kernel does not read again: evicted first, so that maps and coefficients stay in the cache.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_once(const T* pointer) {
  using W = typename Word<static_cast<int>(sizeof(T)) * kCount>::type;
  const W word = __ldcs(reinterpret_cast<const W*>(pointer));
  Pack<T, kCount> pack;
  std::memcpy(&pack, &word, sizeof(W));
  return pack;
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_cached(const T* pointer) {
  using W = typename Word<static_cast<int>(sizeof(T)) * kCount>::type;
  const W word = __ldg(reinterpret_cast<const W*>(pointer));
  Pack<T, kCount> pack;
  std::memcpy(&pack, &word, sizeof(W));
  return pack;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* pointer, const Pack<T, kCount>& pack) {
  using W = typename Word<static_cast<int>(sizeof(T)) * kCount>::type;
  W word;
  std::memcpy(&word, &pack, sizeof(W));
  *reinterpret_cast<W*>(pointer) = word;
}

template <typename T>
__device__ __forceinline__ accumulate_t<T> load_value(const T* pointer) {
  return static_cast<accumulate_t<T>>(*pointer);
}

// Sum over the lanes of a warp whose numbers agree modulo `step`, for powers of two step <= width <= 32; every lane of
// them gets it.
template <typename A>
__device__ __forceinline__ A lane_sum(A value, int step, int width) {
  for (int offset = width / 2; offset >= step; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Sums each of `values` over the block; every thread gets the same bits. `scratch` holds kCount * kThreads / 32 values
// and may be used again afterwards.
template <int kThreads, int kCount, typename A>
__device__ __forceinline__ void block_sum(A (&values)[kCount], A* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A sum = lane_sum(values[i], 1, kWarpSize);
    if (lane == 0) scratch[i * kWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    A total = A(0);
    for (int w = 0; w < kWarps; ++w) total += scratch[i * kWarps + w];
    values[i] = total;
  }
  __syncthreads();
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ uint4 frskd_dynamic_shared_memory[];
  return reinterpret_cast<unsigned char*>(frskd_dynamic_shared_memory);
}

}  // namespace frskd::cuda
