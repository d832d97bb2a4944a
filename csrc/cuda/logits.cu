// Host side of the class-logit operations: checks, plan, launches.
#include <algorithm>

#include "../operations/logits_checks.h"
#include "feature_view.cuh"
#include "logits_backward.cuh"
#include "logits_forward.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

namespace {

// Logits (N, K), (N, K, W) and (N, K, H, W) as four axes.
LogitsView view_of(const Tensor& logits) {
  const int64_t rank = logits.dim();
  LogitsView view{};
  view.data = logits.data_ptr();
  view.stride_sample = logits.stride(0);
  view.stride_class = logits.stride(1);
  view.stride_row = rank == 4 ? logits.stride(2) : 0;
  view.stride_column = rank > 2 ? logits.stride(rank - 1) : 0;
  return view;
}

LabelView label_view_of(const Tensor& labels) {
  const int64_t rank = labels.dim();
  LabelView view{};
  view.data = static_cast<const int64_t*>(labels.data_ptr());
  view.stride_sample = labels.stride(0);
  view.stride_row = rank == 3 ? labels.stride(1) : 0;
  view.stride_column = rank > 1 ? labels.stride(rank - 1) : 0;
  return view;
}

// Distance in memory from a row to the next one.
int64_t row_step(const Tensor& logits) {
  for (int64_t axis = logits.dim() - 1; axis >= 2; --axis) {
    if (logits.size(axis) > 1) return logits.stride(axis);
  }
  return logits.stride(0);
}

int choose_lanes(const Tensor& logits) {
  const int64_t classes = logits.size(1);
  const int64_t rows = rows_of(logits);
  // A thread alone walks all classes, so long rows need many of them to fill the device.
  if (logits.stride(1) != 1 && row_step(logits) == 1 && rows >= 32 && rows * 8 >= classes) return 1;
  return classes <= 32 ? 8 : classes <= 512 ? 32 : kRowThreads;
}

bool allows_packs(const LogitsView& view, int64_t classes, int element_size) {
  const int64_t count = 16 / element_size;
  return view.stride_class == 1 && classes % count == 0 && view.stride_sample % count == 0 &&
         view.stride_row % count == 0 && view.stride_column % count == 0 && is_aligned(view.data, 16);
}

LabelKind label_kind_of(const LogitsHeads& heads) {
  if (heads.targets.empty()) return LabelKind::kNone;
  if (!are_class_indices(heads.targets)) return LabelKind::kProbabilities;
  return heads.targets_b.empty() ? LabelKind::kIndices : LabelKind::kTwoIndices;
}

// Everything of a head but its blocks. `packed` holds as far as the inputs go.
Head make_head(const LogitsHeads& heads, LabelKind kind, size_t index, int64_t first_row) {
  const Tensor& student = heads.students[index];
  const std::vector<Tensor>& teachers = heads.teachers;
  Head head{};
  head.student = view_of(student);
  if (!teachers.empty()) head.teacher = view_of(teachers[index]);
  if (kind == LabelKind::kProbabilities) {
    head.probabilities = view_of(heads.targets[index]);
  } else if (kind != LabelKind::kNone) {
    head.first_labels = label_view_of(heads.targets[index]);
    if (kind == LabelKind::kTwoIndices) head.second_labels = label_view_of(heads.targets_b[index]);
  }
  head.rows = rows_of(student);
  head.first_row = first_row;
  head.pixels = 1;
  for (int64_t axis = 2; axis < student.dim(); ++axis) head.pixels *= student.size(axis);
  head.width = student.dim() > 2 ? student.size(student.dim() - 1) : 1;
  head.classes = static_cast<int>(student.size(1));
  head.lanes = choose_lanes(student);
  const int element_size = static_cast<int>(student.element_size());
  head.packed = head.lanes > 1 && allows_packs(head.student, head.classes, element_size) &&
                (teachers.empty() || allows_packs(head.teacher, head.classes, element_size));
  return head;
}

void assign_blocks(Head& head, int64_t& blocks) {
  head.first_block = static_cast<unsigned>(blocks);
  blocks += ceil_divide(head.rows, kRowThreads / head.lanes);
}

template <typename A>
LabelOptions<A> label_options(LabelKind kind, const LogitsSettings& settings) {
  const bool two = kind == LabelKind::kTwoIndices;
  LabelOptions<A> options{};
  options.kind = kind;
  options.ignore_index = settings.ignore_index;
  options.first_share = static_cast<A>(two ? settings.mix : 1.0);
  options.second_share = static_cast<A>(two ? 1.0 - settings.mix : 0.0);
  options.smoothing = static_cast<A>(settings.label_smoothing);
  options.unsmoothed = static_cast<A>(1.0 - settings.label_smoothing);
  return options;
}

// inverse_valid of the heads with many labels, by blocks that count kCountedRows labels each.
template <typename A>
void launch_counts(const ForwardParameters<A>& forward, A* partial_counts, cudaStream_t stream) {
  const LabelKind kind = forward.options.labels.kind;
  if (kind != LabelKind::kIndices && kind != LabelKind::kTwoIndices) return;
  CountParameters<A> parameters{};
  parameters.labels = forward.options.labels;
  parameters.partial_counts = partial_counts;
  parameters.inverse_valid = forward.inverse_valid;
  parameters.heads_used = forward.heads_used;
  int64_t blocks = 0;
  for (int index = 0; index < forward.heads_used; ++index) {
    parameters.heads[index] = forward.heads[index];
    parameters.first_block[index] = static_cast<unsigned>(blocks);
    if (forward.heads[index].rows > kCountedRows) blocks += ceil_divide(forward.heads[index].rows, kCountedRows);
  }
  parameters.first_block[forward.heads_used] = static_cast<unsigned>(blocks);
  parameters.blocks = static_cast<unsigned>(blocks);
  if (blocks == 0) return;
  launch(count_partial_labels<A>, blocks, kRowThreads, 0, stream, parameters);
  launch(sum_partial_counts<A>, forward.heads_used, kRowThreads, 0, stream, parameters);
}

void logits_forward(const LogitsForward& call) {
  const LogitsRows checked = check(call, Device::kCuda);
  const std::vector<Tensor>&students = call.heads.students, &teachers = call.heads.teachers;
  const double temperature = call.settings.temperature;
  const LabelKind label_kind = label_kind_of(call.heads);

  const DeviceGuard guard(students[0]);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(checked.kind.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    int64_t first_row = 0;
    for (size_t begin = 0; begin < students.size(); begin += kMaxHeads) {
      const size_t end = std::min(begin + kMaxHeads, students.size());
      ForwardParameters<A> parameters{};
      parameters.options.labels = label_options<A>(label_kind, call.settings);
      parameters.options.has_teacher = !teachers.empty();
      parameters.options.plain = label_kind != LabelKind::kNone && (teachers.empty() || temperature != 1.0);
      parameters.options.temperature = static_cast<A>(temperature);
      parameters.options.inverse_temperature = static_cast<A>(1.0 / temperature);
      parameters.losses = static_cast<A*>(call.losses.data_ptr());
      parameters.statistics = static_cast<A*>(call.statistics.data_ptr());
      parameters.inverse_valid = static_cast<A*>(call.inverse_valid.data_ptr()) + begin;
      parameters.total_rows = checked.rows;
      parameters.heads_used = static_cast<int>(end - begin);
      A* partial_counts = parameters.losses + first_row;
      int64_t blocks = 0;
      for (size_t index = begin; index < end; ++index) {
        Head& head = parameters.heads[index - begin];
        head = make_head(call.heads, label_kind, index, first_row);
        assign_blocks(head, blocks);
        first_row += head.rows;
      }
      parameters.row_blocks = static_cast<unsigned>(std::min(blocks, kMaxBlocks));
      launch_counts(parameters, partial_counts, stream);
      launch(logits_losses<T>, blocks + parameters.heads_used, kRowThreads, 0, stream, parameters);
    }
  });
}

