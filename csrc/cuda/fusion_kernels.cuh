// Device code of weighted fusion. Every kernel gives a block a range of positions: the pixels (or packs of them) of the
// map whose elements its threads own, for all channels or for a tile of them. Where channels lie side by side in memory
// (channels_last) a thread keeps its pack of channels, and index arithmetic and affine parameters serve the whole pack.
//
// forward     one launch: threads own output elements
// backward    one launch: threads own gradient elements and gather what reached them. The winner of a pooling window is
//             found again by each of the up to four owners of 2x2 input pixels that look at it
// sums        the same gather, into partial sums per channel and block, which a small launch adds up
// statistics  means and squared deviations per block, each thread's from values shifted by its first one, and a small
//             launch that merges them
#pragma once

#include "../common/fusion_math.h"
#include "device.cuh"

namespace frskd::cuda {

constexpr int kFusionThreads = 256;
constexpr int kFusionUnits = 2;      // positions of a thread whose loads are in flight together
constexpr int kMeasureUnits = 4;     // the same in the pass that only reads
constexpr int kFinishChannels = 32;  // channels of a finishing block, side by side
constexpr int kFinishSlices = kFusionThreads / kFinishChannels;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Division by a constant of the launch: floor(n / divisor) for n < 2^31.
struct Divisor {
  unsigned divisor;
  unsigned multiplier;  // ceil(2^shift / divisor)
  int shift;
};

inline Divisor make_divisor(int64_t divisor) {
  Divisor result{};
  result.divisor = static_cast<unsigned>(divisor);
  result.shift = 31;
  while ((int64_t{1} << (result.shift - 31)) < divisor) ++result.shift;
  result.multiplier = static_cast<unsigned>(((uint64_t{1} << result.shift) + result.divisor - 1) / result.divisor);
  return result;
}

FRSKD_HOST_DEVICE unsigned divide(unsigned numerator, const Divisor& divisor) {
  return static_cast<unsigned>(static_cast<uint64_t>(numerator) * divisor.multiplier >> divisor.shift);
}

// One map (N, C, H, W) of any strides.
struct FusionMap {
  const void* data;
  int64_t stride_sample;  // strides in elements; 0 for an axis of one entry
  int64_t stride_channel;
  int64_t stride_row;
  int64_t stride_column;
  int height;
  int width;
};

// How many elements a position has, and along which axis.
enum class FusionWalk : int {
  kScalar,        // one: any strides
  kPixelPacks,    // 16 bytes of a row (NCHW)
  kChannelPacks,  // 16 bytes of channels (channels_last)
};

// How the positions of a map are dealt out to blocks and threads.
struct FusionDomain {
  int64_t positions;
  Divisor per_sample;   // positions of one sample
  Divisor per_channel;  // positions of one channel of it; equal where the channel belongs to the thread
  Divisor columns;
  int column_step;    // elements of a position along its row
  int channel_step;   // channels of a thread
  int channel_units;  // threads that cover the channels; 1 where positions run over channels too
  int lanes;          // of them in a block, side by side
  int groups;         // positions a block looks at together
  int tiles;          // blocks that cover the channels
  int chunk;          // positions of a block
  int chunks;
  unsigned first_block;
};

template <typename A>
struct FusionInput {
  FusionMap map;
  const A* statistics;  // (>= 2, C): mean, inverse deviation; null where the input is not normalised
  const A* gamma;       // (C,)
  const A* beta;        // (C,)
  int resample;
  int row_shift;  // up: the output has exactly 2^shift rows for each of the source's; -1 for another ratio
  int column_shift;
};

template <typename A>
struct FusionNode {
  FusionInput<A> inputs[kMostFusionInputs];
  const A* weight;  // (inputs_used,)
  A epsilon;
  int inputs_used;
  int channels;
  int height;  // of the output
  int width;
  int pre;
  int act;
  int weighting;
};

struct FusionPosition {
  int64_t sample;
  int channel;
  int row;
  int column;
};

// A thread's share of its block's positions.
struct FusionShare {
  int64_t first_sample;
  unsigned first;  // position of the block's first one in that sample
  unsigned count;  // positions of the block; 0 for a thread without channels
  int channel;     // of the thread
  int chunk;
  int lane;
  int group;
};

__device__ __forceinline__ FusionShare share_of(const FusionDomain& domain, unsigned block) {
  FusionShare share;
  const int thread = static_cast<int>(threadIdx.x);
  const int tile = static_cast<int>(block % static_cast<unsigned>(domain.tiles));
  share.chunk = static_cast<int>(block / static_cast<unsigned>(domain.tiles));
  share.lane = thread % domain.lanes;
  share.group = thread / domain.lanes;
  const int unit = tile * domain.lanes + share.lane;
  share.channel = unit * domain.channel_step;
  const int64_t first = static_cast<int64_t>(share.chunk) * domain.chunk;
  const int64_t left = domain.positions - first;
  share.count = static_cast<unsigned>(left < domain.chunk ? left : domain.chunk);
  if (share.group >= domain.groups || unit >= domain.channel_units) share.count = 0;
  const unsigned size = domain.per_sample.divisor;
  share.first_sample =
      first < (int64_t{1} << 31) ? divide(static_cast<unsigned>(first), domain.per_sample) : first / size;
  share.first = static_cast<unsigned>(first - share.first_sample * size);
  return share;
}

__device__ __forceinline__ FusionPosition
position_at(const FusionDomain& domain, const FusionShare& share, unsigned offset) {
  FusionPosition at;
  unsigned rest = share.first + offset;
  const unsigned sample = divide(rest, domain.per_sample);
  rest -= sample * domain.per_sample.divisor;
  const unsigned channel = divide(rest, domain.per_channel);
  rest -= channel * domain.per_channel.divisor;
  const unsigned row = divide(rest, domain.columns);
  at.sample = share.first_sample + sample;
  at.channel = share.channel + static_cast<int>(channel);
  at.row = static_cast<int>(row);
  at.column = static_cast<int>(rest - row * domain.columns.divisor) * domain.column_step;
  return at;
}

template <typename T>
__device__ __forceinline__ const T* plane_of(const FusionMap& map, int64_t sample, int channel) {
  return static_cast<const T*>(map.data) + sample * map.stride_sample + channel * map.stride_channel;
}

__device__ __forceinline__ int64_t offset_of(const FusionMap& map, int row, int column) {
  return row * map.stride_row + column * map.stride_column;
}

template <typename T, int kPack>
__device__ __forceinline__ void load_pack(const T* pointer, accumulate_t<T> (&values)[kPack]) {
  const Pack<T, kPack> pack = load_cached<T, kPack>(pointer);
#pragma unroll
  for (int j = 0; j < kPack; ++j) values[j] = static_cast<accumulate_t<T>>(pack.values[j]);
}

// y = (x - mean) * scale + beta of one channel or a pack of them. Written with explicit fused operations, so that every
// thread that looks at a pooling window sees the same bits and agrees on its winner.
template <typename A, int kCount>
struct FusionAffine {
  A mean[kCount];
  A scale[kCount];
  A beta[kCount];
  bool used;

