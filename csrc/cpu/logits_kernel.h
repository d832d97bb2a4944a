// Cross-entropy and tempered divergence of class logits on the CPU.
// Two ways through memory: "rows" gathers one row at a time in tiles of classes (online softmax over the tiles),
// "pixels" keeps a tile of neighbouring pixels in vector lanes and walks the classes (maps whose pixels are
// contiguous).
#pragma once

#include "../common/logits_math.h"
#include "logits_call.h"
#include "parallel.h"

namespace frskd {
namespace {

constexpr int64 kClassTile =
    1024;  // classes held as accumulate type at once; five such buffers stay in the first-level cache
static_assert(kLargestFusedClasses <= kClassTile, "a row with gradients is one tile");
constexpr int64 kLargestPixelTile = 128;
constexpr int64 kSmallestPixelTile = 16;

// exp(d) from e = exp(d / T): for T = 1, 2, 4 a power of it saves the second exponential.
enum class Temperature { kOne, kTwo, kFour, kAny };

inline Temperature classify_temperature(double temperature) {
  return temperature == 1.0   ? Temperature::kOne
         : temperature == 2.0 ? Temperature::kTwo
         : temperature == 4.0 ? Temperature::kFour
                              : Temperature::kAny;
}

template <typename V>
struct Exponentials {
  V plain;     // exp(d)
  V tempered;  // exp(d / T)
};

template <Temperature K, bool Plain, bool Tempered, typename V, typename A>
inline __attribute__((always_inline)) Exponentials<V> exponentials(V difference, A inverse_temperature) {
  if constexpr (!Tempered) return {exponential(difference), V{}};
  const V tempered = exponential(difference * inverse_temperature);
  if constexpr (!Plain) return {V{}, tempered};
  if constexpr (K == Temperature::kOne) return {tempered, tempered};
  const V square = tempered * tempered;
  if constexpr (K == Temperature::kTwo) return {square, tempered};
  if constexpr (K == Temperature::kFour) return {square * square, tempered};
  return {exponential(difference), tempered};
}

// What a call needs, fixed at compile time so that the inner loops hold no decisions. `Extra` is everything rare:
// probabilities, label smoothing, a divergence that also pulls the teacher.
template <Temperature K, bool CrossEntropy, bool Teacher, bool Extra>
struct Plan {
  static constexpr Temperature kTemperature = K;
  static constexpr bool kCrossEntropy = CrossEntropy;
  static constexpr bool kTeacher = Teacher;
  static constexpr bool kExtra = Extra;
};

template <typename Body>
inline void with_plan(double temperature, bool cross_entropy, bool teacher, bool extra, const Body& body) {
  if (!teacher)
    return extra ? body(Plan<Temperature::kAny, true, false, true>{})
                 : body(Plan<Temperature::kAny, true, false, false>{});
  if (extra) return body(Plan<Temperature::kAny, true, true, true>{});
  if (!cross_entropy) return body(Plan<Temperature::kAny, false, true, false>{});
  switch (classify_temperature(temperature)) {
    case Temperature::kOne:
      return body(Plan<Temperature::kOne, true, true, false>{});
    case Temperature::kTwo:
      return body(Plan<Temperature::kTwo, true, true, false>{});
    case Temperature::kFour:
      return body(Plan<Temperature::kFour, true, true, false>{});
    case Temperature::kAny:
      return body(Plan<Temperature::kAny, true, true, false>{});
  }
}

inline std::int64_t label_at(const std::int64_t* labels, const std::int64_t strides[3], int64 n, int64 y, int64 x) {
  return labels[n * strides[0] + y * strides[1] + x * strides[2]];
}

// The one or two class indices of a row and their weights in the label distribution, before smoothing.
template <typename A>
struct RowLabels {
  int64 index[2];
  A weight[2];  // 0 where absent or ignored
};

template <typename A>
inline RowLabels<A> row_labels(const Logits& call, const Head& head, int64 n, int64 y, int64 x) {
  RowLabels<A> labels = {{0, 0}, {A(0), A(0)}};
  if (head.labels == nullptr) return labels;
  const int64 first = label_at(head.labels, head.label_strides, n, y, x);
  const A mix = static_cast<A>(call.mix);
  if (first != call.ignore_index) {
    labels.index[0] = first;
    labels.weight[0] = head.labels_b == nullptr ? A(1) : mix;
  }
  if (head.labels_b != nullptr) {
    const int64 second = label_at(head.labels_b, head.label_b_strides, n, y, x);
    if (second != call.ignore_index) {
      labels.index[1] = second;
      labels.weight[1] = A(1) - mix;
    }
  }
  return labels;
}

// `count` classes of one row as accumulate type: the tensor itself where it already is, else a copy in `buffer`.
template <typename T, typename A>
inline const A* class_tile(const T* row, int64 stride, int64 first, int64 count, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (stride == 1) return row + first;
  }
  if (stride == 1) {
    constexpr int64 width = Lanes<A>::kWidth;
    int64 k = 0;
    for (; k + width <= count; k += width) store(load(row + first + k), buffer + k);
    for (; k < count; ++k) buffer[k] = to_scalar(row[first + k]);
  } else {
    for (int64 k = 0; k < count; ++k) buffer[k] = to_scalar(row[(first + k) * stride]);
  }
  return buffer;
}

// Vector `k` of a tile; lanes past the end repeat `fill`.
template <typename A>
inline __attribute__((always_inline)) typename Lanes<A>::Vector lanes_at(const A* tile, int64 k, int64 count, A fill) {
  using L = Lanes<A>;
  if (k + L::kWidth <= count) return load(tile + k);
  const auto part = load_first(tile + k, count - k);
  return L::first(count - k) ? part : L::splat(fill);
}

// Running maximum and exponential sums of one side of a row.
template <typename A>
struct Online {
  A maximum = 0;
  A plain = 0;
  A tempered = 0;
  bool started = false;

