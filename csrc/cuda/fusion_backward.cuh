// Weighted fusion, backward: threads own gradient elements and gather what reached them. The winner of a pooling window
// is found again by each of the up to four owners of 2x2 input pixels that look at it. The pass that sums gathers in
// the same way, into partial sums per channel and block, which a small launch adds up.
#pragma once

#include "fusion_node.cuh"

namespace frskd::cuda {

// One input in a backward pass.
template <typename A>
struct FusionTarget {
  FusionDomain domain;
  FusionMap gradient;      // its data is null where only sums are wanted
  const A* sums;           // (2, C), or null: the gradient of the statistics is left out
  A* channel_partials;     // (chunks, 2, C), or null: not normalised, or the gradient is wanted
  A* derivative_partials;  // (tiles * chunks,), or null: the weight's gradient is not wanted
  A inverse_count;         // 1 / (N * H_i * W_i)
  int input;               // position in the node
  FusionWalk walk;
};

template <typename A>
struct FusionGatherParameters {
  KernelNode<A> node;
  FusionMap grad;
  FusionTarget<A> targets[kMostFusionInputs];
  int targets_used;
};

struct FusionRange {
  int first;
  int end;
};

// The rows of the output that read `row` of an input that is not pooled.
template <typename A>
__device__ __forceinline__ FusionRange rows_of(const KernelInput<A>& input, const KernelNode<A>& node, int row) {
  if (input.resample != kResampleUp) return {row, row + 1};
  return {
      destination(row, input.row_shift, input.map.height, node.height),
      destination(row + 1, input.row_shift, input.map.height, node.height)};
}

template <typename A>
__device__ __forceinline__ FusionRange columns_of(const KernelInput<A>& input, const KernelNode<A>& node, int column) {
  if (input.resample != kResampleUp) return {column, column + 1};
  return {
      destination(column, input.column_shift, input.map.width, node.width),
      destination(column + 1, input.column_shift, input.map.width, node.width)};
}

// Sums the gradient over a rectangle of the output, four positions at a time, whose loads are in flight together: all
// there are where both sides are doubled.
template <typename T, int kPack>
__device__ __forceinline__ void gather_upstream(
    const FusionMap& grad,
    const FusionPosition& at,
    const FusionRange& rows,
    const FusionRange& columns,
    accumulate_t<T> (&gathered)[kPack]) {
  using A = accumulate_t<T>;
  const T* plane = plane_of<T>(grad, at.sample, at.channel);
#pragma unroll 1
  for (int row = rows.first; row < rows.end; row += 2) {
    const bool two_rows = row + 1 < rows.end;
#pragma unroll 1
    for (int column = columns.first; column < columns.end; column += 2) {
      const bool two_columns = column + 1 < columns.end;
      const T* source = plane + offset_of(grad, row, column);
      const int64_t next_column = two_columns ? grad.stride_column : 0;
      const int64_t next_row = two_rows ? grad.stride_row : 0;
      const Pack<T, kPack> packs[4] = {
          load_cached<T, kPack>(source), load_cached<T, kPack>(source + next_column),
          load_cached<T, kPack>(source + next_row), load_cached<T, kPack>(source + next_row + next_column)};
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        A sum = static_cast<A>(packs[0].values[j]);
        if (two_columns) sum += static_cast<A>(packs[1].values[j]);
        if (two_rows) sum += static_cast<A>(packs[2].values[j]);
        if (two_rows && two_columns) sum += static_cast<A>(packs[3].values[j]);
        gathered[j] += sum;
      }
    }
  }
}

// What a thread adds up over its elements, and the parameters of the channels it is at. A pass that writes a gradient
// has constants where one that sums has its sums, so that both are one kernel with one set of registers.
template <typename A, int kCount>
struct FusionGatherState {
  FusionAffine<A, kCount> affine;
  A first[kCount];   // sum of dy; or scale * sums[0] / n
  A second[kCount];  // sum of dy * (x - mean); or scale * inverse deviation * sums[1] / n
  A derivative;      // dL / dw^

