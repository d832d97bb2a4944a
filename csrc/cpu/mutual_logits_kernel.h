// Losses and gradients of the logits of several networks and of their fused classifier, on the CPU: a row of all of
// them at a time, so that each exponential is taken once.
#pragma once

#include "mutual_logits_call.h"
#include "parallel.h"

namespace frskd {
namespace {

// One row of every head, padded to whole vectors. Padding of logits is -inf, whose exponential is 0.
template <typename A>
struct MutualRow {
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  MutualRow(int64 heads, int64 classes)
      : heads(heads),
        classes(classes),
        padded((classes + kWidth - 1) / kWidth * kWidth),
        memory((3 * heads + 3) * padded + 4 * heads) {}

  A* logits(int64 head) const { return memory.data + head * padded; }
  A* plain(int64 head) const { return logits(heads + head); }         // exp(z - max)
  A* tempered(int64 head) const { return logits(2 * heads + head); }  // exp((z - max) / T)
  A* ensemble() const { return logits(3 * heads); }  // mean logits of the networks, then the fused classifier's targets
  A* log_fused() const { return ensemble() + padded; }      // logarithms of the networks' targets
  A* log_ensemble() const { return log_fused() + padded; }  // and of the fused classifier's
  A* maxima() const { return log_ensemble() + padded; }     // one for each head, as the following
  A* plain_sums() const { return maxima() + heads; }
  A* tempered_sums() const { return plain_sums() + heads; }