  __device__ __forceinline__ void load(const FusionInput<A>& input, int channels, int channel) {
    used = input.statistics != nullptr;
    if (!used) return;
    constexpr int kPart = kCount < kPackSize<A> ? kCount : kPackSize<A>;
#pragma unroll
    for (int part = 0; part < kCount; part += kPart) {
      const int first = channel + part;
      const Pack<A, kPart> means = load_cached<A, kPart>(input.statistics + first);
      const Pack<A, kPart> deviations = load_cached<A, kPart>(input.statistics + channels + first);
      const Pack<A, kPart> gammas = load_cached<A, kPart>(input.gamma + first);
      const Pack<A, kPart> betas = load_cached<A, kPart>(input.beta + first);
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        mean[part + j] = means.values[j];
        scale[part + j] = deviations.values[j] * gammas.values[j];
        beta[part + j] = betas.values[j];
      }
    }
  }

  template <int kPack>
  __device__ __forceinline__ void apply(A (&values)[kPack]) const {
    if (!used) return;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int c = kCount == 1 ? 0 : j;
      values[j] = multiply_add(values[j] - mean[c], scale[c], beta[c]);
    }
  }
};

template <typename A>
__device__ __forceinline__ A sigmoid(A value) {
  return A(1) / (A(1) + exponential(-value));
}

template <int kPack, typename A>
__device__ __forceinline__ void activate(A (&values)[kPack], int activation) {
  if (activation == kActivationRelu) {
    // Written so that a NaN stays NaN.
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j] = values[j] < A(0) ? A(0) : values[j];
  } else if (activation == kActivationSilu) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j] = values[j] / (A(1) + exponential(-values[j]));
  }
}