  // Raises the maximum to cover the tile; returns by how much it rose (0 for the first tile).
  A cover(const A* tile, int64 count, A inverse_temperature) {
    using L = Lanes<A>;
    auto largest = L::splat(tile[0]);
    if (count >= L::kWidth) {
      int64 k = 0;
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

// Where a class's share of the label distribution comes from.
template <typename T>
inline bool has_labels(const Head& head) {
  return head.labels != nullptr || head.probabilities.data != nullptr;
}

template <typename A>
struct RowResult {
  A ce_student, ce_teacher, kd, weight;
};

template <typename A>
inline void write_row(const Logits& call, int64 row, const RowResult<A>& result, const A statistics[6]) {
  A* losses = static_cast<A*>(call.losses);
  A* saved = static_cast<A*>(call.statistics);
  losses[row] = result.ce_student;
  losses[call.rows + row] = result.ce_teacher;
  losses[2 * call.rows + row] = result.kd;
  losses[3 * call.rows + row] = result.weight;
  for (int64 k = 0; k < 6; ++k) saved[k * call.rows + row] = statistics[k];
}

// The label distribution's totals over shifted logits, once maxima are known.
// probability_*: sum_k q_k and sum_k q_k (z - max); plain_*: sum_k (z - max) for smoothing; picked: z_y - max.
template <typename A>
inline LabelSums<A> label_sums(
    const Logits& call,
    const Head& head,
    const RowLabels<A>& labels,
    A student_picked0,
    A student_picked1,
    A teacher_picked0,
    A teacher_picked1,
    A probability_mass,
    A probability_student,
    A probability_teacher,
    A shifted_student,
    A shifted_teacher) {
  const A smoothing = static_cast<A>(call.label_smoothing);
  LabelSums<A> sums;
  if (head.probabilities.data != nullptr) {
    sums = {
        (A(1) - smoothing) * probability_mass, (A(1) - smoothing) * probability_student,
        (A(1) - smoothing) * probability_teacher};
  } else {
    const A first = labels.weight[0], second = labels.weight[1];
    sums = {first + second, A(0), A(0)};
    // A weight of 0 times a masked logit of -inf must stay 0.
    if (first != A(0)) {
      sums.student_dot += first * student_picked0;
      sums.teacher_dot += first * teacher_picked0;
    }
    if (second != A(0)) {
      sums.student_dot += second * student_picked1;
      sums.teacher_dot += second * teacher_picked1;
    }
    sums.mass *= A(1) - smoothing;
    sums.student_dot *= A(1) - smoothing;
    sums.teacher_dot *= A(1) - smoothing;
  }
  if (smoothing > A(0)) {
    const A share = head.probabilities.data != nullptr ? A(1) : labels.weight[0] + labels.weight[1];
    const A each = smoothing * share / static_cast<A>(head.student.channels);
    sums.mass += smoothing * share;
    sums.student_dot += each * shifted_student;
    sums.teacher_dot += each * shifted_teacher;
  }
  return sums;
}

// Sums over one tile of classes, given the maxima.
template <typename A>
struct TileSums {
  A plain_s, tempered_s, plain_t, tempered_t, cross, mass, label_s, label_t, shifted_s, shifted_t;
};

// Where a row's exponentials are left for the gradients that the forward pass computes itself.
template <typename A>
struct Kept {
  A *plain_s, *tempered_s, *plain_t, *tempered_t;
};

template <typename P, bool Keep, typename A>
inline TileSums<A> sum_tile(
    const A* zs,
    const A* zt,
    const A* labels,
    int64 count,
    A student_top,
    A teacher_top,
    A inverse_temperature,
    bool smooth,
    const Kept<A>& kept) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr Temperature K = P::kTemperature;
  const V student_maximum = L::splat(student_top), teacher_maximum = L::splat(teacher_top);
  V plain_s = {}, tempered_s = {}, plain_t = {}, tempered_t = {}, crossed = {};
  V label_mass = {}, label_s = {}, label_t = {}, shifted_s = {}, shifted_t = {};
  const auto add = [&](V student, V teacher, V share, auto keep, auto put) __attribute__((always_inline)) {
    const V student_difference = student - student_maximum;
    const auto student_exp = exponentials<K, P::kCrossEntropy, P::kTeacher>(student_difference, inverse_temperature);
    if constexpr (P::kCrossEntropy) plain_s += keep(student_exp.plain);
    if constexpr (Keep) {
      if constexpr (P::kCrossEntropy) put(student_exp.plain, kept.plain_s);
      if constexpr (P::kTeacher) put(student_exp.tempered, kept.tempered_s);
    }
    V teacher_difference = {};
    if constexpr (P::kTeacher) {
      tempered_s += keep(student_exp.tempered);
      teacher_difference = teacher - teacher_maximum;
      auto teacher_exp = exponentials<K, P::kCrossEntropy, true>(teacher_difference, inverse_temperature);
      if constexpr (Keep) {
        if constexpr (P::kCrossEntropy) put(teacher_exp.plain, kept.plain_t);
        put(teacher_exp.tempered, kept.tempered_t);
      }
      teacher_exp.tempered = keep(teacher_exp.tempered);
      if constexpr (P::kCrossEntropy) plain_t += keep(teacher_exp.plain);
      tempered_t += teacher_exp.tempered;
      const V product = teacher_exp.tempered * (teacher_difference - student_difference);
      crossed += teacher_exp.tempered == V{} ? V{} : product;
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
    add(
        load(zs + k), teacher, share, [](V value) __attribute__((always_inline)) { return value; },
        [k](V value, A* out) __attribute__((always_inline)) { store(value, out + k); });
  }
  if (k < count && count >= L::kWidth) {
    // The last vector overlaps the one before: its first lanes were added already and are stored again as they are.
    const auto fresh = ~L::first(L::kWidth - (count - k));
    k = count - L::kWidth;
    const V teacher = P::kTeacher ? load(zt + k) : V{};
    const V share = P::kExtra && labels != nullptr ? (fresh ? load(labels + k) : V{}) : V{};
    add(
        load(zs + k), teacher, share, [fresh](V value) __attribute__((always_inline)) { return fresh ? value : V{}; },
        [k](V value, A* out) __attribute__((always_inline)) { store(value, out + k); });
  } else if (k < count) {
    const auto inside = L::first(count);
    const V teacher = P::kTeacher ? lanes_at(zt, 0, count, teacher_top) : V{};
    const V share = P::kExtra && labels != nullptr ? lanes_at(labels, 0, count, A(0)) : V{};
    add(
        lanes_at(zs, 0, count, student_top), teacher, share,
        [inside](V value) __attribute__((always_inline)) { return inside ? value : V{}; },
        [count](V value, A* out) __attribute__((always_inline)) { store_first(value, out, count); });
  }
  const V lanes[8] = {plain_s, tempered_s, plain_t, tempered_t, crossed, label_mass, label_s, label_t};
  A sums[8];
  for (int first = 0; first < 8; first += L::kWidth) store(horizontal_sums(lanes + first), sums + first);
  return {
      sums[0],
      sums[1],
      sums[2],
      sums[3],
      sums[4],
      sums[5],
      sums[6],
      sums[7],
      P::kExtra ? horizontal_sum(shifted_s) : A(0),
      P::kExtra ? horizontal_sum(shifted_t) : A(0)};
}

// Writes a row's losses and statistics; returns its exponential sums: student and teacher, then both tempered. `kept`
// is for rows of a single tile.
template <typename P, typename T, bool Keep, typename A>
typename Lanes<A>::Vector logits_forward_row(
    const Logits& call, const Head& head, int64 n, int64 y, int64 x, int64 row, const Kept<A>& kept) {
  using L = Lanes<A>;
  constexpr bool teacher = P::kTeacher, ce = P::kCrossEntropy;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool smooth = P::kExtra && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_row = static_cast<const T*>(s.data) + n * s.stride_n + y * s.stride_h + x * s.stride_w;
  const T* teacher_row =
      teacher ? static_cast<const T*>(t.data) + n * t.stride_n + y * t.stride_h + x * t.stride_w : nullptr;
  const A* label_row =
      soft ? static_cast<const A*>(q.data) + n * q.stride_n + y * q.stride_h + x * q.stride_w : nullptr;

  A student_buffer[kClassTile], teacher_buffer[kClassTile], label_buffer[kClassTile];
  Online<A> student_sums, teacher_sums;
  A cross = 0, mass = 0, student_label = 0, teacher_label = 0, student_shifted = 0, teacher_shifted = 0;
  for (int64 first = 0; first < classes; first += kClassTile) {
    const int64 count = classes - first < kClassTile ? classes - first : kClassTile;
    const A before = static_cast<A>(first);
    const A* zs = class_tile(student_row, s.stride_c, first, count, student_buffer);
    const A* zt = teacher ? class_tile(teacher_row, t.stride_c, first, count, teacher_buffer) : nullptr;
    const A* labels = soft ? class_tile(label_row, q.stride_c, first, count, label_buffer) : nullptr;
    const A student_rise = student_sums.cover(zs, count, inverse_temperature);
    student_label -= mass * student_rise;
    student_shifted -= before * student_rise;
    if (teacher) {
      // cross holds sum e_t * ((z_t - max_t) - (z_s - max_s)): shift its offsets with the maxima.
      cross += teacher_sums.tempered * student_rise;
      const A old_maximum = teacher_sums.maximum;
      const bool fresh = !teacher_sums.started || old_maximum == -static_cast<A>(__builtin_inf());
      const A teacher_rise = teacher_sums.cover(zt, count, inverse_temperature);
      if (fresh) {
        cross = 0;
      } else if (teacher_rise != A(0)) {
        // Where everything before vanishes, so does what a masked class may have made of it (0 times infinity).
        const A kept = exponential(L::splat(-teacher_rise * inverse_temperature))[0];
        cross = kept == A(0) ? A(0) : cross * kept - teacher_sums.tempered * teacher_rise;
      }
      teacher_label -= mass * teacher_rise;
      teacher_shifted -= before * teacher_rise;
    }
    const TileSums<A> sums = sum_tile<P, Keep>(
        zs, zt, labels, count, student_sums.maximum, teacher_sums.maximum, inverse_temperature, smooth, kept);
    student_sums.plain += sums.plain_s;
    student_sums.tempered += sums.tempered_s;
    teacher_sums.plain += sums.plain_t;
    teacher_sums.tempered += sums.tempered_t;
    cross += sums.cross;
    mass += sums.mass;
    student_label += sums.label_s;
    teacher_label += sums.label_t;
    student_shifted += sums.shifted_s;
    teacher_shifted += sums.shifted_t;
  }

  // Without teacher or labels a sum is 0 and its logarithm is not used.
  const typename L::Vector exponential_sums = {
      student_sums.plain, teacher_sums.plain, student_sums.tempered, teacher_sums.tempered};
  const typename L::Vector log_sums = logarithm(exponential_sums);
  A statistics[6] = {student_sums.maximum, teacher ? teacher_sums.maximum : A(0), A(0), A(0), A(0), A(0)};
  RowResult<A> result = {A(0), A(0), A(0), A(1)};
  if (teacher) {
    statistics[4] = log_sums[2];
    statistics[5] = log_sums[3];
    result.kd = tempered_divergence(
        cross, teacher_sums.tempered, statistics[4], statistics[5], static_cast<A>(call.temperature));
  }
  if (ce && has_labels<T>(head)) {
    statistics[2] = log_sums[0];
    statistics[3] = teacher ? log_sums[1] : A(0);
    const RowLabels<A> labels = row_labels<A>(call, head, n, y, x);
    A picked[4] = {A(0), A(0), A(0), A(0)};
    for (int side = 0; side < 2 && head.labels != nullptr; ++side) {
      const int64 index = labels.index[side];
      picked[side] = to_scalar(student_row[index * s.stride_c]) - student_sums.maximum;
      if (teacher) picked[2 + side] = to_scalar(teacher_row[index * t.stride_c]) - teacher_sums.maximum;
    }
    const LabelSums<A> sums = label_sums(
        call, head, labels, picked[0], picked[1], picked[2], picked[3], mass, student_label, teacher_label,
        student_shifted, teacher_shifted);
    result.ce_student = cross_entropy(statistics[2], sums.mass, sums.student_dot);
    if (teacher) result.ce_teacher = cross_entropy(statistics[3], sums.mass, sums.teacher_dot);
    if (head.labels != nullptr) result.weight = labels.weight[0] + labels.weight[1];
  }
  write_row(call, row, result, statistics);
  return exponential_sums;
}

// Maps whose pixels are contiguous: `count` neighbouring pixels at once, a class at a time.
template <typename P, typename T, typename A>
void logits_forward_pixels(const Logits& call, const Head& head, int64 n, int64 first, int64 count, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  constexpr int64 capacity = kLargestPixelTile;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  constexpr bool teacher = P::kTeacher, ce = P::kCrossEntropy;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool smooth = P::kExtra && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_base = static_cast<const T*>(s.data) + n * s.stride_n + first;
  const T* teacher_base = teacher ? static_cast<const T*>(t.data) + n * t.stride_n + first : nullptr;
  const A* label_base = soft ? static_cast<const A*>(q.data) + n * q.stride_n : nullptr;

  A maximum_s[capacity], maximum_t[capacity], plain_s[capacity], plain_t[capacity], tempered_s[capacity];
  A tempered_t[capacity], crossed[capacity], mass[capacity], label_s[capacity], label_t[capacity];
  A shifted_s[capacity], shifted_t[capacity], shares[capacity];
  for (int64 pixel = 0; pixel < capacity; ++pixel) {
    plain_s[pixel] = plain_t[pixel] = tempered_s[pixel] = tempered_t[pixel] = crossed[pixel] = 0;
    mass[pixel] = label_s[pixel] = label_t[pixel] = shifted_s[pixel] = shifted_t[pixel] = 0;
    maximum_s[pixel] = maximum_t[pixel] = 0;
  }
  const auto at = [&](const auto* plane, int64 pixel) {
    return pixel + width <= count ? load(plane + pixel) : load_first(plane + pixel, count - pixel);
  };
  for (int64 k = 0; k < classes; ++k) {
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V value = at(student_base + k * s.stride_c, pixel);
      store(k == 0 ? value : ::frskd::maximum(load(maximum_s + pixel), value), maximum_s + pixel);
      if (teacher) {
        const V other = at(teacher_base + k * t.stride_c, pixel);
        store(k == 0 ? other : ::frskd::maximum(load(maximum_t + pixel), other), maximum_t + pixel);
      }
    }
  }
  for (int64 k = 0; k < classes; ++k) {
    if (soft) {
      for (int64 pixel = 0; pixel < count; ++pixel) {
        const int64 y = (first + pixel) / s.width, x = (first + pixel) % s.width;
        shares[pixel] = label_base[k * q.stride_c + y * q.stride_h + x * q.stride_w];
      }
    }
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V student_difference = at(student_base + k * s.stride_c, pixel) - load(maximum_s + pixel);
      const auto student_exp = exponentials<P::kTemperature, ce, teacher>(student_difference, inverse_temperature);
      if (ce) store(load(plain_s + pixel) + student_exp.plain, plain_s + pixel);
      if (smooth) store(load(shifted_s + pixel) + student_difference, shifted_s + pixel);
      V teacher_difference = {};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        const auto teacher_exp = exponentials<P::kTemperature, ce, true>(teacher_difference, inverse_temperature);
        store(load(tempered_s + pixel) + student_exp.tempered, tempered_s + pixel);
        store(load(tempered_t + pixel) + teacher_exp.tempered, tempered_t + pixel);
        const V product = teacher_exp.tempered * (teacher_difference - student_difference);
        store(load(crossed + pixel) + (teacher_exp.tempered == V{} ? V{} : product), crossed + pixel);
        if (ce) store(load(plain_t + pixel) + teacher_exp.plain, plain_t + pixel);
        if (smooth) store(load(shifted_t + pixel) + teacher_difference, shifted_t + pixel);
      }
      if (soft) {
        const V share = load(shares + pixel);
        store(load(mass + pixel) + share, mass + pixel);
        store(load(label_s + pixel) + (share == V{} ? V{} : share * student_difference), label_s + pixel);
        if (teacher) store(load(label_t + pixel) + (share == V{} ? V{} : share * teacher_difference), label_t + pixel);
      }
    }
  }
  A log_plain_s[capacity], log_plain_t[capacity], log_tempered_s[capacity], log_tempered_t[capacity];
  for (int64 pixel = 0; pixel < count; pixel += width) {
    store(logarithm(load(plain_s + pixel)), log_plain_s + pixel);
    store(logarithm(load(plain_t + pixel)), log_plain_t + pixel);
    store(logarithm(load(tempered_s + pixel)), log_tempered_s + pixel);
    store(logarithm(load(tempered_t + pixel)), log_tempered_t + pixel);
  }
  for (int64 pixel = 0; pixel < count; ++pixel) {
    A statistics[6] = {maximum_s[pixel], maximum_t[pixel], A(0), A(0), A(0), A(0)};
    RowResult<A> result = {A(0), A(0), A(0), A(1)};
    if (teacher) {
      statistics[4] = log_tempered_s[pixel];
      statistics[5] = log_tempered_t[pixel];
      result.kd = tempered_divergence(
          crossed[pixel], tempered_t[pixel], statistics[4], statistics[5], static_cast<A>(call.temperature));
    }
    if (ce && has_labels<T>(head)) {
      statistics[2] = log_plain_s[pixel];
      statistics[3] = teacher ? log_plain_t[pixel] : A(0);
      const RowLabels<A> labels = row_labels<A>(call, head, n, (first + pixel) / s.width, (first + pixel) % s.width);
      A picked[4] = {A(0), A(0), A(0), A(0)};
      for (int side = 0; side < 2 && head.labels != nullptr; ++side) {
        const int64 index = labels.index[side];
        picked[side] = to_scalar(student_base[index * s.stride_c + pixel]) - maximum_s[pixel];
        if (teacher) picked[2 + side] = to_scalar(teacher_base[index * t.stride_c + pixel]) - maximum_t[pixel];
      }
      const LabelSums<A> sums = label_sums(
          call, head, labels, picked[0], picked[1], picked[2], picked[3], mass[pixel], label_s[pixel], label_t[pixel],
          shifted_s[pixel], shifted_t[pixel]);
      result.ce_student = cross_entropy(statistics[2], sums.mass, sums.student_dot);
      if (teacher) result.ce_teacher = cross_entropy(statistics[3], sums.mass, sums.teacher_dot);
      if (head.labels != nullptr) result.weight = labels.weight[0] + labels.weight[1];
    }
    write_row(call, row + pixel, result, statistics);
  }
}

// What the backward of one row needs besides its logits.
template <typename A>
struct RowGradient {
  A grad_student, grad_teacher, grad_kd;  // grad_kd already times T
  A mass;
  A smooth_share;  // added to every class of the label distribution
  A kept;          // factor of the unsmoothed distribution
  A divergence;    // KD / T^2
  A statistics[6];
  RowLabels<A> labels;
};

template <typename A>
inline RowGradient<A> row_gradient(
    const Logits& call, const Head& head, int64 index, int64 n, int64 y, int64 x, int64 row) {
  RowGradient<A> g = {};
  const A* saved = static_cast<const A*>(call.statistics);
  for (int64 k = 0; k < 6; ++k) g.statistics[k] = saved[k * call.rows + row];
  const A temperature = static_cast<A>(call.temperature);
  g.divergence = static_cast<const A*>(call.losses)[2 * call.rows + row] / (temperature * temperature);
  A upstream[3] = {};
  for (int part = 0; part < 3; ++part) {
    if (head.scales[part] == 0.0) continue;
    const A* grads = static_cast<const A*>(call.grads[part]);
    const int64 place = index * call.grad_head_stride + row * call.grad_row_stride;
    upstream[part] = grads[place * call.grad_strides[part]] * static_cast<A>(head.scales[part]);
  }
  const A inverse_valid = call.inverse_valid == nullptr ? A(1) : static_cast<const A*>(call.inverse_valid)[index];
  g.grad_student = upstream[0] * inverse_valid;
  g.grad_teacher = upstream[1] * inverse_valid;
  g.grad_kd = upstream[2] * temperature;
  g.labels = row_labels<A>(call, head, n, y, x);
  const A smoothing = static_cast<A>(call.label_smoothing);
  const A share = head.probabilities.data != nullptr ? A(1) : g.labels.weight[0] + g.labels.weight[1];
  g.kept = A(1) - smoothing;
  g.smooth_share = smoothing * share / static_cast<A>(head.student.channels);
  g.mass = share;  // of probabilities the row adds up its own below
  if (head.labels != nullptr && share == A(0)) g.grad_student = g.grad_teacher = A(0);
  return g;
}

// Gradients of one tile of classes; labels of the index kind are subtracted afterwards.
template <typename P, bool StudentWanted, bool TeacherWanted, typename A>
inline void differentiate_tile(
    const RowGradient<A>& g,
    const A scale[4],  // exp(-log-sum): student and teacher, then both tempered
    const A* zs,
    const A* zt,
    const A* shares,
    int64 count,
    A inverse_temperature,
    bool kd_to_teacher,
    A* student_out,
    A* teacher_out) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr Temperature K = P::kTemperature;
  constexpr bool ce = P::kCrossEntropy, teacher = P::kTeacher;
  const V student_maximum = L::splat(g.statistics[0]), teacher_maximum = L::splat(g.statistics[1]);
  const V student_plain = L::splat(g.grad_student * g.mass * scale[0]);
  const V teacher_plain = L::splat(g.grad_teacher * g.mass * scale[1]);
  const V student_tempered = L::splat(scale[2]), teacher_tempered = L::splat(scale[3]);
  const V grad_kd = L::splat(g.grad_kd);
  const A log_offset = g.statistics[5] - g.statistics[4];
  const auto step = [&](int64 k, V student, V other, V share, auto put) __attribute__((always_inline)) {
    const V student_difference = student - student_maximum;
    const auto student_exp = exponentials < K, ce && StudentWanted, teacher > (student_difference, inverse_temperature);
    V teacher_difference = {}, tempered_t = {};
    Exponentials<V> teacher_exp = {V{}, V{}};
    if constexpr (teacher) {
      teacher_difference = other - teacher_maximum;
      teacher_exp = exponentials < K, ce && TeacherWanted, true > (teacher_difference, inverse_temperature);
      tempered_t = teacher_exp.tempered * teacher_tempered;
    }
    V label = L::splat(g.smooth_share);
    if constexpr (P::kExtra) label += g.kept * share;
    if constexpr (StudentWanted) {
      V value = {};
      if constexpr (ce) value += student_exp.plain * student_plain - g.grad_student * label;
      if constexpr (teacher) value += grad_kd * (student_exp.tempered * student_tempered - tempered_t);
      put(value, student_out + k);
    }
    if constexpr (TeacherWanted) {
      V value = {};
      if constexpr (ce) value += teacher_exp.plain * teacher_plain - g.grad_teacher * label;
      if constexpr (P::kExtra) {
        if (kd_to_teacher) {
          const V log_ratio = (teacher_difference - student_difference) * inverse_temperature - log_offset;
          const V pull = grad_kd * tempered_t * (log_ratio - g.divergence);
          value += teacher_exp.tempered == V{} ? V{} : pull;
        }
      }
      put(value, teacher_out + k);
    }
  };
  int64 k = 0;
  for (; k + L::kWidth <= count; k += L::kWidth) {
    const V other = teacher ? load(zt + k) : V{};
    const V share = P::kExtra && shares != nullptr ? load(shares + k) : V{};
    step(k, load(zs + k), other, share, [](V value, A* out) __attribute__((always_inline)) { store(value, out); });
  }
  if (k < count) {
    const int64 rest = count - k;
    const V other = teacher ? lanes_at(zt, k, count, g.statistics[1]) : V{};
    const V share = P::kExtra && shares != nullptr ? lanes_at(shares, k, count, A(0)) : V{};
    step(
        k, lanes_at(zs, k, count, g.statistics[0]), other, share,
        [rest](V value, A* out) __attribute__((always_inline)) { store_first(value, out, rest); });
  }
}

