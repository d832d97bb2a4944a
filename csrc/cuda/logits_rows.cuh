// Rows of class logits on the device: where they lie, their labels, and how their classes are loaded. A team of threads
// serves one row:
//
// * 1 thread where rows are neighbours in memory (NCHW maps, transposed matrices): threads run along the rows, and each
//   walks the classes;
// * 8 or 32 lanes where classes are neighbours, up to 512 of them: several rows in a block;
// * 256 threads for more classes: one row in a block.
#pragma once

#include "../common/logits_math.h"
#include "device.cuh"

namespace frskd::cuda {

constexpr int kMaxHeads = 8;  // per launch: the heads travel by value in the kernel's parameters
constexpr int kRowThreads = 256;
constexpr int kCountedRows = 4096;   // labels that one block counts
constexpr int kClassesInFlight = 4;  // per thread and tensor, where loads are not packed

enum class LabelKind : int { kNone, kIndices, kTwoIndices, kProbabilities };

// Logits (N, K, H, W), or class probabilities of that shape; axes that a tensor lacks have stride 0. In elements.
struct LogitsView {
  void* data;
  int64_t stride_sample;
  int64_t stride_class;
  int64_t stride_row;
  int64_t stride_column;
};

// Class indices (N, H, W).
struct LabelView {
  const int64_t* data;
  int64_t stride_sample;
  int64_t stride_row;
  int64_t stride_column;
};

struct Head {
  LogitsView student;
  LogitsView teacher;  // data is null without a teacher
  LogitsView probabilities;
  LabelView first_labels;
  LabelView second_labels;
  int64_t rows;
  int64_t first_row;  // of this head among the rows of all heads
  int64_t pixels;     // rows per sample
  int64_t width;
  int classes;
  int lanes;    // threads of a team: 1, 8, 32 or kRowThreads
  bool packed;  // the classes are read 16 bytes at a time
  unsigned first_block;
};

template <typename A>
struct LabelOptions {
  LabelKind kind;
  int64_t ignore_index;
  A first_share;   // weight of the first labels: 1, or mix
  A second_share;  // 0, or 1 - mix
  A smoothing;
  A unsmoothed;  // 1 - smoothing
};

// Position of a row in its head, in (n, y, x) order.
struct RowPosition {
  int64_t sample;
  int64_t y;
  int64_t x;
};

__device__ __forceinline__ RowPosition row_position(const Head& head, int64_t row) {
  const int64_t pixel = row % head.pixels;
  return {row / head.pixels, pixel / head.width, pixel % head.width};
}

template <typename View>
__device__ __forceinline__ int64_t row_offset(const View& view, const RowPosition& position) {
  return position.sample * view.stride_sample + position.y * view.stride_row + position.x * view.stride_column;
}

// The label distribution t of one row.
template <typename A>
struct RowLabel {
  const A* probabilities;  // of class 0, or null
  int64_t stride_class;
  A unsmoothed;  // factor of the probabilities
  int first;     // class, or -1
  int second;
  A first_weight;
  A second_weight;
  A uniform;  // share of every class
  A weight;   // of the row in a mean
  A mass;     // sum_k t_k; not known in advance for probabilities; NaN for a label that is no class
};

template <typename A>
__device__ __forceinline__ void add_label(
    RowLabel<A>& label,
    int& index,
    A& index_weight,
    int64_t target,
    A share,
    int classes,
    const LabelOptions<A>& options) {
  index = -1;
  index_weight = A(0);
  if (target == options.ignore_index) return;
  label.weight += share;
  label.mass += share;
  label.uniform += share * options.smoothing / static_cast<A>(classes);
  if (target < 0 || target >= classes) {
    // Raising an error would need a synchronisation, so the row becomes NaN. Nothing is read at such an index.
    label.mass = not_a_number<A>();
    return;
  }
  index = static_cast<int>(target);
  index_weight = share * options.unsmoothed;
}

template <typename A>
__device__ __forceinline__ RowLabel<A> row_label(
    const Head& head, const RowPosition& position, const LabelOptions<A>& options) {
  RowLabel<A> label{};
  label.first = label.second = -1;
  if (options.kind == LabelKind::kProbabilities) {
    label.probabilities = static_cast<const A*>(head.probabilities.data) + row_offset(head.probabilities, position);
    label.stride_class = head.probabilities.stride_class;
    label.unsmoothed = options.unsmoothed;
    label.uniform = options.smoothing / static_cast<A>(head.classes);
    label.weight = A(1);
  } else if (options.kind != LabelKind::kNone) {
    const int64_t first = head.first_labels.data[row_offset(head.first_labels, position)];
    add_label(label, label.first, label.first_weight, first, options.first_share, head.classes, options);
    if (options.kind == LabelKind::kTwoIndices) {
      const int64_t second = head.second_labels.data[row_offset(head.second_labels, position)];
      add_label(label, label.second, label.second_weight, second, options.second_share, head.classes, options);
    }
  }
  return label;
}

template <typename A>
__device__ __forceinline__ A label_of_class(const RowLabel<A>& label, int k) {
  if (label.probabilities != nullptr) {
    return label.unsmoothed * label.probabilities[k * label.stride_class] + label.uniform;
  }
  return label.uniform + (k == label.first ? label.first_weight : A(0)) +
         (k == label.second ? label.second_weight : A(0));
}

// The class of a thread's i-th element, kCount of them from `first` on.
template <int kCount, bool kPacked>
__device__ __forceinline__ int class_of(int first, int lane, int lanes, int i) {
  return kPacked ? first + lane * kCount + i : first + i * lanes + lane;
}

// Loads kCount classes of one row; classes past the end are -inf, which no sum notices.
template <typename T, int kCount, bool kPacked>
__device__ __forceinline__ void load_classes(
    accumulate_t<T> (&values)[kCount],
    const T* row,
    int64_t stride_class,
    int first,
    int lane,
    int lanes,
    int classes) {
  using A = accumulate_t<T>;
  if constexpr (kPacked) {
    const int k = first + lane * kCount;
    if (k < classes) {
      const Pack<T, kCount> pack = load_once<T, kCount>(row + k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = static_cast<A>(pack.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = negative_infinity<A>();
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = class_of<kCount, kPacked>(first, lane, lanes, i);
      values[i] = k < classes ? load_value(row + k * stride_class) : negative_infinity<A>();
    }
  }
}

}  // namespace frskd::cuda
