// Checks of the operation `logit_maps`.
#pragma once

#include "checks.h"
#include "logit_maps.h"

namespace frskd {

// Of height and width each; the kernels have tables of a row's and of a column's pixels.
constexpr std::int64_t kLongestSide = std::int64_t{1} << 24;

inline Kind check(const LogitMapsInputs& inputs, const LogitMapsSettings& settings, Device device) {
  const Tensor& student = inputs.student;
  const Kind kind = kind_of(student, "student", device);
  check_map(student, "student", kind);
  if (inputs.teacher.has_value()) check_like(*inputs.teacher, "teacher", kind, kind.dtype, student);
  check_between(settings.height, "height", student.size(2), kLongestSide);
  check_between(settings.width, "width", student.size(3), kLongestSide);
  if (inputs.targets.has_value()) {
    const Tensor& targets = *inputs.targets;
    check_device(targets, "targets", kind);
    check_dtype(targets, "targets", ScalarType::Long);
    check_shape(targets, "targets", std::vector<std::int64_t>{student.size(0), settings.height, settings.width});
  }
  if (inputs.class_weights.has_value()) check_numbers(*inputs.class_weights, "class_weights", kind, {student.size(1)});
  check_between(settings.label_smoothing, "label_smoothing", 0.0, 1.0);
  STD_TORCH_CHECK(
      std::isfinite(settings.temperature) && settings.temperature > 0.0, "temperature is ", settings.temperature,
      ", but a finite number above 0 was wanted.");
  return kind;
}

// A gradient map, which needs the tensor that its loss is computed from.
inline void check_gradient(
    const std::optional<Tensor>& gradient, const char* name, const Kind& kind, const Tensor& student, bool possible) {
  if (!gradient.has_value()) return;
  STD_TORCH_CHECK(possible, name, " is given, but the teacher or the targets that it is a gradient of are not.");
  check_like(*gradient, name, kind, kind.accumulate, student);
}

inline Kind check(const LogitMapsSums& call, Device device) {
  const LogitMapsInputs& inputs = call.inputs;
  const Kind kind = check(inputs, call.settings, device);
  const bool teacher = inputs.teacher.has_value(), targets = inputs.targets.has_value();
  check_numbers(call.sums, "sums", kind, {4});
  check_gradient(call.ce_student, "ce_student", kind, inputs.student, targets);
  check_gradient(call.kd_student, "kd_student", kind, inputs.student, teacher);
  check_gradient(call.ce_teacher, "ce_teacher", kind, inputs.student, targets && teacher);
  check_gradient(call.kd_teacher, "kd_teacher", kind, inputs.student, teacher);
  return kind;
}

inline void check_pixels(
    const std::vector<Tensor>& maps,
    const char* name,
    const Kind& kind,
    const LogitMapsInputs& inputs,
    const LogitMapsSettings& settings) {
  check_count(maps.size(), name, 3);
  for (std::size_t term = 0; term < maps.size(); ++term) {
    check_numbers(maps[term], {name, term}, kind, {inputs.student.size(0), settings.height, settings.width});
  }
}

inline Kind check(const LogitMapsPixels& call, Device device) {
  const Kind kind = check(call.inputs, call.settings, device);
  check_pixels(call.losses, "losses", kind, call.inputs, call.settings);
  return kind;
}

inline Kind check(const LogitMapsPixelsBackward& call, Device device) {
  const LogitMapsInputs& inputs = call.inputs;
  const Kind kind = check(inputs, call.settings, device);
  check_pixels(call.grads, "grads", kind, inputs, call.settings);
  STD_TORCH_CHECK(
      inputs.teacher.has_value() || !call.kd_to_teacher,
      "kd_to_teacher is true without a teacher, but one was wanted.");
  check_gradient(call.student_gradient, "student_gradient", kind, inputs.student, true);
  check_gradient(call.teacher_gradient, "teacher_gradient", kind, inputs.student, inputs.teacher.has_value());
  return kind;
}

}  // namespace frskd
