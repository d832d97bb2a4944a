// Arguments of the operations `logits_forward` and `logits_backward`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct LogitsHeads {
  std::vector<Tensor> students;   // heads x (N, K[, H[, W]])
  std::vector<Tensor> teachers;   // the same, or empty
  std::vector<Tensor> targets;    // heads x (N[, H[, W]]) int64, or probabilities like the logits, or empty
  std::vector<Tensor> targets_b;  // second labels of a mix, or empty
  FRSKD_INPUTS(students, teachers, targets, targets_b)
};

struct LogitsSettings {
  double mix;  // weight of the first labels
  double label_smoothing;
  std::int64_t ignore_index;
  double temperature;
  FRSKD_INPUTS(mix, label_smoothing, ignore_index, temperature)
};

struct LogitsForward {
  LogitsHeads heads;
  LogitsSettings settings;
  Tensor losses;         // (4, R)
  Tensor statistics;     // (6, R)
  Tensor inverse_valid;  // (heads,)
  FRSKD_INPUTS(heads, settings)
  FRSKD_OUTPUTS(losses, statistics, inverse_valid)
};

struct LogitsUpstream {
  std::vector<Tensor> grads;   // three of one axis or none: ce_student, ce_teacher, kd
  std::int64_t head_stride;    // elements
  std::int64_t row_stride;     // elements
  std::vector<double> scales;  // (3 * heads,)
  FRSKD_INPUTS(grads, head_stride, row_stride, scales)
};

struct LogitsBackward {
  LogitsUpstream upstream;
  LogitsHeads heads;
  LogitsSettings settings;
  Tensor losses;                          // (4, R)
  Tensor statistics;                      // (6, R)
  std::optional<Tensor> inverse_valid;    // (heads,), of means
  bool kd_to_teacher;                     // whether the divergence reaches the teacher
  std::vector<Tensor> student_gradients;  // as students, or empty
  std::vector<Tensor> teacher_gradients;  // as teachers, or empty
  FRSKD_INPUTS(upstream, heads, settings, losses, statistics, inverse_valid, kd_to_teacher)
  FRSKD_OUTPUTS(student_gradients, teacher_gradients)
};

}  // namespace frskd