  __device__ __forceinline__ void load(
      const KernelInput<A>& input, const FusionTarget<A>& target, int channels, int channel) {
    affine.load(input, channels, channel);
    if (target.sums == nullptr) return;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const A scale = affine.scale[c] * target.inverse_count;
      first[c] = scale * __ldg(target.sums + channel + c);
      second[c] =
          scale * __ldg(input.statistics + channels + channel + c) * __ldg(target.sums + channels + channel + c);
    }
  }
};

// Takes in the element(s) x with what was gathered for them.
template <typename T, int kPack, int kCount>
__device__ __forceinline__ void settle(
    FusionGatherState<accumulate_t<T>, kCount>& state,
    const FusionTarget<accumulate_t<T>>& target,
    int pre,
    accumulate_t<T> weight,
    const FusionPosition& at,
    const Pack<T, kPack>& x,
    accumulate_t<T> (&gathered)[kPack]) {
  using A = accumulate_t<T>;
  A raw[kPack], values[kPack], activated[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) raw[j] = values[j] = static_cast<A>(x.values[j]);
  state.affine.apply(values);
#pragma unroll
  for (int j = 0; j < kPack; ++j) activated[j] = values[j];
  activate(activated, pre);
#pragma unroll
  for (int j = 0; j < kPack; ++j) state.derivative += activated[j] * gathered[j];
  through_activation(gathered, values, pre);
#pragma unroll
  for (int j = 0; j < kPack; ++j) gathered[j] *= weight;
  if (target.gradient.data == nullptr) {
    if (!state.affine.used) return;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int c = kCount == 1 ? 0 : j;
      state.first[c] += gathered[j];
      state.second[c] += gathered[j] * (raw[j] - state.affine.mean[c]);
    }
    return;
  }
  Pack<T, kPack> result;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const int c = kCount == 1 ? 0 : j;
    A gradient = gathered[j];
    if (state.affine.used) {
      gradient = state.affine.scale[c] * gradient - state.first[c] - (raw[j] - state.affine.mean[c]) * state.second[c];
    }
    result.values[j] = static_cast<T>(gradient);
  }
  const T* pointer =
      plane_of<T>(target.gradient, at.sample, at.channel) + offset_of(target.gradient, at.row, at.column);
  store<T, kPack>(const_cast<T*>(pointer), result);
}

// Elements of a position in a pass over one input: fewer than 16 bytes where those would need more registers than there
// are.
template <typename T, bool kPool>
constexpr int kGatherPack = kPool && sizeof(T) == 2 ? 4 : kPackSize<T>;

// Sums, for the four pixels of a square of a pooled input, the gradient of the windows that each of them won.
template <typename T, int kPack, int kCount>
__device__ __forceinline__ void gather_windows(
    const FusionMap& grad,
    const KernelInput<accumulate_t<T>>& input,
    const FusionAffine<accumulate_t<T>, kCount>& affine,
    const T* plane,
    const FusionPosition& at,  // of the square, and of the window that begins there
    accumulate_t<T> (&gathered)[4][kPack]) {
  using A = accumulate_t<T>;
#pragma unroll 1
  for (int row = at.row > 0 ? at.row - 1 : 0; row <= at.row; ++row) {
#pragma unroll 1
    for (int column = at.column > 0 ? at.column - 1 : 0; column <= at.column; ++column) {
      A upstream[kPack];
      load_pack<T, kPack>(plane_of<T>(grad, at.sample, at.channel) + offset_of(grad, row, column), upstream);
      A largest[kPack];
      int winners[kPack];
      window_maximum<T, kPack, kCount, true>(input, affine, plane, row, column, largest, winners);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int y = 2 * (at.row - row) + q / 2, x = 2 * (at.column - column) + q % 2;
        const int place = y < 3 && x < 3 ? 3 * y + x : -1;
#pragma unroll
        for (int j = 0; j < kPack; ++j) gathered[q][j] += winners[j] == place ? upstream[j] : A(0);
      }
    }
  }
}

