// The losses of class logits, and what their gradients need of each row. Each logit is read once: a thread keeps a
// running maximum and sums of exponentials of differences to it (online softmax), and the team merges them.
#pragma once

#include "logits_rows.cuh"

namespace frskd::cuda {

template <typename A>
struct ForwardOptions {
  LabelOptions<A> labels;
  bool has_teacher;
  bool plain;  // sums of exp(z - max) are gathered; at T = 1 the tempered ones serve for both
  A temperature;
  A inverse_temperature;
};

template <typename A>
struct RowState {
  RowSums<A> sums;
  LabelSums<A> labels;  // mass here is that of the classes gathered so far
};

template <typename A>
__device__ __forceinline__ RowState<A> empty_row_state() {
  RowState<A> state{};
  state.sums.student_max = state.sums.teacher_max = negative_infinity<A>();
  return state;
}

// What was gathered relative to the old maximum becomes relative to a larger one. An infinite shift (no finite logit so
// far) meets sums that are still zero, and 0 * inf must not make a NaN of them.
template <typename A>
__device__ __forceinline__ void raise_student_max(RowState<A>& state, A maximum, const ForwardOptions<A>& options) {
  const A shift = maximum - state.sums.student_max;
  state.sums.student_max = maximum;
  if (options.plain) state.sums.student_sum *= exponential(-shift);
  if (state.labels.mass != A(0)) state.labels.student_dot -= state.labels.mass * shift;
  if (options.has_teacher) {
    state.sums.student_sum_tempered *= exponential(-shift * options.inverse_temperature);
    if (state.sums.teacher_sum_tempered != A(0)) state.sums.cross += state.sums.teacher_sum_tempered * shift;
  }
}

template <typename A>
__device__ __forceinline__ void raise_teacher_max(RowState<A>& state, A maximum, const ForwardOptions<A>& options) {
  const A shift = maximum - state.sums.teacher_max;
  state.sums.teacher_max = maximum;
  if (options.plain) state.sums.teacher_sum *= exponential(-shift);
  if (state.labels.mass != A(0)) state.labels.teacher_dot -= state.labels.mass * shift;
  const A factor = exponential(-shift * options.inverse_temperature);
  if (state.sums.teacher_sum_tempered != A(0)) state.sums.cross -= state.sums.teacher_sum_tempered * shift;
  state.sums.cross = factor == A(0) ? A(0) : state.sums.cross * factor;
  state.sums.teacher_sum_tempered *= factor;
}

template <typename A, int kCount>
__device__ __forceinline__ void add_classes(
    RowState<A>& state,
    const A (&student)[kCount],
    const A (&teacher)[kCount],
    const A (&label)[kCount],
    const ForwardOptions<A>& options) {
  // Comparisons let a NaN logit pass by the maximum; it enters the sums below.
  A student_max = state.sums.student_max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) student_max = student[i] > student_max ? student[i] : student_max;
  if (student_max > state.sums.student_max) raise_student_max(state, student_max, options);
  const A student_base = student_max == negative_infinity<A>() ? A(0) : student_max;
  A teacher_base = A(0);
  if (options.has_teacher) {
    A teacher_max = state.sums.teacher_max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) teacher_max = teacher[i] > teacher_max ? teacher[i] : teacher_max;
    if (teacher_max > state.sums.teacher_max) raise_teacher_max(state, teacher_max, options);
    teacher_base = teacher_max == negative_infinity<A>() ? A(0) : teacher_max;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A student_shifted = student[i] - student_base;
    const A teacher_shifted = teacher[i] - teacher_base;
    if (options.plain) state.sums.student_sum += exponential(student_shifted);
    if (options.has_teacher) {
      if (options.plain) state.sums.teacher_sum += exponential(teacher_shifted);
      const A tempered = exponential(teacher_shifted * options.inverse_temperature);
      state.sums.teacher_sum_tempered += tempered;
      state.sums.student_sum_tempered += exponential(student_shifted * options.inverse_temperature);
      state.sums.cross += tempered == A(0) ? A(0) : tempered * (teacher_shifted - student_shifted);
    }
    if (label[i] != A(0)) {
      state.labels.mass += label[i];
      state.labels.student_dot += label[i] * student_shifted;
      if (options.has_teacher) state.labels.teacher_dot += label[i] * teacher_shifted;
    }
  }
}

