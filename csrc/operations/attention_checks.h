// Checks of the attention-transfer operations.
#pragma once

#include "attention.h"
#include "checks.h"

namespace frskd {

// A checked pyramid.
struct Levels {
  Kind kind;
  std::int64_t count;
  std::int64_t batch;
  std::int64_t pixels;  // of one sample, over all levels
};

inline void check_level(const Tensor& feature, const Name& name, const Levels& levels) {
  check_map(feature, name, levels.kind);
  STD_TORCH_CHECK(
      feature.size(0) == levels.batch, name, " has batch size ", feature.size(0), ", but ", levels.batch,
      ", that of the first feature, was wanted.");
}

inline Levels check_levels(const std::vector<Tensor>& features, const char* name, Device device) {
  STD_TORCH_CHECK(!features.empty(), name, " is empty, but at least one level was wanted.");
  Levels levels{kind_of(features[0], {name, 0}, device), static_cast<std::int64_t>(features.size()), 0, 0};
  if (features[0].dim() > 0) levels.batch = features[0].size(0);
  for (std::size_t level = 0; level < features.size(); ++level) {
    check_level(features[level], {name, level}, levels);
    levels.pixels += features[level].size(2) * features[level].size(3);
  }
  return levels;
}

inline Levels check(const AttentionForward& call, Device device) {
  check_at_least(call.exponent, "exponent", 1.0);
  const Levels levels = check_levels(call.students, "students", device);
  check_count(call.teachers.size(), "teachers", call.students.size());
  for (std::size_t level = 0; level < call.students.size(); ++level) {
    const Tensor &student = call.students[level], &teacher = call.teachers[level];
    const Name name{"teachers", level};
    check_level(teacher, name, levels);
    STD_TORCH_CHECK(
        student.size(2) == teacher.size(2) && student.size(3) == teacher.size(3), name, " has shape ",
        shape_text(teacher), ", but the height and width of ", Name("students", level), " ", shape_text(student),
        " were wanted.");
  }
  check_numbers(call.losses, "losses", levels.kind, {levels.count, levels.batch});
  const auto check_optional = [&](const std::optional<Tensor>& tensor, const char* name, std::int64_t numel) {
    if (tensor.has_value()) check_numbers(*tensor, name, levels.kind, {numel});
  };
  check_optional(call.student_coefficients, "student_coefficients", levels.batch * levels.pixels);
  check_optional(call.teacher_coefficients, "teacher_coefficients", levels.batch * levels.pixels);
  check_optional(call.workspace, "workspace", 2 * levels.batch * levels.pixels);
  return levels;
}

inline Levels check(const AttentionBackward& call, Device device) {
  check_at_least(call.exponent, "exponent", 1.0);
  const Levels levels = check_levels(call.features, "features", device);
  check_count(call.gradients.size(), "gradients", call.features.size());
  for (std::size_t level = 0; level < call.features.size(); ++level) {
    check_like(call.gradients[level], {"gradients", level}, levels.kind, levels.kind.dtype, call.features[level]);
  }
  check_numbers(call.coefficients, "coefficients", levels.kind, {levels.batch * levels.pixels});
  check_device(call.grad, "grad", levels.kind);
  check_dtype(call.grad, "grad", levels.kind.accumulate);
  check_shape(call.grad, "grad", std::initializer_list<std::int64_t>{levels.count, levels.batch});
  return levels;
}

inline Kind check(const AttentionMap& call, Device device) {
  check_at_least(call.exponent, "exponent", 1.0);
  const Kind kind = kind_of(call.feature, "feature", device);
  check_map(call.feature, "feature", kind);
  check_numbers(call.map, "map", kind, {call.feature.size(0), call.feature.size(2) * call.feature.size(3)});
  check_numbers(call.norm, "norm", kind, {call.feature.size(0)});
  return kind;
}

}  // namespace frskd
