// A node with a depthwise 3x3 convolution behind it, between maps in channels_last: rows of the fused map are convolved
// while they are in the cache, and backward makes the sums of a row of the fused map's gradient as it makes the row.
// The fused map itself is never written.
#pragma once

#include "fused_convolution_call.h"
#include "fusion_backward.h"
#include "fusion_forward.h"

namespace frskd {
namespace {

constexpr int64 kTaps = 9;      // of the convolution
constexpr int64 kRingRows = 3;  // which a row of its result is read from

// For each vector of channels one vector of each of the nine weights, or of what is added up for them.
template <typename A>
struct DepthwiseTable {
  static constexpr int64 kWidth = Lanes<A>::kWidth;
  static int64 place(int64 channel, int64 tap) {
    return channel / kWidth * kWidth * kTaps + tap * kWidth + channel % kWidth;
  }
  static int64 size(int64 channels) { return (channels + kWidth - 1) / kWidth * kWidth * kTaps; }

  // `turned` by 180 degrees for the gradient of the convolved map.
  DepthwiseTable(const void* weight, int64 channels, bool turned) : table(size(channels)) {
    const A* given = static_cast<const A*>(weight);
    for (int64 k = 0; k < size(channels); ++k) table.data[k] = 0;
    for (int64 channel = 0; channel < channels; ++channel) {
      A* to = table.data + place(channel, 0);
      for (int64 t = 0; t < kTaps; ++t) to[t * kWidth] = given[channel * kTaps + (turned ? kTaps - 1 - t : t)];
    }
  }
  Scratch<A> table;
};

// Three rows of the map that is convolved, in buffers.
template <typename T, typename A>
class ConvolvedRows {
 public:
  explicit ConvolvedRows(const NodeRows<T, A>& node)
      : node_(node), row_size_(node.longest_row()), ring_((kRingRows + 1) * row_size_) {}

  // Points at the weights of the run, whose first channel is a multiple of the vectors' width, and clears the row of
  // zeros.
  void begin(const DepthwiseTable<A>& weights, const ChannelRun& run) {
    weights_ = weights.table.data + run.first_channel * kTaps;
    for (int64 k = 0; k < row_size_; ++k) ring_.data[kRingRows * row_size_ + k] = 0;
  }

  // Rows beyond the map are zeros, by which an infinite weight is multiplied, too.
  A* row(int64 y) const {
    const bool inside = y >= 0 && y < node_.call.out.height;
    return ring_.data + (inside ? y % kRingRows : kRingRows) * row_size_;
  }

  // A row of the convolution, read from rows y - 1 to y + 1 of the ring, into `results`; a line is `line` elements
  // long. Along the row the weights stay in registers, and each element of the ring is loaded once.
  template <typename R>
  void convolve(const Slice& slice, int64 y, R* results, int64 line) const {
    using V = typename Lanes<A>::Vector;
    constexpr int64 kWidth = Lanes<A>::kWidth;
    const int64 channels = slice.channels, width = node_.call.out.width;
    const int64 pitch = node_.pitch_of(node_.call.out, slice);
    for (int64 element = 0; element < channels; element += kWidth) {
      const A* taps = weights_ + element * kTaps;
      const V w0 = load(taps), w1 = load(taps + kWidth), w2 = load(taps + 2 * kWidth), w3 = load(taps + 3 * kWidth),
              w4 = load(taps + 4 * kWidth), w5 = load(taps + 5 * kWidth), w6 = load(taps + 6 * kWidth),
              w7 = load(taps + 7 * kWidth), w8 = load(taps + 8 * kWidth);
      const A *above = row(y - 1) + element, *here = row(y) + element, *below = row(y + 1) + element;
      const auto walk = [=](const auto& write) __attribute__((always_inline)) {
        // A column adds to three results: the one before it, its own and the next.
        V before = {}, own = {};
        for (int64 x = 0; x < width; ++x) {
          const V a = load(above + x * pitch), b = load(here + x * pitch), c = load(below + x * pitch);
          const V done = w2 * a + (w5 * b + (w8 * c + before));
          before = w1 * a + (w4 * b + (w7 * c + own));
          own = w0 * a + (w3 * b + w6 * c);
          if (x > 0) write(done, results + (x - 1) * line + element);
        }
        write(before, results + (width - 1) * line + element);
      };
      if (element + kWidth <= channels) {
        walk([](V value, R* to) __attribute__((always_inline)) { store(value, to); });
      } else {
        walk([=](V value, R* to) __attribute__((always_inline)) { store_first(value, to, channels - element); });
      }
    }
  }

