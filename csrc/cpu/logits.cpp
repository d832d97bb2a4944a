// Entry points of the logits operation on the CPU.
#include "../operations/logits_checks.h"
#include "logits_call.h"
#include "tensors.h"
#include "threads.h"

namespace frskd {
namespace {

const std::int64_t* labels_of(const Tensor& labels, std::int64_t strides[3]) {
  const std::int64_t rank = labels.dim();
  strides[0] = labels.stride(0);
  strides[1] = rank == 3 ? labels.stride(1) : 0;
  strides[2] = rank >= 2 ? labels.stride(rank - 1) : 0;
  return static_cast<const std::int64_t*>(labels.data_ptr());
}

std::vector<Head> heads_of(const LogitsHeads& given) {
  const bool indices = are_class_indices(given.targets);
  std::vector<Head> heads;
  std::int64_t rows = 0;
  for (std::size_t index = 0; index < given.students.size(); ++index) {
    const Tensor& student = given.students[index];
    Head head{};
    head.student = map_of(student);
    head.batch = student.size(0);
    head.first_row = rows;
    rows += rows_of(student);
    if (!given.teachers.empty()) head.teacher = map_of(given.teachers[index]);
    if (indices) head.labels = labels_of(given.targets[index], head.label_strides);
    if (!given.targets_b.empty()) head.labels_b = labels_of(given.targets_b[index], head.label_b_strides);
    if (!given.targets.empty() && !indices) head.probabilities = map_of(given.targets[index]);
    heads.push_back(head);
  }
  return heads;
}

bool same(const Map& one, const Map& other) {
  return one.data == other.data && one.channels == other.channels && one.height == other.height &&
         one.width == other.width && one.stride_n == other.stride_n && one.stride_c == other.stride_c;
}

bool same_labels(const Head& one, const Head& other) {
  return one.labels == other.labels && one.label_strides[0] == other.label_strides[0] &&
         one.labels_b == other.labels_b && one.label_b_strides[0] == other.label_b_strides[0];
}

// Finds heads of rows (no maps) that read the same tensors, student and teacher exchanged, under the same labels.
void join_exchanged(std::vector<Head>& heads) {
  for (Head& head : heads) {
    if (head.is_exchanged || head.student.height * head.student.width != 1) continue;
    for (Head* other = &head + 1; other != heads.data() + heads.size(); ++other) {
      if (other->is_exchanged || head.batch != other->batch) continue;
      if (!same(head.student, other->teacher) || !same(head.teacher, other->student)) continue;
      if (!same_labels(head, *other)) continue;
      head.exchanged = other;
      other->is_exchanged = true;
      break;
    }
  }
}

// What both directions give the kernels. `heads` must outlive it.
template <typename Arguments>
Logits kernel_call_of(const Arguments& arguments, const LogitsRows& checked, const std::vector<Head>& heads) {
  const LogitsSettings& settings = arguments.settings;
  Logits call{};
  call.heads = heads.data();
  call.count = checked.heads;
  call.rows = checked.rows;
  call.mix = settings.mix;
  call.label_smoothing = settings.label_smoothing;
  call.ignore_index = settings.ignore_index;
  call.temperature = settings.temperature;
  call.has_teacher = !arguments.heads.teachers.empty();
  call.has_targets = !arguments.heads.targets.empty();
  call.has_probabilities = call.has_targets && !are_class_indices(arguments.heads.targets);
  call.losses = arguments.losses.data_ptr();
  call.statistics = arguments.statistics.data_ptr();
  call.inverse_valid = data_or_null(arguments.inverse_valid);
  return call;
}

void logits_forward(const LogitsForward& arguments) {
  const LogitsRows checked = check(arguments, Device::kCpu);
  std::vector<Head> heads = heads_of(arguments.heads);
  if (!arguments.heads.teachers.empty()) join_exchanged(heads);
  const Logits call = kernel_call_of(arguments, checked, heads);
  kernels<LogitsKernels>().forward(call, element_of(checked.kind.dtype), run_parallel, thread_count());
}

void logits_backward(const LogitsBackward& arguments) {
  const LogitsRows checked = check(arguments, Device::kCpu);
  const LogitsUpstream& upstream = arguments.upstream;
  std::vector<Head> heads = heads_of(arguments.heads);
  for (std::size_t index = 0; index < heads.size(); ++index) {
    Head& head = heads[index];
    if (!arguments.student_gradients.empty()) head.student_gradient = map_of(arguments.student_gradients[index]);
    if (!arguments.teacher_gradients.empty()) head.teacher_gradient = map_of(arguments.teacher_gradients[index]);
    std::copy_n(&upstream.scales[3 * index], 3, head.scales);
  }
  // Only where the students alone get gradients has each logit one of each head.
  const bool students_alone = !arguments.student_gradients.empty() && arguments.teacher_gradients.empty();
  if (students_alone && !arguments.heads.teachers.empty()) join_exchanged(heads);
  Logits call = kernel_call_of(arguments, checked, heads);
  for (std::size_t term = 0; term < 3; ++term) {
    const Tensor& grad = upstream.grads[term];
    call.grad_strides[term] = grad.dim() == 0 ? 0 : grad.stride(0);
    call.grads[term] = grad.data_ptr();
  }
  call.grad_head_stride = upstream.head_stride;
  call.grad_row_stride = upstream.row_stride;
  call.kd_to_teacher = arguments.kd_to_teacher;
  kernels<LogitsKernels>().backward(call, element_of(checked.kind.dtype), run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(logits_forward)
FRSKD_CPU_OPERATION(logits_backward)

}  // namespace
}  // namespace frskd