// Writes what the threads of a block have added up.
template <int kCount, typename A>
__device__ __forceinline__ void leave_partials(
    const FusionGatherState<A, kCount>& state,
    const FusionTarget<A>& target,
    const FusionShare& share,
    int channels,
    unsigned block,  // among those of the target
    A* scratch) {
  if (target.channel_partials != nullptr) {
    A sums[2 * kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      sums[c] = state.first[c];
      sums[kCount + c] = state.second[c];
    }
    column_sum(sums, target.domain.lanes, target.domain.groups, scratch);
    if (share.group == 0 && share.count > 0) {
      A* partials = target.channel_partials + static_cast<int64_t>(share.chunk) * 2 * channels + share.channel;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        partials[c] = sums[c];
        partials[channels + c] = sums[kCount + c];
      }
    }
  }
  if (target.derivative_partials != nullptr) {
    A derivative[1] = {state.derivative};
    __syncthreads();
    block_sum<kFusionThreads>(derivative, scratch);
    if (threadIdx.x == 0) target.derivative_partials[block] = derivative[0];
  }
}

// kPool: the input is pooled, and a position is a square of 2x2 pixels of its padded map, numbered like the windows
// that begin there.
template <typename T, int kPack, bool kAlongChannels, bool kPool>
__device__ __forceinline__ void gather_positions(
    const FusionGatherParameters<accumulate_t<T>>& parameters,
    const FusionTarget<accumulate_t<T>>& target,
    const accumulate_t<T>* weights,
    unsigned block,  // among those of the target
    accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  constexpr int kCount = kAlongChannels ? kPack : 1;
  constexpr int kOwned = kPool ? 4 : 1;
  const KernelNode<A>& node = parameters.node;
  const KernelInput<A>& input = node.inputs[target.input];
  const FusionDomain& domain = target.domain;
  const FusionShare share = share_of(domain, block);
  const A weight = weights[target.input];
  FusionGatherState<A, kCount> state{};
  int loaded = -1;
#pragma unroll 1
  for (unsigned offset = static_cast<unsigned>(share.group); offset < share.count;
       offset += static_cast<unsigned>(domain.groups)) {
    const FusionPosition at = position_at(domain, share, offset);
    if (at.channel != loaded) {
      state.load(input, target, node.channels, at.channel);
      loaded = at.channel;
    }
    const T* plane = plane_of<T>(input.map, at.sample, at.channel);
    Pack<T, kPack> x;
    A gathered[kOwned][kPack] = {};
    if constexpr (kPool) {
      gather_windows<T, kPack, kCount>(parameters.grad, input, state.affine, plane, at, gathered);
    } else {
      // On its way while the gradient is gathered; behind a pool there are no registers for it.
      x = load_cached<T, kPack>(plane + offset_of(input.map, at.row, at.column));
      if (kAlongChannels || kPack == 1) {
        const FusionRange rows = rows_of(input, node, at.row), columns = columns_of(input, node, at.column);
        gather_upstream<T, kPack>(parameters.grad, at, rows, columns, gathered[0]);
      } else {
        const T* upstream = plane_of<T>(parameters.grad, at.sample, at.channel);
        load_pack<T, kPack>(upstream + offset_of(parameters.grad, at.row, at.column), gathered[0]);
      }
    }
#pragma unroll 1
    for (int q = 0; q < kOwned; ++q) {
      FusionPosition pixel = at;
      bool inside = true;
      if constexpr (kPool) {
        pixel.row = 2 * at.row - input.map.height % 2 + q / 2;
        pixel.column = 2 * at.column - input.map.width % 2 + q % 2;
        inside = pixel.row >= 0 && pixel.row < input.map.height && pixel.column >= 0 && pixel.column < input.map.width;
      }
      if (inside) {
        if constexpr (kPool) x = load_cached<T, kPack>(plane + offset_of(input.map, pixel.row, pixel.column));
        settle<T, kPack, kCount>(state, target, node.pre, weight, pixel, x, gathered[0]);
      }
      // The next pixel's values move to the front, so that the loop has one body and the array stays in registers.
#pragma unroll
      for (int next = 1; next < kOwned; ++next) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) gathered[next - 1][j] = gathered[next][j];
      }
    }
  }
  leave_partials(state, target, share, node.channels, block, scratch);
}