// upstream *= activation'(value)
template <int kPack, typename A>
__device__ __forceinline__ void through_activation(A (&upstream)[kPack], const A (&values)[kPack], int activation) {
  if (activation == kActivationRelu) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) upstream[j] = values[j] <= A(0) ? A(0) : upstream[j];
  } else if (activation == kActivationSilu) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const A gate = sigmoid(values[j]);
      upstream[j] *= gate * (A(1) + values[j] * (A(1) - gate));
    }
  }
}

template <typename A>
__device__ __forceinline__ int source_row(const FusionInput<A>& input, int row, int height) {
  if (input.resample != kResampleUp) return row;
  return input.row_shift >= 0 ? row >> input.row_shift : nearest_source(row, input.map.height, height);
}

template <typename A>
__device__ __forceinline__ int source_column(const FusionInput<A>& input, int column, int width) {
  if (input.resample != kResampleUp) return column;
  return input.column_shift >= 0 ? column >> input.column_shift : nearest_source(column, input.map.width, width);
}

// The first output that reads `source` or a later one.
__device__ __forceinline__ int destination(int source, int shift, int source_size, int output_size) {
  return shift >= 0 ? source << shift : first_destination(source, source_size, output_size);
}

// Walks the 3x3 window of the zero-padded normalised map in row-major order; the first largest wins, a NaN always.
template <bool kWinners, int kPack, typename A>
__device__ __forceinline__ void compete(
    const A (&values)[kPack], int place, A (&largest)[kPack], int (&winners)[kPack]) {
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const bool wins = values[j] > largest[j] || values[j] != values[j];
    largest[j] = wins ? values[j] : largest[j];
    if constexpr (kWinners) winners[j] = wins ? place : winners[j];
  }
}

template <typename T, int kPack, int kCount, bool kWinners>
__device__ __forceinline__ void window_maximum(
    const FusionInput<accumulate_t<T>>& input,
    const FusionAffine<accumulate_t<T>, kCount>& affine,
    const T* plane,
    int row,     // of the output
    int column,  // of the output
    accumulate_t<T> (&largest)[kPack],
    int (&winners)[kPack]  // 3 * row + column within the window
) {
  using A = accumulate_t<T>;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    largest[j] = negative_infinity<A>();
    winners[j] = 0;
  }
  const int top = 2 * row - input.map.height % 2;
  const int left = 2 * column - input.map.width % 2;
#pragma unroll 1
  for (int y = 0; y < 3; ++y) {
    const int source_row = top + y;
    const bool row_inside = source_row >= 0 && source_row < input.map.height;
    const T* source = plane + (row_inside ? source_row : 0) * input.map.stride_row;
    Pack<T, kPack> packs[3];
#pragma unroll
    for (int x = 0; x < 3; ++x) {
      // The padding reads some pixel and drops it, so that no load depends on a branch.
      const int source_column = left + x;
      const bool inside = source_column >= 0 && source_column < input.map.width;
      packs[x] = load_cached<T, kPack>(source + (inside ? source_column : 0) * input.map.stride_column);
    }
#pragma unroll
    for (int x = 0; x < 3; ++x) {
      const bool inside = row_inside && left + x >= 0 && left + x < input.map.width;
      A values[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) values[j] = static_cast<A>(packs[x].values[j]);
      affine.apply(values);
#pragma unroll
      for (int j = 0; j < kPack; ++j) values[j] = inside ? values[j] : A(0);
      compete<kWinners>(values, 3 * y + x, largest, winners);
    }
  }
}

