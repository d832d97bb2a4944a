// One row of class logits, (n, y, x): where it lies, its labels, the losses that follow from the sums over its classes,
// and what its gradient needs besides the logits.
#pragma once

#include "../common/logits_math.h"
#include "logits_plan.h"

namespace frskd {
namespace {

struct RowPosition {
  int64 n, y, x;
};

inline RowPosition position_of(const Map& map, int64 n, int64 pixel) {
  return {n, pixel / map.width, pixel % map.width};
}

// The first class of a row, or null where the map is absent.
template <typename T>
inline T* row_of(const Map& map, const RowPosition& at) {
  if (map.data == nullptr) return nullptr;
  return static_cast<T*>(map.data) + at.n * map.stride_n + at.y * map.stride_h + at.x * map.stride_w;
}

inline std::int64_t label_at(const std::int64_t* labels, const std::int64_t strides[3], const RowPosition& at) {
  return labels[at.n * strides[0] + at.y * strides[1] + at.x * strides[2]];
}

inline bool has_labels(const Head& head) { return head.labels != nullptr || head.probabilities.data != nullptr; }

// The one or two class indices of a row and their weights in the label distribution, before smoothing.
template <typename A>
struct RowLabels {
  int64 index[2];
  A weight[2];  // 0 where absent or ignored, NaN where the label is no class

