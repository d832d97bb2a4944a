// Plain descriptions of tensors, passed from the entry points (which check them) to the kernels (which trust them).
#pragma once

#include <cstdint>

namespace frskd {

enum class Element { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A feature map or class logits: (N, C, H, W) with strides in elements; missing trailing axes have size 1.
struct Map {
  void* data;
  std::int64_t channels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t stride_n;
  std::int64_t stride_c;
  std::int64_t stride_h;
  std::int64_t stride_w;
};

// Runs body(begin, end) over [0, count) on the threads PyTorch was told to use.
using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t count, std::int64_t grain, ParallelBody body, void* context);

}  // namespace frskd