template <typename A>
__device__ __forceinline__ void merge_row_states(
    RowState<A>& state, RowState<A> other, const ForwardOptions<A>& options) {
  if (other.sums.student_max > state.sums.student_max) {
    raise_student_max(state, other.sums.student_max, options);
  } else if (state.sums.student_max > other.sums.student_max) {
    raise_student_max(other, state.sums.student_max, options);
  }
  if (other.sums.teacher_max > state.sums.teacher_max) {
    raise_teacher_max(state, other.sums.teacher_max, options);
  } else if (state.sums.teacher_max > other.sums.teacher_max) {
    raise_teacher_max(other, state.sums.teacher_max, options);
  }
  state.sums.student_sum += other.sums.student_sum;
  state.sums.student_sum_tempered += other.sums.student_sum_tempered;
  state.sums.teacher_sum += other.sums.teacher_sum;
  state.sums.teacher_sum_tempered += other.sums.teacher_sum_tempered;
  state.sums.cross += other.sums.cross;
  state.labels.mass += other.labels.mass;
  state.labels.student_dot += other.labels.student_dot;
  state.labels.teacher_dot += other.labels.teacher_dot;
}

// Merges the states of `lanes` neighbouring lanes, a power of two; their first lane has the result.
template <typename A>
__device__ __forceinline__ void merge_lanes(RowState<A>& state, int lanes, const ForwardOptions<A>& options) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    RowState<A> other;
    other.sums.student_max = __shfl_xor_sync(kAllLanes, state.sums.student_max, offset);
    other.sums.teacher_max = __shfl_xor_sync(kAllLanes, state.sums.teacher_max, offset);
    other.sums.student_sum = __shfl_xor_sync(kAllLanes, state.sums.student_sum, offset);
    other.sums.student_sum_tempered = __shfl_xor_sync(kAllLanes, state.sums.student_sum_tempered, offset);
    other.sums.teacher_sum = __shfl_xor_sync(kAllLanes, state.sums.teacher_sum, offset);
    other.sums.teacher_sum_tempered = __shfl_xor_sync(kAllLanes, state.sums.teacher_sum_tempered, offset);
    other.sums.cross = __shfl_xor_sync(kAllLanes, state.sums.cross, offset);
    other.labels.mass = __shfl_xor_sync(kAllLanes, state.labels.mass, offset);
    other.labels.student_dot = __shfl_xor_sync(kAllLanes, state.labels.student_dot, offset);
    other.labels.teacher_dot = __shfl_xor_sync(kAllLanes, state.labels.teacher_dot, offset);
    merge_row_states(state, other, options);
  }
}

template <typename T, int kCount, bool kPacked>
__device__ __forceinline__ RowState<accumulate_t<T>> gather_row(
    const Head& head,
    const RowPosition& position,
    const RowLabel<accumulate_t<T>>& label,
    int classes,  // 0 for a thread without a row
    int lane,
    const ForwardOptions<accumulate_t<T>>& options) {
  using A = accumulate_t<T>;
  RowState<A> state = empty_row_state<A>();
  const T* student_row = static_cast<const T*>(head.student.data) + row_offset(head.student, position);
  const T* teacher_row =
      options.has_teacher ? static_cast<const T*>(head.teacher.data) + row_offset(head.teacher, position) : nullptr;
  const int lanes = head.lanes;
  for (int first = 0; first < classes; first += lanes * kCount) {
    A student[kCount];
    A teacher[kCount] = {};
    A labels[kCount];
    load_classes<T, kCount, kPacked>(student, student_row, head.student.stride_class, first, lane, lanes, classes);
    if (options.has_teacher) {
      load_classes<T, kCount, kPacked>(teacher, teacher_row, head.teacher.stride_class, first, lane, lanes, classes);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = class_of<kCount, kPacked>(first, lane, lanes, i);
      labels[i] = k < classes ? label_of_class(label, k) : A(0);
    }
    add_classes(state, student, teacher, labels, options);
  }
  return state;
}

