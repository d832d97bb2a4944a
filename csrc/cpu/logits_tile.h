// A tile of classes of one row, as accumulate type.
#pragma once

#include "logits_plan.h"

namespace frskd {
namespace {

constexpr int64 kClassTile =
    1024;  // classes held as accumulate type at once; five such buffers stay in the first-level cache

// `count` classes of one row as accumulate type: the tensor itself where it already is, else a copy in `buffer`.
template <typename T, typename A>
inline const A* class_tile(const T* row, int64 stride, int64 first, int64 count, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (stride == 1) return row + first;
  }
  if (stride == 1) {
    constexpr int64 width = Lanes<A>::kWidth;
    int64 k = 0;
    for (; k + width <= count; k += width) store(load(row + first + k), buffer + k);
    for (; k < count; ++k) buffer[k] = to_scalar(row[first + k]);
  } else {
    for (int64 k = 0; k < count; ++k) buffer[k] = to_scalar(row[(first + k) * stride]);
  }
  return buffer;
}

// Vector `k` of a tile; lanes past the end repeat `fill`.
template <typename A>
inline __attribute__((always_inline)) typename Lanes<A>::Vector lanes_at(const A* tile, int64 k, int64 count, A fill) {
  using L = Lanes<A>;
  if (k + L::kWidth <= count) return load(tile + k);
  const auto part = load_first(tile + k, count - k);
  return L::first(count - k) ? part : L::splat(fill);
}

}  // namespace
}  // namespace frskd