// The maxima of kPack neighbouring windows of a row, for maps of even width whose rows can be read in packs.
template <typename T, int kPack>
__device__ __forceinline__ void window_maxima_of_row(
    const FusionInput<accumulate_t<T>>& input,
    const FusionAffine<accumulate_t<T>, 1>& affine,
    const T* plane,
    int row,
    int column,  // of the first window
    accumulate_t<T> (&largest)[kPack]) {
  using A = accumulate_t<T>;
#pragma unroll
  for (int j = 0; j < kPack; ++j) largest[j] = negative_infinity<A>();
  const int top = 2 * row - input.map.height % 2;
  const int left = 2 * column;
  int unused[1] = {};
#pragma unroll 1
  for (int y = 0; y < 3; ++y) {
    A values[2 * kPack + 1] = {};
    if (top + y >= 0 && top + y < input.map.height) {
      const T* source = plane + offset_of(input.map, top + y, left);
      const Pack<T, kPack> first = load_cached<T, kPack>(source);
      const Pack<T, kPack> second = load_cached<T, kPack>(source + kPack);
      const bool inside = left + 2 * kPack < input.map.width;
      A last[1] = {};
      if (inside) load_pack<T, 1>(source + 2 * kPack, last);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        values[j] = static_cast<A>(first.values[j]);
        values[kPack + j] = static_cast<A>(second.values[j]);
      }
      affine.apply(values);
      if (inside) affine.apply(last);
      values[2 * kPack] = last[0];
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      A best[1] = {largest[j]};
#pragma unroll
      for (int x = 0; x < 3; ++x) {
        const A candidate[1] = {values[2 * j + x]};
        compete<false>(candidate, 0, best, unused);
      }
      largest[j] = best[0];
    }
  }
}

// s = sum_i w^_i * pre(v_i) at kUnits positions of the output. Along channels all of them are of the same channels.
template <typename T, int kPack, bool kAlongChannels, int kUnits>
__device__ __forceinline__ void fused_values(
    const FusionNode<accumulate_t<T>>& node,
    const accumulate_t<T>* weights,  // (K,), normalised, shared
    const FusionPosition (&at)[kUnits],
    accumulate_t<T> (&sums)[kUnits][kPack]) {
  using A = accumulate_t<T>;
  constexpr int kCount = kAlongChannels ? kPack : 1;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) sums[u][j] = A(0);
  }
#pragma unroll 1
  for (int i = 0; i < node.inputs_used; ++i) {
    const FusionInput<A>& input = node.inputs[i];
    FusionAffine<A, kCount> affine{};
    A values[kUnits][kPack];
    affine.load(input, node.channels, at[0].channel);
    if (input.resample == kResamplePool) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (!kAlongChannels && u > 0) affine.load(input, node.channels, at[u].channel);
        const T* plane = plane_of<T>(input.map, at[u].sample, at[u].channel);
        if constexpr (kAlongChannels || kPack == 1) {
          int unused[kPack];
          window_maximum<T, kPack, kCount, false>(input, affine, plane, at[u].row, at[u].column, values[u], unused);
        } else {
          window_maxima_of_row<T, kPack>(input, affine, plane, at[u].row, at[u].column, values[u]);
        }
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const T* source = plane_of<T>(input.map, at[u].sample, at[u].channel) +
                          source_row(input, at[u].row, node.height) * input.map.stride_row;
        if (kAlongChannels || kPack == 1 || input.resample == kResampleNone) {
          const int column = source_column(input, at[u].column, node.width);
          load_pack<T, kPack>(source + column * input.map.stride_column, values[u]);
        } else {
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            A value[1];
            const int column = source_column(input, at[u].column + j, node.width);
            load_pack<T, 1>(source + column * input.map.stride_column, value);
            values[u][j] = value[0];
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (!kAlongChannels && u > 0) affine.load(input, node.channels, at[u].channel);
        affine.apply(values[u]);
      }
    }
    const A weight = weights[i];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      activate(values[u], node.pre);
#pragma unroll
      for (int j = 0; j < kPack; ++j) sums[u][j] += weight * values[u][j];
    }
  }
}

template <typename A>
struct Exponential {
  __device__ __forceinline__ A operator()(A value) const { return exponential(value); }
};

