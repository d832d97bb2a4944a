// Arguments of the logits kernels, and their table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

// What the forward pass saves of each row for the backward pass. Maxima and log-sums are kept apart, because their sum
// would lose the log-sum's digits for logits of 1e4.
enum Statistic {
  kStudentMax,  // max z
  kTeacherMax,
  kStudentLogSum,  // log sum_k exp(z - max)
  kTeacherLogSum,
  kStudentLogSumTempered,  // log sum_k exp((z - max) / T)
  kTeacherLogSumTempered,
  kStatistics,
};

// One head of class logits. Absent tensors have a null data pointer.
struct Head {
  Map student;
  Map teacher;
  Map probabilities;           // accumulate dtype
  const std::int64_t* labels;  // (N, H, W)
  const std::int64_t* labels_b;
  std::int64_t label_strides[3];
  std::int64_t label_b_strides[3];
  Map student_gradient;
  Map teacher_gradient;
  std::int64_t batch;
  std::int64_t first_row;  // of this head among all rows
  double scales[3];        // ce_student, ce_teacher, kd
  // Two networks that teach each other come as two heads, student and teacher exchanged. One read of their rows serves
  // both: the first has a pointer to the second here, the second only the mark.
  const Head* exchanged;
  bool is_exchanged;
};

struct Logits {
  const Head* heads;
  std::int64_t count;
  std::int64_t rows;  // of all heads
  double mix;
  double label_smoothing;
  std::int64_t ignore_index;
  double temperature;
  void* losses;         // (4, rows)
  void* statistics;     // (kStatistics, rows)
  void* inverse_valid;  // (count,): written forward; read backward, or null
  const void* grads[3];
  std::int64_t grad_strides[3];  // 0 where one number serves all
  std::int64_t grad_head_stride;
  std::int64_t grad_row_stride;
  bool kd_to_teacher;
  bool has_teacher;  // told apart from the data pointers, which are null where a head has no rows
  bool has_targets;
  bool has_probabilities;
};

struct LogitsKernels {
  void (*forward)(const Logits&, Element, ParallelFor, int threads);
  void (*backward)(const Logits&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_WIDE_KERNELS(LogitsKernels)

}  // namespace frskd
