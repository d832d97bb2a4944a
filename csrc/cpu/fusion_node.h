// What the passes over a fusion node share. They compute on lines: runs of contiguous elements of one row of a map. In
// channels_last a line is the channels of a pixel, otherwise it is the row of a channel; the per-channel numbers of a
// line are laid out beside its elements, so that one set of inner loops serves both.
#pragma once

#include "../common/fusion_math.h"
#include "fusion_call.h"
#include "parallel.h"

namespace frskd {
namespace {

// Elements of a row buffer, which stays in the second-level cache. Blocks of channels should be as wide as the map:
// reading half of every pixel's channels takes more than twice as long as reading all of them in one piece.
constexpr int64 kFusionBuffer = 8192;
constexpr int64 kLongestFlatRow = 65536;     // elements of a plane that is treated as one row
constexpr int64 kMostFusionChannels = 1024;  // channels of a block
constexpr int64 kChannelMultiple = 16;       // of a block that is not the whole map
// Partial sums over the batch; their number may not depend on the threads.
constexpr int64 kSampleGroups = 32;
constexpr int64 kPlaneSampleGroups = 8;  // where each channel of a group costs a preparation
constexpr int64 kConvolvedPixels = 256;  // of a group, at least, in front of a depthwise convolution
// Lines of a power of two of bytes would all fall into the same few sets of the first-level cache.
constexpr int64 kLineGap = 64;  // bytes, between lines that a depthwise convolution reads
constexpr int kWindowTaps = 9;  // of a pooling window
constexpr int kWindowSide = 3;  // the same, along an axis
constexpr int kWindowStride = 2;
// Elements added in float before they join the total in double; no more rows of a plane are computed in one go.
constexpr int64 kRowsBeforeDouble = 32;

template <typename V>
inline __attribute__((always_inline)) V sigmoid(V value) {
  const V one = V{} + 1;
  const V highest = V{} + (sizeof(value[0]) == 4 ? 87 : 708);  // beyond it the exponential leaves the type's range
  const V negative = -value > highest ? highest : -value;
  const V gate = one / (one + exponential(negative));
  return -value > highest ? V{} : gate;
}

// relu and no activation share their code: below `threshold`, 0 or NaN (with which nothing compares), a value is
// replaced by it and its slope is 0.
template <bool Silu, typename V>
inline __attribute__((always_inline)) V activated(V value, V threshold) {
  if constexpr (Silu) return value * sigmoid(value);
  return value < threshold ? threshold : value;
}

// grad * d activated(value) / d value
template <bool Silu, typename V>
inline __attribute__((always_inline)) V times_slope(V grad, V value, V threshold) {
  if constexpr (Silu) {
    const V one = V{} + 1;
    const V gate = sigmoid(value);
    return grad * (gate * (one + value * (one - gate)));
  }
  return value <= threshold ? V{} : grad;
}

template <typename A>
inline typename Lanes<A>::Vector threshold_of(int activation) {
  return Lanes<A>::splat(activation == kActivationRelu ? A(0) : static_cast<A>(__builtin_nan("")));
}

// What the elements of a line are normalised with: y = (x - mean) * scale + beta, and for the gradient
// dx = scale * (dy - mean_dy - (x - mean) * mean_dot).
template <typename A>
struct LineNumbers {
  A* mean;
  A* scale;
  A* beta;
  A* mean_dy;
  A* mean_dot;  // inverse deviation times the mean of dy * xhat
};

// Lines of one row of one map.
template <typename T>
struct Lines {
  T* data;
  const int64* offsets;  // of each line; null: 0
  int64 stride;          // of a line number in `offsets`' place: line k starts at offsets[k] * stride
  T* line(int64 k) const { return data + (offsets == nullptr ? k : offsets[k]) * stride; }
};

template <typename T>
inline __attribute__((always_inline)) auto load_some(const T* pointer, int64 rest, int64 width)
    -> decltype(load(pointer)) {
  return rest >= width ? load(pointer) : load_first(pointer, rest);
}

// The bound is an argument: as an expression of members the compiler takes it anew for every element.
template <typename A>
inline void clear(A* place, int64 count) {
  for (int64 k = 0; k < count; ++k) place[k] = 0;
}

inline bool channels_are_contiguous(const Map& map) { return map.stride_c == 1 || map.channels == 1; }

// How a node is cut: units of work are groups of samples times blocks of channels.
struct FusionPlan {
  bool along_channels;  // a line is the channels of a pixel
  bool convolved;       // a depthwise convolution reads the fused rows
  int64 strip;          // rows of the output that are computed in one go
  int64 block_channels;
  int64 groups, blocks;
  int64 units() const { return groups * blocks; }
};

inline bool has_contiguous_rows(const Fusion& call) {
  bool contiguous = call.out.stride_w == 1;
  for (int i = 0; i < call.count; ++i) {
    const FusionInput& input = call.inputs[i];
    contiguous =
        contiguous && input.map.stride_w == 1 && (input.gradient.data == nullptr || input.gradient.stride_w == 1);
  }
  return contiguous;
}

inline FusionPlan plan_fusion(const Fusion& call, bool with_gradients, bool convolved) {
  FusionPlan plan;
  plan.convolved = convolved;
  plan.along_channels = channels_are_contiguous(call.out) && call.out.channels > 1;
  int64 widest = call.out.width;
  for (int i = 0; i < call.count; ++i) {
    const FusionInput& input = call.inputs[i];
    plan.along_channels = plan.along_channels && channels_are_contiguous(input.map);
    if (with_gradients && input.gradient.data != nullptr) {
      plan.along_channels = plan.along_channels && channels_are_contiguous(input.gradient);
    }
    widest = input.map.width > widest ? input.map.width : widest;
  }
  int64 channels = kFusionBuffer / (widest > 0 ? widest : 1) / kChannelMultiple * kChannelMultiple;
  channels = channels < kChannelMultiple ? kChannelMultiple : channels;
  channels = channels > kMostFusionChannels ? kMostFusionChannels : channels;
  plan.block_channels = channels < call.out.channels ? channels : call.out.channels;
  const int64 most = plan.along_channels ? kSampleGroups : kPlaneSampleGroups;
  plan.groups = call.batch < most ? call.batch : most;
  if (convolved) {
    // A group has sums of nine weights to begin and to end with, which small maps would not be worth.
    const int64 samples = (kConvolvedPixels + pixels_of(call.out) - 1) / pixels_of(call.out);
    const int64 groups = (call.batch + samples - 1) / samples;
    plan.groups = groups < plan.groups ? groups : plan.groups;
  }
  plan.blocks = (call.out.channels + plan.block_channels - 1) / plan.block_channels;
  plan.strip = 1;
  if (!plan.along_channels && has_contiguous_rows(call)) {
    plan.strip = kFusionBuffer / (call.out.width > 0 ? call.out.width : 1);
    plan.strip = plan.strip < 1 ? 1 : plan.strip > kRowsBeforeDouble ? kRowsBeforeDouble : plan.strip;
  }
  return plan;
}

// Channels of the samples of a group. One is computed after the other: along channels the whole block, else one
// channel.
struct ChannelRun {
  int64 first_sample, last_sample;
  int64 first_channel, channels;
};

// body(run) for each run of channels of a unit.
template <typename Body>
void for_each_run(const Fusion& call, const FusionPlan& plan, int64 unit, const Body& body) {
  const int64 group = unit / plan.blocks, block = unit % plan.blocks;
  const int64 first = block * plan.block_channels, rest = call.out.channels - first;
  const int64 channels = rest < plan.block_channels ? rest : plan.block_channels;
  const int64 step = plan.along_channels ? channels : 1;
  for (int64 channel = 0; channel < channels; channel += step) {
    body(ChannelRun{call.batch * group / plan.groups, call.batch * (group + 1) / plan.groups, first + channel, step});
  }
}

// What a row is computed for: one sample of a run of channels.
struct Slice {
  int64 sample, first_channel, channels;
};

template <typename T>
T* row_start(const Map& map, const Slice& slice, int64 y) {
  return static_cast<T*>(map.data) + slice.sample * map.stride_n + slice.first_channel * map.stride_c +
         y * map.stride_h;
}

// A row of a map whose elements along a line are contiguous, as lines.
template <typename T>
Lines<T> row_of(const Map& map, const Slice& slice, int64 y, const int64* offsets = nullptr) {
  return {row_start<T>(map, slice, y), offsets, map.stride_w};
}

// Rows of a plane, whose elements are contiguous, as lines.
template <typename T>
Lines<T> rows_of(const Map& map, const Slice& slice, int64 y) {
  return {row_start<T>(map, slice, y), nullptr, map.stride_h};
}

template <typename A>
FusionWeights<A> weights_of(const Fusion& call) {
  return normalise_fusion_weights(
      static_cast<const A*>(call.weight), call.count, call.weighting, static_cast<A>(call.epsilon), [](A x) {
        if constexpr (sizeof(A) == 4) return __builtin_expf(x);
        return static_cast<A>(__builtin_exp(x));
      });
}

// What one thread knows of a node: the shape of its rows, and the numbers beside the lines of the run at hand.
template <typename T, typename A>
class NodeRows {
 public:
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  const Fusion& call;
  const FusionWeights<A>& weights;
  const bool along_channels;
  const int64 strip;  // rows of the output that are computed in one go
  LineNumbers<A> numbers[kMostFusionInputs];
  int64* source[kMostFusionInputs];  // the input column that an output column reads