void logits_backward(const LogitsBackward& call) {
  const LogitsRows checked = check(call, Device::kCuda);
  const std::vector<Tensor>&students = call.heads.students, &teachers = call.heads.teachers;
  const std::vector<Tensor>& grads = call.upstream.grads;
  const std::vector<double>& scales = call.upstream.scales;
  const int64_t head_stride = call.upstream.head_stride, row_stride = call.upstream.row_stride;
  const std::optional<Tensor>& inverse_valid = call.inverse_valid;
  const double temperature = call.settings.temperature;
  const LabelKind label_kind = label_kind_of(call.heads);
  const bool writes_student = !call.student_gradients.empty(), writes_teacher = !call.teacher_gradients.empty();

  // A term counts only where its scale is not 0, its inputs are there and one of the wanted gradients has it.
  const bool has_labels = label_kind != LabelKind::kNone;
  const bool term_wanted[3] = {
      writes_student && has_labels, writes_teacher && has_labels,
      !teachers.empty() && (writes_student || (writes_teacher && call.kd_to_teacher))};
  if (checked.rows == 0 || (!writes_student && !writes_teacher)) return;

  const DeviceGuard guard(students[0]);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(checked.kind.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    int64_t first_row = 0;
    for (size_t begin = 0; begin < students.size(); begin += kMaxHeads) {
      const size_t end = std::min(begin + kMaxHeads, students.size());
      BackwardParameters<A> parameters{};
      parameters.labels = label_options<A>(label_kind, call.settings);
      for (size_t term = 0; term < 3; ++term) {
        const int64_t step = grads[term].dim() == 0 ? 0 : grads[term].stride(0);
        parameters.grad_strides[term][0] = head_stride * step;
        parameters.grad_strides[term][1] = row_stride * step;
        parameters.grads[term] =
            static_cast<const A*>(grads[term].data_ptr()) + static_cast<int64_t>(begin) * head_stride * step;
      }
      if (inverse_valid.has_value()) {
        parameters.inverse_valid = static_cast<const A*>(inverse_valid->data_ptr()) + begin;
      }
      parameters.statistics = static_cast<const A*>(call.statistics.data_ptr());
      parameters.losses = static_cast<const A*>(call.losses.data_ptr());
      parameters.total_rows = checked.rows;
      parameters.heads_used = static_cast<int>(end - begin);
      parameters.kd_to_teacher = call.kd_to_teacher;
      parameters.temperature = static_cast<A>(temperature);
      parameters.inverse_temperature = static_cast<A>(1.0 / temperature);
      int64_t blocks = 0;
      for (size_t index = begin; index < end; ++index) {
        GradientHead<A>& target = parameters.heads[index - begin];
        target.head = make_head(call.heads, label_kind, index, first_row);
        assign_blocks(target.head, blocks);
        first_row += target.head.rows;
        const auto add_gradient = [&](LogitsView& view, const std::vector<Tensor>& gradients) {
          if (gradients.empty()) return;
          view = view_of(gradients[index]);
          target.head.packed = target.head.packed && allows_packs(view, target.head.classes, sizeof(T));
        };
        add_gradient(target.student_gradient, call.student_gradients);
        add_gradient(target.teacher_gradient, call.teacher_gradients);
        for (size_t term = 0; term < 3; ++term) {
          target.scales[term] = term_wanted[term] ? static_cast<A>(scales[3 * index + term]) : A(0);
        }
      }
      launch(logits_gradients<T>, blocks, kRowThreads, 0, stream, parameters);
    }
  });
}

FRSKD_CUDA_OPERATION(logits_forward)
FRSKD_CUDA_OPERATION(logits_backward)

}  // namespace

}  // namespace frskd::cuda
