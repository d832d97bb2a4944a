// Both backward passes of a node: sums over batch and pixels where an input's `sums_out` is given, gradients where its
// `gradient` is. The output's rows are walked in order, and a row of an input is finished as soon as no later one
// reaches it.
#pragma once

#include "fusion_pool.h"

namespace frskd {
namespace {

constexpr int64 kRowsInFlight = 4;  // of an input's gradient behind a pool: those of a window, and one to keep places

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
    const LineNumbers<A>& numbers,
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
  const A *mean = numbers.mean, *scale_of = numbers.scale, *beta = numbers.beta;
  const A *mean_dy = numbers.mean_dy, *mean_dot = numbers.mean_dot;
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

// dL / ds of the node's own output: rows of its upstream gradient, in the accumulate type.
template <typename T, typename A>
class UpstreamRows {
 public:
  explicit UpstreamRows(const NodeRows<T, A>& node) : node_(node), rows_(node.strip * node.longest_row()) {}

  void begin(int64, const ChannelRun&) {}  // of a unit's channels
  void end_of_map(const Slice&) {}

  // `rows` rows from y on. Where the gradient has the accumulate type and lies in lines, the lines are its own.
  Lines<const A> rows(const Slice& slice, int64 y, int64 rows) {
    const Map& map = node_.call.out;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (node_.along_channels) return row_of<const T>(map, slice, y);
      if (map.stride_w == 1) return rows_of<const T>(map, slice, y);
    }
    const int64 count = node_.line_elements(map, slice), pitch = node_.pitch_of(map, slice);
    const Lines<const T> given =
        node_.along_channels
            ? row_of<const T>(map, slice, y)
            : Lines<const T>{node_.gathered(map, slice, y, node_.kUpstreamPlace), nullptr, map.stride_h};
    for (int64 k = 0; k < node_.lines_of(map, rows); ++k) {
      const T* from = given.line(k);
      A* to = rows_.data + k * pitch;
      for (int64 element = 0; element < count; element += node_.kWidth) {
        store(load_some(from + element, count - element, node_.kWidth), to + element);
      }
    }
    return {rows_.data, nullptr, pitch};
  }

 private:
  const NodeRows<T, A>& node_;
  Scratch<A> rows_;
};

// What one thread adds up and writes for the inputs of a node.
template <typename T, typename A>
class GradientRows {
 public:
  double derivative[kMostFusionInputs] = {};  // of each input's normalised weight

  explicit GradientRows(const NodeRows<T, A>& node)
      : node_(node),
        line_(node.longest_line()),
        totals_(2 * line_ * node.call.count),
        buffers_((kRowsInFlight * node.longest_row() + 2 * line_) * node.call.count),
        written_(line_),
        pooled_(node) {
    A* next = buffers_.data;
    const auto take = [&next](int64 count) {
      A* taken = next;
      next += count;
      return taken;
    };
    for (int i = 0; i < node.call.count; ++i) {
      upstream_[i] = take(kRowsInFlight * node.longest_row());
      sum_dy_[i] = take(line_);
      sum_dot_[i] = take(line_);
      total_dy_[i] = totals_.data + 2 * line_ * i;
      total_dot_[i] = total_dy_[i] + line_;
    }
  }

  void clear_sums() {
    for (int i = 0; i < node_.call.count; ++i) {
      clear(sum_dy_[i], line_);
      clear(sum_dot_[i], line_);
      clear(total_dy_[i], line_);
      clear(total_dot_[i], line_);
    }
  }

  // Of channel k of the run: the sum of dy, and of dy * (x - mean).
  double total_dy(int i, int64 k) const { return total_dy_[i][k]; }
  double total_dot(int i, int64 k) const { return total_dot_[i][k]; }

