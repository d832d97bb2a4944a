// Weighted fusion on the CPU. Both layouts compute on lines: runs of contiguous elements of one row of the map. In
// channels_last a line is the channels of a pixel, otherwise it is the row of a channel; the per-channel numbers of a
// line are laid out beside its elements, so that one set of inner loops serves both. A depthwise convolution behind the
// fused map reads its rows while they are in the cache, and its backward makes the sums of a row of the fused map's
// gradient as it makes the row; the fused map itself is never written.
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
// Partial sums over the batch; their number may not depend on the threads.
constexpr int64 kSampleGroups = 32;
constexpr int64 kPlaneSampleGroups = 8;  // where each channel of a group costs a preparation
constexpr int64 kRowsBeforeDouble = 32;  // elements added in float before they join the total in double
constexpr int64 kConvolvedPixels = 256;  // of a group, at least, in front of a depthwise convolution
constexpr int64 kTaps = 9;               // of a depthwise 3x3 convolution
// Lines of a power of two of bytes would all fall into the same few sets of the first-level cache.
constexpr int64 kLineGap = 64;  // bytes

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

template <typename Body>
inline void with_activation(int activation, const Body& body) {
  if (activation == kActivationSilu) {
    body(Constant<1>{});
  } else {
    body(Constant<0>{});
  }
}

// What the elements of a line are normalised with: y = (x - mean) * scale + beta, and for the gradient
// dx = scale * (dy - mean_dy - (x - mean) * mean_dot).
template <typename A>
struct Coefficients {
  A* mean;
  A* scale;
  A* beta;
  A* mean_dy;
  A* mean_dot;  // inverse deviation times the mean of dy * xhat
};

// Lines of one row of one input.
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

// sums += weight * pre(normalise(x)) over `lines` lines of `count` elements; a line of sums is `padded` elements long.
// The First input starts the sums, the Last one writes them to `out` instead (by `out_threshold`: activated or as they
// are).
template <bool Normalised, bool Silu, bool First, bool Last, typename T, typename A>
void add_lines(
    const Lines<const T>& input,
    const Lines<T>& out,
    int64 lines,
    int64 count,
    int64 padded,
    const Coefficients<A>& coefficients,
    A weight,
    typename Lanes<A>::Vector threshold,
    typename Lanes<A>::Vector out_threshold,
    A* sums) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const V w = L::splat(weight);
  // Copies: a store might change what is behind a reference.
  const A *mean = coefficients.mean, *scale = coefficients.scale, *beta = coefficients.beta;
  const auto sum = [=](V x, int64 element, const A* place) __attribute__((always_inline)) {
    if constexpr (Normalised) x = (x - load(mean + element)) * load(scale + element) + load(beta + element);
    V total = w * activated<Silu>(x, threshold);
    if constexpr (!First) total += load(place);
    if constexpr (Last) total = activated<false>(total, out_threshold);
    return total;
  };
  const int64 whole = count - count % L::kWidth;
  for (int64 k = 0; k < lines; ++k) {
    const T* x = input.line(k);
    A* place = sums + k * padded;
    T* to = Last ? out.line(k) : nullptr;
    for (int64 element = 0; element < whole; element += L::kWidth) {
      const V total = sum(load(x + element), element, place + element);
      if constexpr (Last) {
        store(total, to + element);
      } else {
        store(total, place + element);
      }
    }
    if (whole < count) {
      const V total = sum(load_first(x + whole, count - whole), whole, place + whole);
      if constexpr (Last) {
        store_first(total, to + whole, count - whole);
      } else {
        store(total, place + whole);
      }
    }
  }
}

enum class FusionPass { kGradient, kSums, kWeightOnly };

// One row of gradients of one input. `upstream` holds dL / ds summed over the outputs that read the element, or dL / dy
// itself (Direct, after pooling).
template <bool Normalised, FusionPass Pass, bool Silu, bool Direct, typename T, typename A>
void gradient_lines(
    const Lines<const T>& input,
    const Lines<const A>& upstream,
    const Lines<T>& gradient,
    int64 lines,
    int64 count,
    const Coefficients<A>& coefficients,
    A weight,
    typename Lanes<A>::Vector threshold,
    A* sum_dy,   // per element of a line
    A* sum_dot,  // of dy * (x - mean)
    typename Lanes<A>::Vector& derivative) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const V w = L::splat(weight);
  const int64 whole = count - count % L::kWidth;
  // Copies: a store might change what is behind a reference.
  const A *mean = coefficients.mean, *scale_of = coefficients.scale, *beta = coefficients.beta;
  const A *mean_dy = coefficients.mean_dy, *mean_dot = coefficients.mean_dot;
  V total = {};
  const auto step = [=, &total](V x, V grad, int64 element, V& result) __attribute__((always_inline)) {
    V centred = x, y = x, scale = {};
    if constexpr (Normalised) {
      scale = load(scale_of + element);
      centred = x - load(mean + element);
      y = centred * scale + load(beta + element);
    }
    V dy = grad;
    if constexpr (!Direct) {
      total += grad * activated<Silu>(y, threshold);
      dy = w * times_slope<Silu>(grad, y, threshold);
    }
    if constexpr (Pass == FusionPass::kSums) {
      store(load(sum_dy + element) + dy, sum_dy + element);
      store(load(sum_dot + element) + dy * centred, sum_dot + element);
    } else if constexpr (Pass == FusionPass::kGradient) {
      if constexpr (Normalised) {
        result = scale * ((dy - load(mean_dy + element)) - centred * load(mean_dot + element));
      } else {
        result = dy;
      }
    }
  };
  for (int64 k = 0; k < lines; ++k) {
    const T* x = input.line(k);
    const A* grad = upstream.line(k);
    T* out = Pass == FusionPass::kGradient ? gradient.line(k) : nullptr;
    for (int64 element = 0; element < whole; element += L::kWidth) {
      V result = {};
      step(load(x + element), load(grad + element), element, result);
      if constexpr (Pass == FusionPass::kGradient) store(result, out + element);
    }
    if (whole < count) {
      V result = {};
      step(load_first(x + whole, count - whole), load_first(grad + whole, count - whole), whole, result);
      if constexpr (Pass == FusionPass::kGradient) store_first(result, out + whole, count - whole);
    }
  }
  derivative += total;
}

// Which elements one call computes: a group of samples and a block of channels.
struct FusionBlock {
  int64 first_sample, last_sample;
  int64 first_channel, channels;
};

// The walk over a map: `lines` lines of `count` elements make a row.
struct FusionPlan {
  bool along_channels;
  int64 block_channels;
  int64 groups, blocks;
};

inline bool channels_are_contiguous(const Map& map) { return map.stride_c == 1 || map.channels == 1; }

