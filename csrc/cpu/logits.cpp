// Entry points of the logits operation on the CPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>

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

void check_labels(
    const Head& head, const std::int64_t* labels, const std::int64_t strides[3], std::int64_t ignore_index) {
  if (labels == nullptr) return;
  const std::int64_t classes = head.student.channels;
  for (std::int64_t n = 0; n < head.batch; ++n) {
    for (std::int64_t y = 0; y < head.student.height; ++y) {
      for (std::int64_t x = 0; x < head.student.width; ++x) {
        const std::int64_t label = labels[n * strides[0] + y * strides[1] + x * strides[2]];
        STD_TORCH_CHECK(
            (label >= 0 && label < classes) || label == ignore_index, "targets holds the label ", label, ", but with ",
            classes, " classes a label from 0 to ", classes - 1, " (or ignore_index=", ignore_index, ") was wanted.");
      }
    }
  }
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
  for (const Head& head : call.heads) {
    check_labels(head, head.labels, head.label_strides, ignore_index);
    check_labels(head, head.labels_b, head.label_b_strides, ignore_index);
  }
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
  kernels<LogitsKernels>().forward(kernel_call, call.element, run_parallel, thread_count());
}

// A new contiguous tensor (rows, classes), or a scalar for a rank of 0.
Tensor empty_tensor(std::int64_t rank, std::int64_t rows, std::int64_t classes, ScalarType type) {
  const std::int64_t sizes[2] = {rows, classes}, strides[2] = {classes, 1};
  const std::int32_t dtype = type == ScalarType::Double     ? aoti_torch_dtype_float64()
                             : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                             : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                            : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> logits_with_gradients(
    Tensor student,
    Tensor teacher,
    std::optional<Tensor> targets,
    std::optional<Tensor> targets_b,
    double mix,
    double label_smoothing,
    std::int64_t ignore_index,
    double temperature,
    bool mean,
    double ce_student_weight,
    double ce_teacher_weight,
    double kd_weight,
    bool need_teacher) {
  check_settings(mix, label_smoothing, temperature);
  const Element element = element_of(student, "student");
  const Head head =
      head_of(student, &teacher, targets ? &*targets : nullptr, targets_b ? &*targets_b : nullptr, element);
  const std::int64_t rows = rows_of(head), classes = head.student.channels;
  STD_TORCH_CHECK(
      student.dim() == 2 && rows > 0 && classes <= kLargestFusedClasses && (!targets || head.labels != nullptr),
      "student has shape ", shape_text(student), ", but (N, K) with at least one row, at most ", kLargestFusedClasses,
      " classes and labels of dtype int64 were wanted.");
  check_labels(head, head.labels, head.label_strides, ignore_index);
  check_labels(head, head.labels_b, head.label_b_strides, ignore_index);
  STD_TORCH_CHECK(
      targets || !(targets_b || need_teacher),
      "targets_b and need_teacher go with targets: the divergence does not reach the teacher.");
  const ScalarType type = student.scalar_type(), accumulate = accumulate_type(element);
  Tensor ce_student = empty_tensor(0, 1, 1, accumulate), ce_teacher = empty_tensor(0, 1, 1, accumulate);
  Tensor kd = empty_tensor(0, 1, 1, accumulate), student_gradient = empty_tensor(2, rows, classes, type);
  std::optional<Tensor> teacher_gradient;
  if (need_teacher) teacher_gradient = empty_tensor(2, rows, classes, type);
  const std::size_t size = element == Element::kFloat64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[10 * static_cast<std::size_t>(rows) * size]);
  Logits kernel_call{};
  kernel_call.heads = &head;
  kernel_call.count = 1;
  kernel_call.rows = rows;
  kernel_call.mix = mix;
  kernel_call.label_smoothing = label_smoothing;
  kernel_call.ignore_index = ignore_index;
  kernel_call.temperature = temperature;
  kernel_call.has_teacher = true;
  kernel_call.has_targets = targets.has_value();
  kernel_call.losses = workspace.get();
  kernel_call.statistics = workspace.get() + 4 * static_cast<std::size_t>(rows) * size;
  kernel_call.student_gradient = student_gradient.data_ptr();
  kernel_call.teacher_gradient = teacher_gradient ? teacher_gradient->data_ptr() : nullptr;
  kernel_call.parts[0] = ce_student.data_ptr();
  kernel_call.parts[1] = ce_teacher.data_ptr();
  kernel_call.parts[2] = kd.data_ptr();
  kernel_call.weights[0] = ce_student_weight;
  kernel_call.weights[1] = ce_teacher_weight;
  kernel_call.weights[2] = kd_weight;
  kernel_call.mean = mean;
  kernels<LogitsKernels>().forward(kernel_call, element, run_parallel, thread_count());
  return {ce_student, ce_teacher, kd, student_gradient, teacher_gradient};
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
  kernels<LogitsKernels>().backward(kernel_call, call.element, run_parallel, thread_count());
}

}  // namespace
}  // namespace frskd

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CPU, m) {
  m.impl("logits_forward", TORCH_BOX(&frskd::logits_forward));
  m.impl("logits_with_gradients", TORCH_BOX(&frskd::logits_with_gradients));
  m.impl("logits_backward", TORCH_BOX(&frskd::logits_backward));
}
