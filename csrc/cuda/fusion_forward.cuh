// Weighted fusion, forward: one launch, in which threads own output elements.
#pragma once

#include "fusion_node.cuh"

namespace frskd::cuda {

constexpr int kFusionUnits = 2;  // positions of a thread whose loads are in flight together

// The maxima of kPack neighbouring windows of a row, for maps of even width whose rows can be read in packs.
template <typename T, int kPack>
__device__ __forceinline__ void window_maxima_of_row(
    const KernelInput<accumulate_t<T>>& input,
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
    const KernelNode<accumulate_t<T>>& node,
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
    const KernelInput<A>& input = node.inputs[i];
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
struct FusionForwardParameters {
  KernelNode<A> node;
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

// A pack of pooled pixels takes two packs of its input's rows, which must not be padded at their start. Up-sampled
// inputs are read element by element.
template <typename A>
bool node_allows_pixel_packs(const KernelNode<A>& node, int pack, int element_size) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [&](const KernelInput<A>& input) {
    return input.resample == kResampleUp || (allows_pixel_packs(input.map, pack, element_size) &&
                                             (input.resample == kResampleNone || input.map.width % 2 == 0));
  });
}

template <typename A>
bool is_flat(const KernelNode<A>& node) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [](const KernelInput<A>& input) {
    return input.resample == kResampleNone && is_flat(input.map);
  });
}

template <typename T>
void launch_forward(const FusionForward& call, cudaStream_t stream) {
  using A = accumulate_t<T>;
  constexpr int kSize = static_cast<int>(sizeof(T));
  FusionForwardParameters<A> parameters{};
  KernelNode<A>& node = parameters.node;
  node = make_node<A>(call.node, call.settings, call.out);
  parameters.out = map_of(call.out);
  if (is_flat(node) && is_flat(parameters.out)) {
    parameters.out = flattened(parameters.out);
    for (int i = 0; i < node.inputs_used; ++i) node.inputs[i].map = flattened(node.inputs[i].map);
    node.height = parameters.out.height;
    node.width = parameters.out.width;
  }
  constexpr int kPack = kPackSize<T>;
  const bool channel_packs = allows_channel_packs(parameters.out, node.channels, kPack, kSize) &&
                             node_allows_channel_packs(node, kPack, kSize);
  const bool pixel_packs =
      allows_pixel_packs(parameters.out, kPack, kSize) && node_allows_pixel_packs(node, kPack, kSize);
  parameters.walk = channel_packs ? FusionWalk::kChannelPacks
                    : pixel_packs ? FusionWalk::kPixelPacks
                                  : FusionWalk::kScalar;
  const bool along_channels = channel_packs || (!pixel_packs && prefers_channels(parameters.out, node.channels));
  int64_t blocks = 0;
  parameters.domain = make_domain(
      call.out.size(0), node.channels, node.height, node.width, parameters.walk, kPack, along_channels, false, blocks);
  launch(fusion_fuse<T>, blocks, kFusionThreads, 0, stream, parameters);
}

}  // namespace frskd::cuda
