// The gradients of class logits: probabilities are recomputed from the saved statistics.
#pragma once

#include "logits_rows.cuh"

namespace frskd::cuda {

template <typename A>
struct GradientHead {
  Head head;
  LogitsView student_gradient;  // data is null where that side needs none
  LogitsView teacher_gradient;
  A scales[3];  // of ce_student, ce_teacher, kd; 0 where the term is absent
};

template <typename A>
struct BackwardParameters {
  GradientHead<A> heads[kMaxHeads];
  LabelOptions<A> labels;
  const A* grads[3];           // ce_student, ce_teacher, kd; from this launch's first head on
  int64_t grad_strides[3][2];  // per head, per row; elements
  const A* inverse_valid;      // (heads_used,), or null
  const A* statistics;         // (6, total_rows)
  const A* losses;             // (4, total_rows)
  int64_t total_rows;
  int heads_used;
  bool kd_to_teacher;
  A temperature;
  A inverse_temperature;
};

// What the gradient of one class needs of its row.
template <typename A>
struct RowGradient {
  A student_max;
  A teacher_max;
  A student_log_sum;
  A teacher_log_sum;
  A student_log_sum_tempered;
  A teacher_log_sum_tempered;
  A divergence;  // KD / T^2
  A mass;
  A grads[3];  // of ce_student, ce_teacher and T * kd
  bool student_ce;
  bool teacher_ce;
  bool kd;
  bool kd_to_teacher;
};

template <typename A>
__device__ __forceinline__ RowGradient<A> row_gradient(
    const BackwardParameters<A>& parameters,
    const GradientHead<A>& head,
    int index,
    int64_t row,  // of all heads
    A mass) {
  RowGradient<A> gradient{};
  const A inverse_valid = parameters.inverse_valid == nullptr ? A(1) : parameters.inverse_valid[index];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (head.scales[i] == A(0)) continue;
    const A grad = parameters.grads[i][index * parameters.grad_strides[i][0] + row * parameters.grad_strides[i][1]];
    gradient.grads[i] = grad * head.scales[i] * (i == 2 ? parameters.temperature : inverse_valid);
  }
  gradient.student_ce = head.scales[0] != A(0);
  gradient.teacher_ce = head.scales[1] != A(0);
  gradient.kd = head.scales[2] != A(0);
  gradient.kd_to_teacher = gradient.kd && parameters.kd_to_teacher;
  gradient.mass = mass;
  const A* statistics = parameters.statistics + row;
  gradient.student_max = statistics[0];
  gradient.teacher_max = statistics[parameters.total_rows];
  gradient.student_log_sum = statistics[2 * parameters.total_rows];
  gradient.teacher_log_sum = statistics[3 * parameters.total_rows];
  gradient.student_log_sum_tempered = statistics[4 * parameters.total_rows];
  gradient.teacher_log_sum_tempered = statistics[5 * parameters.total_rows];
  gradient.divergence = gradient.kd_to_teacher ? parameters.losses[2 * parameters.total_rows + row] *
                                                     parameters.inverse_temperature * parameters.inverse_temperature
                                               : A(0);
  return gradient;
}

template <typename T, int kCount, bool kPacked>
__device__ __forceinline__ void store_classes(
    T* row,
    int64_t stride_class,
    const accumulate_t<T> (&values)[kCount],
    int first,
    int lane,
    int lanes,
    int classes) {
  if constexpr (kPacked) {
    const int k = first + lane * kCount;
    if (k >= classes) return;
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = static_cast<T>(values[i]);
    store<T, kCount>(row + k, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = class_of<kCount, kPacked>(first, lane, lanes, i);
      if (k < classes) row[k * stride_class] = static_cast<T>(values[i]);
    }
  }
}