template <typename P, typename T, typename A>
void logits_backward_row(const Logits& call, const Head& head, int64 head_index, int64 n, int64 y, int64 x, int64 row) {
  using L = Lanes<A>;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const Map& ds = head.student_gradient;
  const Map& dt = head.teacher_gradient;
  const int64 classes = s.channels;
  constexpr bool teacher = P::kTeacher;
  const bool soft = P::kExtra && q.data != nullptr;
  RowGradient<A> g = row_gradient<A>(call, head, head_index, n, y, x, row);
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_row = static_cast<const T*>(s.data) + n * s.stride_n + y * s.stride_h + x * s.stride_w;
  const T* teacher_row =
      teacher ? static_cast<const T*>(t.data) + n * t.stride_n + y * t.stride_h + x * t.stride_w : nullptr;
  const A* label_row =
      soft ? static_cast<const A*>(q.data) + n * q.stride_n + y * q.stride_h + x * q.stride_w : nullptr;
  T* student_out =
      ds.data == nullptr ? nullptr : static_cast<T*>(ds.data) + n * ds.stride_n + y * ds.stride_h + x * ds.stride_w;
  T* teacher_out =
      dt.data == nullptr ? nullptr : static_cast<T*>(dt.data) + n * dt.stride_n + y * dt.stride_h + x * dt.stride_w;
  if (soft) {
    A total = 0;
    for (int64 k = 0; k < classes; ++k) total += label_row[k * q.stride_c];
    g.mass = g.kept * total + static_cast<A>(call.label_smoothing);
  }
  A student_buffer[kClassTile], teacher_buffer[kClassTile], label_buffer[kClassTile];
  A student_gradients[kClassTile], teacher_gradients[kClassTile];
  A scale[4];
  {
    typename L::Vector log_sums = {-g.statistics[2], -g.statistics[3], -g.statistics[4], -g.statistics[5]};
    log_sums = exponential(log_sums);
    for (int lane = 0; lane < 4; ++lane) scale[lane] = log_sums[lane];
  }
  // Straight into the tensor where it already has the accumulate type.
  const auto target = [](T* out, int64 stride, int64 first, A* buffer) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (stride == 1) return reinterpret_cast<A*>(out + first);
    }
    return buffer;
  };
  for (int64 first = 0; first < classes; first += kClassTile) {
    const int64 count = classes - first < kClassTile ? classes - first : kClassTile;
    const A* zs = class_tile(student_row, s.stride_c, first, count, student_buffer);
    const A* zt = teacher ? class_tile(teacher_row, t.stride_c, first, count, teacher_buffer) : nullptr;
    const A* shares = soft ? class_tile(label_row, q.stride_c, first, count, label_buffer) : nullptr;
    A* student_to = student_out == nullptr ? nullptr : target(student_out, ds.stride_c, first, student_gradients);
    A* teacher_to = teacher_out == nullptr ? nullptr : target(teacher_out, dt.stride_c, first, teacher_gradients);
    const bool pull = call.kd_to_teacher;
    if (student_to != nullptr && teacher_to != nullptr) {
      differentiate_tile<P, true, true>(
          g, scale, zs, zt, shares, count, inverse_temperature, pull, student_to, teacher_to);
    } else if (student_to != nullptr) {
      differentiate_tile<P, true, false>(
          g, scale, zs, zt, shares, count, inverse_temperature, pull, student_to, teacher_to);
    } else if (teacher_to != nullptr) {
      differentiate_tile<P, false, true>(
          g, scale, zs, zt, shares, count, inverse_temperature, pull, student_to, teacher_to);
    }
    for (int side = 0; side < 2 && head.labels != nullptr; ++side) {
      const int64 k = g.labels.index[side] - first;
      if (g.labels.weight[side] == A(0) || k < 0 || k >= count) continue;
      const A share = g.kept * g.labels.weight[side];
      if (student_to != nullptr) student_to[k] -= g.grad_student * share;
      if (teacher_to != nullptr) teacher_to[k] -= g.grad_teacher * share;
    }
    const auto write = [&](const A* values, T* out, int64 stride) {
      int64 k = 0;
      if (stride == 1) {
        for (; k + L::kWidth <= count; k += L::kWidth) store(load(values + k), out + first + k);
      }
      for (; k < count; ++k) from_scalar(values[k], out + (first + k) * stride);
    };
    if (student_to == student_gradients) write(student_gradients, student_out, ds.stride_c);
    if (teacher_to == teacher_gradients) write(teacher_gradients, teacher_out, dt.stride_c);
  }
}

