// Losses and gradients of neighbouring pixels of one cell: a vector of pixels in each of several rows, all classes.
#pragma once

#include "../common/logits_math.h"
#include "logit_maps_axis.h"
#include "logit_maps_call.h"

namespace frskd {
namespace {

// The numbers of one call that do not depend on a pixel.
template <typename A>
struct PixelRule {
  explicit PixelRule(const LogitMaps& call)
      : call(call),
        classes(call.student.channels),
        class_weights(static_cast<const A*>(call.class_weights)),
        temperature(static_cast<A>(call.temperature)),
        smoothing(call.labels == nullptr ? A(0) : static_cast<A>(call.label_smoothing)),
        uniform(smoothing / static_cast<A>(classes)),
        total_weight(static_cast<A>(classes)) {
    if (class_weights == nullptr) return;
    double total = 0;
    for (int64 k = 0; k < classes; ++k) total += class_weights[k];
    total_weight = static_cast<A>(total);
  }

  A weight_of(int64 k) const { return class_weights == nullptr ? A(1) : class_weights[k]; }

  const LogitMaps& call;
  const int64 classes;
  const A* class_weights;
  const A temperature;
  const A smoothing;
  const A uniform;  // what smoothing gives to each class
  A total_weight;   // of all classes
};

// Logits of the two rows between which a cell lies, interpolated along the rows: (class, lane).
template <typename A>
struct Corners {
  const A* upper;
  const A* lower;
};

template <typename A>
inline __attribute__((always_inline)) Vector<A> blended(
    const Corners<A>& corners, int64 k, Vector<A> near, Vector<A> far) {
  constexpr int64 width = Lanes<A>::kWidth;
  return near * load(corners.upper + k * width) + far * load(corners.lower + k * width);
}

// What one pass over the classes gathers of a vector of pixels. The tempered sums are those of exp(z / T); where T is 1
// or there are no labels, only they are taken.
template <typename A>
struct PixelSums {
  Vector<A> student_max, teacher_max;
  Vector<A> student_sum, teacher_sum;
  Vector<A> student_tempered, teacher_tempered;
  Vector<A> cross;                             // sum exp(z_t / T) (z_t - z_s), both less their maxima
  Vector<A> student_shifted, teacher_shifted;  // sum of weighted z less its maximum, for label smoothing
};

// One row of a group: its pixels' exponentials, and what their losses and gradients need.
template <typename A>
struct PixelRow {
  static constexpr int64 kWidth = Lanes<A>::kWidth;
  int64 y;
  A near, far;  // its weights of the cell's upper and lower row
  PixelSums<A> sums;
  Vector<A> log_ratio;   // log sum exp(z_t / T) - log sum exp(z_s / T), both less their maxima
  Vector<A> divergence;  // KD / T^2
  // Gradients are sums of these times exponentials. 0 in lanes that have no pixel.
  Vector<A> ce_student, ce_teacher, kd_student, kd_teacher;
  int64 labels[kWidth];   // -1 where there is none
  A own_student[kWidth];  // what the gradient of a label's class has less
  A own_teacher[kWidth];
  Vector<A> smooth_student, smooth_teacher;  // what every class has less, but for its weight
};

// Exponentials of one row: student, teacher, and both tempered where these are others; each (class, lane).
template <typename A, bool kTeacher, bool kBoth>
inline void softmax(
    const PixelRule<A>& rule,
    const Corners<A>& student,
    const Corners<A>& teacher,
    A scale,
    A* exponentials,
    PixelRow<A>& row) {
  using V = Vector<A>;
  using L = Lanes<A>;
  constexpr int64 width = L::kWidth;
  const int64 classes = rule.classes;
  const V near = L::splat(row.near), far = L::splat(row.far);
  // A NaN that the maximum drops comes back by its exponential.
  V student_max = blended(student, 0, near, far), teacher_max = {};
  if (kTeacher) teacher_max = blended(teacher, 0, near, far);
  for (int64 k = 1; k < classes; ++k) {
    const V value = blended(student, k, near, far);
    student_max = value > student_max ? value : student_max;
    if (kTeacher) {
      const V other = blended(teacher, k, near, far);
      teacher_max = other > teacher_max ? other : teacher_max;
    }
  }
  PixelSums<A> sums = {};
  const V factor = L::splat(scale);
  A* of_student = exponentials;
  A* of_teacher = of_student + classes * width;
  A* tempered_student = of_teacher + classes * width;
  A* tempered_teacher = tempered_student + classes * width;
  const bool smooth = rule.smoothing > A(0);
  for (int64 k = 0; k < classes; ++k) {
    const V student_difference = blended(student, k, near, far) - student_max;
    const V student_tempered = exponential(student_difference * factor);
    sums.student_tempered += student_tempered;
    V student_plain = student_tempered;
    if (kBoth) {
      store(student_tempered, tempered_student + k * width);
      student_plain = exponential(student_difference);
      sums.student_sum += student_plain;
    }
    store(student_plain, of_student + k * width);
    V teacher_difference = {};
    if (kTeacher) {
      teacher_difference = blended(teacher, k, near, far) - teacher_max;
      const V teacher_tempered = exponential(teacher_difference * factor);
      sums.teacher_tempered += teacher_tempered;
      const V product = teacher_tempered * (teacher_difference - student_difference);
      sums.cross += teacher_tempered == V{} ? V{} : product;
      V teacher_plain = teacher_tempered;
      if (kBoth) {
        store(teacher_tempered, tempered_teacher + k * width);
        teacher_plain = exponential(teacher_difference);
        sums.teacher_sum += teacher_plain;
      }
      store(teacher_plain, of_teacher + k * width);
    }
    if (smooth) {
      const V weight = L::splat(rule.weight_of(k));
      sums.student_shifted += weight * student_difference;
      if (kTeacher) sums.teacher_shifted += weight * teacher_difference;
    }
  }
  if (!kBoth) {
    sums.student_sum = sums.student_tempered;
    sums.teacher_sum = sums.teacher_tempered;
  }
  sums.student_max = student_max;
  sums.teacher_max = teacher_max;
  row.sums = sums;
}

// Sums of losses over pixels: ce_student, ce_teacher, kd, weight, by lanes.
template <typename A>
struct Totals {
  using Wide = decltype(widened(Vector<A>{}));
  void add(int term, Vector<A> values) {
    const Wide wide = widened(values);
    sums[term].low += wide.low;
    sums[term].high += wide.high;
  }
  Wide sums[4];
};

// Losses of one row's pixels, and the factors of their gradients.
template <typename A, bool kTeacher, bool kBoth>
inline void finish_pixels(
    const PixelRule<A>& rule,
    const Corners<A>& student,
    const Corners<A>& teacher,
    int64 n,
    int64 x,
    int64 count,
    PixelRow<A>& row,
    Totals<A>& totals) {
  using V = Vector<A>;
  using L = Lanes<A>;
  constexpr int64 width = L::kWidth;
  const LogitMaps& call = rule.call;
  const PixelSums<A>& sums = row.sums;
  const V zero = {}, temperature = L::splat(rule.temperature);
  const auto inside = L::first(count);
  const int64 pixel = (n * call.height + row.y) * call.width + x;
  const auto upstream = [&](int term) {
    return call.grads[term] == nullptr ? L::splat(A(1))
                                       : load_up_to(static_cast<const A*>(call.grads[term]) + pixel, count);
  };
  const auto finish = [&](int term, V loss) {
    totals.add(term, loss);
    if (call.losses[term] != nullptr) store_up_to(loss, static_cast<A*>(call.losses[term]) + pixel, count);
  };
  const V log_student = logarithm(sums.student_tempered);
  const V log_teacher = kTeacher ? logarithm(sums.teacher_tempered) : zero;
  row.log_ratio = log_teacher - log_student;
  row.divergence = zero;
  row.kd_student = row.kd_teacher = zero;
  if (kTeacher) {
    const V divergence = sums.cross / (sums.teacher_tempered * temperature) - row.log_ratio;
    row.divergence = divergence;
    const V scale = upstream(2) * temperature;
    row.kd_student = inside ? scale / sums.student_tempered : zero;
    row.kd_teacher = inside ? scale / sums.teacher_tempered : zero;
    finish(2, inside ? divergence * (temperature * temperature) : zero);
  } else {
    finish(2, zero);
  }
  row.ce_student = row.ce_teacher = zero;
  if (call.labels == nullptr) {
    finish(0, zero);
    finish(1, zero);
    return;
  }
  A weights[width], kept[width], student_chosen[width], teacher_chosen[width];
  const int64* labels = call.labels + n * call.label_strides[0] + row.y * call.label_strides[1];
  for (int64 lane = 0; lane < width; ++lane) {
    const int64 label = lane < count ? labels[(x + lane) * call.label_strides[2]] : call.ignore_index;
    const bool counts = label != call.ignore_index, known = counts && label >= 0 && label < rule.classes;
    kept[lane] = counts;
    // A label that is no class gives NaN.
    weights[lane] = known ? rule.weight_of(label) : counts ? static_cast<A>(__builtin_nan("")) : A(0);
    row.labels[lane] = known ? label : -1;
    const int64 place = (known ? label : 0) * width + lane;
    student_chosen[lane] = row.near * student.upper[place] + row.far * student.lower[place];
    if (kTeacher) teacher_chosen[lane] = row.near * teacher.upper[place] + row.far * teacher.lower[place];
  }
  const V weight = load(weights), own = weight * (A(1) - rule.smoothing);
  const auto counts = load(kept) != zero;
  const V uniform = counts ? L::splat(rule.uniform) : zero, whole = own + uniform * rule.total_weight;
  totals.add(3, weight);
  const auto of_network = [&](int term, V chosen, V maximum, V log_sum, V sum, V shifted, V& share, V& smooth,
                              A* less) {
    V loss = own * (log_sum - (chosen - maximum));
    if (rule.smoothing > A(0)) loss += uniform * (log_sum * rule.total_weight - shifted);
    finish(term, counts ? loss : zero);
    const V grad = upstream(term);
    share = counts ? whole * grad / sum : zero;
    smooth = uniform * grad;
    store(own * grad, less);
  };
  of_network(
      0, load(student_chosen), sums.student_max, kBoth ? logarithm(sums.student_sum) : log_student, sums.student_sum,
      sums.student_shifted, row.ce_student, row.smooth_student, row.own_student);
  if (kTeacher) {
    of_network(
        1, load(teacher_chosen), sums.teacher_max, kBoth ? logarithm(sums.teacher_sum) : log_teacher, sums.teacher_sum,
        sums.teacher_shifted, row.ce_teacher, row.smooth_teacher, row.own_teacher);
  } else {
    finish(1, zero);
  }
}

// Adds to the cell's upper and lower row of a gradient map what `Terms` kinds of exponentials give, each times a factor
// of its own. Row r of the group has its exponentials at exponentials[term] + r * step, and its factors, times its
// weights of the upper row, then of the lower, in factors[2 * (r * Terms + term)].
template <typename A, int Terms, int Rows>
inline void accumulate_rows(
    const A* const exponentials[], int64 step, const Vector<A> factors[], int64 classes, A* upper, A* lower) {
  constexpr int64 width = Lanes<A>::kWidth;
  for (int64 k = 0; k < classes; ++k) {
    Vector<A> above = {}, below = {};
    for (int r = 0; r < Rows; ++r) {
      for (int term = 0; term < Terms; ++term) {
        const Vector<A> value = load(exponentials[term] + r * step + k * width);
        above += value * factors[2 * (r * Terms + term)];
        below += value * factors[2 * (r * Terms + term) + 1];
      }
    }
    // One after the other: behind the last cell both are the same row.
    store(load(upper + k * width) + above, upper + k * width);
    store(load(lower + k * width) + below, lower + k * width);
  }
}

template <typename A, int Terms>
inline void accumulate(
    const A* const exponentials[],
    int64 step,
    const Vector<A> factors[],
    int64 rows,
    int64 classes,
    A* upper,
    A* lower) {
  const A* from[Terms];
  for (int term = 0; term < Terms; ++term) from[term] = exponentials[term];
  const auto take = [&](auto count) {
    constexpr int kRows = decltype(count)::kValue;
    accumulate_rows<A, Terms, kRows>(from, step, factors, classes, upper, lower);
    for (int term = 0; term < Terms; ++term) from[term] += kRows * step;
    factors += 2 * Terms * kRows;
    rows -= kRows;
  };
  while (rows >= 4) take(Constant<4>{});
  if (rows >= 2) take(Constant<2>{});
  if (rows >= 1) take(Constant<1>{});
}

// What the divergence gives to the teacher of its own gradient, for one row.
template <typename A>
inline void accumulate_divergence(
    const PixelRule<A>& rule,
    const Corners<A>& student,
    const Corners<A>& teacher,
    const A* tempered_teacher,
    const PixelRow<A>& row,
    A* upper,
    A* lower) {
  using L = Lanes<A>;
  constexpr int64 width = L::kWidth;
  const Vector<A> near = L::splat(row.near), far = L::splat(row.far);
  const Vector<A> inverse = L::splat(A(1) / rule.temperature), offset = row.log_ratio + row.divergence;
  for (int64 k = 0; k < rule.classes; ++k) {
    const Vector<A> difference = (blended(teacher, k, near, far) - row.sums.teacher_max) -
                                 (blended(student, k, near, far) - row.sums.student_max);
    const Vector<A> exponential = load(tempered_teacher + k * width);
    const Vector<A> slope = row.kd_teacher * exponential * (difference * inverse - offset);
    const Vector<A> kept = exponential == Vector<A>{} ? Vector<A>{} : slope;
    store(load(upper + k * width) + near * kept, upper + k * width);
    store(load(lower + k * width) + far * kept, lower + k * width);
  }
}

// What a label's class and, with label smoothing, every class has less than its share of the probabilities.
template <typename A>
inline void subtract_labels(
    const PixelRule<A>& rule, const PixelRow<A>& row, const A* own, Vector<A> smooth, A* upper, A* lower) {
  constexpr int64 width = Lanes<A>::kWidth;
  for (int64 lane = 0; lane < width; ++lane) {
    if (row.labels[lane] < 0) continue;
    const int64 place = row.labels[lane] * width + lane;
    upper[place] -= row.near * own[lane];
    lower[place] -= row.far * own[lane];
  }
  if (rule.smoothing == A(0)) return;
  for (int64 k = 0; k < rule.classes; ++k) {
    const Vector<A> less = smooth * rule.weight_of(k);
    store(load(upper + k * width) - row.near * less, upper + k * width);
    store(load(lower + k * width) - row.far * less, lower + k * width);
  }
}

}  // namespace
}  // namespace frskd
