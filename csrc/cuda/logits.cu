// Host side of the class-logit operations: checks, plan, launches.
#include <algorithm>

#include "../operations/logits.h"
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

int64_t rows_of(const Tensor& logits) {
  int64_t rows = logits.size(0);
  for (int64_t axis = 2; axis < logits.dim(); ++axis) rows *= logits.size(axis);
  return rows;
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

// The label tensors of one call, checked.
struct Labels {
  const std::vector<Tensor>& first;
  const std::vector<Tensor>& second;
  LabelKind kind;
};

void check_logits(const Tensor& logits, const std::string& name, const Tensor& first, ScalarType dtype) {
  check_device(logits, name, first);
  check_dtype(logits, name, dtype);
  STD_TORCH_CHECK(
      logits.dim() >= 2 && logits.dim() <= 4, name, " has shape ", shape_of(logits),
      ", but (N, K), (N, K, W) or (N, K, H, W) was wanted.");
  STD_TORCH_CHECK(
      logits.size(1) > 0 && logits.size(1) <= (int64_t{1} << 30), name, " has shape ", shape_of(logits),
      ", but from 1 to 2^30 classes were wanted.");
}

void check_class_indices(const Tensor& labels, const std::string& name, const Tensor& logits) {
  check_device(labels, name, logits);
  check_dtype(labels, name, ScalarType::Long);
  bool same = labels.dim() == logits.dim() - 1;
  for (int64_t axis = 0; same && axis < labels.dim(); ++axis) {
    same = labels.size(axis) == logits.size(axis == 0 ? 0 : axis + 1);
  }
  STD_TORCH_CHECK(
      same, name, " has shape ", shape_of(labels), ", but the shape of its logits ", shape_of(logits),
      " without the class axis was wanted.");
}

Labels check_labels(const LogitsHeads& heads) {
  const std::vector<Tensor>&students = heads.students, &targets = heads.targets, &targets_b = heads.targets_b;
  const ScalarType accumulate = accumulate_dtype(students[0].scalar_type());
  if (targets.empty()) {
    STD_TORCH_CHECK(targets_b.empty(), "targets_b is given without targets, but second labels need first ones.");
    return {targets, targets_b, LabelKind::kNone};
  }
  check_count(targets.size(), "targets", students.size());
  STD_TORCH_CHECK(targets[0].defined(), "targets[0] is an undefined tensor, but a CUDA tensor was wanted.");
  const bool indices = targets[0].scalar_type() == ScalarType::Long;
  if (!targets_b.empty()) check_count(targets_b.size(), "targets_b", students.size());
  STD_TORCH_CHECK(
      indices || targets_b.empty(), "targets_b is given with class probabilities, but it belongs to class indices.");
  for (size_t head = 0; head < students.size(); ++head) {
    const std::string name = name_of("targets", head);
    if (indices) {
      check_class_indices(targets[head], name, students[head]);
      if (!targets_b.empty()) check_class_indices(targets_b[head], name_of("targets_b", head), students[head]);
    } else {
      check_device(targets[head], name, students[head]);
      check_dtype(targets[head], name, accumulate);
      check_same_shape(targets[head], name, students[head], name_of("students", head));
    }
  }
  const LabelKind kind = !indices            ? LabelKind::kProbabilities
                         : targets_b.empty() ? LabelKind::kIndices
                                             : LabelKind::kTwoIndices;
  return {targets, targets_b, kind};
}

// Checks students and teachers, and returns the number of rows of all heads.
int64_t check_heads(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers) {
  STD_TORCH_CHECK(!students.empty(), "students is empty, but at least one head was wanted.");
  STD_TORCH_CHECK(students[0].defined(), "students[0] is an undefined tensor, but a CUDA tensor was wanted.");
  if (!teachers.empty()) check_count(teachers.size(), "teachers", students.size());
  const ScalarType dtype = students[0].scalar_type();
  int64_t rows = 0;
  for (size_t head = 0; head < students.size(); ++head) {
    const std::string name = name_of("students", head);
    check_logits(students[head], name, students[0], dtype);
    if (!teachers.empty()) {
      const std::string teacher_name = name_of("teachers", head);
      check_logits(teachers[head], teacher_name, students[0], dtype);
      check_same_shape(teachers[head], teacher_name, students[head], name);
    }
    rows += rows_of(students[head]);
  }
  return rows;
}

void check_settings(const LogitsSettings& settings) {
  STD_TORCH_CHECK(
      settings.temperature > 0.0, "temperature is ", settings.temperature, ", but a number above 0 was wanted.");
  STD_TORCH_CHECK(
      settings.mix >= 0.0 && settings.mix <= 1.0, "mix is ", settings.mix, ", but a number from 0 to 1 was wanted.");
  STD_TORCH_CHECK(
      settings.label_smoothing >= 0.0 && settings.label_smoothing <= 1.0, "label_smoothing is ",
      settings.label_smoothing, ", but a number from 0 to 1 was wanted.");
}

// Everything of a head but its blocks. `packed` holds as far as the inputs go.
Head make_head(
    const std::vector<Tensor>& students,
    const std::vector<Tensor>& teachers,
    const Labels& labels,
    size_t index,
    int64_t first_row) {
  const Tensor& student = students[index];
  Head head{};
  head.student = view_of(student);
  if (!teachers.empty()) head.teacher = view_of(teachers[index]);
  if (labels.kind == LabelKind::kProbabilities) {
    head.probabilities = view_of(labels.first[index]);
  } else if (labels.kind != LabelKind::kNone) {
    head.first_labels = label_view_of(labels.first[index]);
    if (labels.kind == LabelKind::kTwoIndices) head.second_labels = label_view_of(labels.second[index]);
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
  const std::vector<Tensor>&students = call.heads.students, &teachers = call.heads.teachers;
  const double temperature = call.settings.temperature;
  const Tensor &losses = call.losses, &statistics = call.statistics, &inverse_valid = call.inverse_valid;
  const int64_t total_rows = check_heads(students, teachers);
  const Tensor& first = students[0];
  const Labels labels = check_labels(call.heads);
  check_settings(call.settings);
  const ScalarType accumulate = accumulate_dtype(first.scalar_type());
  check_contiguous(losses, "losses", first, accumulate, {4, total_rows});
  check_contiguous(statistics, "statistics", first, accumulate, {6, total_rows});
  check_contiguous(inverse_valid, "inverse_valid", first, accumulate, {static_cast<int64_t>(students.size())});

  const DeviceGuard guard(first);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(first.scalar_type(), "students[0]", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    int64_t first_row = 0;
    for (size_t begin = 0; begin < students.size(); begin += kMaxHeads) {
      const size_t end = std::min(begin + kMaxHeads, students.size());
      ForwardParameters<A> parameters{};
      parameters.options.labels = label_options<A>(labels.kind, call.settings);
      parameters.options.has_teacher = !teachers.empty();
      parameters.options.plain = labels.kind != LabelKind::kNone && (teachers.empty() || temperature != 1.0);
      parameters.options.temperature = static_cast<A>(temperature);
      parameters.options.inverse_temperature = static_cast<A>(1.0 / temperature);
      parameters.losses = static_cast<A*>(losses.data_ptr());
      parameters.statistics = static_cast<A*>(statistics.data_ptr());
      parameters.inverse_valid = static_cast<A*>(inverse_valid.data_ptr()) + begin;
      parameters.total_rows = total_rows;
      parameters.heads_used = static_cast<int>(end - begin);
      A* partial_counts = parameters.losses + first_row;
      int64_t blocks = 0;
      for (size_t index = begin; index < end; ++index) {
        Head& head = parameters.heads[index - begin];
        head = make_head(students, teachers, labels, index, first_row);
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
  const std::vector<Tensor>&students = call.heads.students, &teachers = call.heads.teachers;
  const std::vector<Tensor>&student_gradients = call.student_gradients, &teacher_gradients = call.teacher_gradients;
  const std::vector<Tensor>& grads = call.upstream.grads;
  const std::vector<double>& scales = call.upstream.scales;
  const int64_t head_stride = call.upstream.head_stride, row_stride = call.upstream.row_stride;
  const Tensor &losses = call.losses, &statistics = call.statistics;
  const std::optional<Tensor>& inverse_valid = call.inverse_valid;
  const double temperature = call.settings.temperature;
  const int64_t total_rows = check_heads(students, teachers);
  const Tensor& first = students[0];
  const ScalarType dtype = first.scalar_type();
  const ScalarType accumulate = accumulate_dtype(dtype);
  const int64_t heads = static_cast<int64_t>(students.size());
  const Labels labels = check_labels(call.heads);
  check_settings(call.settings);
  check_contiguous(statistics, "statistics", first, accumulate, {6, total_rows});
  check_contiguous(losses, "losses", first, accumulate, {4, total_rows});
  if (inverse_valid.has_value()) check_contiguous(*inverse_valid, "inverse_valid", first, accumulate, {heads});
  const bool writes_student = !student_gradients.empty();
  const bool writes_teacher = !teacher_gradients.empty();
  STD_TORCH_CHECK(
      !writes_teacher || !teachers.empty(),
      "teacher_gradients is given without teachers, but a gradient needs its logits.");
  const auto check_gradients = [&](const std::vector<Tensor>& gradients, const char* name,
                                   const std::vector<Tensor>& inputs, const char* input_name) {
    check_count(gradients.size(), name, students.size());
    for (size_t head = 0; head < gradients.size(); ++head) {
      const std::string gradient_name = name_of(name, head);
      check_device(gradients[head], gradient_name, first);
      check_dtype(gradients[head], gradient_name, dtype);
      check_same_shape(gradients[head], gradient_name, inputs[head], name_of(input_name, head));
    }
  };
  if (writes_student) check_gradients(student_gradients, "student_gradients", students, "students");
  if (writes_teacher) check_gradients(teacher_gradients, "teacher_gradients", teachers, "teachers");
  STD_TORCH_CHECK(
      scales.size() == 3 * students.size(), "scales has ", scales.size(), " numbers, but ", 3 * students.size(),
      ", three for each head, were wanted.");
  check_count(grads.size(), "grads", 3);
  STD_TORCH_CHECK(
      head_stride >= 0 && row_stride >= 0, "head_stride is ", head_stride, " and row_stride is ", row_stride,
      ", but numbers of at least 0 were wanted.");

  // A term counts only where its scale is not 0, its inputs are there and one of the wanted gradients has it.
  const bool has_labels = labels.kind != LabelKind::kNone;
  const bool term_wanted[3] = {
      writes_student && has_labels, writes_teacher && has_labels,
      !teachers.empty() && (writes_student || (writes_teacher && call.kd_to_teacher))};
  bool term_used[3] = {};
  for (size_t head = 0; head < students.size(); ++head) {
    for (size_t term = 0; term < 3; ++term) {
      term_used[term] = term_used[term] || (term_wanted[term] && scales[3 * head + term] != 0.0);
    }
  }
  for (size_t term = 0; term < 3; ++term) {
    if (!term_used[term] || total_rows == 0) continue;
    const std::string name = name_of("grads", term);
    check_device(grads[term], name, first);
    check_dtype(grads[term], name, accumulate);
    STD_TORCH_CHECK(
        grads[term].dim() <= 1, name, " has shape ", shape_of(grads[term]), ", but one axis or none was wanted.");
    // Both factors are at most 2^62 / 2 apart from the tensor's size, so the products cannot pass 64 bits.
    const int64_t numel = grads[term].numel();
    STD_TORCH_CHECK(
        numel > 0 && head_stride <= numel && row_stride <= numel &&
            (heads - 1) * head_stride + (total_rows - 1) * row_stride < numel,
        name, " has ", numel, " elements, but its last index is ", heads - 1, " * ", head_stride, " + ", total_rows - 1,
        " * ", row_stride, ".");
  }
  if (total_rows == 0 || (!writes_student && !writes_teacher)) return;

  const DeviceGuard guard(first);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(dtype, "students[0]", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    int64_t first_row = 0;
    for (size_t begin = 0; begin < students.size(); begin += kMaxHeads) {
      const size_t end = std::min(begin + kMaxHeads, students.size());
      BackwardParameters<A> parameters{};
      parameters.labels = label_options<A>(labels.kind, call.settings);
      for (size_t term = 0; term < 3; ++term) {
        if (!term_used[term]) continue;
        const int64_t step = grads[term].dim() == 0 ? 0 : grads[term].stride(0);
        parameters.grad_strides[term][0] = head_stride * step;
        parameters.grad_strides[term][1] = row_stride * step;
        parameters.grads[term] =
            static_cast<const A*>(grads[term].data_ptr()) + static_cast<int64_t>(begin) * head_stride * step;
      }
      if (inverse_valid.has_value()) {
        parameters.inverse_valid = static_cast<const A*>(inverse_valid->data_ptr()) + begin;
      }
      parameters.statistics = static_cast<const A*>(statistics.data_ptr());
      parameters.losses = static_cast<const A*>(losses.data_ptr());
      parameters.total_rows = total_rows;
      parameters.heads_used = static_cast<int>(end - begin);
      parameters.kd_to_teacher = call.kd_to_teacher;
      parameters.temperature = static_cast<A>(temperature);
      parameters.inverse_temperature = static_cast<A>(1.0 / temperature);
      int64_t blocks = 0;
      for (size_t index = begin; index < end; ++index) {
        GradientHead<A>& target = parameters.heads[index - begin];
        target.head = make_head(students, teachers, labels, index, first_row);
        assign_blocks(target.head, blocks);
        first_row += target.head.rows;
        if (writes_student) {
          target.student_gradient = view_of(student_gradients[index]);
          target.head.packed =
              target.head.packed && allows_packs(target.student_gradient, target.head.classes, sizeof(T));
        }
        if (writes_teacher) {
          target.teacher_gradient = view_of(teacher_gradients[index]);
          target.head.packed =
              target.head.packed && allows_packs(target.teacher_gradient, target.head.classes, sizeof(T));
        }
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
