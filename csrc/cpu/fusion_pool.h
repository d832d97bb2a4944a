// Pooling of planes, where the elements along a row lie together and the windows of a row are computed in vectors.
#pragma once

#include "fusion_node.h"

namespace frskd {
namespace {

// The maxima of the columns of a window, from which the windows of a row of the output are made. In
// both steps the first largest wins, in the order of rows, or the last NaN.
template <typename T, typename A>
class PooledRow {
 public:
  using V = typename Lanes<A>::Vector;
  using M = typename Lanes<A>::Mask;
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  explicit PooledRow(const NodeRows<T, A>& node)
      : node_(node),
        end_(pools_planes(node) ? kPadding + kWindowStride * node.padded(node.call.out.width) + kWindowSide : 0),
        columns_(end_ + kWidth),
        rows_(end_ + kWidth) {}

  // Of the windows of output row y.
  template <bool Normalised>
  void load_columns(int i, const Slice& slice, int64 y) {
    const Map& map = node_.call.inputs[i].map;
    const LineNumbers<A>& numbers = node_.numbers[i];
    const int64 top = kWindowStride * y - map.height % 2;
    const T* rows[kWindowSide];
    for (int k = 0; k < kWindowSide; ++k) {
      const bool inside = top + k >= 0 && top + k < map.height;
      rows[k] = inside ? node_.gathered(map, slice, top + k, node_.kWindowPlace + k) : nullptr;
    }
    A* columns = columns_.data + kPadding;
    A* chosen_rows = rows_.data + kPadding;
    for (int64 element = 0; element < map.width; element += kWidth) {
      const int64 rest = map.width - element;
      V best = node_.template tap_value<Normalised, V>(rows[0], numbers, element, rest), chosen = {};
      for (int k = 1; k < kWindowSide; ++k) {
        const V value = node_.template tap_value<Normalised, V>(rows[k], numbers, element, rest);
        const auto larger = (value > best) | (value != value);
        best = larger ? value : best;
        chosen = larger ? V{} + static_cast<A>(k) : chosen;
      }
      store(best, columns + element);
      store(chosen, chosen_rows + element);
    }
    columns_.data[0] = rows_.data[0] = 0;
    for (int64 x = kPadding + map.width; x < end_; ++x) columns_.data[x] = rows_.data[x] = 0;
    left_ = kPadding - map.width % 2;
  }

  // The maxima of the windows x, x + 1, ...
  V values(int64 x) const {
    V best = every_other(columns_.data + left_ + kWindowStride * x);
    for (int k = 1; k < kWindowSide; ++k) {
      const V value = every_other(columns_.data + left_ + kWindowStride * x + k);
      best = (value > best) | (value != value) ? value : best;
    }
    return best;
  }

  // The same, and the places of the winners in their windows.
  V winners(int64 x, V& row, V& column) const {
    const A *columns = columns_.data + left_ + kWindowStride * x, *rows = rows_.data + left_ + kWindowStride * x;
    V best = every_other(columns);
    row = every_other(rows);
    column = V{};
    for (int k = 1; k < kWindowSide; ++k) {
      const V value = every_other(columns + k), of_value = every_other(rows + k);
      const M first_nan = (best == best) | (of_value >= row);
      const M better = (value > best) | ((value == best) & (of_value < row)) | ((value != value) & first_nan);
      best = better ? value : best;
      row = better ? of_value : row;
      column = better ? V{} + static_cast<A>(k) : column;
    }
    return best;
  }

 private:
  static constexpr int64 kPadding = 1;  // elements in front of the first column

  static bool pools_planes(const NodeRows<T, A>& node) {
    bool pools = false;
    for (int i = 0; i < node.call.count; ++i) pools = pools || node.call.inputs[i].resample == kResamplePool;
    return pools && !node.along_channels;
  }

  static inline __attribute__((always_inline)) V every_other(const A* from) {
    V result;
    for (int lane = 0; lane < kWidth; ++lane) result[lane] = from[kWindowStride * lane];
    return result;
  }

  const NodeRows<T, A>& node_;
  const int64 end_;     // of what windows read, behind the padding at the end
  Scratch<A> columns_;  // maxima
  Scratch<A> rows_;     // in which row of the window they are
  int64 left_ = 0;      // of the first window
};

}  // namespace
}  // namespace frskd