  NodeRows(const Fusion& call, const FusionPlan& plan, const FusionWeights<A>& weights)
      : call(call),
        weights(weights),
        along_channels(plan.along_channels),
        strip(plan.strip),
        gap_(plan.convolved ? kLineGap / static_cast<int64>(sizeof(A)) : 0),
        longest_line_(padded(plan.along_channels ? plan.block_channels : widest_of(call))),
        longest_row_(
            plan.along_channels ? widest_of(call) * (padded(plan.block_channels) + gap_) : padded(widest_of(call))),
        of_channels_(kNumbersOfAChannel * longest_line_ * call.count),
        copies_((kWindowPlace + kWindowSide) * longest_line_),
        columns_(call.out.width * call.count) {
    A* next = of_channels_.data;
    const auto take = [&next, this] {
      A* taken = next;
      next += longest_line_;
      return taken;
    };
    for (int i = 0; i < call.count; ++i) {
      numbers[i] = {take(), take(), take(), take(), take()};
      source[i] = columns_.data + i * call.out.width;
      const FusionInput& input = call.inputs[i];
      for (int64 x = 0; x < call.out.width; ++x) {
        source[i][x] = input.resample == kResampleUp ? nearest_source(
                                                           static_cast<int>(x), static_cast<int>(input.map.width),
                                                           static_cast<int>(call.out.width))
                                                     : x;
      }
    }
  }