template <typename P, typename T, typename A>
void logits_backward_pixels(
    const Logits& call, const Head& head, int64 head_index, int64 n, int64 first, int64 count, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  constexpr int64 capacity = kLargestPixelTile;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const Map& ds = head.student_gradient;
  const Map& dt = head.teacher_gradient;
  const int64 classes = s.channels;
  constexpr bool ce = P::kCrossEntropy, teacher = P::kTeacher;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool student_wanted = ds.data != nullptr, teacher_wanted = dt.data != nullptr;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_base = static_cast<const T*>(s.data) + n * s.stride_n + first;
  const T* teacher_base = teacher ? static_cast<const T*>(t.data) + n * t.stride_n + first : nullptr;
  const A* label_base = soft ? static_cast<const A*>(q.data) + n * q.stride_n : nullptr;
  T* student_out = student_wanted ? static_cast<T*>(ds.data) + n * ds.stride_n + first : nullptr;
  T* teacher_out = teacher_wanted ? static_cast<T*>(dt.data) + n * dt.stride_n + first : nullptr;

  A maximum_s[capacity], maximum_t[capacity], scale_s[capacity], scale_t[capacity], kd_s[capacity], kd_t[capacity];
  A smooth_s[capacity], smooth_t[capacity], grad_s[capacity], grad_t[capacity], grad_kd[capacity], offset[capacity];
  A divergence[capacity], shares[capacity];
  RowLabels<A> labels[capacity];
  A kept = A(1) - static_cast<A>(call.label_smoothing);
  for (int64 pixel = 0; pixel < capacity; ++pixel) {
    maximum_s[pixel] = maximum_t[pixel] = scale_s[pixel] = scale_t[pixel] = kd_s[pixel] = kd_t[pixel] = 0;
    smooth_s[pixel] = smooth_t[pixel] = grad_s[pixel] = grad_t[pixel] = grad_kd[pixel] = offset[pixel] = 0;
    divergence[pixel] = shares[pixel] = 0;
  }
  for (int64 pixel = 0; pixel < count; ++pixel) {
    const int64 y = (first + pixel) / s.width, x = (first + pixel) % s.width;
    RowGradient<A> g = row_gradient<A>(call, head, head_index, n, y, x, row + pixel);
    if (soft) {
      A total = 0;
      for (int64 k = 0; k < classes; ++k) total += label_base[k * q.stride_c + y * q.stride_h + x * q.stride_w];
      g.mass = kept * total + static_cast<A>(call.label_smoothing);
    }
    labels[pixel] = g.labels;
    maximum_s[pixel] = g.statistics[0];
    maximum_t[pixel] = g.statistics[1];
    // exp of a single number, by the same function as the lanes, so that both ways through memory agree.
    const auto inverse = [](A log_sum) { return exponential(L::splat(-log_sum))[0]; };
    scale_s[pixel] = g.grad_student * g.mass * inverse(g.statistics[2]);
    scale_t[pixel] = g.grad_teacher * g.mass * inverse(g.statistics[3]);
    kd_s[pixel] = inverse(g.statistics[4]);
    kd_t[pixel] = inverse(g.statistics[5]);
    smooth_s[pixel] = g.grad_student * g.smooth_share;
    smooth_t[pixel] = g.grad_teacher * g.smooth_share;
    grad_s[pixel] = g.grad_student * kept;
    grad_t[pixel] = g.grad_teacher * kept;
    grad_kd[pixel] = g.grad_kd;
    offset[pixel] = g.statistics[5] - g.statistics[4];
    divergence[pixel] = g.divergence;
  }
  const auto at = [&](const auto* plane, int64 pixel) {
    return pixel + width <= count ? load(plane + pixel) : load_first(plane + pixel, count - pixel);
  };
  const auto write = [&](V value, T* plane, int64 pixel) {
    if (pixel + width <= count) {
      store(value, plane + pixel);
    } else {
      store_first(value, plane + pixel, count - pixel);
    }
  };
  for (int64 k = 0; k < classes; ++k) {
    if (soft || head.labels != nullptr) {
      for (int64 pixel = 0; pixel < count; ++pixel) {
        if (soft) {
          const int64 y = (first + pixel) / s.width, x = (first + pixel) % s.width;
          shares[pixel] = label_base[k * q.stride_c + y * q.stride_h + x * q.stride_w];
        } else {
          const RowLabels<A>& own = labels[pixel];
          shares[pixel] = (own.index[0] == k ? own.weight[0] : A(0)) + (own.index[1] == k ? own.weight[1] : A(0));
        }
      }
    }
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V student_difference = at(student_base + k * s.stride_c, pixel) - load(maximum_s + pixel);
      const auto student_exp = exponentials<P::kTemperature, ce, teacher>(student_difference, inverse_temperature);
      V teacher_difference = {};
      Exponentials<V> teacher_exp = {V{}, V{}};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        teacher_exp = exponentials<P::kTemperature, ce, true>(teacher_difference, inverse_temperature);
      }
      const V share = load(shares + pixel);
      const V tempered_t = teacher_exp.tempered * load(kd_t + pixel);
      if (student_wanted) {
        V value = {};
        if (ce) {
          value += student_exp.plain * load(scale_s + pixel) - (load(smooth_s + pixel) + load(grad_s + pixel) * share);
        }
        if (teacher) value += load(grad_kd + pixel) * (student_exp.tempered * load(kd_s + pixel) - tempered_t);
        write(value, student_out + k * ds.stride_c, pixel);
      }
      if (teacher_wanted) {
        V value = {};
        if (ce) {
          value += teacher_exp.plain * load(scale_t + pixel) - (load(smooth_t + pixel) + load(grad_t + pixel) * share);
        }
        if (P::kExtra && call.kd_to_teacher) {
          const V log_ratio = (teacher_difference - student_difference) * inverse_temperature - load(offset + pixel);
          const V pull = load(grad_kd + pixel) * tempered_t * (log_ratio - load(divergence + pixel));
          value += teacher_exp.tempered == V{} ? V{} : pull;
        }
        write(value, teacher_out + k * dt.stride_c, pixel);
      }
    }
  }
}