 private:
  const NodeRows<T, A>& node_;
  const int64 row_size_;
  Scratch<A> ring_;  // row y in place y % 3, and a row of zeros
  const A* weights_ = nullptr;
};

template <typename T, typename A>
void convolve_forward(const Fusion& call, const FusedConvolution& convolution, ParallelFor run) {
  if (call.batch == 0) return;
  const FusionPlan plan = plan_fusion(call, false, true);
  const FusionWeights<A> weights = weights_of<A>(call);
  const DepthwiseTable<A> depthwise(convolution.weight, call.out.channels, false);
  parallel(run, plan.units(), 1, [&](int64 begin, int64 end) {
    NodeRows<T, A> node(call, plan, weights);
    FusedRows<T, A> fused(node);
    ConvolvedRows<T, A> convolved(node);
    for (int64 unit = begin; unit < end; ++unit) {
      for_each_run(call, plan, unit, [&](const ChannelRun& channels) {
        node.prepare(channels);
        convolved.begin(depthwise, channels);
        for (int64 sample = channels.first_sample; sample < channels.last_sample; ++sample) {
          const Slice slice{sample, channels.first_channel, channels.channels};
          for (int64 y = 0; y <= call.out.height; ++y) {
            if (y < call.out.height) fused.fuse(slice, y, 1, convolved.row(y), false);
            if (y == 0) continue;
            const Lines<T> out = row_of<T>(call.out, slice, y - 1);
            convolved.convolve(slice, y - 1, out.data, out.stride);
          }
        }
      });
    }
  });
}

// dL / ds of a node whose map is convolved: rows made from the gradient of the convolution, and on the way the gradient
// of its weights.
template <typename T, typename A>
class ConvolutionGradientRows {
 public:
  ConvolutionGradientRows(
      const NodeRows<T, A>& node,
      const FusedConvolution& convolution,
      const DepthwiseTable<A>& turned,
      const FusionPlan& plan,
      double* parts)
      : node_(node),
        convolution_(convolution),
        turned_(turned),
        plan_(plan),
        parts_(parts),
        fused_(node),
        gradients_(node),
        sums_(node.longest_row()),
        map_gradient_(node.longest_row()),
        weight_sums_(kTaps * node.longest_line()) {}

  void begin(int64 unit, const ChannelRun& run) {
    gradients_.begin(turned_, run);
    const int64 group = unit / plan_.blocks, size = turned_.size(node_.call.out.channels);
    totals_ = parts_ + group * size + run.first_channel * kTaps;
    for (int64 k = 0; k < node_.padded(run.channels) * kTaps; ++k) totals_[k] = weight_sums_.data[k] = 0;
  }

  Lines<const A> rows(const Slice& slice, int64 y, int64) {
    const int64 height = node_.call.out.height;
    if (y == 0) load_gradient(slice, 0);
    if (y + 1 < height) load_gradient(slice, y + 1);
    const Lines<const A> result = convolve(slice, y);
    fused_.fuse(slice, y, 1, sums_.data, false);
    add_weight_gradient(slice, y);
    pending_ += node_.call.out.width;
    if (pending_ >= kRowsBeforeDouble) settle(slice.channels);
    return result;
  }

  void end_of_map(const Slice& slice) { settle(slice.channels); }

 private:
  using V = typename Lanes<A>::Vector;
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  const NodeRows<T, A>& node_;
  const FusedConvolution& convolution_;
  const DepthwiseTable<A>& turned_;
  const FusionPlan& plan_;
  double* parts_;  // (groups, a table)
  FusedRows<T, A> fused_;
  ConvolvedRows<T, A> gradients_;  // of the convolution
  Scratch<A> sums_;                // a row of the fused map
  Scratch<A> map_gradient_;        // a row of its gradient, where that is written in half precision
  Scratch<A> weight_sums_;         // of the weights' gradient, laid out as they are
  double* totals_ = nullptr;       // the same
  int64 pending_ = 0;              // elements in weight_sums_

  // Brings row y of the convolution's upstream gradient into the ring.
  void load_gradient(const Slice& slice, int64 y) {
    const int64 channels = slice.channels, pitch = node_.pitch_of(node_.call.out, slice);
    const Lines<const T> given = row_of<const T>(node_.call.out, slice, y);
    A* row = gradients_.row(y);
    for (int64 x = 0; x < node_.call.out.width; ++x) {
      const T* from = given.line(x);
      A* to = row + x * pitch;
      int64 k = 0;
      for (; k + kWidth <= channels; k += kWidth) store(load(from + k), to + k);
      if (k < channels) store(load_first(from + k, channels - k), to + k);
    }
  }