  // All rows of one slice, in order; upstream.rows(slice, y, rows) gives dL / ds of `rows` rows from y on.
  template <typename Upstream>
  void walk(const Slice& slice, Upstream& upstream) {
    const Fusion& call = node_.call;
    int64 next_row[kMostFusionInputs] = {};
    for (int i = 0; i < call.count; ++i) {
      if (call.inputs[i].resample == kResampleNone || !wanted(i)) continue;
      clear(upstream_[i], kRowsInFlight * row_of_upstream(i, slice));
    }
    for (int64 y = 0; y < call.out.height; y += node_.strip) {
      const int64 rest = call.out.height - y, rows = rest < node_.strip ? rest : node_.strip;
      const Lines<const A> slopes = upstream.rows(slice, y, rows);
      for (int i = 0; i < call.count; ++i) {
        if (!wanted(i)) continue;
        const int resample = call.inputs[i].resample;
        if (resample == kResampleNone) {
          finish_rows<false>(i, slopes, slice, y, rows);
          continue;
        }
        for (int64 row = 0; row < rows; ++row) {
          // Along channels there is one row, whose lines these are.
          const Lines<const A> of_row{slopes.data + row * slopes.stride, nullptr, slopes.stride};
          if (resample == kResampleUp) {
            undo_up(i, of_row, slice, y + row, next_row[i]);
          } else {
            undo_pool(i, of_row, slice, y + row, next_row[i]);
          }
        }
      }
    }
    for (int i = 0; i < call.count; ++i) settle(i, node_.line_elements(call.inputs[i].map, slice));
    upstream.end_of_map(slice);
  }

 private:
  using L = Lanes<A>;
  using V = typename L::Vector;
  static constexpr int64 kWidth = L::kWidth;

  const NodeRows<T, A>& node_;
  const int64 line_;
  Scratch<double> totals_;
  Scratch<A> buffers_;
  Scratch<T> written_;  // a row of a gradient whose elements do not lie together
  PooledRow<T, A> pooled_;
  A* upstream_[kMostFusionInputs];  // up: a row of the input; pool: the rows in flight, row y in place y % 4
  A* sum_dy_[kMostFusionInputs];    // (a line), as total_dy in the accumulate type
  A* sum_dot_[kMostFusionInputs];
  double* total_dy_[kMostFusionInputs];
  double* total_dot_[kMostFusionInputs];
  int64 pending_[kMostFusionInputs] = {};  // elements in sum_dy and sum_dot

  // Whether input i has anything to compute in this pass.
  bool wanted(int i) const {
    const FusionInput& input = node_.call.inputs[i];
    return input.sums_out != nullptr || input.gradient.data != nullptr || node_.call.weight_gradient != nullptr;
  }

  int64 row_of_upstream(int i, const Slice& slice) const { return node_.row_elements(node_.call.inputs[i].map, slice); }

  // Gradients of `rows` rows of input i from `row` on, whose `given` is dL / ds summed over the outputs that read them
  // (or dL / dy: Direct).
  template <bool Direct>
  void finish_rows(int i, const Lines<const A>& given, const Slice& slice, int64 row, int64 rows) {
    const FusionInput& input = node_.call.inputs[i];
    const int64 lines = node_.lines_of(input.map, rows), count = node_.line_elements(input.map, slice);
    const Lines<const T> x = node_.input_rows(i, slice, row, nullptr);
    V derivatives = {};
    const auto run = [&](auto normalised, auto pre, auto pass, const Lines<T>& out) {
      gradient_lines<
          decltype(normalised)::kValue != 0, static_cast<FusionPass>(decltype(pass)::kValue),
          !Direct && decltype(pre)::kValue != 0, Direct>(
          x, given, out, lines, count, node_.numbers[i], node_.weights.normalised[i], threshold_of<A>(node_.call.pre),
          sum_dy_[i], sum_dot_[i], derivatives);
    };
    node_.with_input(i, [&](auto normalised, auto pre) {
      if (input.sums_out != nullptr) {
        run(normalised, pre, Constant<static_cast<int>(FusionPass::kSums)>{}, Lines<T>{});
        return;
      }
      if (input.gradient.data == nullptr) {
        if constexpr (!Direct) run(normalised, pre, Constant<static_cast<int>(FusionPass::kWeightOnly)>{}, Lines<T>{});
        return;
      }
      const Constant<static_cast<int>(FusionPass::kGradient)> pass{};
      if (node_.along_channels) {
        run(normalised, pre, pass, row_of<T>(input.gradient, slice, row));
      } else if (input.gradient.stride_w == 1) {
        run(normalised, pre, pass, rows_of<T>(input.gradient, slice, row));
      } else {
        run(normalised, pre, pass, Lines<T>{written_.data, nullptr, 0});
        const Lines<T> pixels = row_of<T>(input.gradient, slice, row);
        for (int64 column = 0; column < input.map.width; ++column) *pixels.line(column) = written_.data[column];
      }
    });
    derivative[i] += horizontal_sum(derivatives);
    if (input.sums_out != nullptr) {
      pending_[i] += lines;
      if (pending_[i] >= kRowsBeforeDouble) settle(i, count);
    }
  }

