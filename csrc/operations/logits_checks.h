// Checks of the class-logit operations.
#pragma once

#include "checks.h"
#include "logits.h"

namespace frskd {

inline std::int64_t rows_of(const Tensor& logits) {
  std::int64_t rows = logits.size(0);
  for (std::int64_t axis = 2; axis < logits.dim(); ++axis) rows *= logits.size(axis);
  return rows;
}

// Targets are class indices or probabilities, of one kind in all heads.
inline bool are_class_indices(const std::vector<Tensor>& targets) {
  return !targets.empty() && targets[0].scalar_type() == ScalarType::Long;
}

struct LogitsRows {
  Kind kind;
  std::int64_t heads;
  std::int64_t rows;  // of all heads
};

inline void check_class_indices(const Tensor& labels, const Name& name, const Kind& kind, const Tensor& logits) {
  check_device(labels, name, kind);
  check_dtype(labels, name, ScalarType::Long);
  bool same = labels.dim() == logits.dim() - 1;
  for (std::int64_t axis = 0; same && axis < labels.dim(); ++axis) {
    same = labels.size(axis) == logits.size(axis == 0 ? 0 : axis + 1);
  }
  STD_TORCH_CHECK(
      same, name, " has shape ", shape_text(labels), ", but the shape of its logits ", shape_text(logits),
      " without the class axis was wanted.");
}

inline LogitsRows check(const LogitsHeads& heads, const LogitsSettings& settings, Device device) {
  check_between(settings.mix, "mix", 0.0, 1.0);
  check_between(settings.label_smoothing, "label_smoothing", 0.0, 1.0);
  STD_TORCH_CHECK(
      std::isfinite(settings.temperature) && settings.temperature > 0.0, "temperature is ", settings.temperature,
      ", but a finite number above 0 was wanted.");
  const std::vector<Tensor>&students = heads.students, &teachers = heads.teachers;
  const std::vector<Tensor>&targets = heads.targets, &targets_b = heads.targets_b;
  STD_TORCH_CHECK(!students.empty(), "students is empty, but at least one head was wanted.");
  const Kind kind = kind_of(students[0], {"students", 0}, device);
  if (!teachers.empty()) check_count(teachers.size(), "teachers", students.size());
  if (!targets.empty()) {
    check_count(targets.size(), "targets", students.size());
    check_device(targets[0], {"targets", 0}, kind);
  }
  const bool indices = are_class_indices(targets);
  STD_TORCH_CHECK(
      indices || targets_b.empty(), "targets_b is given without class indices in targets, but they were wanted.");
  if (!targets_b.empty()) check_count(targets_b.size(), "targets_b", students.size());
  LogitsRows checked{kind, static_cast<std::int64_t>(students.size()), 0};
  for (std::size_t head = 0; head < students.size(); ++head) {
    const Tensor& student = students[head];
    const Name name{"students", head};
    check_device(student, name, kind);
    check_dtype(student, name, kind.dtype);
    STD_TORCH_CHECK(
        student.dim() >= 2 && student.dim() <= 4, name, " has shape ", shape_text(student),
        ", but (N, K), (N, K, W) or (N, K, H, W) was wanted.");
    STD_TORCH_CHECK(
        student.size(1) > 0 && student.size(1) <= (std::int64_t{1} << 30), name, " has shape ", shape_text(student),
        ", but from 1 to 2^30 classes were wanted.");
    if (!teachers.empty()) check_like(teachers[head], {"teachers", head}, kind, kind.dtype, student);
    if (indices) check_class_indices(targets[head], {"targets", head}, kind, student);
    if (!targets_b.empty()) check_class_indices(targets_b[head], {"targets_b", head}, kind, student);
    if (!targets.empty() && !indices) check_like(targets[head], {"targets", head}, kind, kind.accumulate, student);
    checked.rows += rows_of(student);
  }
  return checked;
}

inline LogitsRows check(const LogitsForward& call, Device device) {
  const LogitsRows checked = check(call.heads, call.settings, device);
  check_numbers(call.losses, "losses", checked.kind, {4, checked.rows});
  check_numbers(call.statistics, "statistics", checked.kind, {6, checked.rows});
  check_numbers(call.inverse_valid, "inverse_valid", checked.kind, {checked.heads});
  return checked;
}

inline LogitsRows check(const LogitsBackward& call, Device device) {
  const LogitsRows checked = check(call.heads, call.settings, device);
  const Kind& kind = checked.kind;
  check_numbers(call.losses, "losses", kind, {4, checked.rows});
  check_numbers(call.statistics, "statistics", kind, {6, checked.rows});
  if (call.inverse_valid.has_value()) check_numbers(*call.inverse_valid, "inverse_valid", kind, {checked.heads});
  const auto check_gradients = [&](const std::vector<Tensor>& gradients, const char* name,
                                   const std::vector<Tensor>& logits) {
    if (gradients.empty()) return;
    check_count(gradients.size(), name, logits.size());
    for (std::size_t head = 0; head < gradients.size(); ++head) {
      check_like(gradients[head], {name, head}, kind, kind.dtype, logits[head]);
    }
  };
  check_gradients(call.student_gradients, "student_gradients", call.heads.students);
  check_gradients(call.teacher_gradients, "teacher_gradients", call.heads.teachers);
  const std::int64_t head_stride = call.upstream.head_stride, row_stride = call.upstream.row_stride;
  check_count(call.upstream.scales.size(), "scales", 3 * call.heads.students.size());
  check_between<std::int64_t>(head_stride, "head_stride", 0, 1);
  check_between<std::int64_t>(row_stride, "row_stride", 0, 1);
  check_count(call.upstream.grads.size(), "grads", 3);
  const std::int64_t wanted =
      checked.rows == 0 ? 0 : 1 + (checked.heads - 1) * head_stride + (checked.rows - 1) * row_stride;
  for (std::size_t term = 0; term < 3; ++term) {
    const Tensor& grad = call.upstream.grads[term];
    const Name name{"grads", term};
    check_device(grad, name, kind);
    check_dtype(grad, name, kind.accumulate);
    STD_TORCH_CHECK(
        grad.dim() <= 1 && grad.numel() >= wanted, name, " has shape ", shape_text(grad),
        ", but one axis or none, and at least ", wanted, " elements were wanted.");
  }
  return checked;
}

}  // namespace frskd