template <typename T, bool kPool>
__device__ __forceinline__ void gather_target(
    const FusionGatherParameters<accumulate_t<T>>& parameters,
    const FusionTarget<accumulate_t<T>>& target,
    const accumulate_t<T>* weights,
    unsigned block,
    accumulate_t<T>* scratch) {
  constexpr int kPack = kGatherPack<T, kPool>;
  if constexpr (kPack > 1) {
    if (target.walk == FusionWalk::kChannelPacks) {
      return gather_positions<T, kPack, true, kPool>(parameters, target, weights, block, scratch);
    }
  }
  if constexpr (!kPool) {
    if (target.walk == FusionWalk::kPixelPacks) {
      return gather_positions<T, kPack, false, kPool>(parameters, target, weights, block, scratch);
    }
  }
  gather_positions<T, 1, false, kPool>(parameters, target, weights, block, scratch);
}

template <typename T>
__global__ void __launch_bounds__(kFusionThreads, 2)
    fusion_gather(const __grid_constant__ FusionGatherParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  __shared__ static A weights[kMostFusionInputs];
  __shared__ static A scratch[2 * kGatherPack<T, false> * kFusionThreads];
  share_weights(parameters.node, weights);
  int index = 0;
  while (index + 1 < parameters.targets_used && blockIdx.x >= parameters.targets[index + 1].domain.first_block) ++index;
  const FusionTarget<A>& target = parameters.targets[index];
  const unsigned block = blockIdx.x - target.domain.first_block;
  if (parameters.node.inputs[target.input].resample == kResamplePool) {
    gather_target<T, true>(parameters, target, weights, block, scratch);
  } else {
    gather_target<T, false>(parameters, target, weights, block, scratch);
  }
}

template <typename A>
struct FusionSumsTarget {
  const A* channel_partials;     // (chunks, 2, C), or null
  const A* derivative_partials;  // (blocks,), or null
  const A* inverse_deviation;    // (C,)
  A* sums;                       // (2, C)
  int chunks;
  int blocks;
};

template <typename A>
struct FusionSumsParameters {
  FusionSumsTarget<A> targets[kMostFusionInputs];
  const A* weight;     // (K,)
  A* weight_gradient;  // (K,), or null
  double epsilon;
  int inputs_used;
  int channels;
  int channel_blocks;  // per input
  int sum_blocks;      // of all inputs; one more block serves the weights
  int weighting;
};

template <typename A, int kCount>
__device__ __forceinline__ void write_weight_gradient(
    const FusionSumsParameters<A>& parameters, const double (&derivatives)[kMostFusionInputs]) {
  double weight[kCount], derivative[kCount], gradient[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    weight[i] = parameters.weight[i];
    derivative[i] = derivatives[i];
  }
  const FusionWeights<double> weights =
      normalise_fusion_weights(weight, kCount, parameters.weighting, parameters.epsilon, Exponential<double>());
  fusion_weight_gradient(weights, weight, derivative, kCount, gradient);
#pragma unroll
  for (int i = 0; i < kCount; ++i) parameters.weight_gradient[i] = static_cast<A>(gradient[i]);
}