// Tile of pixels such that all its classes of student and teacher stay in the second-level cache between the two
// passes.
inline int64 pixel_tile(int64 classes) {
  const int64 fitting = 32768 / classes / 16 * 16;
  return fitting > kLargestPixelTile ? kLargestPixelTile
                                     : (fitting < kSmallestPixelTile ? kSmallestPixelTile : fitting);
}

inline bool absent_or_contiguous(const Map& map) { return map.data == nullptr || pixels_are_contiguous(map); }

inline bool along_pixels(const Head& head) {
  return pixels_of(head.student) >= 8 && pixels_are_contiguous(head.student) && absent_or_contiguous(head.teacher) &&
         absent_or_contiguous(head.student_gradient) && absent_or_contiguous(head.teacher_gradient);
}

// Visits every row or tile of pixels of every head once: body(head, head_index, n, first, count, row) where count is 0
// for a row.
template <typename Body>
void for_each_piece(const Logits& call, ParallelFor run, const Body& body) {
  for (int64 index = 0; index < call.count; ++index) {
    const Head& head = call.heads[index];
    const int64 pixels = pixels_of(head.student);
    const bool tiled = along_pixels(head);
    const int64 tile = tiled ? pixel_tile(head.student.channels) : 1;
    const int64 pieces = pixels == 0 ? 0 : (pixels + tile - 1) / tile;
    // An exponential costs about as much as eight loads.
    parallel(run, head.batch * pieces, grain_for(8 * tile * head.student.channels), [&](int64 begin, int64 end) {
      for (int64 step = begin; step < end; ++step) {
        const int64 n = step / pieces, first = step % pieces * tile;
        const int64 count = pixels - first < tile ? pixels - first : tile;
        body(head, index, n, first, tiled ? count : 0, head.first_row + n * pixels + first);
      }
    });
  }
}