  A total() const { return weight[0] + weight[1]; }
};

template <typename A>
inline RowLabels<A> row_labels(const Logits& call, const Head& head, const RowPosition& at) {
  RowLabels<A> labels = {{0, 0}, {A(0), A(0)}};
  const auto set = [&](int side, int64 label, A weight) {
    if (label == call.ignore_index) return;
    const bool known = label >= 0 && label < head.student.channels;
    labels.index[side] = known ? label : 0;
    labels.weight[side] = known ? weight : static_cast<A>(__builtin_nan(""));
  };
  if (head.labels == nullptr) return labels;
  const A mix = static_cast<A>(call.mix);
  set(0, label_at(head.labels, head.label_strides, at), head.labels_b == nullptr ? A(1) : mix);
  if (head.labels_b != nullptr) set(1, label_at(head.labels_b, head.label_b_strides, at), A(1) - mix);
  return labels;
}

// What one pass over the classes of a row found. Logits are taken relative to the row's maximum.
template <typename A>
struct RowTotals {
  A student_max, teacher_max;
  A student_log_sum, teacher_log_sum;                    // log sum_k exp(z - max)
  A student_log_sum_tempered, teacher_log_sum_tempered;  // log sum_k exp((z - max) / T)
  A teacher_sum_tempered;
  A cross;                               // as RowSums::cross
  A mass, student_label, teacher_label;  // of probabilities q: sum_k q_k and sum_k q_k (z - max)
  A student_shifted, teacher_shifted;    // sum_k (z - max), for label smoothing
};

// The label distribution's totals; student_picked and teacher_picked are z - max of the two labels.
template <typename A>
inline LabelSums<A> label_sums(
    const Logits& call,
    const Head& head,
    const RowLabels<A>& labels,
    const RowTotals<A>& totals,
    const A student_picked[2],
    const A teacher_picked[2]) {
  const A smoothing = static_cast<A>(call.label_smoothing);
  const A unsmoothed = A(1) - smoothing;
  LabelSums<A> sums;
  if (head.probabilities.data != nullptr) {
    sums = {unsmoothed * totals.mass, unsmoothed * totals.student_label, unsmoothed * totals.teacher_label};
  } else {
    sums = {labels.total(), A(0), A(0)};
    for (int side = 0; side < 2; ++side) {
      // A weight of 0 times a masked logit of -inf must stay 0.
      if (labels.weight[side] == A(0)) continue;
      sums.student_dot += labels.weight[side] * student_picked[side];
      sums.teacher_dot += labels.weight[side] * teacher_picked[side];
    }
    sums.mass *= unsmoothed;
    sums.student_dot *= unsmoothed;
    sums.teacher_dot *= unsmoothed;
  }
  if (smoothing > A(0)) {
    const A share = head.probabilities.data != nullptr ? A(1) : labels.total();
    const A each = smoothing * share / static_cast<A>(head.student.channels);
    sums.mass += smoothing * share;
    sums.student_dot += each * totals.student_shifted;
    sums.teacher_dot += each * totals.teacher_shifted;
  }
  return sums;
}

// Writes the losses and the statistics of one row; `student` and `teacher` point to its first class.
template <typename P, typename T, typename A>
inline void write_losses(
    const Logits& call,
    const Head& head,
    const RowPosition& at,
    int64 row,
    const T* student,
    const T* teacher,
    const RowTotals<A>& totals) {
  constexpr bool has_teacher = P::kTeacher;
  A ce_student = 0, ce_teacher = 0, kd = 0;
  // A row that has labels but is computed without them is an ignored one.
  A weight = P::kCrossEntropy || head.labels == nullptr ? A(1) : A(0);
  A statistics[kStatistics] = {totals.student_max, has_teacher ? totals.teacher_max : A(0), A(0), A(0), A(0), A(0)};
  if (has_teacher) {
    statistics[kStudentLogSumTempered] = totals.student_log_sum_tempered;
    statistics[kTeacherLogSumTempered] = totals.teacher_log_sum_tempered;
    kd = tempered_divergence(
        totals.cross, totals.teacher_sum_tempered, statistics[kStudentLogSumTempered],
        statistics[kTeacherLogSumTempered], static_cast<A>(call.temperature));
  }
  if (P::kCrossEntropy && has_labels(head)) {
    statistics[kStudentLogSum] = totals.student_log_sum;
    statistics[kTeacherLogSum] = has_teacher ? totals.teacher_log_sum : A(0);
    const RowLabels<A> labels = row_labels<A>(call, head, at);
    A student_picked[2] = {A(0), A(0)}, teacher_picked[2] = {A(0), A(0)};
    for (int side = 0; side < 2 && head.labels != nullptr; ++side) {
      const int64 k = labels.index[side];
      student_picked[side] = to_scalar(student[k * head.student.stride_c]) - totals.student_max;
      if (has_teacher) teacher_picked[side] = to_scalar(teacher[k * head.teacher.stride_c]) - totals.teacher_max;
    }
    const LabelSums<A> sums = label_sums(call, head, labels, totals, student_picked, teacher_picked);
    ce_student = cross_entropy(statistics[kStudentLogSum], sums.mass, sums.student_dot);
    if (has_teacher) ce_teacher = cross_entropy(statistics[kTeacherLogSum], sums.mass, sums.teacher_dot);
    if (head.labels != nullptr) weight = labels.total();
  }
  A* losses = static_cast<A*>(call.losses) + row;
  A* saved = static_cast<A*>(call.statistics) + row;
  losses[0] = ce_student;
  losses[call.rows] = ce_teacher;
  losses[2 * call.rows] = kd;
  losses[3 * call.rows] = weight;
  for (int64 k = 0; k < kStatistics; ++k) saved[k * call.rows] = statistics[k];
}

// What the backward of one row needs besides its logits.
template <typename A>
struct RowGradient {
  A grad_student, grad_teacher, grad_kd;  // grad_kd already times T
  A mass;
  A smooth_share;  // added to every class of the label distribution
  A kept;          // factor of the unsmoothed distribution
  A divergence;    // KD / T^2
  A statistics[kStatistics];
  RowLabels<A> labels;
};

template <typename A>
inline RowGradient<A> row_gradient(
    const Logits& call, const Head& head, int64 index, const RowPosition& at, int64 row) {
  RowGradient<A> g = {};
  const A* saved = static_cast<const A*>(call.statistics);
  for (int64 k = 0; k < kStatistics; ++k) g.statistics[k] = saved[k * call.rows + row];
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
  g.labels = row_labels<A>(call, head, at);
  const A smoothing = static_cast<A>(call.label_smoothing);
  const A share = head.probabilities.data != nullptr ? A(1) : g.labels.total();
  g.kept = A(1) - smoothing;
  g.smooth_share = smoothing * share / static_cast<A>(head.student.channels);
  g.mass = share;  // of probabilities the row adds up its own below
  if (head.labels != nullptr && share == A(0)) g.grad_student = g.grad_teacher = A(0);
  return g;
}

}  // namespace
}  // namespace frskd
