// Losses of class logits, a row at a time in tiles of classes: an online softmax over the tiles.
#pragma once

#include "logits_row.h"
#include "logits_tile.h"

namespace frskd {
namespace {

// Running maximum and exponential sums of one side of a row.
template <typename A>
struct Online {
  A maximum = 0;
  A plain = 0;
  A tempered = 0;
  bool started = false;

  // Whether there was no class before, or none but masked ones.
  bool fresh() const { return !started || maximum == -static_cast<A>(__builtin_inf()); }

  // Raises the maximum to cover the tile; returns by how much it rose (0 for the first tile).
  A cover(const A* tile, int64 count, A inverse_temperature) {
    using L = Lanes<A>;
    auto largest = L::splat(tile[0]);
    if (count >= L::kWidth) {
      int64 k = 0;
      // Several at a time, because each waits for the one before.
      auto second = largest, third = largest, fourth = largest;
      for (; k + 4 * L::kWidth <= count; k += 4 * L::kWidth) {
        largest = ::frskd::maximum(load(tile + k), largest);
        second = ::frskd::maximum(load(tile + k + L::kWidth), second);
        third = ::frskd::maximum(load(tile + k + 2 * L::kWidth), third);
        fourth = ::frskd::maximum(load(tile + k + 3 * L::kWidth), fourth);
      }
      largest = ::frskd::maximum(::frskd::maximum(largest, second), ::frskd::maximum(third, fourth));
      for (; k + L::kWidth <= count; k += L::kWidth) largest = ::frskd::maximum(load(tile + k), largest);
      // The last vector overlaps the one before, which no maximum minds.
      if (k < count) largest = ::frskd::maximum(load(tile + count - L::kWidth), largest);
    } else {
      largest = lanes_at(tile, 0, count, tile[0]);
    }
    const A top = horizontal_maximum(largest);
    if (!started) {
      started = true;
      maximum = top;
      return 0;
    }
    if (!(top > maximum) && top == top) return 0;
    const A rise = top - maximum;
    // From -inf every earlier class had weight 0 and its sums hold NaN: start again.
    if (maximum == -static_cast<A>(__builtin_inf())) {
      plain = tempered = 0;
      maximum = top;
      return 0;
    }
    plain *= exponential(L::splat(-rise))[0];
    tempered *= exponential(L::splat(-rise * inverse_temperature))[0];
    maximum = top;
    return rise;
  }
};

// Sums over one tile of classes, given the maxima.
template <typename A>
struct TileSums {
  A plain_s, tempered_s, plain_t, tempered_t, cross, cross_back, mass, label_s, label_t, shifted_s, shifted_t;
};

// With `Both` also the sum of the divergence in which the teacher learns from the student, in cross_back.
template <typename P, bool Both, typename A>
inline TileSums<A> sum_tile(
    const A* zs,
    const A* zt,
    const A* labels,
    int64 count,
    A student_top,
    A teacher_top,
    A inverse_temperature,
    bool smooth) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr Temperature K = P::kTemperature;
  const V student_maximum = L::splat(student_top), teacher_maximum = L::splat(teacher_top);
  V plain_s = {}, tempered_s = {}, plain_t = {}, tempered_t = {}, crossed = {}, crossed_back = {};
  V label_mass = {}, label_s = {}, label_t = {}, shifted_s = {}, shifted_t = {};
  const auto add = [&](V student, V teacher, V share, auto keep) __attribute__((always_inline)) {
    const V student_difference = student - student_maximum;
    const auto student_exp = exponentials<K, P::kCrossEntropy, P::kTeacher>(student_difference, inverse_temperature);
    if constexpr (P::kCrossEntropy) plain_s += keep(student_exp.plain);
    V teacher_difference = {};
    if constexpr (P::kTeacher) {
      const V tempered = keep(student_exp.tempered);
      tempered_s += tempered;
      teacher_difference = teacher - teacher_maximum;
      auto teacher_exp = exponentials<K, P::kCrossEntropy, true>(teacher_difference, inverse_temperature);
      teacher_exp.tempered = keep(teacher_exp.tempered);
      if constexpr (P::kCrossEntropy) plain_t += keep(teacher_exp.plain);
      tempered_t += teacher_exp.tempered;
      const V product = teacher_exp.tempered * (teacher_difference - student_difference);
      crossed += teacher_exp.tempered == V{} ? V{} : product;
      if constexpr (Both) {
        const V product_back = tempered * (student_difference - teacher_difference);
        crossed_back += tempered == V{} ? V{} : product_back;
      }
    }
    if constexpr (P::kExtra) {
      if (smooth) {
        shifted_s += keep(student_difference);
        if (P::kTeacher) shifted_t += keep(teacher_difference);
      }
      label_mass += share;
      label_s += share == V{} ? V{} : share * student_difference;
      if (P::kTeacher) label_t += share == V{} ? V{} : share * teacher_difference;
    }
  };
  int64 k = 0;
  for (; k + L::kWidth <= count; k += L::kWidth) {
    const V teacher = P::kTeacher ? load(zt + k) : V{};
    const V share = P::kExtra && labels != nullptr ? load(labels + k) : V{};
    add(load(zs + k), teacher, share, [](V value) __attribute__((always_inline)) { return value; });
  }
  if (k < count && count >= L::kWidth) {
    // The last vector overlaps the one before: its first lanes were added already.
    const auto fresh = ~L::first(L::kWidth - (count - k));
    k = count - L::kWidth;
    const V teacher = P::kTeacher ? load(zt + k) : V{};
    const V share = P::kExtra && labels != nullptr ? (fresh ? load(labels + k) : V{}) : V{};
    add(load(zs + k), teacher, share, [fresh](V value) __attribute__((always_inline)) { return fresh ? value : V{}; });
  } else if (k < count) {
    const auto inside = L::first(count);
    const V teacher = P::kTeacher ? lanes_at(zt, 0, count, teacher_top) : V{};
    const V share = P::kExtra && labels != nullptr ? lanes_at(labels, 0, count, A(0)) : V{};
    add(lanes_at(zs, 0, count, student_top), teacher, share,
        [inside](V value) __attribute__((always_inline)) { return inside ? value : V{}; });
  }
  static_assert(!(Both && P::kExtra), "these sums share a place");
  const V lanes[8] = {plain_s, tempered_s, plain_t, tempered_t, crossed, Both ? crossed_back : label_mass,
                      label_s, label_t};
  A sums[8];
  store_horizontal_sums<8>(lanes, sums);
  return {
      sums[0],
      sums[1],
      sums[2],
      sums[3],
      sums[4],
      Both ? sums[5] : A(0),
      Both ? A(0) : sums[5],
      sums[6],
      sums[7],
      P::kExtra ? horizontal_sum(shifted_s) : A(0),
      P::kExtra ? horizontal_sum(shifted_t) : A(0)};
}

// sum_k e_k * (d_k - d'_k), with e the tempered exponentials and d the differences to the maximum of one side, d' those
// of the other, brought to a maximum of the first side that rose by `rise`. `tempered` is sum_k e_k after the rise,
// `fresh` says that there was no class before.
template <typename A>
inline void raise(A& cross, bool fresh, A rise, A tempered, A inverse_temperature) {
  using L = Lanes<A>;
  if (fresh) {
    cross = 0;
  } else if (rise != A(0)) {
    // Where everything before vanishes, so does what a masked class may have made of it (0 times infinity).
    const A kept = exponential(L::splat(-rise * inverse_temperature))[0];
    cross = kept == A(0) ? A(0) : cross * kept - tempered * rise;
  }
}

// The losses and statistics of one row, with `Both` also those of the head with student and teacher exchanged.
template <typename P, bool Both, typename T, typename A>
void logits_forward_row(const Logits& call, const Head& head, const RowPosition& at, int64 row) {
  using L = Lanes<A>;
  constexpr bool teacher = P::kTeacher;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool smooth = P::kExtra && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_row = row_of<const T>(s, at);
  const T* teacher_row = teacher ? row_of<const T>(t, at) : nullptr;
  const A* label_row = soft ? row_of<const A>(q, at) : nullptr;

  A student_buffer[kClassTile], teacher_buffer[kClassTile], label_buffer[kClassTile];
  Online<A> student_sums, teacher_sums;
  A cross = 0, cross_back = 0, mass = 0, student_label = 0, teacher_label = 0, student_shifted = 0, teacher_shifted = 0;
  for (int64 first = 0; first < classes; first += kClassTile) {
    const int64 count = classes - first < kClassTile ? classes - first : kClassTile;
    const A before = static_cast<A>(first);
    const A* zs = class_tile(student_row, s.stride_c, first, count, student_buffer);
    const A* zt = teacher ? class_tile(teacher_row, t.stride_c, first, count, teacher_buffer) : nullptr;
    const A* labels = soft ? class_tile(label_row, q.stride_c, first, count, label_buffer) : nullptr;
    const bool student_fresh = student_sums.fresh();
    const A student_rise = student_sums.cover(zs, count, inverse_temperature);
    student_label -= mass * student_rise;
    student_shifted -= before * student_rise;
    if (teacher) {
      // cross holds sum e_t * ((z_t - max_t) - (z_s - max_s)): shift its offsets with the maxima.
      cross += teacher_sums.tempered * student_rise;
      const bool fresh = teacher_sums.fresh();
      const A teacher_rise = teacher_sums.cover(zt, count, inverse_temperature);
      raise(cross, fresh, teacher_rise, teacher_sums.tempered, inverse_temperature);
      if constexpr (Both) {
        raise(cross_back, student_fresh, student_rise, student_sums.tempered, inverse_temperature);
        cross_back += student_sums.tempered * teacher_rise;
      }
      teacher_label -= mass * teacher_rise;
      teacher_shifted -= before * teacher_rise;
    }
    const TileSums<A> sums = sum_tile<P, Both>(
        zs, zt, labels, count, student_sums.maximum, teacher_sums.maximum, inverse_temperature, smooth);
    student_sums.plain += sums.plain_s;
    student_sums.tempered += sums.tempered_s;
    teacher_sums.plain += sums.plain_t;
    teacher_sums.tempered += sums.tempered_t;
    cross += sums.cross;
    cross_back += sums.cross_back;
    mass += sums.mass;
    student_label += sums.label_s;
    teacher_label += sums.label_t;
    student_shifted += sums.shifted_s;
    teacher_shifted += sums.shifted_t;
  }

  // Without teacher or labels a sum is 0 and its logarithm is not used.
  const typename L::Vector log_sums = logarithm(
      typename L::Vector{student_sums.plain, teacher_sums.plain, student_sums.tempered, teacher_sums.tempered});
  RowTotals<A> totals = {};
  totals.student_max = student_sums.maximum;
  totals.teacher_max = teacher_sums.maximum;
  totals.student_log_sum = log_sums[0];
  totals.teacher_log_sum = log_sums[1];
  totals.student_log_sum_tempered = log_sums[2];
  totals.teacher_log_sum_tempered = log_sums[3];
  totals.teacher_sum_tempered = teacher_sums.tempered;
  totals.cross = cross;
  totals.mass = mass;
  totals.student_label = student_label;
  totals.teacher_label = teacher_label;
  totals.student_shifted = student_shifted;
  totals.teacher_shifted = teacher_shifted;
  write_losses<P>(call, head, at, row, student_row, teacher_row, totals);
  if constexpr (Both) {
    RowTotals<A> exchanged = {};
    exchanged.student_max = totals.teacher_max;
    exchanged.teacher_max = totals.student_max;
    exchanged.student_log_sum = totals.teacher_log_sum;
    exchanged.teacher_log_sum = totals.student_log_sum;
    exchanged.student_log_sum_tempered = totals.teacher_log_sum_tempered;
    exchanged.teacher_log_sum_tempered = totals.student_log_sum_tempered;
    exchanged.teacher_sum_tempered = student_sums.tempered;
    exchanged.cross = cross_back;
    const int64 other_row = head.exchanged->first_row + row - head.first_row;
    write_losses<P>(call, *head.exchanged, at, other_row, teacher_row, student_row, exchanged);
  }
}

}  // namespace
}  // namespace frskd
