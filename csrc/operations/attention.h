// Arguments of the operations `attention_forward`, `attention_backward` and `attention_map`; docs/contracts.md has the
// mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct AttentionForward {
  std::vector<Tensor> students;                // L x (N, C_l, H_l, W_l)
  std::vector<Tensor> teachers;                // L x (N, D_l, H_l, W_l)
  double exponent;                             // p >= 1
  Tensor losses;                               // (L, N)
  std::optional<Tensor> student_coefficients;  // (N * sum_l H_l * W_l,)
  std::optional<Tensor> teacher_coefficients;  // the same
  std::optional<Tensor> workspace;             // (2 * N * sum_l H_l * W_l,), of a GPU
  FRSKD_INPUTS(students, teachers, exponent)
  FRSKD_OUTPUTS(losses, student_coefficients, teacher_coefficients, workspace)
};

struct AttentionBackward {
  Tensor grad;                    // (L, N), any strides
  double scale;                   // of grad
  std::vector<Tensor> features;   // L x (N, C_l, H_l, W_l)
  Tensor coefficients;            // (N * sum_l H_l * W_l,)
  double exponent;                // p >= 1
  std::vector<Tensor> gradients;  // as features
  FRSKD_INPUTS(grad, scale, features, coefficients, exponent)
  FRSKD_OUTPUTS(gradients)
};

struct AttentionMap {
  Tensor feature;   // (N, C, H, W)
  double exponent;  // p >= 1
  Tensor map;       // (N, H * W)
  Tensor norm;      // (N,)
  FRSKD_INPUTS(feature, exponent)
  FRSKD_OUTPUTS(map, norm)
};

}  // namespace frskd
