// Arguments of the operation `logit_maps`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct LogitMapsInputs {
  Tensor student;                       // (N, K, h, w)
  std::optional<Tensor> teacher;        // the same
  std::optional<Tensor> targets;        // (N, H, W) class indices
  std::optional<Tensor> class_weights;  // (K,)
  FRSKD_INPUTS(student, teacher, targets, class_weights)
};

struct LogitMapsSettings {
  std::int64_t height;  // H
  std::int64_t width;   // W
  double label_smoothing;
  std::int64_t ignore_index;
  double temperature;
  FRSKD_INPUTS(height, width, label_smoothing, ignore_index, temperature)
};

// Gradient maps are like the maps, but in the accumulate dtype; those that are not wanted are absent.
struct LogitMapsSums {
  LogitMapsInputs inputs;
  LogitMapsSettings settings;
  Tensor sums;                       // (4,): ce_student, ce_teacher, kd, weight
  std::optional<Tensor> ce_student;  // gradients
  std::optional<Tensor> kd_student;
  std::optional<Tensor> ce_teacher;
  std::optional<Tensor> kd_teacher;
  FRSKD_INPUTS(inputs, settings)
  FRSKD_OUTPUTS(sums, ce_student, kd_student, ce_teacher, kd_teacher)
};

struct LogitMapsPixels {
  LogitMapsInputs inputs;
  LogitMapsSettings settings;
  std::vector<Tensor> losses;  // three of (N, H, W): ce_student, ce_teacher, kd
  FRSKD_INPUTS(inputs, settings)
  FRSKD_OUTPUTS(losses)
};

struct LogitMapsPixelsBackward {
  std::vector<Tensor> grads;  // of the three losses, (N, H, W)
  LogitMapsInputs inputs;
  LogitMapsSettings settings;
  bool kd_to_teacher;
  std::optional<Tensor> student_gradient;
  std::optional<Tensor> teacher_gradient;
  FRSKD_INPUTS(grads, inputs, settings, kd_to_teacher)
  FRSKD_OUTPUTS(student_gradient, teacher_gradient)
};

}  // namespace frskd