  // Row y of the fused map's gradient, which is written and given in the accumulate type.
  Lines<const A> convolve(const Slice& slice, int64 y) {
    const Lines<T> written = row_of<T>(convolution_.map_gradient, slice, y);
    if constexpr (sizeof(T) == sizeof(A)) {
      gradients_.convolve(slice, y, written.data, written.stride);
      return {written.data, nullptr, written.stride};
    } else {
      const int64 channels = slice.channels, pitch = node_.pitch_of(node_.call.out, slice);
      gradients_.convolve(slice, y, map_gradient_.data, pitch);
      for (int64 x = 0; x < node_.call.out.width; ++x) {
        const A* from = map_gradient_.data + x * pitch;
        T* to = written.line(x);
        int64 k = 0;
        for (; k + kWidth <= channels; k += kWidth) store(load(from + k), to + k);
        if (k < channels) store_first(load(from + k), to + k, channels - k);
      }
      return {map_gradient_.data, nullptr, pitch};
    }
  }

  // Weight (j, k) has met element (y, x) of the fused map in result (y + 1 - j, x + 1 - k).
  void add_weight_gradient(const Slice& slice, int64 y) {
    const int64 pitch = node_.pitch_of(node_.call.out, slice), width = node_.call.out.width;
    for (int64 element = 0; element < slice.channels; element += kWidth) {
      A* places = weight_sums_.data + element * kTaps;
      V t0 = load(places), t1 = load(places + kWidth), t2 = load(places + 2 * kWidth), t3 = load(places + 3 * kWidth),
        t4 = load(places + 4 * kWidth), t5 = load(places + 5 * kWidth), t6 = load(places + 6 * kWidth),
        t7 = load(places + 7 * kWidth), t8 = load(places + 8 * kWidth);
      const A *above = gradients_.row(y - 1) + element, *here = gradients_.row(y) + element,
              *below = gradients_.row(y + 1) + element, *fused = sums_.data + element;
      V left = {}, middle = load(fused);
      for (int64 x = 0; x < width; ++x) {
        const V right = x + 1 < width ? load(fused + (x + 1) * pitch) : V{};
        const V a = load(above + x * pitch), b = load(here + x * pitch), c = load(below + x * pitch);
        t0 += c * left;
        t1 += c * middle;
        t2 += c * right;
        t3 += b * left;
        t4 += b * middle;
        t5 += b * right;
        t6 += a * left;
        t7 += a * middle;
        t8 += a * right;
        left = middle;
        middle = right;
      }
      const V totals[kTaps] = {t0, t1, t2, t3, t4, t5, t6, t7, t8};
      for (int t = 0; t < kTaps; ++t) store(totals[t], places + t * kWidth);
    }
  }

  void settle(int64 channels) {
    if (pending_ == 0) return;
    pending_ = 0;
    for (int64 k = 0; k < node_.padded(channels) * kTaps; ++k) {
      totals_[k] += weight_sums_.data[k];
      weight_sums_.data[k] = 0;
    }
  }
};

template <typename T, typename A>
void convolve_backward(const Fusion& call, const FusedConvolution& convolution, ParallelFor run) {
  const int64 channels = call.out.channels;
  const FusionPlan plan = plan_fusion(call, true, true);
  const DepthwiseTable<A> turned(convolution.weight, channels, true);
  const int64 size = turned.size(channels);
  Scratch<double> parts(plan.groups * size);
  walk_backward<T, A>(call, plan, run, [&](const NodeRows<T, A>& node) {
    return ConvolutionGradientRows<T, A>(node, convolution, turned, plan, parts.data);
  });
  A* out = static_cast<A*>(convolution.weight_gradient);
  for (int64 group = 1; group < plan.groups; ++group) {
    for (int64 k = 0; k < size; ++k) parts.data[k] += parts.data[group * size + k];
  }
  for (int64 channel = 0; channel < channels; ++channel) {
    for (int64 t = 0; t < kTaps; ++t) {
      const double total = plan.groups == 0 ? 0 : parts.data[turned.place(channel, t)];
      out[channel * kTaps + t] = static_cast<A>(total);
    }
  }
}

}  // namespace
}  // namespace frskd