inline FusionPlan plan_fusion(const Fusion& call, bool with_gradients) {
  FusionPlan plan;
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
  int64 channels = kFusionBuffer / (widest > 0 ? widest : 1) / 16 * 16;
  channels = channels < 16 ? 16 : channels > kMostFusionChannels ? kMostFusionChannels : channels;
  plan.block_channels = channels < call.out.channels ? channels : call.out.channels;
  const int64 most = plan.along_channels ? kSampleGroups : kPlaneSampleGroups;
  plan.groups = call.batch < most ? call.batch : most;
  if (call.depthwise != nullptr) {
    // A group has sums of nine weights to begin and to end with, which small maps would not be worth.
    const int64 samples = (kConvolvedPixels + pixels_of(call.out) - 1) / pixels_of(call.out);
    const int64 groups = (call.batch + samples - 1) / samples;
    plan.groups = groups < plan.groups ? groups : plan.groups;
  }
  plan.blocks = (call.out.channels + plan.block_channels - 1) / plan.block_channels;
  return plan;
}

inline FusionBlock block_of(const Fusion& call, const FusionPlan& plan, int64 unit) {
  const int64 group = unit / plan.blocks, block = unit % plan.blocks;
  FusionBlock result;
  result.first_sample = call.batch * group / plan.groups;
  result.last_sample = call.batch * (group + 1) / plan.groups;
  result.first_channel = block * plan.block_channels;
  const int64 rest = call.out.channels - result.first_channel;
  result.channels = rest < plan.block_channels ? rest : plan.block_channels;
  return result;
}

// Buffers and per-channel numbers of one thread.
template <typename T, typename A>
struct FusionWorker {
  static constexpr int64 kWidth = Lanes<A>::kWidth;
  static constexpr int64 kDouble = static_cast<int64>(sizeof(double) / sizeof(A));
  const Fusion& call;
  const bool along_channels;
  const FusionWeights<A>& weights;
  int64 longest_row = 0;   // elements of the longest row buffer, lines padded
  int64 longest_line = 0;  // elements of the longest line, padded
  int64 table_size = 0;
  Scratch<A> numbers;
  Scratch<T> copies;
  Scratch<int64> tables;
  Coefficients<A> coefficients[kMostFusionInputs];
  A* sums;                         // (a row) the fused sum, or dL / ds
  A* values;                       // (a row) of an input that is to be up-sampled
  A* upstream[kMostFusionInputs];  // up: (a row of the input); pool: four rows of it
  A* sum_dy[kMostFusionInputs];    // (a line)
  A* sum_dot[kMostFusionInputs];
  int64* source[kMostFusionInputs];  // the input column that an output column reads
  // Of a depthwise convolution.
  A* ring;                   // three rows that it reads, row y in place y % 3, and a row of zeros
  A* map_gradient;           // (a row) of the fused map
  const A* depthwise;        // its weights: DepthwiseTable
  A* depthwise_sums;         // of its weights' gradient, laid out as they are
  double* depthwise_totals;  // the same
  int64 pending_depthwise = 0;
  int64 pending[kMostFusionInputs] = {};  // elements in sum_dy and sum_dot
  double* totals[kMostFusionInputs];      // (2, channels of the block): sum of dy, of dy * (x - mean)
  double derivative[kMostFusionInputs] = {};

  static int64 padded(int64 count) { return (count + kWidth - 1) / kWidth * kWidth; }
  static int64 gap(const Fusion& call) {
    return call.depthwise == nullptr ? 0 : kLineGap / static_cast<int64>(sizeof(A));
  }
  // From one line of a row buffer to the next.
  int64 pitch_of(int64 count) const { return padded(count) + gap(call); }
  static int64 row_elements(const Fusion& call, const FusionPlan& plan, int64 width) {
    return plan.along_channels ? width * (padded(plan.block_channels) + gap(call)) : padded(width);
  }
  static int64 line_elements(const FusionPlan& plan, int64 widest) {
    return padded(plan.along_channels ? plan.block_channels : widest);
  }
  static int64 widest_of(const Fusion& call) {
    int64 widest = call.out.width;
    for (int i = 0; i < call.count; ++i) widest = call.inputs[i].map.width > widest ? call.inputs[i].map.width : widest;
    return widest;
  }

  FusionWorker(const Fusion& call, const FusionPlan& plan, const FusionWeights<A>& weights)
      : call(call),
        along_channels(plan.along_channels),
        weights(weights),
        longest_row(row_elements(call, plan, widest_of(call))),
        longest_line(line_elements(plan, widest_of(call))),
        table_size(call.out.width),
        numbers(
            longest_row * (2 + 4 * kMostFusionInputs) + longest_line * 7 * kMostFusionInputs +
            2 * kMostFusionInputs * longest_line * kDouble +
            (call.depthwise == nullptr ? 0 : 5 * longest_row + longest_line * kTaps) + 16),
        copies(longest_line * 8),
        tables(table_size * kMostFusionInputs) {
    A* next = numbers.data;
    const auto take = [&next](int64 count) {
      A* taken = next;
      next += count;
      return taken;
    };
    for (int i = 0; i < kMostFusionInputs; ++i) {
      totals[i] = reinterpret_cast<double*>(take(2 * longest_line * kDouble));
    }
    if (call.depthwise != nullptr) {
      ring = take(4 * longest_row);
      map_gradient = take(longest_row);
      depthwise_sums = take(kTaps * longest_line);
    }
    sums = take(longest_row);
    values = take(longest_row);
    for (int i = 0; i < kMostFusionInputs; ++i) {
      upstream[i] = take(4 * longest_row);
      coefficients[i] = {
          take(longest_line), take(longest_line), take(longest_line), take(longest_line), take(longest_line)};
      sum_dy[i] = take(longest_line);
      sum_dot[i] = take(longest_line);
      source[i] = tables.data + i * table_size;
      if (i >= call.count) continue;
      const FusionInput& input = call.inputs[i];
      for (int64 x = 0; x < call.out.width; ++x) {
        source[i][x] = input.resample == kResampleUp ? nearest_source(
                                                           static_cast<int>(x), static_cast<int>(input.map.width),
                                                           static_cast<int>(call.out.width))
                                                     : x;
      }
    }
  }

  // Lays the per-channel numbers of channels [first, first + count) beside the elements of a line: one each along
  // channels, `repeat` times the same along a row.
  void prepare(int i, int64 first, int64 count, int64 repeat) {
    const FusionInput& input = call.inputs[i];
    if (input.statistics == nullptr) return;
    const A* mean = static_cast<const A*>(input.statistics);
    const A* inverse = mean + input.map.channels;
    const A* gamma = static_cast<const A*>(input.gamma);
    const A* beta = static_cast<const A*>(input.beta);
    const A* given = static_cast<const A*>(input.sums);
    const double elements = static_cast<double>(call.batch * pixels_of(input.map));
    const Coefficients<A>& into = coefficients[i];
    const int64 size = padded(count * repeat);
    for (int64 k = 0; k < size; ++k) {
      const int64 channel = first + (repeat > 1 || count == 1 ? 0 : (k < count ? k : count - 1));
      into.mean[k] = mean[channel];
      into.scale[k] = inverse[channel] * gamma[channel];
      into.beta[k] = beta[channel];
      into.mean_dy[k] = given == nullptr ? A(0) : static_cast<A>(given[channel] / elements);
      into.mean_dot[k] =
          given == nullptr ? A(0) : static_cast<A>(given[input.map.channels + channel] / elements * inverse[channel]);
    }
  }