  // Moves the sums in float to the totals in double.
  void settle(int i, int64 count) {
    if (pending_[i] == 0) return;
    pending_[i] = 0;
    if (node_.along_channels) {
      for (int64 k = 0; k < count; ++k) {
        total_dy_[i][k] += sum_dy_[i][k];
        total_dot_[i][k] += sum_dot_[i][k];
        sum_dy_[i][k] = sum_dot_[i][k] = 0;
      }
      return;
    }
    double dy = 0, dot = 0;
    for (int64 k = 0; k < node_.padded(count); ++k) {
      dy += sum_dy_[i][k];
      dot += sum_dot_[i][k];
      sum_dy_[i][k] = sum_dot_[i][k] = 0;
    }
    total_dy_[i][0] += dy;
    total_dot_[i][0] += dot;
  }

  // Adds row y of the output to the input row it was copied from, and finishes rows without further copies.
  void undo_up(int i, const Lines<const A>& slopes, const Slice& slice, int64 y, int64& next_row) {
    const Map& map = node_.call.inputs[i].map;
    const Map& out = node_.call.out;
    gather_up(i, slopes, slice);
    while (next_row < map.height &&
           first_destination(
               static_cast<int>(next_row + 1), static_cast<int>(map.height), static_cast<int>(out.height)) <= y + 1) {
      finish_rows<false>(i, Lines<const A>{upstream_[i], nullptr, node_.pitch_of(map, slice)}, slice, next_row, 1);
      clear(upstream_[i], row_of_upstream(i, slice));
      ++next_row;
    }
  }

  void gather_up(int i, const Lines<const A>& slopes, const Slice& slice) {
    const int64* source = node_.source[i];
    if (!node_.along_channels) {
      const A* row = slopes.data;
      for (int64 x = 0; x < node_.call.out.width; ++x) upstream_[i][source[x]] += row[x];
      return;
    }
    const int64 channels = slice.channels, pitch = node_.pitch_of(node_.call.out, slice);
    for (int64 x = 0; x < node_.call.out.width; ++x) {
      A* to = upstream_[i] + source[x] * pitch;
      const A* from = slopes.line(x);
      int64 k = 0;
      for (; k + kWidth <= channels; k += kWidth) store(load(to + k) + load(from + k), to + k);
      if (k < channels) store(load(to + k) + load_first(from + k, channels - k), to + k);
    }
  }

  // Hands row y of the output to the winners of its windows, and finishes rows that no later window reaches.
  void undo_pool(int i, const Lines<const A>& slopes, const Slice& slice, int64 y, int64& next_row) {
    const Map& map = node_.call.inputs[i].map;
    const int64 row = row_of_upstream(i, slice);
    node_.with_input(i, [&](auto normalised, auto pre) {
      constexpr bool Normalised = decltype(normalised)::kValue != 0, Silu = decltype(pre)::kValue != 0;
      if (node_.along_channels) {
        scatter_pooled_pixels<Normalised, Silu>(i, slopes, slice, y, row);
      } else {
        scatter_pooled_row<Normalised, Silu>(i, slopes.data, slice, y, row);
      }
    });
    const bool last = y + 1 == node_.call.out.height;
    const int64 reached = last ? map.height : kWindowStride * (y + 1) - map.height % 2;
    for (; next_row < reached; ++next_row) {
      A* ready = upstream_[i] + next_row % kRowsInFlight * row;
      finish_rows<true>(i, Lines<const A>{ready, nullptr, node_.pitch_of(map, slice)}, slice, next_row, 1);
      clear(ready, row);
    }
  }