// The count is a constant in each call, so that the weights stay in registers.
template <typename A, int kCount>
__device__ __forceinline__ void share_weights(const FusionNode<A>& node, A* weights) {
  A raw[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw[i] = node.weight[i];
  const FusionWeights<A> result = normalise_fusion_weights(raw, kCount, node.weighting, node.epsilon, Exponential<A>());
#pragma unroll
  for (int i = 0; i < kCount; ++i) weights[i] = result.normalised[i];
}

// w^ of the node, for all threads of the block.
template <typename A>
__device__ __forceinline__ void share_weights(
    const FusionNode<A>& node,
    A* weights  // (kMostFusionInputs,), shared
) {
  if (threadIdx.x == 0) {
    if (node.inputs_used == 1) share_weights<A, 1>(node, weights);
    if (node.inputs_used == 2) share_weights<A, 2>(node, weights);
    if (node.inputs_used == 3) share_weights<A, 3>(node, weights);
    if (node.inputs_used == 4) share_weights<A, 4>(node, weights);
  }
  __syncthreads();
}

template <typename A>
struct FusionForwardParameters {
  FusionNode<A> node;
  FusionMap out;
  FusionDomain domain;
  FusionWalk walk;
};

template <typename T, int kPack, bool kAlongChannels>
__device__ __forceinline__ void fuse_positions(
    const FusionForwardParameters<accumulate_t<T>>& parameters, const accumulate_t<T>* weights) {
  using A = accumulate_t<T>;
  const FusionDomain& domain = parameters.domain;
  const FusionShare share = share_of(domain, blockIdx.x);
  const unsigned groups = static_cast<unsigned>(domain.groups);
#pragma unroll 1
  for (unsigned first = static_cast<unsigned>(share.group); first < share.count; first += groups * kFusionUnits) {
    FusionPosition at[kFusionUnits];
#pragma unroll
    for (int u = 0; u < kFusionUnits; ++u) {
      // A position past the end is the last one again and not written, so that no load depends on a branch.
      const unsigned offset = first + static_cast<unsigned>(u) * groups;
      at[u] = position_at(domain, share, offset < share.count ? offset : share.count - 1);
    }
    A sums[kFusionUnits][kPack];
    fused_values<T, kPack, kAlongChannels, kFusionUnits>(parameters.node, weights, at, sums);
#pragma unroll
    for (int u = 0; u < kFusionUnits; ++u) {
      if (first + static_cast<unsigned>(u) * groups >= share.count) break;
      activate(sums[u], parameters.node.act);
      Pack<T, kPack> result;
#pragma unroll
      for (int j = 0; j < kPack; ++j) result.values[j] = static_cast<T>(sums[u][j]);
      const T* target =
          plane_of<T>(parameters.out, at[u].sample, at[u].channel) + offset_of(parameters.out, at[u].row, at[u].column);
      store<T, kPack>(const_cast<T*>(target), result);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kFusionThreads, 2)
    fusion_fuse(const __grid_constant__ FusionForwardParameters<accumulate_t<T>> parameters) {
  __shared__ static accumulate_t<T> weights[kMostFusionInputs];
  share_weights(parameters.node, weights);
  if (parameters.walk == FusionWalk::kChannelPacks) return fuse_positions<T, kPackSize<T>, true>(parameters, weights);
  if (parameters.walk == FusionWalk::kPixelPacks) return fuse_positions<T, kPackSize<T>, false>(parameters, weights);
  fuse_positions<T, 1, false>(parameters, weights);
}

// Sums each of `values` over the threads of the block with the same lane; all of them get the same bits.
template <int kCount, typename A>
__device__ __forceinline__ void column_sum(
    A (&values)[kCount],
    int lanes,
    int groups,
    A* scratch  // (kCount * kFusionThreads,), shared
) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / lanes;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) scratch[i * kFusionThreads + thread] = values[i];
  __syncthreads();
  for (int count = groups; count > 1;) {
    const int half = (count + 1) / 2;
    if (group + half < count) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        scratch[i * kFusionThreads + thread] += scratch[i * kFusionThreads + thread + half * lanes];
      }
    }
    __syncthreads();
    count = half;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = scratch[i * kFusionThreads + thread % lanes];
}

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
  FusionNode<A> node;
  FusionMap grad;
  FusionTarget<A> targets[kMostFusionInputs];
  int targets_used;
};

// dL/ds at one position of the output. kRecompute: there is an activation after the sum.
template <typename T, int kPack, bool kAlongChannels, bool kRecompute>
__device__ __forceinline__ void upstream_at(
    const FusionNode<accumulate_t<T>>& node,
    const accumulate_t<T>* weights,
    const FusionMap& grad,
    const FusionPosition& at,
    accumulate_t<T> (&upstream)[kPack]) {
  using A = accumulate_t<T>;
  load_pack<T, kPack>(plane_of<T>(grad, at.sample, at.channel) + offset_of(grad, at.row, at.column), upstream);
  if constexpr (kRecompute) {
    const FusionPosition position[1] = {at};
    A sums[1][kPack];
    fused_values<T, kPack, kAlongChannels, 1>(node, weights, position, sums);
    through_activation(upstream, sums[0], node.act);
  }
}

