// What the kernel files share: scratch memory, loops over PyTorch's threads, types and numbers known at compile time.
#pragma once

#include <stdlib.h>

#include "simd.h"
#include "views.h"

namespace frskd {
namespace {

template <int Value>
struct Constant {
  static constexpr int kValue = Value;
};

constexpr unsigned long kCacheLine = 64;  // bytes

// Vectors of memory that begins with a cache line do not cross into the next one.
template <typename A>
struct Scratch {
  explicit Scratch(int64 count)
      : data(static_cast<A*>(aligned_alloc(kCacheLine, (sizeof(A) * count / kCacheLine + 1) * kCacheLine))) {
    if (data == nullptr) __builtin_trap();
  }
  ~Scratch() { free(data); }
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

// Steps of a loop that one thread takes at least.
inline int64 grain_for(int64 elements_per_step) {
  constexpr int64 worthwhile = 32768;  // elements below which waking a thread costs more than it saves
  const int64 grain = worthwhile / (elements_per_step > 0 ? elements_per_step : 1);
  return grain > 0 ? grain : 1;
}

inline int64 pixels_of(const Map& map) { return map.height * map.width; }

// Whether to run along the pixels of a channel; a single pixel with contiguous channels runs along the channels
// instead.
inline bool pixels_are_contiguous(const Map& map) {
  if (map.stride_c == 1 && map.channels > 1) return false;
  return (map.stride_w == 1 || map.width == 1) && (map.stride_h == map.width || map.height == 1);
}

// Calls body with a zero of the element's type and one of its accumulate type.
template <typename Body>
void with_element(Element element, const Body& body) {
  switch (element) {
    case Element::kFloat32:
      return body(float{}, float{});
    case Element::kFloat64:
      return body(double{}, double{});
    case Element::kBFloat16:
      return body(BFloat16{}, float{});
    case Element::kFloat16:
      return body(Half{}, float{});
  }
}

}  // namespace
}  // namespace frskd