  template <bool Normalised, bool Silu>
  void scatter_pooled_row(int i, const A* slopes, const Slice& slice, int64 y, int64 row) {
    const Map& map = node_.call.inputs[i].map;
    const V weight = L::splat(node_.weights.normalised[i]), threshold = threshold_of<A>(node_.call.pre);
    const int64 top = kWindowStride * y - map.height % 2, left = -(map.width % 2), width = node_.call.out.width;
    V derivatives = {};
    pooled_.template load_columns<Normalised>(i, slice, y);
    for (int64 x = 0; x < width; x += kWidth) {
      const int64 rest = width - x < kWidth ? width - x : kWidth;
      V of_row, of_column;
      const V best = pooled_.winners(x, of_row, of_column), grad = load_some(slopes + x, rest, kWidth);
      derivatives += grad * activated<Silu>(best, threshold);
      A dy[kWidth], rows[kWidth], columns[kWidth];
      store(weight * times_slope<Silu>(grad, best, threshold), dy);
      store(of_row, rows);
      store(of_column, columns);
      for (int64 k = 0; k < rest; ++k) {
        const int64 to_row = top + static_cast<int64>(rows[k]);
        const int64 to_column = left + kWindowStride * (x + k) + static_cast<int64>(columns[k]);
        const bool inside = to_row >= 0 && to_row < map.height && to_column >= 0 && to_column < map.width;
        if (inside) upstream_[i][to_row % kRowsInFlight * row + to_column] += dy[k];
      }
    }
    derivative[i] += horizontal_sum(derivatives);
  }

  template <bool Normalised, bool Silu>
  void scatter_pooled_pixels(int i, const Lines<const A>& slopes, const Slice& slice, int64 y, int64 row) {
    using M = typename L::Mask;
    const Map& map = node_.call.inputs[i].map;
    const LineNumbers<A>& numbers = node_.numbers[i];
    const A weight = node_.weights.normalised[i];
    const V threshold = threshold_of<A>(node_.call.pre);
    const T* base = row_start<const T>(map, slice, 0);
    const int64 channels = slice.channels, pitch = node_.pitch_of(map, slice);
    const int64 top = kWindowStride * y - map.height % 2, left_of_first = -(map.width % 2);
    V derivatives = {};
    for (int64 x = 0; x < node_.call.out.width; ++x) {
      const T* taps[kWindowTaps];
      node_.window(map, base, y, x, taps);
      const int64 left = left_of_first + kWindowStride * x;
      for (int64 element = 0; element < channels; element += kWidth) {
        const int64 rest = channels - element;
        V best = node_.template tap_value<Normalised, V>(taps[0], numbers, element, rest);
        M chosen = {};
        for (int t = 1; t < kWindowTaps; ++t) {
          const V value = node_.template tap_value<Normalised, V>(taps[t], numbers, element, rest);
          const auto larger = (value > best) | (value != value);
          best = larger ? value : best;
          chosen = larger ? M{} + t : chosen;
        }
        const V grad = load_some(slopes.line(x) + element, rest, kWidth);
        derivatives += grad * activated<Silu>(best, threshold);
        const V dy = L::splat(weight) * times_slope<Silu>(grad, best, threshold);
        for (int t = 0; t < kWindowTaps; ++t) {
          if (taps[t] == nullptr) continue;
          A* to =
              upstream_[i] + (top + t / kWindowSide) % kRowsInFlight * row + (left + t % kWindowSide) * pitch + element;
          store(load(to) + (chosen == M{} + t ? dy : V{}), to);
        }
      }
    }
    derivative[i] += horizontal_sum(derivatives);
  }
};

// The sums of all units, in double; they are added in a fixed order.
template <typename T, typename A>
class BackwardTotals {
 public:
  BackwardTotals(const Fusion& call, const FusionPlan& plan)
      : call_(call),
        plan_(plan),
        sums_(plan.groups * call.count * 2 * call.out.channels),
        derivatives_(plan.units() * call.count) {}

  void keep_sums(int64 unit, const ChannelRun& run, const GradientRows<T, A>& found) {
    for (int i = 0; i < call_.count; ++i) {
      if (call_.inputs[i].sums_out == nullptr) continue;
      double* dy = sums_of(unit / plan_.blocks, i) + run.first_channel;
      double* dot = dy + call_.out.channels;
      for (int64 k = 0; k < run.channels; ++k) {
        dy[k] = found.total_dy(i, k);
        dot[k] = found.total_dot(i, k);
      }
    }
  }