  static int64 padded(int64 count) { return (count + kWidth - 1) / kWidth * kWidth; }
  int64 longest_line() const { return longest_line_; }  // elements, padded
  int64 longest_row() const { return longest_row_; }    // elements of a row buffer, lines padded

  // The lines of a row (along channels) or of `rows` rows, the elements of each, and those from one line of a buffer to
  // the next.
  int64 lines_of(const Map& map, int64 rows = 1) const { return along_channels ? map.width : rows; }
  int64 line_elements(const Map& map, const Slice& slice) const { return along_channels ? slice.channels : map.width; }
  int64 pitch_of(const Map& map, const Slice& slice) const { return padded(line_elements(map, slice)) + gap_; }
  int64 row_elements(const Map& map, const Slice& slice) const { return lines_of(map) * pitch_of(map, slice); }

  // Lays the numbers of the run's channels beside the elements of the lines of every normalised input: one each along
  // channels, the same all along a row.
  void prepare(const ChannelRun& run) {
    for (int i = 0; i < call.count; ++i) {
      const FusionInput& input = call.inputs[i];
      if (input.statistics == nullptr) continue;
      const int64 repeat = along_channels ? 1 : input.map.width;
      const A* mean = static_cast<const A*>(input.statistics);
      const A* inverse = mean + input.map.channels;
      const A* gamma = static_cast<const A*>(input.gamma);
      const A* beta = static_cast<const A*>(input.beta);
      const A* given = static_cast<const A*>(input.sums);
      const double elements = static_cast<double>(call.batch * pixels_of(input.map));
      const LineNumbers<A>& into = numbers[i];
      const int64 size = padded(run.channels * repeat);
      for (int64 k = 0; k < size; ++k) {
        const int64 within = repeat > 1 || run.channels == 1 ? 0 : (k < run.channels ? k : run.channels - 1);
        const int64 channel = run.first_channel + within;
        into.mean[k] = mean[channel];
        into.scale[k] = inverse[channel] * gamma[channel];
        into.beta[k] = beta[channel];
        into.mean_dy[k] = given == nullptr ? A(0) : static_cast<A>(given[channel] / elements);
        into.mean_dot[k] =
            given == nullptr ? A(0) : static_cast<A>(given[input.map.channels + channel] / elements * inverse[channel]);
      }
    }
  }