struct FusionRange {
  int first;
  int end;
};

// The rows of the output that read `row` of an input that is not pooled.
template <typename A>
__device__ __forceinline__ FusionRange rows_of(const FusionInput<A>& input, const FusionNode<A>& node, int row) {
  if (input.resample != kResampleUp) return {row, row + 1};
  return {
      destination(row, input.row_shift, input.map.height, node.height),
      destination(row + 1, input.row_shift, input.map.height, node.height)};
}

template <typename A>
__device__ __forceinline__ FusionRange columns_of(const FusionInput<A>& input, const FusionNode<A>& node, int column) {
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
      const FusionInput<A>& input, const FusionTarget<A>& target, int channels, int channel) {
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
template <typename T, bool kPool, bool kRecompute>
constexpr int kGatherPack = kRecompute                ? (sizeof(T) == 8 ? 1 : 2)
                            : kPool && sizeof(T) == 2 ? 4
                                                      : kPackSize<T>;

// kPool: the input is pooled, and a position is a square of 2x2 pixels of its padded map, numbered like the windows
// that begin there.
template <typename T, int kPack, bool kAlongChannels, bool kPool, bool kRecompute>
__device__ __forceinline__ void gather_positions(
    const FusionGatherParameters<accumulate_t<T>>& parameters,
    const FusionTarget<accumulate_t<T>>& target,
    const accumulate_t<T>* weights,
    unsigned block,  // among those of the target
    accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  constexpr int kCount = kAlongChannels ? kPack : 1;
  constexpr int kOwned = kPool ? 4 : 1;
  const FusionNode<A>& node = parameters.node;
  const FusionInput<A>& input = node.inputs[target.input];
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
    // On its way while the gradient is gathered, where there are registers for it.
    constexpr bool kEarly = !kPool && !kRecompute;
    if constexpr (kEarly) x = load_cached<T, kPack>(plane + offset_of(input.map, at.row, at.column));
    A gathered[kOwned][kPack] = {};
    if (kAlongChannels || kPack == 1) {
      const FusionRange rows =
          kPool ? FusionRange{at.row > 0 ? at.row - 1 : 0, at.row + 1} : rows_of(input, node, at.row);
      const FusionRange columns =
          kPool ? FusionRange{at.column > 0 ? at.column - 1 : 0, at.column + 1} : columns_of(input, node, at.column);
      if constexpr (!kPool && !kRecompute) {
        gather_upstream<T, kPack>(parameters.grad, at, rows, columns, gathered[0]);
      } else {
#pragma unroll 1
        for (int row = rows.first; row < rows.end; ++row) {
#pragma unroll 1
          for (int column = columns.first; column < columns.end; ++column) {
            A upstream[kPack];
            upstream_at<T, kPack, kAlongChannels, kRecompute>(
                node, weights, parameters.grad, {at.sample, at.channel, row, column}, upstream);
            if constexpr (kPool) {
              A largest[kPack];
              int winners[kPack];
              window_maximum<T, kPack, kCount, true>(input, state.affine, plane, row, column, largest, winners);
#pragma unroll
              for (int q = 0; q < kOwned; ++q) {
                const int y = 2 * (at.row - row) + q / 2, x = 2 * (at.column - column) + q % 2;
                const int place = y < 3 && x < 3 ? 3 * y + x : -1;
#pragma unroll
                for (int j = 0; j < kPack; ++j) gathered[q][j] += winners[j] == place ? upstream[j] : A(0);
              }
            } else {
#pragma unroll
              for (int j = 0; j < kPack; ++j) gathered[0][j] += upstream[j];
            }
          }
        }
      }
    } else {
      upstream_at<T, kPack, kAlongChannels, kRecompute>(node, weights, parameters.grad, at, gathered[0]);
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
        if constexpr (!kEarly) x = load_cached<T, kPack>(plane + offset_of(input.map, pixel.row, pixel.column));
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
  if (target.channel_partials != nullptr) {
    A sums[2 * kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      sums[c] = state.first[c];
      sums[kCount + c] = state.second[c];
    }
    column_sum(sums, domain.lanes, domain.groups, scratch);
    if (share.group == 0 && share.count > 0) {
      A* partials = target.channel_partials + static_cast<int64_t>(share.chunk) * 2 * node.channels + share.channel;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        partials[c] = sums[c];
        partials[node.channels + c] = sums[kCount + c];
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

template <typename T, bool kPool, bool kRecompute>
__device__ __forceinline__ void gather_target(
    const FusionGatherParameters<accumulate_t<T>>& parameters,
    const FusionTarget<accumulate_t<T>>& target,
    const accumulate_t<T>* weights,
    unsigned block,
    accumulate_t<T>* scratch) {
  constexpr int kPack = kGatherPack<T, kPool, kRecompute>;
  if constexpr (kPack > 1) {
    if (target.walk == FusionWalk::kChannelPacks) {
      return gather_positions<T, kPack, true, kPool, kRecompute>(parameters, target, weights, block, scratch);
    }
  }
  if constexpr (!kPool && !kRecompute) {
    if (target.walk == FusionWalk::kPixelPacks) {
      return gather_positions<T, kPack, false, kPool, kRecompute>(parameters, target, weights, block, scratch);
    }
  }
  gather_positions<T, 1, false, kPool, kRecompute>(parameters, target, weights, block, scratch);
}

template <typename T, bool kRecompute>
__global__ void __launch_bounds__(kFusionThreads, 2)
    fusion_gather(const __grid_constant__ FusionGatherParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  __shared__ static A weights[kMostFusionInputs];
  __shared__ static A scratch[2 * kGatherPack<T, false, kRecompute> * kFusionThreads];
  share_weights(parameters.node, weights);
  int index = 0;
  while (index + 1 < parameters.targets_used && blockIdx.x >= parameters.targets[index + 1].domain.first_block) ++index;
  const FusionTarget<A>& target = parameters.targets[index];
  const unsigned block = blockIdx.x - target.domain.first_block;
  if (parameters.node.inputs[target.input].resample == kResamplePool) {
    gather_target<T, true, kRecompute>(parameters, target, weights, block, scratch);
  } else {
    gather_target<T, false, kRecompute>(parameters, target, weights, block, scratch);
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

template <typename A>
struct FusionStatisticsTarget {
  FusionDomain domain;
  FusionMap map;
  A* partials;    // (chunks, 2, C): mean and squared deviations from it
  A* statistics;  // (3, C): mean, 1 / sqrt(variance + epsilon), variance
  double epsilon;
  double count;        // N * H_i * W_i
  double chunk_count;  // values of one channel in a block's share; the last block has what is left
  FusionWalk walk;
};

template <typename A>
struct FusionStatisticsParameters {
  FusionStatisticsTarget<A> targets[kMostFusionInputs];
  int targets_used;
  int channels;
  int channel_blocks;  // of the finishing launch, per input
};

// A channel that starts with an outlier, or lies far from zero, must not lose its variance to the shift: threads shift
// by values of their own, and everything after them is merged by Chan's formula in double.
template <typename T, int kPack, bool kAlongChannels>
__device__ __forceinline__ void measure_positions(
    const FusionStatisticsTarget<accumulate_t<T>>& target, int channels, unsigned block, double* scratch) {
  using A = accumulate_t<T>;
  constexpr int kCount = kAlongChannels ? kPack : 1;
  const FusionDomain& domain = target.domain;
  const FusionShare share = share_of(domain, block);
  A shift[kCount] = {}, sums[kCount] = {}, squares[kCount] = {};
  int count = 0;
#pragma unroll 1
  for (unsigned first = static_cast<unsigned>(share.group); first < share.count;
       first += static_cast<unsigned>(kMeasureUnits * domain.groups)) {
    Pack<T, kPack> packs[kMeasureUnits];
#pragma unroll
    for (int u = 0; u < kMeasureUnits; ++u) {
      // A position past the end is the last one again and not counted, so that no load depends on a branch.
      const unsigned offset = first + static_cast<unsigned>(u * domain.groups);
      const FusionPosition at = position_at(domain, share, offset < share.count ? offset : share.count - 1);
      packs[u] = load_cached<T, kPack>(
          plane_of<T>(target.map, at.sample, at.channel) + offset_of(target.map, at.row, at.column));
    }
    if (count == 0) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) shift[c] = static_cast<A>(packs[0].values[c]);
    }
#pragma unroll
    for (int u = 0; u < kMeasureUnits; ++u) {
      if (first + static_cast<unsigned>(u * domain.groups) >= share.count) break;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const int c = kCount == 1 ? 0 : j;
        const A difference = static_cast<A>(packs[u].values[j]) - shift[c];
        sums[c] += difference;
        squares[c] += difference * difference;
      }
      count += 1;
    }
  }
  const double own = static_cast<double>(count) * (kPack / kCount);
  const int64_t left = domain.positions - static_cast<int64_t>(share.chunk) * domain.chunk;
  const double all = static_cast<double>(left < domain.chunk ? left : domain.chunk) * (kPack / kCount);
  double means[kCount], totals[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    means[c] = count == 0 ? 0.0 : static_cast<double>(shift[c]) + static_cast<double>(sums[c]) / own;
    totals[c] = own * means[c];
  }
  column_sum(totals, domain.lanes, domain.groups, scratch);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const double mean = totals[c] / all;
    const double distance = means[c] - mean;
    // About the thread's own mean, then about the block's.
    const double about = count == 0 ? 0.0 : squares[c] - static_cast<double>(sums[c]) * sums[c] / own;
    totals[c] = about + own * distance * distance;
    means[c] = mean;
  }
  column_sum(totals, domain.lanes, domain.groups, scratch);
  if (share.group == 0 && share.count > 0) {
    A* partials = target.partials + static_cast<int64_t>(share.chunk) * 2 * channels + share.channel;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      partials[c] = static_cast<A>(means[c]);
      partials[channels + c] = static_cast<A>(totals[c]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kFusionThreads, 2)
    fusion_measure(const __grid_constant__ FusionStatisticsParameters<accumulate_t<T>> parameters) {
  constexpr int kPack = kPackSize<T>;
  __shared__ static double scratch[kPack * kFusionThreads];
  int index = 0;
  while (index + 1 < parameters.targets_used && blockIdx.x >= parameters.targets[index + 1].domain.first_block) ++index;
  const FusionStatisticsTarget<accumulate_t<T>>& target = parameters.targets[index];
  const unsigned block = blockIdx.x - target.domain.first_block;
  if (target.walk == FusionWalk::kChannelPacks) {
    return measure_positions<T, kPack, true>(target, parameters.channels, block, scratch);
  }
  if (target.walk == FusionWalk::kPixelPacks) {
    return measure_positions<T, kPack, false>(target, parameters.channels, block, scratch);
  }
  measure_positions<T, 1, false>(target, parameters.channels, block, scratch);
}

template <typename A>
__global__ void __launch_bounds__(kFusionThreads)
    fusion_merge_statistics(const __grid_constant__ FusionStatisticsParameters<A> parameters) {
  __shared__ static double scratch[kFusionThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const FusionStatisticsTarget<A>& target =
      parameters.targets[static_cast<int>(blockIdx.x) / parameters.channel_blocks];
  const int block = static_cast<int>(blockIdx.x) % parameters.channel_blocks;
  const int channels = parameters.channels;
  const int channel = block * kFinishChannels + thread % kFinishChannels;
  const int chunks = channel < channels ? target.domain.chunks : 0;
  const double last_count = target.count - target.chunk_count * (target.domain.chunks - 1);
  const auto count_of = [&](int chunk) { return chunk + 1 < target.domain.chunks ? target.chunk_count : last_count; };
  double sums[1] = {};
  for (int chunk = thread / kFinishChannels; chunk < chunks; chunk += kFinishSlices) {
    sums[0] += count_of(chunk) * target.partials[static_cast<int64_t>(chunk) * 2 * channels + channel];
  }
  column_sum(sums, kFinishChannels, kFinishSlices, scratch);
  const double mean = sums[0] / target.count;
  sums[0] = 0.0;
  for (int chunk = thread / kFinishChannels; chunk < chunks; chunk += kFinishSlices) {
    const A* partials = target.partials + static_cast<int64_t>(chunk) * 2 * channels + channel;
    const double distance = partials[0] - mean;
    sums[0] += partials[channels] + count_of(chunk) * distance * distance;
  }
  column_sum(sums, kFinishChannels, kFinishSlices, scratch);
  if (thread >= kFinishChannels || channel >= channels) return;
  const double variance = sums[0] / target.count;
  target.statistics[channel] = static_cast<A>(mean);
  target.statistics[channels + channel] = static_cast<A>(1.0 / sqrt(variance + target.epsilon));
  target.statistics[2 * channels + channel] = static_cast<A>(variance);
}

}  // namespace frskd::cuda