// Adds up the blocks' partial sums, in double and in a fixed order.
template <typename A>
__global__ void __launch_bounds__(kFusionThreads)
    fusion_add_partials(const __grid_constant__ FusionSumsParameters<A> parameters) {
  __shared__ static double scratch[2 * kFusionThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (static_cast<int>(blockIdx.x) < parameters.sum_blocks) {
    const FusionSumsTarget<A>& target = parameters.targets[static_cast<int>(blockIdx.x) / parameters.channel_blocks];
    const int channels = parameters.channels;
    const int block = static_cast<int>(blockIdx.x) % parameters.channel_blocks;
    const int channel = block * kFinishChannels + thread % kFinishChannels;
    if (target.sums == nullptr) return;
    double sums[2] = {};
    if (channel < channels) {
      for (int chunk = thread / kFinishChannels; chunk < target.chunks; chunk += kFinishSlices) {
        const A* partials = target.channel_partials + static_cast<int64_t>(chunk) * 2 * channels + channel;
        sums[0] += partials[0];
        sums[1] += partials[channels];
      }
    }
    column_sum(sums, kFinishChannels, kFinishSlices, scratch);
    if (thread < kFinishChannels && channel < channels) {
      target.sums[channel] = static_cast<A>(sums[0]);
      target.sums[channels + channel] = static_cast<A>(sums[1] * target.inverse_deviation[channel]);
    }
    return;
  }
  double derivatives[kMostFusionInputs] = {};
#pragma unroll
  for (int i = 0; i < kMostFusionInputs; ++i) {
    if (i >= parameters.inputs_used || parameters.targets[i].derivative_partials == nullptr) continue;
    for (int block = thread; block < parameters.targets[i].blocks; block += kFusionThreads) {
      derivatives[i] += parameters.targets[i].derivative_partials[block];
    }
  }
  block_sum<kFusionThreads>(derivatives, scratch);
  if (thread != 0) return;
  if (parameters.inputs_used == 1) write_weight_gradient<A, 1>(parameters, derivatives);
  if (parameters.inputs_used == 2) write_weight_gradient<A, 2>(parameters, derivatives);
  if (parameters.inputs_used == 3) write_weight_gradient<A, 3>(parameters, derivatives);
  if (parameters.inputs_used == 4) write_weight_gradient<A, 4>(parameters, derivatives);
}

// Chooses the walk over one input in a backward pass and deals out its positions.
template <typename T>
void plan_target(
    FusionTarget<accumulate_t<T>>& target,
    const KernelNode<accumulate_t<T>>& node,
    const FusionMap& grad,
    int64_t samples,
    bool per_channel,
    int64_t& blocks) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  const KernelInput<accumulate_t<T>>& input = node.inputs[target.input];
  const bool pool = input.resample == kResamplePool;
  // Squares of 2x2 pixels are as many as the output's pixels.
  int64_t rows = pool ? node.height : input.map.height;
  int64_t columns = pool ? node.width : input.map.width;
  FusionMap maps[3] = {input.map, grad, target.gradient.data != nullptr ? target.gradient : input.map};
  // Where only equal positions of these maps are looked at, their rows may count as one.
  if (input.resample == kResampleNone &&
      std::all_of(maps, maps + 3, [](const FusionMap& map) { return is_flat(map); })) {
    for (FusionMap& map : maps) map = flattened(map);
    columns *= rows;
    rows = 1;
  }
  const int pack = pool ? kGatherPack<T, true> : kGatherPack<T, false>;
  const auto all = [&](auto allows) { return std::all_of(maps, maps + 3, allows); };
  const bool channel_packs =
      pack > 1 && all([&](const FusionMap& map) { return allows_channel_packs(map, node.channels, pack, kSize); }) &&
      has_aligned_affine(input);
  // Neighbouring threads at neighbouring pixels of a resampled row read whole sectors anyway.
  const bool pixel_packs = input.resample == kResampleNone &&
                           all([&](const FusionMap& map) { return allows_pixel_packs(map, pack, kSize); });
  target.walk = channel_packs ? FusionWalk::kChannelPacks : pixel_packs ? FusionWalk::kPixelPacks : FusionWalk::kScalar;
  const bool along_channels = channel_packs || (!pixel_packs && prefers_channels(input.map, node.channels));
  target.domain =
      make_domain(samples, node.channels, rows, columns, target.walk, pack, along_channels, per_channel, blocks);
}