  // A row of one channel. Elements that are not contiguous are copied first; `place` keeps copies apart.
  const T* gathered(const Map& map, const Slice& slice, int64 y, int place) const {
    const T* start = row_start<const T>(map, slice, y);
    if (map.stride_w == 1) return start;
    T* copy = copies_.data + place * longest_line_;
    for (int64 x = 0; x < map.width; ++x) copy[x] = start[x * map.stride_w];
    return copy;
  }
  static constexpr int kUpstreamPlace = kMostFusionInputs;    // of the upstream gradient; inputs have their position
  static constexpr int kWindowPlace = kMostFusionInputs + 1;  // of the rows of a pooling window

  // Row y of input i, or the rows from it on where those of a plane are computed in one go.
  Lines<const T> input_rows(int i, const Slice& slice, int64 y, const int64* offsets) const {
    const Map& map = call.inputs[i].map;
    if (along_channels) return row_of<const T>(map, slice, y, offsets);
    return {gathered(map, slice, y, i), nullptr, map.stride_h};
  }

  // body(Normalised, Silu) with what input i needs, as compile-time constants.
  template <typename Body>
  void with_input(int i, const Body& body) const {
    const auto with_activation = [&](auto normalised) {
      if (call.pre == kActivationSilu) {
        body(normalised, Constant<1>{});
      } else {
        body(normalised, Constant<0>{});
      }
    };
    if (call.inputs[i].statistics != nullptr) {
      with_activation(Constant<1>{});
    } else {
      with_activation(Constant<0>{});
    }
  }

  // The nine elements that output (y, x) is the maximum of; null in the padding.
  static void window(const Map& map, const T* base, int64 y, int64 x, const T* taps[kWindowTaps]) {
    const int64 top = kWindowStride * y - map.height % 2, left = kWindowStride * x - map.width % 2;
    for (int t = 0; t < kWindowTaps; ++t) {
      const int64 row = top + t / kWindowSide, column = left + t % kWindowSide;
      const bool inside = row >= 0 && row < map.height && column >= 0 && column < map.width;
      taps[t] = inside ? base + row * map.stride_h + column * map.stride_w : nullptr;
    }
  }

  // The element of a pooling window, normalised; `tap` is null in the padding.
  template <bool Normalised, typename V>
  static inline __attribute__((always_inline)) V
  tap_value(const T* tap, const LineNumbers<A>& k, int64 element, int64 rest) {
    if (tap == nullptr) return V{};
    const V x = load_some(tap + element, rest, kWidth);
    if constexpr (!Normalised) return x;
    return (x - load(k.mean + element)) * load(k.scale + element) + load(k.beta + element);
  }

 private:
  static constexpr int64 kNumbersOfAChannel = 5;
  static int64 widest_of(const Fusion& call) {
    int64 widest = call.out.width;
    for (int i = 0; i < call.count; ++i) widest = call.inputs[i].map.width > widest ? call.inputs[i].map.width : widest;
    return widest;
  }

  const int64 gap_;  // elements
  const int64 longest_line_, longest_row_;
  Scratch<A> of_channels_;
  Scratch<T> copies_;
  Scratch<int64> columns_;
};

inline bool is_one_row(const Map& map) {
  return map.data == nullptr || map.height == 1 || (map.stride_w == 1 && map.stride_h == map.width);
}

// The same node with every plane as a single row, where nothing is resampled and planes lie in one piece.
inline Fusion flattened(const Fusion& call) {
  Fusion flat = call;
  bool possible = call.out.stride_c != 1 && is_one_row(call.out) && pixels_of(call.out) <= kLongestFlatRow;
  for (int i = 0; i < call.count; ++i) {
    const FusionInput& input = call.inputs[i];
    possible = possible && input.resample == kResampleNone && is_one_row(input.map) && is_one_row(input.gradient);
  }
  if (!possible) return flat;
  const auto flatten = [](Map& map) {
    if (map.height > 1) map.stride_w = 1;
    map.width *= map.height;
    map.height = 1;
  };
  flatten(flat.out);
  for (int i = 0; i < call.count; ++i) {
    flatten(flat.inputs[i].map);
    flatten(flat.inputs[i].gradient);
  }
  return flat;
}

}  // namespace
}  // namespace frskd