// How many of the head's labels [begin, end) are kept: first labels, second labels. Every thread gets both.
__device__ __forceinline__ void count_labels(
    int64_t (&counts)[2], const Head& head, int64_t begin, int64_t end, LabelKind kind, int64_t ignore_index) {
  __shared__ static int64_t scratch[2 * kRowThreads / kWarpSize];
  counts[0] = counts[1] = 0;
#pragma unroll 4
  for (int64_t row = begin + threadIdx.x; row < end; row += kRowThreads) {
    const RowPosition position = row_position(head, row);
    counts[0] += head.first_labels.data[row_offset(head.first_labels, position)] != ignore_index;
    if (kind == LabelKind::kTwoIndices) {
      counts[1] += head.second_labels.data[row_offset(head.second_labels, position)] != ignore_index;
    }
  }
  block_sum<kRowThreads>(counts, scratch);
}

// 1 / max(weight, tiny), 0 for no weight.
template <typename A>
__device__ __forceinline__ A inverse_weight(double first_count, double second_count, const LabelOptions<A>& options) {
  const double weight = first_count * options.first_share + second_count * options.second_share;
  constexpr double kTiny = sizeof(A) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308;
  return weight > 0.0 ? static_cast<A>(1.0 / (weight < kTiny ? kTiny : weight)) : A(0);
}

template <typename A>
struct ForwardParameters {
  Head heads[kMaxHeads];
  ForwardOptions<A> options;
  A* losses;         // (4, total_rows)
  A* statistics;     // (6, total_rows)
  A* inverse_valid;  // (heads_used,)
  int64_t total_rows;
  unsigned row_blocks;  // the blocks after these count the labels of one head each
  int heads_used;
};

// Writes inverse_valid of a head from its labels. Heads of more than kCountedRows rows have it from
// count_partial_labels.
template <typename A>
__device__ __forceinline__ void write_inverse_valid(const ForwardParameters<A>& parameters, int index) {
  const Head& head = parameters.heads[index];
  const LabelOptions<A>& options = parameters.options.labels;
  int64_t counts[2] = {head.rows, 0};
  if (options.kind == LabelKind::kIndices || options.kind == LabelKind::kTwoIndices) {
    if (head.rows > kCountedRows) return;
    count_labels(counts, head, 0, head.rows, options.kind, options.ignore_index);
  } else if (options.kind == LabelKind::kNone) {
    counts[0] = 0;
  }
  if (threadIdx.x == 0) {
    parameters.inverse_valid[index] =
        inverse_weight(static_cast<double>(counts[0]), static_cast<double>(counts[1]), options);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 2 : 3)
    logits_losses(const __grid_constant__ ForwardParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  __shared__ static RowState<A> warp_states[kRowThreads / kWarpSize];
  if (blockIdx.x >= parameters.row_blocks) {
    write_inverse_valid(parameters, static_cast<int>(blockIdx.x - parameters.row_blocks));
    return;
  }
  int index = 0;
  while (index + 1 < parameters.heads_used && blockIdx.x >= parameters.heads[index + 1].first_block) ++index;
  const Head& head = parameters.heads[index];
  const ForwardOptions<A>& options = parameters.options;
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = head.lanes;
  const int lane = thread % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x - head.first_block) * (kRowThreads / lanes) + thread / lanes;
  // Threads without a row go along, because the shuffles below want every lane.
  const bool has_row = row < head.rows;
  const RowPosition position = row_position(head, has_row ? row : 0);
  const RowLabel<A> label = row_label(head, position, options.labels);
  const int classes = has_row ? head.classes : 0;
  RowState<A> state = head.packed
                          ? gather_row<T, kPackSize<T>, true>(head, position, label, classes, lane, options)
                          : gather_row<T, kClassesInFlight, false>(head, position, label, classes, lane, options);
  merge_lanes(state, lanes < kWarpSize ? lanes : kWarpSize, options);
  if (lanes == kRowThreads) {
    constexpr int kWarps = kRowThreads / kWarpSize;
    if (thread % kWarpSize == 0) warp_states[thread / kWarpSize] = state;
    __syncthreads();
    if (thread < kWarpSize) {
      state = warp_states[thread % kWarps];
      merge_lanes(state, kWarps, options);
    }
  }
  if (!has_row || lane != 0) return;

  const RowSums<A>& sums = state.sums;
  const bool has_labels = options.labels.kind != LabelKind::kNone;
  const bool plain_is_tempered = has_labels && !options.plain;
  const A student_tempered = options.has_teacher ? logarithm(sums.student_sum_tempered) : A(0);
  const A teacher_tempered = options.has_teacher ? logarithm(sums.teacher_sum_tempered) : A(0);
  const A student_plain = options.plain ? logarithm(sums.student_sum) : plain_is_tempered ? student_tempered : A(0);
  const A teacher_plain = !options.has_teacher ? A(0)
                          : options.plain      ? logarithm(sums.teacher_sum)
                          : plain_is_tempered  ? teacher_tempered
                                               : A(0);
  const A mass = options.labels.kind == LabelKind::kProbabilities ? state.labels.mass : label.mass;
  const int64_t column = head.first_row + row;
  const int64_t total = parameters.total_rows;
  A* losses = parameters.losses + column;
  losses[0] = has_labels ? cross_entropy(student_plain, mass, state.labels.student_dot) : A(0);
  losses[total] =
      has_labels && options.has_teacher ? cross_entropy(teacher_plain, mass, state.labels.teacher_dot) : A(0);
  losses[2 * total] = options.has_teacher ? tempered_divergence(
                                                sums.cross, sums.teacher_sum_tempered, student_tempered,
                                                teacher_tempered, options.temperature)
                                          : A(0);
  losses[3 * total] = label.weight;
  A* statistics = parameters.statistics + column;
  statistics[0] = sums.student_max;
  statistics[total] = options.has_teacher ? sums.teacher_max : A(0);
  statistics[2 * total] = student_plain;
  statistics[3 * total] = teacher_plain;
  statistics[4 * total] = student_tempered;
  statistics[5 * total] = teacher_tempered;
}