// The rare cases of a call: they share one slower body.
inline bool has_extra(const Logits& call, bool backward) {
  return call.has_probabilities || (backward ? call.kd_to_teacher : call.label_smoothing > 0.0);
}

template <typename T, typename A>
void logits_forward_typed(const Logits& call, ParallelFor run) {
  with_plan(call.temperature, call.has_targets, call.has_teacher, has_extra(call, false), [&](auto plan) {
    using P = decltype(plan);
    for_each_piece(call, run, [&](const Head& head, int64, int64 n, int64 first, int64 count, int64 row) {
      if (count > 0) {
        logits_forward_pixels<P, T, A>(call, head, n, first, count, row);
      } else {
        const int64 width = head.student.width;
        logits_forward_row<P, T, false>(call, head, n, first / width, first % width, row, Kept<A>{});
      }
    });
  });
  const A* weights = static_cast<const A*>(call.losses) + 3 * call.rows;
  for (int64 index = 0; index < call.count; ++index) {
    const Head& head = call.heads[index];
    double valid = 0;
    const int64 rows = head.batch * pixels_of(head.student);
    for (int64 row = 0; row < rows; ++row) valid += weights[head.first_row + row];
    static_cast<A*>(call.inverse_valid)[index] = valid == 0 ? A(0) : static_cast<A>(1.0 / valid);
  }
}

