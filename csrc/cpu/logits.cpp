// Entry points of the logits operation on the CPU.
#include "../operations/logits.h"

#include "checks.h"
#include "logits_call.h"
#include "threads.h"

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
    STD_TORCH_CHECK(
        target_b == nullptr, "targets_b is given with class probabilities, but it belongs to class indices.");
    check_same_shape(*target, student, "targets");
    head.probabilities =
        map_of(*target, element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32, 2, "targets");
  }
  return head;
}

std::int64_t rows_of(const Head& head) { return head.batch * head.student.height * head.student.width; }

Call call_of(const LogitsHeads& heads) {
  const std::vector<Tensor>&students = heads.students, &teachers = heads.teachers;
  const std::vector<Tensor>&targets = heads.targets, &targets_b = heads.targets_b;
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

void check_settings(const LogitsSettings& settings) {
  check_number(settings.mix, 0.0, "mix");
  check_number(settings.label_smoothing, 0.0, "label_smoothing");
  check_number(settings.temperature, 0.0, "temperature");
  STD_TORCH_CHECK(
      settings.mix <= 1.0 && settings.label_smoothing <= 1.0 && settings.temperature > 0.0,
      "mix and label_smoothing must be at most 1 and temperature greater than 0.");
}

// What both directions give the kernels. `call` must outlive it.
Logits kernel_call_of(
    const Call& call,
    const LogitsHeads& heads,
    const LogitsSettings& settings,
    const Tensor& losses,
    const Tensor& statistics) {
  Logits kernel_call{};
  kernel_call.heads = call.heads.data();
  kernel_call.count = static_cast<std::int64_t>(call.heads.size());
  kernel_call.rows = call.rows;
  kernel_call.mix = settings.mix;
  kernel_call.label_smoothing = settings.label_smoothing;
  kernel_call.ignore_index = settings.ignore_index;
  kernel_call.temperature = settings.temperature;
  kernel_call.has_teacher = !heads.teachers.empty();
  kernel_call.has_targets = !heads.targets.empty();
  kernel_call.has_probabilities = call.has_probabilities;
  kernel_call.losses = working_tensor(losses, call.element, 4 * call.rows, "losses");
  kernel_call.statistics = working_tensor(statistics, call.element, kStatistics * call.rows, "statistics");
  return kernel_call;
}

void logits_forward(const LogitsForward& arguments) {
  check_settings(arguments.settings);
  const Call call = call_of(arguments.heads);
  Logits kernel_call =
      kernel_call_of(call, arguments.heads, arguments.settings, arguments.losses, arguments.statistics);
  kernel_call.inverse_valid = working_tensor(arguments.inverse_valid, call.element, kernel_call.count, "inverse_valid");
  kernels<LogitsKernels>().forward(kernel_call, call.element, run_parallel, thread_count());
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

void attach_upstream(Call& call, Logits& kernel_call, const LogitsUpstream& upstream) {
  const std::int64_t count = kernel_call.count;
  STD_TORCH_CHECK(
      static_cast<std::int64_t>(upstream.scales.size()) == 3 * count, "scales has ", upstream.scales.size(),
      " entries, but three for each of the ", count, " heads were wanted.");
  STD_TORCH_CHECK(upstream.grads.size() == 3, "grads has ", upstream.grads.size(), " entries, but three were wanted.");
  const std::int64_t head_stride = upstream.head_stride, row_stride = upstream.row_stride;
  STD_TORCH_CHECK(
      (head_stride == 0 || head_stride == 1) && (row_stride == 0 || row_stride == 1),
      "head_stride and row_stride must be 0 or 1.");
  const std::int64_t needed = call.rows == 0 ? 0 : 1 + (count - 1) * head_stride + (call.rows - 1) * row_stride;
  for (int part = 0; part < 3; ++part) {
    const Tensor& grad = upstream.grads[part];
    check_on_cpu(grad, "grads");
    STD_TORCH_CHECK(
        grad.scalar_type() == accumulate_type(call.element) && grad.dim() <= 1 && grad.numel() >= needed, "grads[",
        part, "] has shape ", shape_text(grad), ", but one axis or none and at least ", needed,
        " elements in the accumulate dtype was wanted.");
    kernel_call.grad_strides[part] = grad.dim() == 0 ? 0 : grad.strides()[0];
    kernel_call.grads[part] = grad.data_ptr();
    for (std::int64_t index = 0; index < count; ++index) {
      call.heads[index].scales[part] = upstream.scales[3 * index + part];
    }
  }
  kernel_call.grad_head_stride = head_stride;
  kernel_call.grad_row_stride = row_stride;
}

void logits_backward(const LogitsBackward& arguments) {
  check_settings(arguments.settings);
  const LogitsHeads& heads = arguments.heads;
  Call call = call_of(heads);
  attach_gradients(call, arguments.student_gradients, heads.students, &Head::student_gradient, "student_gradients");
  attach_gradients(call, arguments.teacher_gradients, heads.teachers, &Head::teacher_gradient, "teacher_gradients");
  Logits kernel_call = kernel_call_of(call, heads, arguments.settings, arguments.losses, arguments.statistics);
  attach_upstream(call, kernel_call, arguments.upstream);
  const std::optional<Tensor>& inverse_valid = arguments.inverse_valid;
  if (inverse_valid) {
    kernel_call.inverse_valid = working_tensor(*inverse_valid, call.element, kernel_call.count, "inverse_valid");
  }
  kernel_call.kd_to_teacher = arguments.kd_to_teacher;
  kernels<LogitsKernels>().backward(kernel_call, call.element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(logits_forward)
FRSKD_CPU_OPERATION(logits_backward)

}  // namespace
}  // namespace frskd