// Adds up the partial sums of a pass into `sums` (empty: there are none) and the weight's gradient.
template <typename A>
void launch_finish(
    const FusionGatherParameters<A>& gather,
    double epsilon,
    const std::vector<Tensor>& sums,
    const Tensor& weight_gradient,
    cudaStream_t stream) {
  const KernelNode<A>& node = gather.node;
  FusionSumsParameters<A> parameters{};
  parameters.weight = node.weight;
  parameters.weight_gradient = static_cast<A*>(weight_gradient.data_ptr());
  parameters.epsilon = epsilon;
  parameters.inputs_used = node.inputs_used;
  parameters.channels = node.channels;
  parameters.weighting = node.weighting;
  for (int i = 0; i < gather.targets_used; ++i) {
    const FusionTarget<A>& target = gather.targets[i];
    FusionSumsTarget<A>& finish = parameters.targets[target.input];
    finish.channel_partials = target.channel_partials;
    finish.derivative_partials = target.derivative_partials;
    finish.chunks = target.domain.chunks;
    finish.blocks = target.domain.tiles * target.domain.chunks;
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i].numel() == 0) continue;
    parameters.targets[i].sums = static_cast<A*>(sums[i].data_ptr());
    parameters.targets[i].inverse_deviation = node.inputs[i].statistics + node.channels;
  }
  parameters.channel_blocks = static_cast<int>(ceil_divide(node.channels, kFinishChannels));
  parameters.sum_blocks = sums.empty() ? 0 : node.inputs_used * parameters.channel_blocks;
  launch(
      fusion_add_partials<A>, static_cast<int64_t>(parameters.sum_blocks) + 1, kFusionThreads, 0, stream, parameters);
}

// The sums over all pixels that backward needs where an input is normalised.
template <typename T>
void launch_backward_sums(const FusionBackwardSums& call, Workspace room, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const FusionNode& given = call.node;
  const int64_t samples = call.grad.size(0), channels = call.grad.size(1);
  FusionGatherParameters<A> parameters{};
  parameters.node = make_node<A>(given, call.settings, call.grad);
  parameters.grad = map_of(call.grad);
  // Weights of one have no gradient, so an input that is not normalised then has nothing to add up.
  const bool derives = call.settings.weighting != kWeightSum;
  int64_t blocks = 0;
  for (size_t i = 0; i < given.inputs.size(); ++i) {
    const bool normalised = given.statistics[i].numel() > 0;
    if (!normalised && !derives) continue;
    FusionTarget<A>& target = parameters.targets[parameters.targets_used++];
    target.input = static_cast<int>(i);
    plan_target<T>(target, parameters.node, parameters.grad, samples, true, blocks);
    const int64_t chunks = target.domain.chunks;
    if (normalised) target.channel_partials = room.take<A>(2 * channels * chunks);
    if (derives) target.derivative_partials = room.take<A>(target.domain.tiles * chunks);
  }
  launch(fusion_gather<T>, blocks, kFusionThreads, 0, stream, parameters);
  launch_finish(parameters, call.settings.epsilon, call.sums, call.weight_gradient, stream);
}

// The gradients of the inputs.
template <typename T>
void launch_backward(
    const FusionBackward& call,
    const Tensor* const (&wanted)[kMostFusionInputs],  // where the gradient of each input goes, or null
    Workspace room,
    cudaStream_t stream) {
  using A = accumulate_t<T>;
  const FusionNode& given = call.node;
  const int64_t samples = call.grad.size(0);
  FusionGatherParameters<A> parameters{};
  parameters.node = make_node<A>(given, call.settings, call.grad);
  parameters.grad = map_of(call.grad);
  const bool derives = call.weight_gradient.has_value() && call.settings.weighting != kWeightSum;
  int64_t blocks = 0;
  for (size_t i = 0; i < given.inputs.size(); ++i) {
    if (wanted[i] == nullptr && !derives) continue;
    FusionTarget<A>& target = parameters.targets[parameters.targets_used++];
    target.input = static_cast<int>(i);
    if (wanted[i] != nullptr) target.gradient = map_of(*wanted[i]);
    if (call.sums[i].numel() > 0) target.sums = static_cast<const A*>(call.sums[i].data_ptr());
    const int64_t pixels = given.inputs[i].size(2) * given.inputs[i].size(3);
    target.inverse_count = static_cast<A>(1.0 / (static_cast<double>(samples) * static_cast<double>(pixels)));
    plan_target<T>(target, parameters.node, parameters.grad, samples, false, blocks);
    if (derives) {
      target.derivative_partials = room.take<A>(static_cast<int64_t>(target.domain.tiles) * target.domain.chunks);
    }
  }
  launch(fusion_gather<T>, blocks, kFusionThreads, 0, stream, parameters);
  if (call.weight_gradient.has_value()) {
    launch_finish(parameters, call.settings.epsilon, {}, *call.weight_gradient, stream);
  }
}

}  // namespace frskd::cuda