  // A row of the map for channel block or channel `first_channel`, as lines. A row whose elements are not contiguous is
  // copied to `copy` first.
  template <typename Pointer>
  Lines<Pointer> row_of(const Map& map, int64 sample, int64 first_channel, int64 y, const int64* offsets) {
    Pointer* start =
        static_cast<Pointer*>(map.data) + sample * map.stride_n + first_channel * map.stride_c + y * map.stride_h;
    return {start, offsets, map.stride_w};
  }

  const T* gathered(const Map& map, int64 sample, int64 channel, int64 y, int place) {
    const T* start =
        static_cast<const T*>(map.data) + sample * map.stride_n + channel * map.stride_c + y * map.stride_h;
    if (map.stride_w == 1) return start;
    T* copy = copies.data + place * longest_line;
    for (int64 x = 0; x < map.width; ++x) copy[x] = start[x * map.stride_w];
    return copy;
  }

  template <typename Body>
  void with_input(int i, const Body& body) {
    with_activation(call.pre, [&](auto pre) {
      if (call.inputs[i].statistics != nullptr) {
        body(Constant<1>{}, pre);
      } else {
        body(Constant<0>{}, pre);
      }
    });
  }

  // The element of a pooling window, normalised; `tap` is null in the padding.
  template <bool Normalised, typename V>
  inline __attribute__((always_inline)) V tap_value(const T* tap, const Coefficients<A>& k, int64 element, int64 rest) {
    if (tap == nullptr) return V{};
    const V x = load_some(tap + element, rest, kWidth);
    if constexpr (!Normalised) return x;
    return (x - load(k.mean + element)) * load(k.scale + element) + load(k.beta + element);
  }

  // The nine elements that output (y, x) is the maximum of; null in the padding.
  void window(const Map& map, const T* base, int64 y, int64 x, const T* taps[9]) {
    const int64 top = 2 * y - map.height % 2, left = 2 * x - map.width % 2;
    for (int t = 0; t < 9; ++t) {
      const int64 row = top + t / 3, column = left + t % 3;
      const bool inside = row >= 0 && row < map.height && column >= 0 && column < map.width;
      taps[t] = inside ? base + row * map.stride_h + column * map.stride_w : nullptr;
    }
  }

  // sums = sum_i w_i * pre(v_i) for one row of the output; a line is the channel block, or the row of one channel.
  // With `write` the row is also activated and written to the output.
  void fuse_row(int64 sample, int64 first_channel, int64 channels, int64 y, bool write) {
    const int64 lines = along_channels ? call.out.width : 1;
    const int64 count = along_channels ? channels : call.out.width;
    const int64 pitch = pitch_of(count);
    const auto starts_sums = [&](int i) {
      return i == 0 &&
             (call.inputs[i].resample == kResampleNone || (call.inputs[i].resample == kResampleUp && along_channels));
    };
    if (!starts_sums(0)) {
      for (int64 k = 0; k < lines * pitch; ++k) sums[k] = 0;
    }
    bool written = false;
    for (int i = 0; i < call.count; ++i) {
      const FusionInput& input = call.inputs[i];
      const A weight = weights.normalised[i];
      with_input(i, [&](auto normalised, auto pre) {
        constexpr bool Normalised = decltype(normalised)::kValue != 0;
        constexpr bool Silu = decltype(pre)::kValue != 0;
        if (input.resample == kResamplePool) {
          pool_row<Normalised, Silu>(i, sample, first_channel, channels, y);
          return;
        }
        const bool up = input.resample == kResampleUp;
        const int64 row =
            up ? nearest_source(
                     static_cast<int>(y), static_cast<int>(input.map.height), static_cast<int>(call.out.height))
               : y;
        const Lines<const T> given =
            along_channels ? row_of<const T>(input.map, sample, first_channel, row, source[i])
                           : Lines<const T>{gathered(input.map, sample, first_channel, row, i), nullptr, 0};
        const auto threshold = threshold_of<A>(call.pre), out_threshold = threshold_of<A>(call.act);
        if (up && !along_channels) {
          const int64 width = input.map.width;
          add_lines<Normalised, Silu, true, false>(
              given, Lines<T>{}, 1, width, padded(width), coefficients[i], weight, threshold, out_threshold, values);
          for (int64 x = 0; x < call.out.width; ++x) sums[x] += values[source[i][x]];
          return;
        }
        const bool last =
            write && i == call.count - 1 && call.act != kActivationSilu && (along_channels || call.out.stride_w == 1);
        const Lines<T> out = last ? row_of<T>(call.out, sample, first_channel, y, nullptr) : Lines<T>{};
        const auto add = [&](auto first, auto is_last) {
          add_lines<Normalised, Silu, decltype(first)::kValue != 0, decltype(is_last)::kValue != 0>(
              given, out, lines, count, pitch, coefficients[i], weight, threshold, out_threshold, sums);
        };
        written = last;
        if (starts_sums(i)) {
          last ? add(Constant<1>{}, Constant<1>{}) : add(Constant<1>{}, Constant<0>{});
        } else {
          last ? add(Constant<0>{}, Constant<1>{}) : add(Constant<0>{}, Constant<0>{});
        }
      });
    }
    if (write && !written) write_row(sample, first_channel, channels, y);
  }

  template <bool Normalised, bool Silu>
  void pool_row(int i, int64 sample, int64 first_channel, int64 channels, int64 y) {
    using V = typename Lanes<A>::Vector;
    const Map& map = call.inputs[i].map;
    const A weight = weights.normalised[i];
    const V threshold = threshold_of<A>(call.pre);
    const T* base = static_cast<const T*>(map.data) + sample * map.stride_n + first_channel * map.stride_c;
    const int64 pitch = pitch_of(channels);
    for (int64 x = 0; x < call.out.width; ++x) {
      const T* taps[9];
      window(map, base, y, x, taps);
      if (!along_channels) {
        A best = 0;
        for (int t = 0; t < 9; ++t) {
          const A value = scalar_tap<Normalised>(taps[t], coefficients[i]);
          if (t == 0 || value > best || value != value) best = value;
        }
        sums[x] += (weight * activated<Silu>(V{best}, threshold))[0];
        continue;
      }
      for (int64 element = 0; element < channels; element += kWidth) {
        const int64 rest = channels - element;
        V best = tap_value<Normalised, V>(taps[0], coefficients[i], element, rest);
        for (int t = 1; t < 9; ++t) {
          const V value = tap_value<Normalised, V>(taps[t], coefficients[i], element, rest);
          best = (value > best) | (value != value) ? value : best;
        }
        A* place = sums + x * pitch + element;
        store(load(place) + Lanes<A>::splat(weight) * activated<Silu>(best, threshold), place);
      }
    }
  }