  void keep_derivatives(int64 unit, const GradientRows<T, A>& found) {
    for (int i = 0; i < call_.count; ++i) derivatives_.data[unit * call_.count + i] = found.derivative[i];
  }

  void write() {
    for (int i = 0; i < call_.count; ++i) {
      if (call_.inputs[i].sums_out != nullptr) write_sums(i);
    }
    if (call_.weight_gradient != nullptr) write_weight_gradient();
  }

 private:
  const Fusion& call_;
  const FusionPlan& plan_;
  Scratch<double> sums_;         // (groups, inputs, 2, C)
  Scratch<double> derivatives_;  // (units, inputs)

  double* sums_of(int64 group, int i) { return sums_.data + (group * call_.count + i) * 2 * call_.out.channels; }

  void write_sums(int i) {
    const int64 channels = call_.out.channels;
    A* out = static_cast<A*>(call_.inputs[i].sums_out);
    const A* inverse = static_cast<const A*>(call_.inputs[i].statistics) + channels;
    double* totals = sums_of(0, i);  // to which the other groups' are added
    for (int64 group = 1; group < plan_.groups; ++group) {
      const double* from = sums_of(group, i);
      for (int64 k = 0; k < 2 * channels; ++k) totals[k] += from[k];
    }
    for (int64 channel = 0; channel < channels; ++channel) {
      const bool empty = plan_.groups == 0;
      out[channel] = empty ? A(0) : static_cast<A>(totals[channel]);
      out[channels + channel] = empty ? A(0) : static_cast<A>(totals[channels + channel] * inverse[channel]);
    }
  }

  // In double, because the gradient is a small difference of large sums.
  void write_weight_gradient() {
    double weight[kMostFusionInputs] = {}, derivative[kMostFusionInputs] = {}, gradient[kMostFusionInputs] = {};
    for (int i = 0; i < call_.count; ++i) {
      weight[i] = static_cast<const A*>(call_.weight)[i];
      for (int64 unit = 0; unit < plan_.units(); ++unit) derivative[i] += derivatives_.data[unit * call_.count + i];
    }
    const FusionWeights<double> exact = normalise_fusion_weights(
        weight, call_.count, call_.weighting, call_.epsilon, [](double x) { return __builtin_exp(x); });
    fusion_weight_gradient(exact, weight, derivative, call_.count, gradient);
    for (int i = 0; i < call_.count; ++i) static_cast<A*>(call_.weight_gradient)[i] = static_cast<A>(gradient[i]);
  }
};

// make_upstream(node) makes what gives a thread the rows of dL / ds.
template <typename T, typename A, typename MakeUpstream>
void walk_backward(const Fusion& call, const FusionPlan& plan, ParallelFor run, const MakeUpstream& make_upstream) {
  const FusionWeights<A> weights = weights_of<A>(call);
  BackwardTotals<T, A> totals(call, plan);
  parallel(run, plan.units(), 1, [&](int64 begin, int64 end) {
    NodeRows<T, A> node(call, plan, weights);
    GradientRows<T, A> gradients(node);
    auto upstream = make_upstream(node);
    for (int64 unit = begin; unit < end; ++unit) {
      for (int i = 0; i < call.count; ++i) gradients.derivative[i] = 0;
      for_each_run(call, plan, unit, [&](const ChannelRun& channels) {
        node.prepare(channels);
        gradients.clear_sums();
        upstream.begin(unit, channels);
        for (int64 sample = channels.first_sample; sample < channels.last_sample; ++sample) {
          gradients.walk(Slice{sample, channels.first_channel, channels.channels}, upstream);
        }
        totals.keep_sums(unit, channels, gradients);
      });
      totals.keep_derivatives(unit, gradients);
    }
  });
  totals.write();
}

template <typename T, typename A>
void fuse_backward(const Fusion& given, ParallelFor run) {
  const Fusion call = flattened(given);
  walk_backward<T, A>(
      call, plan_fusion(call, true, false), run, [](const NodeRows<T, A>& node) { return UpstreamRows<T, A>(node); });
}

}  // namespace
}  // namespace frskd