// A row's losses and its gradients, from one set of exponentials.
template <typename P, typename T, typename A>
void logits_row_with_gradients(const Logits& call, const Head& head, int64 row, const A scales[3]) {
  using L = Lanes<A>;
  constexpr bool ce = P::kCrossEntropy;
  constexpr bool rounds = sizeof(T) != sizeof(A);
  const int64 classes = head.student.channels;
  A exponentials[4][kLargestFusedClasses];
  const Kept<A> kept = {exponentials[0], exponentials[1], exponentials[2], exponentials[3]};
  const auto sums = logits_forward_row<P, T, true>(call, head, row, 0, 0, row, kept);
  // A gradient of half precision is complete before it is rounded.
  A unrounded[2][rounds ? kLargestFusedClasses : 1];
  T* const outputs[2] = {
      static_cast<T*>(call.student_gradient) + row * classes,
      call.teacher_gradient == nullptr ? nullptr : static_cast<T*>(call.teacher_gradient) + row * classes};
  A *student = unrounded[0], *teacher = outputs[1] == nullptr ? nullptr : unrounded[1];
  if constexpr (!rounds) {
    student = outputs[0];
    teacher = outputs[1];
  }
  const RowLabels<A> labels = row_labels<A>(call, head, row, 0, 0);
  const A smoothing = static_cast<A>(call.label_smoothing);
  const A share = labels.weight[0] + labels.weight[1];
  const A by_student = share == A(0) ? A(0) : scales[0], by_teacher = share == A(0) ? A(0) : scales[1];
  const A smooth_share = smoothing * share / static_cast<A>(classes);
  const auto student_each = L::splat(by_student * smooth_share), teacher_each = L::splat(by_teacher * smooth_share);
  const auto student_plain = L::splat(by_student * share / sums[0]);
  const auto teacher_plain = L::splat(by_teacher * share / sums[1]);
  const auto student_factor = L::splat(A(1) / sums[2]), teacher_factor = L::splat(A(1) / sums[3]);
  const auto by_kd = L::splat(scales[2] * static_cast<A>(call.temperature));
  const auto finish = [&](int64 k, auto get, auto put) __attribute__((always_inline)) {
    auto gradient = by_kd * (get(kept.tempered_s + k) * student_factor - get(kept.tempered_t + k) * teacher_factor);
    if constexpr (ce) gradient += get(kept.plain_s + k) * student_plain - student_each;
    put(gradient, student + k);
    if (ce && teacher != nullptr) put(get(kept.plain_t + k) * teacher_plain - teacher_each, teacher + k);
  };
  const auto each_vector = [classes](auto whole, auto part) __attribute__((always_inline)) {
    if (classes < L::kWidth) return part();
    for (int64 first = 0; first < classes; first += L::kWidth) {
      // The last vector overlaps the one before and writes the same numbers there.
      whole(first + L::kWidth <= classes ? first : classes - L::kWidth);
    }
  };
  each_vector(
      [&](int64 k) __attribute__((always_inline)) {
        finish(
            k, [](const A* from) __attribute__((always_inline)) { return load(from); },
            [](auto value, A* to) __attribute__((always_inline)) { store(value, to); });
      },
      [&]() __attribute__((always_inline)) {
        finish(
            0, [classes](const A* from) __attribute__((always_inline)) { return load_first(from, classes); },
            [classes](auto value, A* to) __attribute__((always_inline)) { store_first(value, to, classes); });
      });
  for (int side = 0; side < 2; ++side) {
    if (labels.weight[side] == A(0)) continue;
    const A pull = (A(1) - smoothing) * labels.weight[side];
    student[labels.index[side]] -= by_student * pull;
    if (teacher != nullptr) teacher[labels.index[side]] -= by_teacher * pull;
  }
  if constexpr (rounds) {
    for (int side = 0; side < 2 && outputs[side] != nullptr; ++side) {
      const A* from = unrounded[side];
      T* to = outputs[side];
      each_vector(
          [&](int64 k) __attribute__((always_inline)) { store(load(from + k), to + k); },
          [&]() __attribute__((always_inline)) { store_first(load_first(from, classes), to, classes); });
    }
  }
}