  template <bool Normalised>
  A scalar_tap(const T* tap, const Coefficients<A>& k) {
    if (tap == nullptr) return A(0);
    const A x = to_scalar(*tap);
    return Normalised ? (x - k.mean[0]) * k.scale[0] + k.beta[0] : x;
  }

  void write_row(int64 sample, int64 first_channel, int64 channels, int64 y) {
    const int64 lines = along_channels ? call.out.width : 1;
    const int64 count = along_channels ? channels : call.out.width;
    const int64 pitch = pitch_of(count);
    T* start = static_cast<T*>(call.out.data) + sample * call.out.stride_n + first_channel * call.out.stride_c +
               y * call.out.stride_h;
    const auto threshold = threshold_of<A>(call.act);
    with_activation(call.act, [&](auto act) {
      constexpr bool Silu = decltype(act)::kValue != 0;
      for (int64 k = 0; k < lines; ++k) {
        const A* from = sums + k * pitch;
        T* to = start + (along_channels ? k * call.out.stride_w : 0);
        if (!along_channels && call.out.stride_w != 1) {
          for (int64 x = 0; x < count; ++x) {
            from_scalar(activated<Silu>(typename Lanes<A>::Vector{from[x]}, threshold)[0], to + x * call.out.stride_w);
          }
          continue;
        }
        int64 element = 0;
        for (; element + kWidth <= count; element += kWidth)
          store(activated<Silu>(load(from + element), threshold), to + element);
        if (element < count)
          store_first(activated<Silu>(load(from + element), threshold), to + element, count - element);
      }
    });
  }

  // Row y of the ring; rows beyond the map are zeros, by which an infinite weight is multiplied, too.
  A* ring_row(int64 y) const { return ring + (y < 0 || y >= call.out.height ? 3 : y % 3) * longest_row; }

  // Points at the depthwise weights of the block, whose first channel is a multiple of the vectors' width, and clears
  // what is added to and the row of zeros.
  void prepare_depthwise(const A* table, double* gradients, int64 first, int64 count) {
    depthwise = table + first * kTaps;
    depthwise_totals = gradients == nullptr ? nullptr : gradients + first * kTaps;
    for (int64 k = 0; k < padded(count) * kTaps; ++k) {
      depthwise_sums[k] = 0;
      if (gradients != nullptr) depthwise_totals[k] = 0;
    }
    for (int64 k = 0; k < longest_row; ++k) ring[3 * longest_row + k] = 0;
  }