// For heads of more than kCountedRows rows, two launches before logits_losses. `partial_counts` is memory that the
// losses overwrite afterwards.
template <typename A>
struct CountParameters {
  Head heads[kMaxHeads];
  LabelOptions<A> labels;
  A* partial_counts;  // (2, blocks)
  A* inverse_valid;   // (heads_used,)
  unsigned first_block[kMaxHeads + 1];
  unsigned blocks;
  int heads_used;
};

template <typename A>
__global__ void __launch_bounds__(kRowThreads)
    count_partial_labels(const __grid_constant__ CountParameters<A> parameters) {
  int index = 0;
  while (index + 1 < parameters.heads_used && blockIdx.x >= parameters.first_block[index + 1]) ++index;
  const Head& head = parameters.heads[index];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - parameters.first_block[index]) * kCountedRows;
  const int64_t end = begin + kCountedRows < head.rows ? begin + kCountedRows : head.rows;
  int64_t counts[2];
  count_labels(counts, head, begin, end, parameters.labels.kind, parameters.labels.ignore_index);
  if (threadIdx.x == 0) {
    parameters.partial_counts[blockIdx.x] = static_cast<A>(counts[0]);
    parameters.partial_counts[parameters.blocks + blockIdx.x] = static_cast<A>(counts[1]);
  }
}

// One block per head.
template <typename A>
__global__ void __launch_bounds__(kRowThreads)
    sum_partial_counts(const __grid_constant__ CountParameters<A> parameters) {
  __shared__ static double scratch[2 * kRowThreads / kWarpSize];
  const unsigned begin = parameters.first_block[blockIdx.x];
  const unsigned end = parameters.first_block[blockIdx.x + 1];
  if (begin == end) return;
  double counts[2] = {0.0, 0.0};
  for (unsigned block = begin + threadIdx.x; block < end; block += kRowThreads) {
    counts[0] += static_cast<double>(parameters.partial_counts[block]);
    counts[1] += static_cast<double>(parameters.partial_counts[parameters.blocks + block]);
  }
  block_sum<kRowThreads>(counts, scratch);
  if (threadIdx.x == 0) {
    parameters.inverse_valid[blockIdx.x] = inverse_weight(counts[0], counts[1], parameters.labels);
  }
}

}  // namespace frskd::cuda
