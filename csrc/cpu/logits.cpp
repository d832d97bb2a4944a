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
  Call call;
  call.element = element_of(students[0], "students");
  for (std::size_t index = 0; index < count; ++index) {
    Head head{};
    head.student = map_of(students[index], call.element, 2, "students");
    head.batch = students[index].sizes()[0];
    head.first_row = call.rows;
    STD_TORCH_CHECK(head.student.channels > 0, "students has a head without classes.");
    if (!teachers.empty()) {
      check_same_shape(teachers[index], students[index], "teachers");
      head.teacher = map_of(teachers[index], call.element, 2, "teachers");
    }
    if (!targets.empty()) {
      const Tensor& target = targets[index];
      if (target.scalar_type() == ScalarType::Long) {
        head.labels = labels_of(target, students[index], head.label_strides, "targets");
        if (!targets_b.empty()) {
          head.labels_b = labels_of(targets_b[index], students[index], head.label_b_strides, "targets_b");
        }
      } else {
        STD_TORCH_CHECK(targets_b.empty(), "targets_b goes with class indices, but targets holds probabilities.");
        check_same_shape(target, students[index], "targets");
        const Element wanted = call.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
        call.has_probabilities = true;
        head.probabilities = map_of(target, wanted, 2, "targets");
      }
    }
    call.rows += head.batch * head.student.height * head.student.width;
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
  kernels().logits_forward(kernel_call, call.element, run_parallel, thread_count());
}

void logits_with_gradients(
    Tensor student,
    Tensor teacher,
    std::vector<Tensor> targets,
    double mix,
    double label_smoothing,
    std::int64_t ignore_index,
    double temperature,
    bool mean,
    std::vector<Tensor> parts,
    Tensor gradients) {
  check_settings(mix, label_smoothing, temperature);
  STD_TORCH_CHECK(
      targets.size() <= 2, "targets has ", targets.size(), " tensors, but none, the labels or two labels were wanted.");
  const bool has_targets = !targets.empty();
  std::vector<Tensor> first(targets.begin(), targets.begin() + (has_targets ? 1 : 0));
  std::vector<Tensor> second(targets.begin() + first.size(), targets.end());
  const Call call = call_of({student}, {teacher}, first, second);
  const Head& head = call.heads[0];
  STD_TORCH_CHECK(
      call.element == Element::kFloat32 || call.element == Element::kFloat64,
      "student must be float32 or float64: gradients of other dtypes would be rounded twice.");
  STD_TORCH_CHECK(
      student.dim() == 2 && head.student.channels <= kLargestFusedClasses && !call.has_probabilities,
      "student has shape ", shape_text(student), ", but (N, K) with at most ", kLargestFusedClasses,
      " classes and labels of dtype int64 were wanted.");
  check_labels(head, head.labels, head.label_strides, ignore_index);
  check_labels(head, head.labels_b, head.label_b_strides, ignore_index);
  const std::int64_t plane = call.rows * head.student.channels;
  STD_TORCH_CHECK(parts.size() == 3, "parts has ", parts.size(), " tensors, but three were wanted.");
  const std::int64_t planes = gradients.dim() == 3 ? gradients.sizes()[0] : 0;
  STD_TORCH_CHECK(
      has_targets ? planes == 2 || planes == 3 : planes == 1, "gradients has shape ", shape_text(gradients),
      ", but two or three planes (N, K) with targets and one without were wanted.");
  std::vector<unsigned char> workspace(static_cast<std::size_t>(10 * call.rows) * sizeof(double));
  Logits kernel_call{};
  kernel_call.heads = call.heads.data();
  kernel_call.count = 1;
  kernel_call.rows = call.rows;
  kernel_call.mix = mix;
  kernel_call.label_smoothing = label_smoothing;
  kernel_call.ignore_index = ignore_index;
  kernel_call.temperature = temperature;
  kernel_call.has_teacher = true;
  kernel_call.has_targets = has_targets;
  kernel_call.losses = workspace.data();
  kernel_call.statistics = workspace.data() + static_cast<std::size_t>(4 * call.rows) * sizeof(double);
  kernel_call.gradients = working_tensor(gradients, call.element, planes * plane, "gradients");
  kernel_call.gradient_planes = planes;
  for (int part = 0; part < 3; ++part) kernel_call.parts[part] = working_tensor(parts[part], call.element, 1, "parts");
  kernel_call.mean = mean;
  STD_TORCH_CHECK(call.rows > 0, "student has no rows, but at least one was wanted.");
  kernels().logits_forward(kernel_call, call.element, run_parallel, thread_count());
}

template <typename A>
void scale_planes(const A* planes, std::int64_t count, const A* const grads[3], bool has_ce, A* student, A* teacher) {
  const A by_ce = *grads[0], by_teacher = *grads[1], by_kd = *grads[2];
  if (!has_ce) {
    for (std::int64_t k = 0; k < count; ++k) student[k] = planes[k] * by_kd;
    return;
  }
  for (std::int64_t k = 0; k < count; ++k) student[k] = planes[k] * by_ce + planes[count + k] * by_kd;
  if (teacher == nullptr) return;
  for (std::int64_t k = 0; k < count; ++k) teacher[k] = planes[2 * count + k] * by_teacher;
}

void logits_scale(Tensor gradients, std::vector<Tensor> grads, Tensor student, std::optional<Tensor> teacher) {
  const Element element = element_of(gradients, "gradients");
  STD_TORCH_CHECK(
      element == Element::kFloat32 || element == Element::kFloat64, "gradients must be float32 or float64.");
  const std::int64_t planes = gradients.dim() == 3 ? gradients.sizes()[0] : 0;
  STD_TORCH_CHECK(
      teacher ? planes == 3 : planes >= 1 && planes <= 3, "gradients has shape ", shape_text(gradients),
      ", but one to three planes (N, K), three with a teacher, were wanted.");
  STD_TORCH_CHECK(grads.size() == 3, "grads has ", grads.size(), " tensors, but three were wanted.");
  const std::int64_t count = gradients.sizes()[1] * gradients.sizes()[2];
  const void* from = working_tensor(gradients, element, planes * count, "gradients");
  void* to = working_tensor(student, element, count, "student");
  void* teacher_to = teacher ? working_tensor(*teacher, element, count, "teacher") : nullptr;
  const void* scalars[3];
  for (int part = 0; part < 3; ++part) scalars[part] = working_tensor(grads[part], element, 1, "grads");
  const auto scale = [&](auto number) {
    using A = decltype(number);
    const A* const by[3] = {
        static_cast<const A*>(scalars[0]), static_cast<const A*>(scalars[1]), static_cast<const A*>(scalars[2])};
    scale_planes(static_cast<const A*>(from), count, by, planes > 1, static_cast<A*>(to), static_cast<A*>(teacher_to));
  };
  element == Element::kFloat64 ? scale(double{}) : scale(float{});
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
  m.impl("logits_with_gradients", TORCH_BOX(&frskd::logits_with_gradients));
  m.impl("logits_scale", TORCH_BOX(&frskd::logits_scale));
  m.impl("logits_backward", TORCH_BOX(&frskd::logits_backward));
}