  // A row of the convolution, read from rows y - 1 to y + 1 of the ring, into `results`; a line is `line` elements
  // long. Along the row the weights stay in registers, and each element of the ring is loaded once.
  template <typename R>
  void convolve_row(int64 y, int64 channels, R* results, int64 line) {
    using V = typename Lanes<A>::Vector;
    const int64 pitch = pitch_of(channels), width = call.out.width;
    for (int64 element = 0; element < channels; element += kWidth) {
      const A* taps = depthwise + element * kTaps;
      const V w0 = load(taps), w1 = load(taps + kWidth), w2 = load(taps + 2 * kWidth), w3 = load(taps + 3 * kWidth),
              w4 = load(taps + 4 * kWidth), w5 = load(taps + 5 * kWidth), w6 = load(taps + 6 * kWidth),
              w7 = load(taps + 7 * kWidth), w8 = load(taps + 8 * kWidth);
      const A *above = ring_row(y - 1) + element, *here = ring_row(y) + element, *below = ring_row(y + 1) + element;
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

  // All rows of the convolved map of one sample and channel block.
  void forward_depthwise(int64 sample, int64 first_channel, int64 channels) {
    for (int64 y = 0; y <= call.out.height; ++y) {
      if (y < call.out.height) {
        sums = ring_row(y);
        fuse_row(sample, first_channel, channels, y, false);
      }
      if (y == 0) continue;
      const Lines<T> out = row_of<T>(call.out, sample, first_channel, y - 1, nullptr);
      convolve_row(y - 1, channels, out.data, out.stride);
    }
  }

  // Brings row y of the convolution's upstream gradient into the ring.
  void load_gradient_row(int64 sample, int64 first_channel, int64 channels, int64 y) {
    const Lines<const T> given = row_of<const T>(call.out, sample, first_channel, y, nullptr);
    const int64 pitch = pitch_of(channels);
    A* row = ring_row(y);
    for (int64 x = 0; x < call.out.width; ++x) {
      const T* from = given.line(x);
      A* to = row + x * pitch;
      int64 k = 0;
      for (; k + kWidth <= channels; k += kWidth) store(load(from + k), to + k);
      if (k < channels) store(load_first(from + k, channels - k), to + k);
    }
  }

  // dL / ds for one row of the fused map, written and returned, from three rows of the gradient of its convolution; and
  // that row's share of the gradient of the convolution's weights.
  Lines<const A> convolution_gradient(int64 sample, int64 first_channel, int64 channels, int64 y) {
    using V = typename Lanes<A>::Vector;
    const int64 pitch = pitch_of(channels);
    if (y == 0) load_gradient_row(sample, first_channel, channels, 0);
    if (y + 1 < call.out.height) load_gradient_row(sample, first_channel, channels, y + 1);
    const Lines<T> written = row_of<T>(call.map_gradient, sample, first_channel, y, nullptr);
    Lines<const A> result{map_gradient, nullptr, pitch};
    if constexpr (sizeof(T) == sizeof(A)) {
      convolve_row(y, channels, written.data, written.stride);
      result = {written.data, nullptr, written.stride};
    } else {
      convolve_row(y, channels, map_gradient, pitch);
      for (int64 x = 0; x < call.out.width; ++x) {
        const A* from = map_gradient + x * pitch;
        T* to = written.line(x);
        int64 k = 0;
        for (; k + kWidth <= channels; k += kWidth) store(load(from + k), to + k);
        if (k < channels) store_first(load(from + k), to + k, channels - k);
      }
    }
    fuse_row(sample, first_channel, channels, y, false);
    // Weight (j, k) has met element (y, x) of the map in result (y + 1 - j, x + 1 - k).
    for (int64 element = 0; element < channels; element += kWidth) {
      A* places = depthwise_sums + element * kTaps;
      V t0 = load(places), t1 = load(places + kWidth), t2 = load(places + 2 * kWidth), t3 = load(places + 3 * kWidth),
        t4 = load(places + 4 * kWidth), t5 = load(places + 5 * kWidth), t6 = load(places + 6 * kWidth),
        t7 = load(places + 7 * kWidth), t8 = load(places + 8 * kWidth);
      const A *above = ring_row(y - 1) + element, *here = ring_row(y) + element, *below = ring_row(y + 1) + element,
              *fused = sums + element;
      V left = {}, middle = load(fused);
      for (int64 x = 0; x < call.out.width; ++x) {
        const V right = x + 1 < call.out.width ? load(fused + (x + 1) * pitch) : V{};
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
    pending_depthwise += call.out.width;
    if (pending_depthwise >= kRowsBeforeDouble) settle_depthwise(channels);
    return result;
  }

  void settle_depthwise(int64 channels) {
    if (pending_depthwise == 0) return;
    pending_depthwise = 0;
    for (int64 k = 0; k < padded(channels) * kTaps; ++k) {
      depthwise_totals[k] += depthwise_sums[k];
      depthwise_sums[k] = 0;
    }
  }

  // dL / ds for one row of the output: the upstream gradient times the slope of the last activation. Where that is the
  // upstream gradient itself, in the accumulate type, the lines are its own.
  Lines<const A> upstream_row(int64 sample, int64 first_channel, int64 channels, int64 y) {
    const int64 lines = along_channels ? call.out.width : 1;
    const int64 count = along_channels ? channels : call.out.width;
    const int64 pitch = pitch_of(count);
    if (call.act != kActivationNone) fuse_row(sample, first_channel, channels, y, false);
    const T* start = static_cast<const T*>(call.out.data) + sample * call.out.stride_n +
                     first_channel * call.out.stride_c + y * call.out.stride_h;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (call.act == kActivationNone && (along_channels || call.out.stride_w == 1)) {
        return {start, nullptr, call.out.stride_w};
      }
    }
    const auto threshold = threshold_of<A>(call.act);
    with_activation(call.act, [&](auto act) {
      constexpr bool Silu = decltype(act)::kValue != 0;
      for (int64 k = 0; k < lines; ++k) {
        A* place = sums + k * pitch;
        const T* from = along_channels ? start + k * call.out.stride_w
                                       : gathered(call.out, sample, first_channel, y, kMostFusionInputs);
        for (int64 element = 0; element < count; element += kWidth) {
          const auto grad = load_some(from + element, count - element, kWidth);
          store(times_slope<Silu>(grad, load(place + element), threshold), place + element);
        }
      }
    });
    return {sums, nullptr, pitch};
  }

  // Gradients of one row of input i, whose `given` is dL / ds summed over its outputs (or dL / dy: Direct).
  template <bool Direct>
  void finish_row(int i, const Lines<const A>& given, int64 sample, int64 first_channel, int64 channels, int64 row) {
    const FusionInput& input = call.inputs[i];
    const int64 lines = along_channels ? input.map.width : 1;
    const int64 count = along_channels ? channels : input.map.width;
    const Lines<const T> x = along_channels
                                 ? row_of<const T>(input.map, sample, first_channel, row, nullptr)
                                 : Lines<const T>{gathered(input.map, sample, first_channel, row, i), nullptr, 0};
    typename Lanes<A>::Vector derivatives = {};
    const auto run = [&](auto normalised, auto pre, auto pass, const Lines<T>& out) {
      gradient_lines<
          decltype(normalised)::kValue != 0, static_cast<FusionPass>(decltype(pass)::kValue),
          !Direct && decltype(pre)::kValue != 0, Direct>(
          x, given, out, lines, count, coefficients[i], weights.normalised[i], threshold_of<A>(call.pre), sum_dy[i],
          sum_dot[i], derivatives);
    };
    with_input(i, [&](auto normalised, auto pre) {
      if (input.sums_out != nullptr) {
        run(normalised, pre, Constant<static_cast<int>(FusionPass::kSums)>{}, Lines<T>{nullptr, nullptr, 0});
        return;
      }
      if (input.gradient.data == nullptr) {
        if constexpr (!Direct) {
          run(normalised, pre, Constant<static_cast<int>(FusionPass::kWeightOnly)>{}, Lines<T>{nullptr, nullptr, 0});
        }
        return;
      }
      const Map& out = input.gradient;
      if (along_channels || out.stride_w == 1) {
        const Lines<T> to = along_channels ? row_of<T>(out, sample, first_channel, row, nullptr)
                                           : row_of<T>(out, sample, first_channel, row, nullptr);
        run(normalised, pre, Constant<static_cast<int>(FusionPass::kGradient)>{}, to);
        return;
      }
      T* copy = copies.data + (kMostFusionInputs + 1) * longest_line;
      run(normalised, pre, Constant<static_cast<int>(FusionPass::kGradient)>{}, Lines<T>{copy, nullptr, 0});
      T* to = row_of<T>(out, sample, first_channel, row, nullptr).data;
      for (int64 column = 0; column < out.width; ++column) to[column * out.stride_w] = copy[column];
    });
    derivative[i] += horizontal_sum(derivatives);
    if (input.sums_out != nullptr) {
      pending[i] += lines > 1 ? lines : 1;
      if (pending[i] >= kRowsBeforeDouble) settle(i, count);
    }
  }

  // Moves the sums in float to the totals in double.
  void settle(int i, int64 count) {
    if (pending[i] == 0) return;
    pending[i] = 0;
    if (along_channels) {
      for (int64 k = 0; k < count; ++k) {
        totals[i][k] += sum_dy[i][k];
        totals[i][longest_line + k] += sum_dot[i][k];
        sum_dy[i][k] = sum_dot[i][k] = 0;
      }
      return;
    }
    double dy = 0, dot = 0;
    for (int64 k = 0; k < padded(count); ++k) {
      dy += sum_dy[i][k];
      dot += sum_dot[i][k];
      sum_dy[i][k] = sum_dot[i][k] = 0;
    }
    totals[i][0] += dy;
    totals[i][longest_line] += dot;
  }

  // Whether input i has anything to compute in this pass.
  bool wanted(int i) const {
    const FusionInput& input = call.inputs[i];
    return input.sums_out != nullptr || input.gradient.data != nullptr || call.weight_gradient != nullptr;
  }

  // All rows of one sample and one channel block (or one channel), in order.
  void backward_map(int64 sample, int64 first_channel, int64 channels) {
    const int64 lines = along_channels ? call.out.width : 1;
    const int64 count = along_channels ? channels : call.out.width;
    const int64 pitch = pitch_of(count);
    int64 next_row[kMostFusionInputs] = {};
    for (int i = 0; i < call.count; ++i) {
      if (call.inputs[i].resample == kResampleNone || !wanted(i)) continue;
      const int64 row = along_channels ? call.inputs[i].map.width * pitch : padded(call.inputs[i].map.width);
      for (int64 k = 0; k < 4 * row; ++k) upstream[i][k] = 0;
    }
    for (int64 y = 0; y < call.out.height; ++y) {
      const Lines<const A> slopes = call.depthwise == nullptr
                                        ? upstream_row(sample, first_channel, channels, y)
                                        : convolution_gradient(sample, first_channel, channels, y);
      for (int i = 0; i < call.count; ++i) {
        if (!wanted(i)) continue;
        const FusionInput& input = call.inputs[i];
        if (input.resample == kResampleNone) {
          finish_row<false>(i, slopes, sample, first_channel, channels, y);
          continue;
        }
        const int64 row = along_channels ? input.map.width * pitch : padded(input.map.width);
        if (input.resample == kResampleUp) {
          gather_up(i, slopes, lines, channels, pitch);
          while (next_row[i] < input.map.height &&
                 first_destination(
                     static_cast<int>(next_row[i] + 1), static_cast<int>(input.map.height),
                     static_cast<int>(call.out.height)) <= y + 1) {
            finish_row<false>(
                i, Lines<const A>{upstream[i], nullptr, pitch}, sample, first_channel, channels, next_row[i]);
            for (int64 k = 0; k < row; ++k) upstream[i][k] = 0;
            ++next_row[i];
          }
          continue;
        }
        with_input(i, [&](auto normalised, auto pre) {
          scatter_pool<decltype(normalised)::kValue != 0, decltype(pre)::kValue != 0>(
              i, slopes, sample, first_channel, channels, y, row);
        });
        // Rows that no later window reaches.
        const int64 reached = y + 1 == call.out.height ? input.map.height : 2 * (y + 1) - input.map.height % 2;
        for (; next_row[i] < reached; ++next_row[i]) {
          A* ready = upstream[i] + next_row[i] % 4 * row;
          finish_row<true>(i, Lines<const A>{ready, nullptr, pitch}, sample, first_channel, channels, next_row[i]);
          for (int64 k = 0; k < row; ++k) ready[k] = 0;
        }
      }
    }
    for (int i = 0; i < call.count; ++i) settle(i, along_channels ? channels : call.inputs[i].map.width);
    if (call.depthwise != nullptr) settle_depthwise(channels);
  }

  void gather_up(int i, const Lines<const A>& slopes, int64 lines, int64 channels, int64 pitch) {
    if (!along_channels) {
      const A* row = slopes.data;
      for (int64 x = 0; x < call.out.width; ++x) upstream[i][source[i][x]] += row[x];
      return;
    }
    for (int64 x = 0; x < lines; ++x) {
      A* to = upstream[i] + source[i][x] * pitch;
      const A* from = slopes.line(x);
      int64 k = 0;
      for (; k + kWidth <= channels; k += kWidth) store(load(to + k) + load(from + k), to + k);
      if (k < channels) store(load(to + k) + load_first(from + k, channels - k), to + k);
    }
  }

  template <bool Normalised, bool Silu>
  void scatter_pool(
      int i,
      const Lines<const A>& slopes,
      int64 sample,
      int64 first_channel,
      int64 channels,
      int64 y,
      int64 row_elements_of_input) {
    using L = Lanes<A>;
    using V = typename L::Vector;
    using M = typename L::Mask;
    const Map& map = call.inputs[i].map;
    const A weight = weights.normalised[i];
    const V threshold = threshold_of<A>(call.pre);
    const T* base = static_cast<const T*>(map.data) + sample * map.stride_n + first_channel * map.stride_c;
    const int64 pitch = pitch_of(channels);
    const int64 top = 2 * y - map.height % 2, left_of_first = -(map.width % 2);
    V derivatives = {};
    for (int64 x = 0; x < call.out.width; ++x) {
      const T* taps[9];
      window(map, base, y, x, taps);
      const int64 left = left_of_first + 2 * x;
      if (!along_channels) {
        A best = 0;
        int chosen = 0;
        for (int t = 0; t < 9; ++t) {
          const A value = scalar_tap<Normalised>(taps[t], coefficients[i]);
          if (t == 0 || value > best || value != value) {
            best = value;
            chosen = t;
          }
        }
        const V value = V{best}, grad = V{slopes.data[x]};
        derivative[i] += (grad * activated<Silu>(value, threshold))[0];
        if (taps[chosen] != nullptr) {
          upstream[i][(top + chosen / 3) % 4 * row_elements_of_input + left + chosen % 3] +=
              weight * times_slope<Silu>(grad, value, threshold)[0];
        }
        continue;
      }
      for (int64 element = 0; element < channels; element += kWidth) {
        const int64 rest = channels - element;
        V best = tap_value<Normalised, V>(taps[0], coefficients[i], element, rest);
        M chosen = {};
        for (int t = 1; t < 9; ++t) {
          const V value = tap_value<Normalised, V>(taps[t], coefficients[i], element, rest);
          const auto larger = (value > best) | (value != value);
          best = larger ? value : best;
          chosen = larger ? M{} + t : chosen;
        }
        const V grad = load_some(slopes.line(x) + element, rest, kWidth);
        derivatives += grad * activated<Silu>(best, threshold);
        const V dy = L::splat(weight) * times_slope<Silu>(grad, best, threshold);
        for (int t = 0; t < 9; ++t) {
          if (taps[t] == nullptr) continue;
          A* to = upstream[i] + (top + t / 3) % 4 * row_elements_of_input + (left + t % 3) * pitch + element;
          store(load(to) + (chosen == M{} + t ? dy : V{}), to);
        }
      }
    }
    derivative[i] += horizontal_sum(derivatives);
  }
};

template <typename A>
FusionWeights<A> weights_of(const Fusion& call) {
  return normalise_fusion_weights(
      static_cast<const A*>(call.weight), call.count, call.weighting, static_cast<A>(call.epsilon), [](A x) {
        if constexpr (sizeof(A) == 4) return __builtin_expf(x);
        return static_cast<A>(__builtin_exp(x));
      });
}

inline bool is_one_row(const Map& map) {
  return map.data == nullptr || map.height == 1 || (map.stride_w == 1 && map.stride_h == map.width);
}

// The same node with every plane as a single row, where nothing is resampled and planes lie in one piece.
inline Fusion flattened(const Fusion& call) {
  Fusion flat = call;
  bool possible = call.depthwise == nullptr && call.out.stride_c != 1 && is_one_row(call.out) &&
                  pixels_of(call.out) <= kLongestFlatRow;
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

// The weights of a depthwise convolution, for each vector of channels one vector of each of the nine weights.
template <typename A>
struct DepthwiseTable {
  static constexpr int64 kWidth = Lanes<A>::kWidth;
  static int64 place(int64 channel, int64 tap) {
    return channel / kWidth * kWidth * kTaps + tap * kWidth + channel % kWidth;
  }
  static int64 size(int64 channels) { return (channels + kWidth - 1) / kWidth * kWidth * kTaps; }

  // `turned` by 180 degrees for the gradient of the convolved map.
  DepthwiseTable(const Fusion& call, bool turned) : table(call.depthwise == nullptr ? 0 : size(call.out.channels)) {
    if (call.depthwise == nullptr) return;
    const A* given = static_cast<const A*>(call.depthwise);
    for (int64 k = 0; k < size(call.out.channels); ++k) table.data[k] = 0;
    for (int64 channel = 0; channel < call.out.channels; ++channel) {
      A* to = table.data + place(channel, 0);
      for (int64 t = 0; t < kTaps; ++t) to[t * kWidth] = given[channel * kTaps + (turned ? kTaps - 1 - t : t)];
    }
  }
  Scratch<A> table;
};

template <typename T, typename A>
void fusion_forward_typed(const Fusion& given, ParallelFor run, int) {
  if (given.batch == 0) return;
  const Fusion call = flattened(given);
  const FusionPlan plan = plan_fusion(call, false);
  const FusionWeights<A> weights = weights_of<A>(call);
  const DepthwiseTable<A> depthwise(call, false);
  parallel(run, plan.groups * plan.blocks, 1, [&](int64 begin, int64 end) {
    FusionWorker<T, A> worker(call, plan, weights);
    for (int64 unit = begin; unit < end; ++unit) {
      const FusionBlock block = block_of(call, plan, unit);
      const int64 step = plan.along_channels ? block.channels : 1;
      for (int64 channel = 0; channel < block.channels; channel += step) {
        const int64 first = block.first_channel + channel;
        for (int i = 0; i < call.count; ++i) {
          worker.prepare(i, first, step, plan.along_channels ? 1 : call.inputs[i].map.width);
        }
        if (call.depthwise != nullptr) worker.prepare_depthwise(depthwise.table.data, nullptr, first, step);
        for (int64 sample = block.first_sample; sample < block.last_sample; ++sample) {
          if (call.depthwise != nullptr) {
            worker.forward_depthwise(sample, first, step);
            continue;
          }
          for (int64 y = 0; y < call.out.height; ++y) {
            worker.fuse_row(sample, first, step, y, true);
          }
        }
      }
    }
  });
}

// Both backward passes: sums where an input's `sums_out` is given, gradients where its `gradient` is.
template <typename T, typename A>
void fusion_backward_typed(const Fusion& given, ParallelFor run, int) {
  const Fusion call = flattened(given);
  const FusionPlan plan = plan_fusion(call, true);
  const FusionWeights<A> weights = weights_of<A>(call);
  const int64 channels = call.out.channels, units = plan.groups * plan.blocks;
  Scratch<double> sums(plan.groups * call.count * 2 * channels), derivatives(units * kMostFusionInputs);
  const DepthwiseTable<A> depthwise(call, true);
  const int64 depthwise_size = call.depthwise == nullptr ? 0 : depthwise.size(channels);
  Scratch<double> depthwise_parts(plan.groups * depthwise_size);
  parallel(run, units, 1, [&](int64 begin, int64 end) {
    FusionWorker<T, A> worker(call, plan, weights);
    for (int64 unit = begin; unit < end; ++unit) {
      const FusionBlock block = block_of(call, plan, unit);
      const int64 step = plan.along_channels ? block.channels : 1;
      for (int i = 0; i < call.count; ++i) worker.derivative[i] = 0;
      for (int64 channel = 0; channel < block.channels; channel += step) {
        const int64 first = block.first_channel + channel;
        for (int i = 0; i < call.count; ++i) {
          worker.prepare(i, first, step, plan.along_channels ? 1 : call.inputs[i].map.width);
          for (int64 k = 0; k < worker.longest_line; ++k) {
            worker.sum_dy[i][k] = worker.sum_dot[i][k] = 0;
            worker.totals[i][k] = worker.totals[i][worker.longest_line + k] = 0;
          }
        }
        if (call.depthwise != nullptr) {
          double* totals = depthwise_parts.data + unit / plan.blocks * depthwise_size;
          worker.prepare_depthwise(depthwise.table.data, totals, first, step);
        }
        for (int64 sample = block.first_sample; sample < block.last_sample; ++sample) {
          worker.backward_map(sample, first, step);
        }
        for (int i = 0; i < call.count; ++i) {
          if (call.inputs[i].sums_out == nullptr) continue;
          double* to = sums.data + (unit / plan.blocks * call.count + i) * 2 * channels + first;
          for (int64 k = 0; k < step; ++k) {
            to[k] = worker.totals[i][k];
            to[channels + k] = worker.totals[i][worker.longest_line + k];
          }
        }
      }
      for (int i = 0; i < call.count; ++i) derivatives.data[unit * kMostFusionInputs + i] = worker.derivative[i];
    }
  });
  for (int i = 0; i < call.count; ++i) {
    if (call.inputs[i].sums_out == nullptr) continue;
    A* out = static_cast<A*>(call.inputs[i].sums_out);
    const A* inverse = static_cast<const A*>(call.inputs[i].statistics) + channels;
    double* totals = sums.data + i * 2 * channels;  // of the first group, to which the others are added
    for (int64 group = 1; group < plan.groups; ++group) {
      const double* from = totals + group * call.count * 2 * channels;
      for (int64 k = 0; k < 2 * channels; ++k) totals[k] += from[k];
    }
    for (int64 channel = 0; channel < channels; ++channel) {
      out[channel] = plan.groups == 0 ? A(0) : static_cast<A>(totals[channel]);
      out[channels + channel] = plan.groups == 0 ? A(0) : static_cast<A>(totals[channels + channel] * inverse[channel]);
    }
  }
  if (call.depthwise != nullptr) {
    A* out = static_cast<A*>(call.depthwise_gradient);
    for (int64 group = 1; group < plan.groups; ++group) {
      for (int64 k = 0; k < depthwise_size; ++k)
        depthwise_parts.data[k] += depthwise_parts.data[group * depthwise_size + k];
    }
    for (int64 channel = 0; channel < channels; ++channel) {
      for (int64 t = 0; t < kTaps; ++t) {
        const double total = plan.groups == 0 ? 0 : depthwise_parts.data[depthwise.place(channel, t)];
        out[channel * kTaps + t] = static_cast<A>(total);
      }
    }
  }
  if (call.weight_gradient != nullptr) {
    // In double, because the gradient is a small difference of large sums.
    double weight[kMostFusionInputs] = {}, derivative[kMostFusionInputs] = {}, gradient[kMostFusionInputs] = {};
    for (int i = 0; i < call.count; ++i) {
      weight[i] = static_cast<const A*>(call.weight)[i];
      for (int64 unit = 0; unit < units; ++unit) derivative[i] += derivatives.data[unit * kMostFusionInputs + i];
    }
    const FusionWeights<double> exact = normalise_fusion_weights(
        weight, call.count, call.weighting, call.epsilon, [](double x) { return __builtin_exp(x); });
    fusion_weight_gradient(exact, weight, derivative, call.count, gradient);
    for (int i = 0; i < call.count; ++i) static_cast<A*>(call.weight_gradient)[i] = static_cast<A>(gradient[i]);
  }
}

constexpr int64 kStatisticsBlock = 1024;  // channels
constexpr int64 kStatisticsTile = 8192;   // elements read twice, which stay in the cache between

// Mean and sum of squared deviations of a part; parts merge without cancellation (Chan et al.).
struct Moments {
  double mean, squares;
};

// What a part of `count` elements weighs in a merge with `total_count` others.
struct Share {
  Share(double total_count, double count)
      : of_mean(count / (total_count + count)), of_square(total_count * count / (total_count + count)) {}
  double of_mean, of_square;
};

inline __attribute__((always_inline)) void merge(Moments& total, const Share& share, double mean, double squares) {
  const double difference = mean - total.mean;
  total.mean += difference * share.of_mean;
  total.squares += squares + difference * difference * share.of_square;
}

template <typename T, typename A>
void fusion_statistics_typed(const FusionStatistics& call, ParallelFor run, int) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const Map& map = call.input;
  const int64 channels = map.channels, pixels = pixels_of(map);
  const int64 groups = call.batch < kSampleGroups ? call.batch : kSampleGroups;
  const bool along_channels = channels_are_contiguous(map) && channels > 1;
  const int64 block = channels < kStatisticsBlock ? channels : kStatisticsBlock;
  const int64 blocks = (channels + block - 1) / block;
  Scratch<Moments> parts(groups * channels);
  const T* data = static_cast<const T*>(map.data);
  parallel(run, groups * blocks, 1, [&](int64 begin, int64 end) {
    const int64 width = L::kWidth;
    Scratch<A> scratch(3 * kStatisticsBlock);
    for (int64 unit = begin; unit < end; ++unit) {
      const int64 group = unit / blocks, first = unit % blocks * block;
      const int64 last = first + block < channels ? first + block : channels;
      const int64 first_sample = call.batch * group / groups, last_sample = call.batch * (group + 1) / groups;
      Moments* into = parts.data + group * channels;
      for (int64 channel = first; channel < last; ++channel) into[channel] = {0, 0};
      double counted = 0;
      for (int64 sample = first_sample; sample < last_sample; ++sample) {
        if (along_channels) {
          // Twice over pixels that stay in the first-level cache: their mean, then the deviations from it.
          const int64 size = last - first, padded = (size + width - 1) / width * width;
          const int64 step = kStatisticsTile / padded;
          A* mean = scratch.data;
          A* squares = mean + kStatisticsBlock;
          A* drift = squares + kStatisticsBlock;
          for (int64 tile = 0; tile < pixels; tile += step) {
            const int64 count = pixels - tile < step ? pixels - tile : step;
            for (int64 k = 0; k < padded; ++k) mean[k] = squares[k] = drift[k] = 0;
            const auto each_pixel = [&](const auto& body) __attribute__((always_inline)) {
              for (int64 pixel = tile; pixel < tile + count; ++pixel) {
                const T* point = data + sample * map.stride_n + first + pixel / map.width * map.stride_h +
                                 pixel % map.width * map.stride_w;
                for (int64 k = 0; k < padded; k += width) body(load_some(point + k, size - k, width), k);
              }
            };
            each_pixel([&](V x, int64 k) __attribute__((always_inline)) { store(load(mean + k) + x, mean + k); });
            const A inverse = A(1) / static_cast<A>(count);
            for (int64 k = 0; k < padded; ++k) mean[k] *= inverse;
            each_pixel([&](V x, int64 k) __attribute__((always_inline)) {
              const V deviation = x - load(mean + k);
              store(load(squares + k) + deviation * deviation, squares + k);
              store(load(drift + k) + deviation, drift + k);
            });
            const Share share(counted, static_cast<double>(count));
            const double inverse_count = 1.0 / static_cast<double>(count);
            for (int64 k = 0; k < size; ++k) {
              // What rounding left of the deviations' sum, which would be 0 of the exact mean.
              const double left = drift[k], shift = left * inverse_count;
              merge(into[first + k], share, mean[k] + shift, squares[k] - left * shift);
            }
            counted += static_cast<double>(count);
          }
          continue;
        }
        for (int64 channel = first; channel < last; ++channel) {
          double sample_counted = counted;
          const T* plane = data + sample * map.stride_n + channel * map.stride_c;
          const bool flat = map.stride_w == 1 && (map.stride_h == map.width || map.height == 1);
          const int64 rows = flat ? (pixels + 1023) / 1024 : map.height;
          for (int64 row = 0; row < rows; ++row) {
            const T* line = flat ? plane + row * 1024 : plane + row * map.stride_h;
            const int64 count = !flat ? map.width : pixels - row * 1024 < 1024 ? pixels - row * 1024 : 1024;
            const int64 whole = map.stride_w == 1 ? count - count % width : 0;
            V sums = {};
            for (int64 x = 0; x < whole; x += width) sums += load(line + x);
            A sum = horizontal_sum(sums);
            for (int64 x = whole; x < count; ++x) sum += to_scalar(line[x * map.stride_w]);
            const A mean = sum / static_cast<A>(count);
            V squares = {}, drifts = {};
            for (int64 x = 0; x < whole; x += width) {
              const V deviation = load(line + x) - mean;
              squares += deviation * deviation;
              drifts += deviation;
            }
            double square = horizontal_sum(squares), left = horizontal_sum(drifts);
            for (int64 x = whole; x < count; ++x) {
              const A deviation = to_scalar(line[x * map.stride_w]) - mean;
              square += static_cast<double>(deviation) * static_cast<double>(deviation);
              left += deviation;
            }
            const double shift = left / static_cast<double>(count);
            merge(
                into[channel], Share(sample_counted, static_cast<double>(count)), static_cast<double>(mean) + shift,
                square - left * shift);
            sample_counted += static_cast<double>(count);
          }
        }
        if (!along_channels) counted += static_cast<double>(pixels);
      }
    }
  });
  A* out = static_cast<A*>(call.statistics);
  for (int64 channel = 0; channel < channels; ++channel) {
    Moments total = {0, 0};
    double counted = 0;
    for (int64 group = 0; group < groups; ++group) {
      const int64 samples = call.batch * (group + 1) / groups - call.batch * group / groups;
      const double count = static_cast<double>(samples * pixels);
      const Moments& part = parts.data[group * channels + channel];
      merge(total, Share(counted, count), part.mean, part.squares);
      counted += count;
    }
    const double variance = total.squares / counted;
    out[channel] = static_cast<A>(total.mean);
    out[channels + channel] = static_cast<A>(1.0 / __builtin_sqrt(variance + call.epsilon));
    out[2 * channels + channel] = static_cast<A>(variance);
  }
}

#define FRSKD_FOR_ELEMENTS(function, call)                  \
  switch (element) {                                        \
    case Element::kFloat32:                                 \
      return function<float, float>(call, run, threads);    \
    case Element::kFloat64:                                 \
      return function<double, double>(call, run, threads);  \
    case Element::kBFloat16:                                \
      return function<BFloat16, float>(call, run, threads); \
    case Element::kFloat16:                                 \
      return function<Half, float>(call, run, threads);     \
  }

void fusion_statistics(const FusionStatistics& call, Element element, ParallelFor run, int threads) {
  FRSKD_FOR_ELEMENTS(fusion_statistics_typed, call)
}

void fusion_forward(const Fusion& call, Element element, ParallelFor run, int threads) {
  FRSKD_FOR_ELEMENTS(fusion_forward_typed, call)
}

void fusion_backward(const Fusion& call, Element element, ParallelFor run, int threads) {
  FRSKD_FOR_ELEMENTS(fusion_backward_typed, call)
}

#undef FRSKD_FOR_ELEMENTS

}  // namespace
}  // namespace frskd
