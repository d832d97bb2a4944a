// Gradients of class logits, a row at a time in tiles of classes, from the saved statistics.
#pragma once

#include "logits_row.h"
#include "logits_tile.h"
#include "parallel.h"

namespace frskd {
namespace {

// Gradients of one tile of classes; labels of the index kind are subtracted afterwards. With `Both` the teacher's is
// that of a student of the student: of its cross-entropy, and of the divergence by `grad_kd_back`, which times T is
// upstream.
template <typename P, bool StudentWanted, bool TeacherWanted, bool Both, typename A>
inline void differentiate_tile(
    const RowGradient<A>& g,
    const A scale[4],  // exp(-log-sum): student and teacher, then both tempered
    const A* zs,
    const A* zt,
    const A* shares,
    int64 count,
    A inverse_temperature,
    bool kd_to_teacher,
    A grad_kd_back,
    A* student_out,
    A* teacher_out) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr Temperature K = P::kTemperature;
  constexpr bool ce = P::kCrossEntropy, teacher = P::kTeacher;
  const V student_maximum = L::splat(g.statistics[kStudentMax]), teacher_maximum = L::splat(g.statistics[kTeacherMax]);
  const V student_plain = L::splat(g.grad_student * g.mass * scale[0]);
  const V teacher_plain = L::splat(g.grad_teacher * g.mass * scale[1]);
  const V student_tempered = L::splat(scale[2]), teacher_tempered = L::splat(scale[3]);
  const V grad_kd = L::splat(g.grad_kd);
  const A log_offset = g.statistics[kTeacherLogSumTempered] - g.statistics[kStudentLogSumTempered];
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
      if constexpr (Both) value += grad_kd_back * (tempered_t - student_exp.tempered * student_tempered);
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
  const auto whole_step = [&](int64 k) __attribute__((always_inline)) {
    const V other = teacher ? load(zt + k) : V{};
    const V share = P::kExtra && shares != nullptr ? load(shares + k) : V{};
    step(k, load(zs + k), other, share, [](V value, A* out) __attribute__((always_inline)) { store(value, out); });
  };
  for (; k + L::kWidth <= count; k += L::kWidth) whole_step(k);
  if (k < count && count >= L::kWidth) {
    // The last vector overlaps the one before and writes some numbers again.
    whole_step(count - L::kWidth);
  } else if (k < count) {
    const int64 rest = count - k;
    const V other = teacher ? lanes_at(zt, k, count, g.statistics[kTeacherMax]) : V{};
    const V share = P::kExtra && shares != nullptr ? lanes_at(shares, k, count, A(0)) : V{};
    step(
        k, lanes_at(zs, k, count, g.statistics[kStudentMax]), other, share,
        [rest](V value, A* out) __attribute__((always_inline)) { store_first(value, out, rest); });
  }
}

template <typename P, bool Both, typename T, typename A>
void logits_backward_row(const Logits& call, const Head& head, int64 head_index, const RowPosition& at, int64 row) {
  using L = Lanes<A>;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const Map& ds = head.student_gradient;
  const Map& dt = Both ? head.exchanged->student_gradient : head.teacher_gradient;
  const int64 classes = s.channels;
  constexpr bool teacher = P::kTeacher;
  const bool soft = P::kExtra && q.data != nullptr;
  RowGradient<A> g = row_gradient<A>(call, head, head_index, at, row);
  A grad_kd_back = 0;
  if constexpr (Both) {
    const int64 other_row = head.exchanged->first_row + row - head.first_row;
    const auto back = row_gradient<A>(call, *head.exchanged, head.exchanged - call.heads, at, other_row);
    g.grad_teacher = back.grad_student;
    grad_kd_back = back.grad_kd;
  }
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_row = row_of<const T>(s, at);
  const T* teacher_row = teacher ? row_of<const T>(t, at) : nullptr;
  const A* label_row = soft ? row_of<const A>(q, at) : nullptr;
  T* student_out = row_of<T>(ds, at);
  T* teacher_out = row_of<T>(dt, at);
  if (soft) {
    A total = 0;
    for (int64 k = 0; k < classes; ++k) total += label_row[k * q.stride_c];
    g.mass = g.kept * total + static_cast<A>(call.label_smoothing);
  }
  A student_buffer[kClassTile], teacher_buffer[kClassTile], label_buffer[kClassTile];
  A student_gradients[kClassTile], teacher_gradients[kClassTile];
  A scale[4];
  {
    typename L::Vector log_sums = {
        -g.statistics[kStudentLogSum], -g.statistics[kTeacherLogSum], -g.statistics[kStudentLogSumTempered],
        -g.statistics[kTeacherLogSumTempered]};
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
    const auto differentiate = [&](auto student_wanted, auto teacher_wanted) {
      differentiate_tile<P, decltype(student_wanted)::kValue, decltype(teacher_wanted)::kValue, Both>(
          g, scale, zs, zt, shares, count, inverse_temperature, pull, grad_kd_back, student_to, teacher_to);
    };
    if (student_to != nullptr && teacher_to != nullptr) {
      differentiate(Constant<true>{}, Constant<true>{});
    } else if constexpr (!Both) {
      if (student_to != nullptr) differentiate(Constant<true>{}, Constant<false>{});
      if (student_to == nullptr && teacher_to != nullptr) differentiate(Constant<false>{}, Constant<true>{});
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

}  // namespace
}  // namespace frskd