template <typename T, int kCount, bool kPacked>
__device__ __forceinline__ void write_row_gradient(
    const GradientHead<accumulate_t<T>>& target,
    const RowPosition& position,
    const RowLabel<accumulate_t<T>>& label,
    const RowGradient<accumulate_t<T>>& gradient,
    int classes,  // 0 for a thread without a row
    int lane,
    accumulate_t<T> inverse_temperature) {
  using A = accumulate_t<T>;
  const Head& head = target.head;
  const int lanes = head.lanes;
  const bool writes_student = target.student_gradient.data != nullptr;
  const bool writes_teacher = target.teacher_gradient.data != nullptr;
  const bool reads_student = writes_student || gradient.kd_to_teacher;
  const bool reads_teacher = writes_teacher || gradient.kd;
  const bool unit_temperature = inverse_temperature == A(1);
  // An ignored row (mass 0) must not meet a NaN of its probabilities.
  const bool student_ce = gradient.student_ce && gradient.mass != A(0);
  const bool teacher_ce = gradient.teacher_ce && gradient.mass != A(0);
  const T* student_row = static_cast<const T*>(head.student.data) + row_offset(head.student, position);
  const T* teacher_row =
      reads_teacher ? static_cast<const T*>(head.teacher.data) + row_offset(head.teacher, position) : nullptr;
  T* student_target =
      writes_student ? static_cast<T*>(target.student_gradient.data) + row_offset(target.student_gradient, position)
                     : nullptr;
  T* teacher_target =
      writes_teacher ? static_cast<T*>(target.teacher_gradient.data) + row_offset(target.teacher_gradient, position)
                     : nullptr;
  for (int first = 0; first < classes; first += lanes * kCount) {
    A student[kCount] = {};
    A teacher[kCount] = {};
    if (reads_student) {
      load_classes<T, kCount, kPacked>(student, student_row, head.student.stride_class, first, lane, lanes, classes);
    }
    if (reads_teacher) {
      load_classes<T, kCount, kPacked>(teacher, teacher_row, head.teacher.stride_class, first, lane, lanes, classes);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = class_of<kCount, kPacked>(first, lane, lanes, i);
      const A label_share = k < classes ? label_of_class(label, k) : A(0);
      const A student_shifted = student[i] - gradient.student_max;
      const A teacher_shifted = teacher[i] - gradient.teacher_max;
      A student_tempered = A(0);
      A teacher_tempered = A(0);
      if (gradient.kd) {
        student_tempered = exponential(student_shifted * inverse_temperature - gradient.student_log_sum_tempered);
        teacher_tempered = exponential(teacher_shifted * inverse_temperature - gradient.teacher_log_sum_tempered);
      }
      if (writes_teacher) {
        const bool shared = unit_temperature && gradient.kd;
        const A probability = !teacher_ce ? A(0)
                              : shared    ? teacher_tempered
                                          : exponential(teacher_shifted - gradient.teacher_log_sum);
        const A log_ratio = (teacher_shifted - student_shifted) * inverse_temperature -
                            (gradient.teacher_log_sum_tempered - gradient.student_log_sum_tempered);
        teacher[i] = teacher_gradient(
            probability, gradient.kd_to_teacher ? teacher_tempered : A(0), log_ratio, gradient.divergence,
            gradient.teacher_ce ? label_share : A(0), teacher_ce ? gradient.mass : A(0), gradient.grads[1],
            gradient.grads[2]);
      }
      if (writes_student) {
        const bool shared = unit_temperature && gradient.kd;
        const A probability = !student_ce ? A(0)
                              : shared    ? student_tempered
                                          : exponential(student_shifted - gradient.student_log_sum);
        student[i] = student_gradient(
            probability, student_tempered, teacher_tempered, gradient.student_ce ? label_share : A(0),
            student_ce ? gradient.mass : A(0), gradient.grads[0], gradient.grads[2]);
      }
    }
    if (writes_student) {
      store_classes<T, kCount, kPacked>(
          student_target, target.student_gradient.stride_class, student, first, lane, lanes, classes);
    }
    if (writes_teacher) {
      store_classes<T, kCount, kPacked>(
          teacher_target, target.teacher_gradient.stride_class, teacher, first, lane, lanes, classes);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 2 : 3)
    logits_gradients(const __grid_constant__ BackwardParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  __shared__ static A mass_scratch[kRowThreads / kWarpSize];
  int index = 0;
  while (index + 1 < parameters.heads_used && blockIdx.x >= parameters.heads[index + 1].head.first_block) ++index;
  const GradientHead<A>& target = parameters.heads[index];
  const Head& head = target.head;
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = head.lanes;
  const int lane = thread % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x - head.first_block) * (kRowThreads / lanes) + thread / lanes;
  const bool has_row = row < head.rows;
  const RowPosition position = row_position(head, has_row ? row : 0);
  const RowLabel<A> label = row_label(head, position, parameters.labels);
  const int classes = has_row ? head.classes : 0;
  A mass = label.mass;
  if (parameters.labels.kind == LabelKind::kProbabilities) {
    A sums[1] = {A(0)};
    for (int k = lane; k < classes; k += lanes) sums[0] += label_of_class(label, k);
    if (lanes == kRowThreads) {
      block_sum<kRowThreads>(sums, mass_scratch);
    } else {
      sums[0] = lane_sum(sums[0], 1, lanes);
    }
    mass = sums[0];
  }
  if (!has_row) return;
  const RowGradient<A> gradient = row_gradient(parameters, target, index, head.first_row + row, mass);
  if (head.packed) {
    write_row_gradient<T, kPackSize<T>, true>(
        target, position, label, gradient, classes, lane, parameters.inverse_temperature);
  } else {
    write_row_gradient<T, kClassesInFlight, false>(
        target, position, label, gradient, classes, lane, parameters.inverse_temperature);
  }
}

}  // namespace frskd::cuda
