// A node of weighted fusion: its inputs, their normalisation, activations, pooling windows and weights.
#pragma once

#include "../common/fusion_math.h"
#include "../operations/fusion.h"
#include "fusion_domain.cuh"

namespace frskd::cuda {

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename A>
struct KernelInput {
  FusionMap map;
  const A* statistics;  // (>= 2, C): mean, inverse deviation; null where the input is not normalised
  const A* gamma;       // (C,)
  const A* beta;        // (C,)
  int resample;
  int row_shift;  // up: the output has exactly 2^shift rows for each of the source's; -1 for another ratio
  int column_shift;
};

template <typename A>
struct KernelNode {
  KernelInput<A> inputs[kMostFusionInputs];
  const A* weight;  // (inputs_used,)
  A epsilon;
  int inputs_used;
  int channels;
  int height;  // of the output
  int width;
  int pre;
  int weighting;
};

template <typename A>
bool has_aligned_affine(const KernelInput<A>& input) {
  return is_aligned(input.statistics, 16) && is_aligned(input.gamma, 16) && is_aligned(input.beta, 16);
}

// Fills everything that does not depend on a walk.
template <typename A>
KernelNode<A> make_node(const FusionNode& given, const FusionSettings& settings, const Tensor& output) {
  KernelNode<A> node{};
  node.weight = static_cast<const A*>(given.weight.data_ptr());
  node.epsilon = static_cast<A>(settings.epsilon);
  node.inputs_used = static_cast<int>(given.inputs.size());
  node.channels = static_cast<int>(output.size(1));
  node.height = static_cast<int>(output.size(2));
  node.width = static_cast<int>(output.size(3));
  node.pre = static_cast<int>(settings.pre);
  node.weighting = static_cast<int>(settings.weighting);
  const auto exact_shift = [](int source, int size) {
    // Nearest neighbour by a power of two is exact in float32 up to 2^24.
    for (int shift = 0; size <= (1 << 24) && shift < 24; ++shift) {
      if (source << shift == size) return shift;
      if (source << shift > size) break;
    }
    return -1;
  };
  for (size_t i = 0; i < given.inputs.size(); ++i) {
    KernelInput<A>& input = node.inputs[i];
    input.map = map_of(given.inputs[i]);
    input.resample = static_cast<int>(settings.resamples[i]);
    if (given.statistics[i].numel() > 0) {
      input.statistics = static_cast<const A*>(given.statistics[i].data_ptr());
      input.gamma = static_cast<const A*>(given.gammas[i].data_ptr());
      input.beta = static_cast<const A*>(given.betas[i].data_ptr());
    }
    if (input.resample == kResampleUp) {
      input.row_shift = exact_shift(input.map.height, node.height);
      input.column_shift = exact_shift(input.map.width, node.width);
    }
  }
  return node;
}

template <typename A>
bool node_allows_channel_packs(const KernelNode<A>& node, int pack, int element_size) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [&](const KernelInput<A>& input) {
    return allows_channel_packs(input.map, node.channels, pack, element_size) && has_aligned_affine(input);
  });
}

// y = (x - mean) * scale + beta of one channel or a pack of them. Written with explicit fused operations, so that every
// thread that looks at a pooling window sees the same bits and agrees on its winner.
template <typename A, int kCount>
struct FusionAffine {
  A mean[kCount];
  A scale[kCount];
  A beta[kCount];
  bool used;

  __device__ __forceinline__ void load(const KernelInput<A>& input, int channels, int channel) {
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
__device__ __forceinline__ int source_row(const KernelInput<A>& input, int row, int height) {
  if (input.resample != kResampleUp) return row;
  return input.row_shift >= 0 ? row >> input.row_shift : nearest_source(row, input.map.height, height);
}

template <typename A>
__device__ __forceinline__ int source_column(const KernelInput<A>& input, int column, int width) {
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
    const KernelInput<accumulate_t<T>>& input,
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

template <typename A>
struct Exponential {
  __device__ __forceinline__ A operator()(A value) const { return exponential(value); }
};

// The count is a constant in each call, so that the weights stay in registers.
template <typename A, int kCount>
__device__ __forceinline__ void share_weights(const KernelNode<A>& node, A* weights) {
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
    const KernelNode<A>& node,
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

}  // namespace frskd::cuda
