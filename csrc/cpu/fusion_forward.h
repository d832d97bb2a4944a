// The fused map of a node, row by row, or in strips of rows of a plane. A strip stays in a buffer in the cache while
// its inputs are added.
#pragma once

#include "fusion_pool.h"

namespace frskd {
namespace {

// sums += weight * pre(normalise(x)) over `lines` lines of `count` elements; a line of sums is `pitch` elements long.
// The First input starts the sums, the Last one writes them to `out` instead.
template <bool Normalised, bool Silu, bool First, bool Last, typename T, typename A>
void add_lines(
    const Lines<const T>& input,
    const Lines<T>& out,
    int64 lines,
    int64 count,
    int64 pitch,
    const LineNumbers<A>& numbers,
    A weight,
    typename Lanes<A>::Vector threshold,
    A* sums) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const V w = L::splat(weight);
  // Copies: a store might change what is behind a reference.
  const A *mean = numbers.mean, *scale = numbers.scale, *beta = numbers.beta;
  const auto sum = [=](V x, int64 element, const A* place) __attribute__((always_inline)) {
    if constexpr (Normalised) x = (x - load(mean + element)) * load(scale + element) + load(beta + element);
    V total = w * activated<Silu>(x, threshold);
    if constexpr (!First) total += load(place);
    return total;
  };
  const int64 whole = count - count % L::kWidth;
  for (int64 k = 0; k < lines; ++k) {
    const T* x = input.line(k);
    A* place = sums + k * pitch;
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

template <typename T, typename A>
class FusedRows {
 public:
  explicit FusedRows(const NodeRows<T, A>& node) : node_(node), values_(node.longest_row()), pooled_(node) {}

  // sums = sum_i w_i * pre(v_i) for `rows` rows from y on. With `write` they go to the output, in which case `sums` is
  // only room.
  void fuse(const Slice& slice, int64 y, int64 rows, A* sums, bool write) {
    const Fusion& call = node_.call;
    const int64 pitch = node_.pitch_of(call.out, slice);
    if (!starts_sums(0)) clear(sums, node_.lines_of(call.out, rows) * pitch);
    bool written = false;
    for (int i = 0; i < call.count; ++i) {
      node_.with_input(i, [&](auto normalised, auto pre) {
        constexpr bool Normalised = decltype(normalised)::kValue != 0;
        constexpr bool Silu = decltype(pre)::kValue != 0;
        const int resample = call.inputs[i].resample;
        if (resample == kResampleNone || (resample == kResampleUp && node_.along_channels)) {
          written = write && i == call.count - 1 && (node_.along_channels || call.out.stride_w == 1);
          add_pixels<Normalised, Silu>(i, slice, y, rows, sums, written);
          return;
        }
        for (int64 row = 0; row < rows; ++row) {
          if (resample == kResampleUp) {
            add_enlarged_row<Normalised, Silu>(i, slice, y + row, sums + row * pitch);
          } else if (node_.along_channels) {
            add_pooled_pixels<Normalised, Silu>(i, slice, y, sums);
          } else {
            add_pooled_row<Normalised, Silu>(i, slice, y + row, sums + row * pitch);
          }
        }
      });
    }
    if (write && !written) write_rows(slice, y, rows, sums);
  }

 private:
  using V = typename Lanes<A>::Vector;
  static constexpr int64 kWidth = Lanes<A>::kWidth;
  const NodeRows<T, A>& node_;
  Scratch<A> values_;  // (a row) of an input that is to be up-sampled
  PooledRow<T, A> pooled_;

  // Whether input i stores its term and need not find zeros.
  bool starts_sums(int i) const {
    const int resample = node_.call.inputs[i].resample;
    return i == 0 && (resample == kResampleNone || (resample == kResampleUp && node_.along_channels));
  }

  int64 source_row(int i, int64 y) const {
    const FusionInput& input = node_.call.inputs[i];
    if (input.resample != kResampleUp) return y;
    return nearest_source(
        static_cast<int>(y), static_cast<int>(input.map.height), static_cast<int>(node_.call.out.height));
  }

  // An input that lines of the output read line by line: as it is, or up-sampled along channels.
  template <bool Normalised, bool Silu>
  void add_pixels(int i, const Slice& slice, int64 y, int64 rows, A* sums, bool write) {
    const Map& map = node_.call.out;
    const Lines<const T> given = node_.input_rows(i, slice, source_row(i, y), node_.source[i]);
    const Lines<T> out = !write                 ? Lines<T>{}
                         : node_.along_channels ? row_of<T>(map, slice, y)
                                                : rows_of<T>(map, slice, y);
    const auto add = [&](auto first, auto last) {
      add_lines<Normalised, Silu, decltype(first)::kValue != 0, decltype(last)::kValue != 0>(
          given, out, node_.lines_of(map, rows), node_.line_elements(map, slice), node_.pitch_of(map, slice),
          node_.numbers[i], node_.weights.normalised[i], threshold_of<A>(node_.call.pre), sums);
    };
    if (starts_sums(i)) {
      write ? add(Constant<1>{}, Constant<1>{}) : add(Constant<1>{}, Constant<0>{});
    } else {
      write ? add(Constant<0>{}, Constant<1>{}) : add(Constant<0>{}, Constant<0>{});
    }
  }

  template <bool Normalised, bool Silu>
  void add_enlarged_row(int i, const Slice& slice, int64 y, A* sums) {
    const int64 width = node_.call.inputs[i].map.width;
    add_lines<Normalised, Silu, true, false>(
        node_.input_rows(i, slice, source_row(i, y), nullptr), Lines<T>{}, 1, width, node_.padded(width),
        node_.numbers[i], node_.weights.normalised[i], threshold_of<A>(node_.call.pre), values_.data);
    const int64* source = node_.source[i];
    const A* values = values_.data;
    for (int64 x = 0; x < node_.call.out.width; ++x) sums[x] += values[source[x]];
  }

  template <bool Normalised, bool Silu>
  void add_pooled_row(int i, const Slice& slice, int64 y, A* sums) {
    const V weight = Lanes<A>::splat(node_.weights.normalised[i]), threshold = threshold_of<A>(node_.call.pre);
    pooled_.template load_columns<Normalised>(i, slice, y);
    for (int64 x = 0; x < node_.call.out.width; x += kWidth) {
      store(load(sums + x) + weight * activated<Silu>(pooled_.values(x), threshold), sums + x);
    }
  }

  template <bool Normalised, bool Silu>
  void add_pooled_pixels(int i, const Slice& slice, int64 y, A* sums) {
    const Map& map = node_.call.inputs[i].map;
    const LineNumbers<A>& numbers = node_.numbers[i];
    const A weight = node_.weights.normalised[i];
    const V threshold = threshold_of<A>(node_.call.pre);
    const T* base = row_start<const T>(map, slice, 0);
    const int64 channels = slice.channels, pitch = node_.pitch_of(map, slice);
    for (int64 x = 0; x < node_.call.out.width; ++x) {
      const T* taps[kWindowTaps];
      node_.window(map, base, y, x, taps);
      for (int64 element = 0; element < channels; element += kWidth) {
        const int64 rest = channels - element;
        V best = node_.template tap_value<Normalised, V>(taps[0], numbers, element, rest);
        for (int t = 1; t < kWindowTaps; ++t) {
          const V value = node_.template tap_value<Normalised, V>(taps[t], numbers, element, rest);
          best = (value > best) | (value != value) ? value : best;
        }
        A* place = sums + x * pitch + element;
        store(load(place) + Lanes<A>::splat(weight) * activated<Silu>(best, threshold), place);
      }
    }
  }

  void write_rows(const Slice& slice, int64 y, int64 rows, const A* sums) {
    const Map& out = node_.call.out;
    const int64 count = node_.line_elements(out, slice), pitch = node_.pitch_of(out, slice);
    const Lines<T> lines = node_.along_channels ? row_of<T>(out, slice, y) : rows_of<T>(out, slice, y);
    if (!node_.along_channels && out.stride_w != 1) {
      for (int64 x = 0; x < count; ++x) from_scalar(sums[x], lines.data + x * out.stride_w);
      return;
    }
    for (int64 k = 0; k < node_.lines_of(out, rows); ++k) {
      const A* from = sums + k * pitch;
      T* to = lines.line(k);
      int64 element = 0;
      for (; element + kWidth <= count; element += kWidth) store(load(from + element), to + element);
      if (element < count) store_first(load(from + element), to + element, count - element);
    }
  }
};

template <typename T, typename A>
void fuse_forward(const Fusion& given, ParallelFor run) {
  if (given.batch == 0) return;
  const Fusion call = flattened(given);
  const FusionPlan plan = plan_fusion(call, false, false);
  const FusionWeights<A> weights = weights_of<A>(call);
  parallel(run, plan.units(), 1, [&](int64 begin, int64 end) {
    NodeRows<T, A> node(call, plan, weights);
    FusedRows<T, A> fused(node);
    Scratch<A> sums(node.strip * node.longest_row());
    for (int64 unit = begin; unit < end; ++unit) {
      for_each_run(call, plan, unit, [&](const ChannelRun& channels) {
        node.prepare(channels);
        for (int64 sample = channels.first_sample; sample < channels.last_sample; ++sample) {
          const Slice slice{sample, channels.first_channel, channels.channels};
          for (int64 y = 0; y < call.out.height; y += plan.strip) {
            const int64 rest = call.out.height - y;
            fused.fuse(slice, y, rest < plan.strip ? rest : plan.strip, sums.data, true);
          }
        }
      });
    }
  });
}

}  // namespace
}  // namespace frskd
