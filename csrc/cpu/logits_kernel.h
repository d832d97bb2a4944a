// Cross-entropy and tempered divergence of class logits on the CPU.
// Two ways through memory: "rows" gathers one row at a time in tiles of classes (online softmax over the tiles),
// "pixels" keeps a tile of neighbouring pixels in vector lanes and walks the classes (maps whose pixels are
// contiguous).
#pragma once

#include "../common/logits_math.h"
#include "attention_kernel.h"
#include "simd.h"
#include "views.h"

namespace frskd {
namespace {

constexpr int64 kClassTile =
    1024;  // classes held as accumulate type at once; five such buffers stay in the first-level cache
constexpr int64 kLargestPixelTile = 128;
constexpr int64 kSmallestPixelTile = 16;

inline float logarithm(float value) { return __builtin_logf(value); }
inline double logarithm(double value) { return __builtin_log(value); }

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

template <typename V, typename A>
inline __attribute__((always_inline)) Exponentials<V> exponentials(
    V difference, A inverse_temperature, Temperature kind, bool want_plain, bool want_tempered) {
  if (!want_tempered) return {exponential(difference), V{}};
  const V tempered = exponential(difference * inverse_temperature);
  if (!want_plain) return {V{}, tempered};
  switch (kind) {
    case Temperature::kOne:
      return {tempered, tempered};
    case Temperature::kTwo:
      return {tempered * tempered, tempered};
    case Temperature::kFour: {
      const V square = tempered * tempered;
      return {square * square, tempered};
    }
    case Temperature::kAny:
      break;
  }
  return {exponential(difference), tempered};
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

template <typename V>
inline auto horizontal_maximum(V value) {
  auto result = value[0];
  for (unsigned lane = 1; lane < sizeof(V) / sizeof(value[0]); ++lane) {
    result = (result > value[lane] || result != result) ? result : value[lane];
  }
  return result;
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
    for (int64 k = 0; k < count; k += L::kWidth) largest = ::frskd::maximum(largest, lanes_at(tile, k, count, tile[0]));
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

template <typename A>
struct LabelTotals {
  A mass = 0;
  A student = 0;  // sum_k t_k z_s
  A teacher = 0;
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

template <typename T, typename A>
void logits_forward_row(const Logits& call, const Head& head, int64 n, int64 y, int64 x, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  const bool teacher = t.data != nullptr, ce = has_labels<T>(head), soft = q.data != nullptr;
  const bool smooth = ce && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const Temperature kind = classify_temperature(call.temperature);
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
        cross = cross * exponential(L::splat(-teacher_rise * inverse_temperature))[0] -
                teacher_sums.tempered * teacher_rise;
      }
      teacher_label -= mass * teacher_rise;
      teacher_shifted -= before * teacher_rise;
    }
    const V student_maximum = L::splat(student_sums.maximum), teacher_maximum = L::splat(teacher_sums.maximum);
    V plain_s = {}, tempered_s = {}, plain_t = {}, tempered_t = {}, crossed = {};
    V label_mass = {}, label_s = {}, label_t = {}, shifted_s = {}, shifted_t = {};
    for (int64 k = 0; k < count; k += L::kWidth) {
      const bool partial = k + L::kWidth > count;
      const auto inside = L::first(count - k);
      const V student_difference = lanes_at(zs, k, count, student_sums.maximum) - student_maximum;
      auto student_exp = exponentials(student_difference, inverse_temperature, kind, ce, teacher);
      if (partial) {
        student_exp.plain = inside ? student_exp.plain : V{};
        student_exp.tempered = inside ? student_exp.tempered : V{};
      }
      plain_s += student_exp.plain;
      tempered_s += student_exp.tempered;
      if (smooth) shifted_s += partial ? (inside ? student_difference : V{}) : student_difference;
      V teacher_difference = {};
      if (teacher) {
        teacher_difference = lanes_at(zt, k, count, teacher_sums.maximum) - teacher_maximum;
        auto teacher_exp = exponentials(teacher_difference, inverse_temperature, kind, ce, true);
        if (partial) {
          teacher_exp.plain = inside ? teacher_exp.plain : V{};
          teacher_exp.tempered = inside ? teacher_exp.tempered : V{};
        }
        plain_t += teacher_exp.plain;
        tempered_t += teacher_exp.tempered;
        const V product = teacher_exp.tempered * (teacher_difference - student_difference);
        crossed += teacher_exp.tempered == V{} ? V{} : product;
        if (smooth) shifted_t += partial ? (inside ? teacher_difference : V{}) : teacher_difference;
      }
      if (soft) {
        const V share = lanes_at(labels, k, count, A(0));
        label_mass += share;
        label_s += share == V{} ? V{} : share * student_difference;
        if (teacher) label_t += share == V{} ? V{} : share * teacher_difference;
      }
    }
    student_sums.plain += horizontal_sum(plain_s);
    student_sums.tempered += horizontal_sum(tempered_s);
    teacher_sums.plain += horizontal_sum(plain_t);
    teacher_sums.tempered += horizontal_sum(tempered_t);
    cross += horizontal_sum(crossed);
    mass += horizontal_sum(label_mass);
    student_label += horizontal_sum(label_s);
    teacher_label += horizontal_sum(label_t);
    student_shifted += horizontal_sum(shifted_s);
    teacher_shifted += horizontal_sum(shifted_t);
  }

  A statistics[6] = {student_sums.maximum, teacher ? teacher_sums.maximum : A(0), A(0), A(0), A(0), A(0)};
  RowResult<A> result = {A(0), A(0), A(0), A(1)};
  if (teacher) {
    statistics[4] = logarithm(student_sums.tempered);
    statistics[5] = logarithm(teacher_sums.tempered);
    result.kd = tempered_divergence(
        cross, teacher_sums.tempered, statistics[4], statistics[5], static_cast<A>(call.temperature));
  }
  if (ce) {
    statistics[2] = logarithm(student_sums.plain);
    statistics[3] = teacher ? logarithm(teacher_sums.plain) : A(0);
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
}

// Maps whose pixels are contiguous: `count` neighbouring pixels at once, a class at a time.
template <typename T, typename A>
void logits_forward_pixels(const Logits& call, const Head& head, int64 n, int64 first, int64 count, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  constexpr int64 capacity = kLargestPixelTile;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  const bool teacher = t.data != nullptr, ce = has_labels<T>(head), soft = q.data != nullptr;
  const bool smooth = ce && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const Temperature kind = classify_temperature(call.temperature);
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
      const auto student_exp = exponentials(student_difference, inverse_temperature, kind, ce, teacher);
      if (ce) store(load(plain_s + pixel) + student_exp.plain, plain_s + pixel);
      if (smooth) store(load(shifted_s + pixel) + student_difference, shifted_s + pixel);
      V teacher_difference = {};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        const auto teacher_exp = exponentials(teacher_difference, inverse_temperature, kind, ce, true);
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
  for (int64 pixel = 0; pixel < count; ++pixel) {
    A statistics[6] = {maximum_s[pixel], maximum_t[pixel], A(0), A(0), A(0), A(0)};
    RowResult<A> result = {A(0), A(0), A(0), A(1)};
    if (teacher) {
      statistics[4] = logarithm(tempered_s[pixel]);
      statistics[5] = logarithm(tempered_t[pixel]);
      result.kd = tempered_divergence(
          crossed[pixel], tempered_t[pixel], statistics[4], statistics[5], static_cast<A>(call.temperature));
    }
    if (ce) {
      statistics[2] = logarithm(plain_s[pixel]);
      statistics[3] = teacher ? logarithm(plain_t[pixel]) : A(0);
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
    upstream[part] =
        grads[index * call.grad_head_stride + row * call.grad_row_stride] * static_cast<A>(head.scales[part]);
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

template <typename T, typename A>
void logits_backward_row(const Logits& call, const Head& head, int64 head_index, int64 n, int64 y, int64 x, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const Map& ds = head.student_gradient;
  const Map& dt = head.teacher_gradient;
  const int64 classes = s.channels;
  const bool soft = q.data != nullptr, ce = has_labels<T>(head), teacher = t.data != nullptr;
  const bool kd_to_teacher = call.kd_to_teacher;
  RowGradient<A> g = row_gradient<A>(call, head, head_index, n, y, x, row);
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const Temperature kind = classify_temperature(call.temperature);
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
  const A inverse_s = exponential(L::splat(-g.statistics[2]))[0],
          inverse_t = exponential(L::splat(-g.statistics[3]))[0];
  const A tempered_inverse_s = exponential(L::splat(-g.statistics[4]))[0];
  const A tempered_inverse_t = exponential(L::splat(-g.statistics[5]))[0];
  const A log_offset = g.statistics[5] - g.statistics[4];
  for (int64 first = 0; first < classes; first += kClassTile) {
    const int64 count = classes - first < kClassTile ? classes - first : kClassTile;
    const A* zs = class_tile(student_row, s.stride_c, first, count, student_buffer);
    const A* zt = teacher ? class_tile(teacher_row, t.stride_c, first, count, teacher_buffer) : nullptr;
    const A* shares = soft ? class_tile(label_row, q.stride_c, first, count, label_buffer) : nullptr;
    for (int64 k = 0; k < count; k += L::kWidth) {
      const V student_difference = lanes_at(zs, k, count, g.statistics[0]) - g.statistics[0];
      const auto student_exp = exponentials(student_difference, inverse_temperature, kind, ce, teacher);
      V teacher_difference = {};
      Exponentials<V> teacher_exp = {V{}, V{}};
      if (teacher) {
        teacher_difference = lanes_at(zt, k, count, g.statistics[1]) - g.statistics[1];
        teacher_exp = exponentials(teacher_difference, inverse_temperature, kind, ce && teacher_out != nullptr, true);
      }
      V label = L::splat(g.smooth_share);
      if (soft) label += g.kept * lanes_at(shares, k, count, A(0));
      const V tempered_t = teacher_exp.tempered * tempered_inverse_t;
      if (student_out != nullptr) {
        V value = {};
        if (ce) value += g.grad_student * (student_exp.plain * inverse_s * g.mass - label);
        if (teacher) value += g.grad_kd * (student_exp.tempered * tempered_inverse_s - tempered_t);
        store_first(value, student_gradients + k, count - k < L::kWidth ? count - k : L::kWidth);
      }
      if (teacher_out != nullptr) {
        V value = {};
        if (ce) value += g.grad_teacher * (teacher_exp.plain * inverse_t * g.mass - label);
        if (kd_to_teacher) {
          const V log_ratio = (teacher_difference - student_difference) * inverse_temperature - log_offset;
          const V pull = g.grad_kd * tempered_t * (log_ratio - g.divergence);
          value += teacher_exp.tempered == V{} ? V{} : pull;
        }
        store_first(value, teacher_gradients + k, count - k < L::kWidth ? count - k : L::kWidth);
      }
    }
    for (int side = 0; side < 2 && head.labels != nullptr; ++side) {
      const int64 k = g.labels.index[side] - first;
      if (g.labels.weight[side] == A(0) || k < 0 || k >= count) continue;
      const A share = g.kept * g.labels.weight[side];
      if (student_out != nullptr) student_gradients[k] -= g.grad_student * share;
      if (teacher_out != nullptr) teacher_gradients[k] -= g.grad_teacher * share;
    }
    const auto write = [&](const A* values, T* out, int64 stride) {
      int64 k = 0;
      if (stride == 1) {
        for (; k + L::kWidth <= count; k += L::kWidth) store(load(values + k), out + first + k);
      }
      for (; k < count; ++k) from_scalar(values[k], out + (first + k) * stride);
    };
    if (student_out != nullptr) write(student_gradients, student_out, ds.stride_c);
    if (teacher_out != nullptr) write(teacher_gradients, teacher_out, dt.stride_c);
  }
}

template <typename T, typename A>
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
  const bool soft = q.data != nullptr, ce = has_labels<T>(head), teacher = t.data != nullptr;
  const bool student_wanted = ds.data != nullptr, teacher_wanted = dt.data != nullptr;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const Temperature kind = classify_temperature(call.temperature);
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
      const auto student_exp = exponentials(student_difference, inverse_temperature, kind, ce, teacher);
      V teacher_difference = {};
      Exponentials<V> teacher_exp = {V{}, V{}};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        teacher_exp = exponentials(teacher_difference, inverse_temperature, kind, ce && teacher_wanted, true);
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
        if (call.kd_to_teacher) {
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

template <typename T, typename A>
void logits_forward_typed(const Logits& call, ParallelFor run) {
  for_each_piece(call, run, [&](const Head& head, int64, int64 n, int64 first, int64 count, int64 row) {
    if (count > 0) {
      logits_forward_pixels<T, A>(call, head, n, first, count, row);
    } else {
      logits_forward_row<T, A>(call, head, n, first / head.student.width, first % head.student.width, row);
    }
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

template <typename T, typename A>
void logits_backward_typed(const Logits& call, ParallelFor run) {
  for_each_piece(call, run, [&](const Head& head, int64 index, int64 n, int64 first, int64 count, int64 row) {
    if (count > 0) {
      logits_backward_pixels<T, A>(call, head, index, n, first, count, row);
    } else {
      logits_backward_row<T, A>(call, head, index, n, first / head.student.width, first % head.student.width, row);
    }
  });
}

void logits_forward(const Logits& call, Element element, ParallelFor run, int) {
  switch (element) {
    case Element::kFloat32:
      return logits_forward_typed<float, float>(call, run);
    case Element::kFloat64:
      return logits_forward_typed<double, double>(call, run);
    case Element::kBFloat16:
      return logits_forward_typed<BFloat16, float>(call, run);
    case Element::kFloat16:
      return logits_forward_typed<Half, float>(call, run);
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
