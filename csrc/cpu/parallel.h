// What the kernel files share: scratch memory, loops over PyTorch's threads, numbers known at compile time.
#pragma once

#include "simd.h"
#include "views.h"

namespace frskd {
namespace {

template <int Value>
struct Constant {
  static constexpr int kValue = Value;
};

template <typename A>
struct Scratch {
  explicit Scratch(int64 count) : data(static_cast<A*>(__builtin_malloc(sizeof(A) * (count > 0 ? count : 1)))) {
    if (data == nullptr) __builtin_trap();
  }
  ~Scratch() { __builtin_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data;
};

template <typename Body>
void parallel(ParallelFor run, int64 count, int64 grain, const Body& body) {
  run(
      count, grain, [](int64 begin, int64 end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64 pixels_of(const Map& map) { return map.height * map.width; }

}  // namespace
}  // namespace frskd