// One head of rows (N, K) with K within a tile, class indices or no labels: reduced losses and gradients at once.
template <typename T, typename A>
void logits_with_gradients_typed(const Logits& call, ParallelFor run) {
  const Head& head = call.heads[0];
  double valid = 0;
  for (int64 row = 0; row < call.rows; ++row) {
    const RowLabels<A> labels = row_labels<A>(call, head, row, 0, 0);
    valid += labels.weight[0] + labels.weight[1];
  }
  const double over_kept = !call.mean ? 1 : valid == 0 ? 0 : 1 / valid;
  const double over_rows = !call.mean ? 1 : 1 / static_cast<double>(call.rows);
  const double divisors[3] = {over_kept, over_kept, over_rows};
  A scales[3];
  for (int part = 0; part < 3; ++part) scales[part] = static_cast<A>(call.weights[part] * divisors[part]);
  const bool extra = call.has_targets && has_extra(call, false);
  with_plan(call.temperature, call.has_targets, true, extra, [&](auto plan) {
    using P = decltype(plan);
    if constexpr (P::kTeacher) {
      // A thread that has gone to sleep since the last step takes as long to wake as this does for 16,000 elements.
      parallel(run, call.rows, grain_for(2 * head.student.channels), [&](int64 begin, int64 end) {
        for (int64 row = begin; row < end; ++row) logits_row_with_gradients<P, T>(call, head, row, scales);
      });
    }
  });
  const A* losses = static_cast<const A*>(call.losses);
  double sums[3] = {};
  for (int64 row = 0; row < call.rows; ++row) {
    for (int part = 0; part < 3; ++part) sums[part] += losses[part * call.rows + row];
  }
  for (int part = 0; part < 3; ++part) {
    *static_cast<A*>(call.parts[part]) = static_cast<A>(sums[part] * divisors[part]);
  }
}

template <typename T, typename A>
void logits_backward_typed(const Logits& call, ParallelFor run) {
  with_plan(call.temperature, call.has_targets, call.has_teacher, has_extra(call, true), [&](auto plan) {
    using P = decltype(plan);
    for_each_piece(call, run, [&](const Head& head, int64 index, int64 n, int64 first, int64 count, int64 row) {
      if (count > 0) {
        logits_backward_pixels<P, T, A>(call, head, index, n, first, count, row);
      } else {
        const int64 width = head.student.width;
        logits_backward_row<P, T, A>(call, head, index, n, first / width, first % width, row);
      }
    });
  });
}

template <typename T, typename A>
void logits_forward_either(const Logits& call, ParallelFor run) {
  call.student_gradient == nullptr ? logits_forward_typed<T, A>(call, run)
                                   : logits_with_gradients_typed<T, A>(call, run);
}

void logits_forward(const Logits& call, Element element, ParallelFor run, int) {
  switch (element) {
    case Element::kFloat32:
      return logits_forward_either<float, float>(call, run);
    case Element::kFloat64:
      return logits_forward_either<double, double>(call, run);
    case Element::kBFloat16:
      return logits_forward_either<BFloat16, float>(call, run);
    case Element::kFloat16:
      return logits_forward_either<Half, float>(call, run);
  }
}

void logits_backward(const Logits& call, Element element, ParallelFor run, int) {
  switch (element) {
    case Element::kFloat32:
      return logits_backward_typed<float, float>(call, run);
    case Element::kFloat64:
      return logits_backward_typed<double, double>(call, run);
    case Element::kBFloat16:
      return logits_backward_typed<BFloat16, float>(call, run);
    case Element::kFloat16:
      return logits_backward_typed<Half, float>(call, run);
  }
}

}  // namespace
}  // namespace frskd
