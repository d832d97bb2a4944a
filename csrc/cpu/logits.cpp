// Entry points of the logits operation on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"

namespace frskd {
namespace {

struct Call {
  std::vector<Head> heads;
  std::int64_t rows = 0;
  Element element = Element::kFloat32;
  bool has_probabilities = false;
};

void check_same_shape(const Tensor& tensor, const Tensor& wanted, const char* name) {
  bool same = tensor.dim() == wanted.dim();
  for (std::int64_t axis = 0; same && axis < tensor.dim(); ++axis) same = tensor.sizes()[axis] == wanted.sizes()[axis];
  STD_TORCH_CHECK(
      same, name, " has shape ", shape_text(tensor), ", but that of the student logits ", shape_text(wanted),
      " was wanted.");
}

const std::int64_t* labels_of(const Tensor& labels, const Tensor& logits, std::int64_t strides[3], const char* name) {
  check_on_cpu(labels, name);
  const std::int64_t rank = logits.dim();
  bool same =
      labels.scalar_type() == ScalarType::Long && labels.dim() == rank - 1 && labels.sizes()[0] == logits.sizes()[0];
  for (std::int64_t axis = 2; same && axis < rank; ++axis) same = labels.sizes()[axis - 1] == logits.sizes()[axis];
  STD_TORCH_CHECK(
      same, name, " has shape ", shape_text(labels), ", but one int64 class index for each row of logits ",
      shape_text(logits), " was wanted.");
  strides[0] = labels.strides()[0];
  strides[1] = rank == 4 ? labels.strides()[1] : 0;
  strides[2] = rank >= 3 ? labels.strides()[rank - 2] : 0;
  return static_cast<const std::int64_t*>(labels.data_ptr());
}

// `first_row` is left to the caller; absent tensors are null.
Head head_of(
    const Tensor& student, const Tensor* teacher, const Tensor* target, const Tensor* target_b, Element element) {
  Head head{};
  head.student = map_of(student, element, 2, "students");
  head.batch = student.sizes()[0];
  STD_TORCH_CHECK(head.student.channels > 0, "students has a head without classes.");
  if (teacher != nullptr) {
    check_same_shape(*teacher, student, "teachers");
    head.teacher = map_of(*teacher, element, 2, "teachers");
  }
  if (target == nullptr) return head;
  if (target->scalar_type() == ScalarType::Long) {
    head.labels = labels_of(*target, student, head.label_strides, "targets");
    if (target_b != nullptr) head.labels_b = labels_of(*target_b, student, head.label_b_strides, "targets_b");
  } else {
    STD_TORCH_CHECK(target_b == nullptr, "targets_b goes with class indices, but targets holds probabilities.");
    check_same_shape(*target, student, "targets");
    head.probabilities =
        map_of(*target, element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32, 2, "targets");
  }
  return head;
}

std::int64_t rows_of(const Head& head) { return head.batch * head.student.height * head.student.width; }

Call call_of(
    const std::vector<Tensor>& students,
    const std::vector<Tensor>& teachers,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& targets_b) {
  const std::size_t count = students.size();
  STD_TORCH_CHECK(count > 0, "students is empty, but at least one head was wanted.");
  STD_TORCH_CHECK(
      (teachers.empty() || teachers.size() == count) && (targets.empty() || targets.size() == count) &&
          (targets_b.empty() || (targets_b.size() == count && targets.size() == count)),
      "teachers, targets and targets_b must be empty or have one entry for each of the ", count, " heads.");
  const auto entry = [](const std::vector<Tensor>& tensors, std::size_t index) {
    return tensors.empty() ? nullptr : &tensors[index];
  };
  Call call;
  call.element = element_of(students[0], "students");
  for (std::size_t index = 0; index < count; ++index) {
    const Tensor* target = entry(targets, index);
    Head head = head_of(students[index], entry(teachers, index), target, entry(targets_b, index), call.element);
    head.first_row = call.rows;
    call.has_probabilities |= target != nullptr && target->scalar_type() != ScalarType::Long;
    call.rows += rows_of(head);
    call.heads.push_back(head);
  }
  return call;
}

void check_settings(double mix, double label_smoothing, double temperature) {
  check_number(mix, 0.0, "mix");
  check_number(label_smoothing, 0.0, "label_smoothing");
  check_number(temperature, 0.0, "temperature");
  STD_TORCH_CHECK(
      mix <= 1.0 && label_smoothing <= 1.0 && temperature > 0.0,
      "mix and label_smoothing must be at most 1 and temperature greater than 0.");
}

void logits_forward(
    std::vector<Tensor> students,
    std::vector<Tensor> teachers,
    std::vector<Tensor> targets,
    std::vector<Tensor> targets_b,
    double mix,
    double label_smoothing,
    std::int64_t ignore_index,
    double temperature,
    Tensor losses,
    Tensor statistics,
    Tensor inverse_valid) {
  check_settings(mix, label_smoothing, temperature);
  const Call call = call_of(students, teachers, targets, targets_b);
  Logits kernel_call{};
  kernel_call.heads = call.heads.data();
  kernel_call.count = static_cast<std::int64_t>(call.heads.size());
  kernel_call.rows = call.rows;
  kernel_call.mix = mix;
  kernel_call.label_smoothing = label_smoothing;
  kernel_call.ignore_index = ignore_index;
  kernel_call.temperature = temperature;
  kernel_call.has_teacher = !teachers.empty();
  kernel_call.has_targets = !targets.empty();
  kernel_call.has_probabilities = call.has_probabilities;
  kernel_call.losses = working_tensor(losses, call.element, 4 * call.rows, "losses");
  kernel_call.statistics = working_tensor(statistics, call.element, 6 * call.rows, "statistics");
  kernel_call.inverse_valid = working_tensor(inverse_valid, call.element, kernel_call.count, "inverse_valid");
  kernels().logits_forward(kernel_call, call.element, run_parallel, thread_count());
}

void attach_gradients(
    Call& call,
    const std::vector<Tensor>& gradients,
    const std::vector<Tensor>& logits,
    Map Head::* slot,
    const char* name) {
  if (gradients.empty()) return;
  STD_TORCH_CHECK(
      gradients.size() == logits.size(), name, " has ", gradients.size(), " heads, but ", logits.size(),
      " were wanted.");
  for (std::size_t index = 0; index < gradients.size(); ++index) {
    check_same_shape(gradients[index], logits[index], name);
    call.heads[index].*slot = map_of(gradients[index], call.element, 2, name);
  }
}

void logits_backward(
    std::vector<Tensor> grads,
    std::int64_t grad_head_stride,
    std::int64_t grad_row_stride,
    std::vector<double> scales,
    std::optional<Tensor> inverse_valid,
    std::vector<Tensor> students,
    std::vector<Tensor> teachers,
    std::vector<Tensor> targets,
    std::vector<Tensor> targets_b,
    double mix,
    double label_smoothing,
    std::int64_t ignore_index,
    double temperature,
    Tensor statistics,
    Tensor losses,
    bool kd_to_teacher,
    std::vector<Tensor> student_gradients,
    std::vector<Tensor> teacher_gradients) {
  check_settings(mix, label_smoothing, temperature);
  Call call = call_of(students, teachers, targets, targets_b);
  attach_gradients(call, student_gradients, students, &Head::student_gradient, "student_gradients");
  attach_gradients(call, teacher_gradients, teachers, &Head::teacher_gradient, "teacher_gradients");
  const std::int64_t count = static_cast<std::int64_t>(call.heads.size());
  STD_TORCH_CHECK(
      static_cast<std::int64_t>(scales.size()) == 3 * count, "scales has ", scales.size(),
      " entries, but three for each of the ", count, " heads were wanted.");
  STD_TORCH_CHECK(grads.size() == 3, "grads has ", grads.size(), " entries, but three were wanted.");
  STD_TORCH_CHECK(
      (grad_head_stride == 0 || grad_head_stride == 1) && (grad_row_stride == 0 || grad_row_stride == 1),
      "grad_head_stride and grad_row_stride must be 0 or 1.");
  const std::int64_t needed =
      call.rows == 0 ? 0 : 1 + (count - 1) * grad_head_stride + (call.rows - 1) * grad_row_stride;
  Logits kernel_call{};
  for (int part = 0; part < 3; ++part) {
    check_on_cpu(grads[part], "grads");
    STD_TORCH_CHECK(
        grads[part].scalar_type() == accumulate_type(call.element) && grads[part].dim() == 1 &&
            grads[part].numel() >= needed,
        "grads[", part, "] has shape ", shape_text(grads[part]), ", but one axis of at least ", needed,
        " elements in the accumulate dtype was wanted.");
    kernel_call.grad_strides[part] = grads[part].strides()[0];
    kernel_call.grads[part] = grads[part].data_ptr();
    for (std::int64_t index = 0; index < count; ++index) call.heads[index].scales[part] = scales[3 * index + part];
  }
  kernel_call.heads = call.heads.data();
  kernel_call.count = count;
  kernel_call.rows = call.rows;
  kernel_call.mix = mix;
  kernel_call.label_smoothing = label_smoothing;
  kernel_call.ignore_index = ignore_index;
  kernel_call.temperature = temperature;
  kernel_call.has_teacher = !teachers.empty();
  kernel_call.has_targets = !targets.empty();
  kernel_call.has_probabilities = call.has_probabilities;
  kernel_call.losses = working_tensor(losses, call.element, 4 * call.rows, "losses");
  kernel_call.statistics = working_tensor(statistics, call.element, 6 * call.rows, "statistics");
  kernel_call.inverse_valid =
      inverse_valid ? working_tensor(*inverse_valid, call.element, count, "inverse_valid") : nullptr;
  kernel_call.grad_head_stride = grad_head_stride;
  kernel_call.grad_row_stride = grad_row_stride;
  kernel_call.kd_to_teacher = kd_to_teacher;
  kernels().logits_backward(kernel_call, call.element, run_parallel, thread_count());
}

}  // namespace
}  // namespace frskd

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CPU, m) {
  m.impl("logits_forward", TORCH_BOX(&frskd::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&frskd::logits_backward));
}