  const int64 heads, classes, padded;
  Scratch<A> memory;
};

template <typename T, typename A>
inline void read_row(const Map& map, int64 n, A* out, int64 padded) {
  const T* row = static_cast<const T*>(map.data) + n * map.stride_n;
  int64 k = 0;
  if (map.stride_c == 1) {
    for (; k + Lanes<A>::kWidth <= map.channels; k += Lanes<A>::kWidth) store(load(row + k), out + k);
  }
  for (; k < map.channels; ++k) out[k] = static_cast<A>(to_scalar(row[k * map.stride_c]));
  for (; k < padded; ++k) out[k] = -static_cast<A>(__builtin_inf());
}

template <typename A>
inline A largest(const A* row, int64 padded) {
  auto top = load(row);
  for (int64 k = Lanes<A>::kWidth; k < padded; k += Lanes<A>::kWidth) top = maximum(load(row + k), top);
  return horizontal_maximum(top);
}

// out = exp((z - top) * factor); returns the sum.
template <typename A>
inline A exponentials_of(const A* row, A top, A factor, A* out, int64 padded) {
  using L = Lanes<A>;
  typename L::Vector sum = {};
  for (int64 k = 0; k < padded; k += L::kWidth) {
    const auto value = exponential((load(row + k) - L::splat(top)) * L::splat(factor));
    store(value, out + k);
    sum += value;
  }
  return horizontal_sum(sum);
}

template <typename A>
inline A log_of(A value) {
  return logarithm(Lanes<A>::splat(value))[0];
}

// targets = probabilities * factor + offset, and their logarithms; `targets` may be null.
template <typename A>
inline void targets_of(const A* exponentials, A factor, A offset, A* targets, A* logarithms, int64 padded) {
  using L = Lanes<A>;
  const auto least =
      L::splat(sizeof(A) == 8 ? static_cast<A>(2.2250738585072014e-308) : static_cast<A>(1.17549435e-38));
  for (int64 k = 0; k < padded; k += L::kWidth) {
    const auto target = load(exponentials + k) * L::splat(factor) + L::splat(offset);
    // The logarithm of 0 is multiplied by 0.
    store(logarithm(maximum(target, least)), logarithms + k);
    if (targets != nullptr) store(target, targets + k);
  }
}

// The divergence of one head, sum q (log q - log p) with p its tempered probabilities, and its gradient of both losses.
// q = exponentials * factor + offset.
template <typename A>
inline A diverge(
    const MutualRow<A>& row,
    int64 head,
    A inverse_temperature,
    const A* exponentials,
    A factor,
    A offset,
    const A* log_targets,
    A ce_scale,  // of exp(z - max) in the gradient
    A kd_scale,  // of exp((z - max) / T) in it
    A target_scale,
    A* gradient) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const V top = L::splat(row.maxima()[head]), log_sum = L::splat(log_of(row.tempered_sums()[head]));
  const V inverse = L::splat(inverse_temperature), q_factor = L::splat(factor), q_offset = L::splat(offset);
  const V ce = L::splat(ce_scale), kd = L::splat(kd_scale), pull = L::splat(target_scale);
  const A *z = row.logits(head), *plain = row.plain(head), *tempered = row.tempered(head);
  V sum = {};
  for (int64 k = 0; k < row.padded; k += L::kWidth) {
    const V target = load(exponentials + k) * q_factor + q_offset;
    const V log_p = (load(z + k) - top) * inverse - log_sum;
    const V term = target * (load(log_targets + k) - log_p);
    const int64 left = row.classes - k;
    const auto counts = ~(target == V{}) & L::first(left);
    sum += counts ? term : V{};
    V slope = load(tempered + k) * kd - target * pull;
    if (ce_scale != A(0)) slope += load(plain + k) * ce;
    store_up_to(slope, gradient + k, left);
  }
  return horizontal_sum(sum);
}

template <typename T, typename A>
void mutual_logits_row(const MutualLogits& call, const MutualRow<A>& row, int64 n) {
  using L = Lanes<A>;
  const int64 heads = row.heads, fused = heads - 1, padded = row.padded;
  const A inverse_temperature = static_cast<A>(1.0 / call.temperature), offset = static_cast<A>(call.offset);
  const bool labelled = call.labels != nullptr && call.labels[n * call.label_stride] != call.ignore_index;
  const int64 label = labelled ? call.labels[n * call.label_stride] : 0;
  const bool known = label >= 0 && label < call.classes;
  // A label that is no class gives NaN.
  const A ce_weight = !labelled ? A(0) : static_cast<A>(known ? call.inverse_valid : __builtin_nan(""));

  for (int64 head = 0; head < heads; ++head) {
    A* z = row.logits(head);
    read_row<T>(call.logits[head], n, z, padded);
    const A top = largest(z, padded);
    row.maxima()[head] = top;
    row.tempered_sums()[head] = exponentials_of(z, top, inverse_temperature, row.tempered(head), padded);
    if (labelled) row.plain_sums()[head] = exponentials_of(z, top, A(1), row.plain(head), padded);
  }
  A* ensemble = row.ensemble();
  const auto share = L::splat(static_cast<A>(1.0 / static_cast<double>(fused)));
  for (int64 k = 0; k < padded; k += L::kWidth) {
    auto sum = load(row.logits(0) + k);
    for (int64 head = 1; head < fused; ++head) sum += load(row.logits(head) + k);
    store(sum * share, ensemble + k);
  }
  const A total = exponentials_of(ensemble, largest(ensemble, padded), inverse_temperature, ensemble, padded);
  targets_of(ensemble, A(1) / total, offset, ensemble, row.log_ensemble(), padded);
  const A fused_factor = A(1) / row.tempered_sums()[fused];
  targets_of<A>(row.tempered(fused), fused_factor, offset, nullptr, row.log_fused(), padded);

  A* ce_rows = static_cast<A*>(call.rows) + n;
  A* kd_rows = ce_rows + heads * call.batch;
  const double mass = 1.0 + static_cast<double>(call.classes) * call.offset;
  const double scale = call.weight * call.temperature / static_cast<double>(call.batch);
  for (int64 head = 0; head < heads; ++head) {
    A* gradient = static_cast<A*>(call.gradients) + (head * call.batch + n) * call.classes;
    const bool last = head == fused;
    const A divergence = diverge(
        row, head, inverse_temperature, last ? ensemble : row.tempered(fused), last ? A(1) : fused_factor,
        last ? A(0) : offset, last ? row.log_ensemble() : row.log_fused(),
        labelled ? ce_weight / row.plain_sums()[head] : A(0), static_cast<A>(scale * mass) / row.tempered_sums()[head],
        static_cast<A>(scale), gradient);
    kd_rows[head * call.batch] = static_cast<A>(call.temperature * call.temperature) * divergence;
    A ce = 0;
    if (labelled) {
      ce = known ? log_of(row.plain_sums()[head]) - (row.logits(head)[label] - row.maxima()[head]) : ce_weight;
      if (known) gradient[label] -= ce_weight;
    }
    ce_rows[head * call.batch] = ce;
  }
}

void mutual_logits_forward(const MutualLogits& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    // Two exponentials for each logit, each about as much as eight loads.
    parallel(run, call.batch, grain_for(16 * call.heads * call.classes), [&](int64 begin, int64 end) {
      const MutualRow<A> row(call.heads, call.classes);
      for (int64 n = begin; n < end; ++n) mutual_logits_row<T, A>(call, row, n);
    });
  });
}

}  // namespace
}  // namespace frskd
