// Means over the channels of |f|^p, on which both the loss and the attention map are built.
#pragma once

#include "../common/attention_math.h"
#include "device.cuh"
#include "feature_view.cuh"

namespace frskd::cuda {

constexpr int kMaxLevels = 8;  // per launch: the levels travel by value in the kernel's parameters

// |f|^p; kSquare is p = 2.
template <bool kSquare, typename A>
__device__ __forceinline__ A activity(A value, A exponent) {
  if constexpr (kSquare) {
    return value * value;
  } else {
    return power(magnitude(value), exponent);
  }
}

// Values of scratch memory that channel_means needs.
template <typename T, int kThreads>
constexpr int kMeansScratch = kThreads * kPackSize<T>;

// Lanes along pixels. A thread owns one pack of pixels and every `groups`-th channel; the groups are then summed in
// order.
template <typename T, bool kSquare, int kThreads, int kPack>
__device__ __forceinline__ void channel_means_along_pixels(
    const FeatureView& view,
    int64_t sample,
    int begin,  // first pixel, a multiple of kPack
    int end,
    accumulate_t<T> exponent,
    accumulate_t<T>* scratch,  // (kThreads * kPack,), shared
    accumulate_t<T>* out       // (end - begin,)
) {
  using A = accumulate_t<T>;
  constexpr int kInFlight = 4;
  const T* data = static_cast<const T*>(view.data) + sample * view.stride_sample;
  const int thread = static_cast<int>(threadIdx.x);
  const int packs = (end - begin) / kPack;
  const int tiles = (packs + kThreads - 1) / kThreads;
  const int widest = (packs + tiles - 1) / tiles;
  const A channels = static_cast<A>(view.channels);
  for (int first = 0; first < packs; first += widest) {
    const int tile = min(widest, packs - first);
    const int groups = kThreads / tile;
    const int column = thread % tile;
    const int group = thread / tile;
    A sums[kPack] = {};
    if (group < groups) {
      const T* pixel = data + pixel_offset(view, begin + (first + column) * kPack);
      const int64_t step = groups * view.stride_channel;
      const T* source = pixel + group * view.stride_channel;
      int channel = group;
#pragma unroll 1
      for (; channel + (kInFlight - 1) * groups < view.channels; channel += kInFlight * groups) {
        Pack<T, kPack> packed[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          packed[i] = kPack > 1 ? load_once<T, kPack>(source + i * step) : load_cached<T, kPack>(source + i * step);
        }
        source += kInFlight * step;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            sums[j] += activity<kSquare>(static_cast<A>(packed[i].values[j]), exponent);
          }
        }
      }
#pragma unroll 1
      for (; channel < view.channels; channel += groups) {
        const Pack<T, kPack> packed = load_cached<T, kPack>(source);
        source += step;
#pragma unroll
        for (int j = 0; j < kPack; ++j) sums[j] += activity<kSquare>(static_cast<A>(packed.values[j]), exponent);
      }
    }
    if (groups == 1) {
      if (thread < tile) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) out[(first + column) * kPack + j] = sums[j] / channels;
      }
      continue;
    }
    // Lanes of one warp that share a column are summed by shuffles, which leaves one row of partial sums per warp.
    const bool shuffled = tile < kWarpSize && (tile & (tile - 1)) == 0;
    const int rows = shuffled ? kThreads / kWarpSize : groups;
    const int row = shuffled ? thread / kWarpSize : group;
    if (shuffled) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) sums[j] = lane_sum(sums[j], tile, kWarpSize);
    }
    if (shuffled ? thread % kWarpSize < tile : group < groups) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) scratch[(row * kPack + j) * tile + column] = sums[j];
    }
    __syncthreads();
    for (int i = thread; i < tile * kPack; i += kThreads) {
      A total = A(0);
      for (int r = 0; r < rows; ++r) total += scratch[r * kPack * tile + i];
      out[(first + i % tile) * kPack + i / tile] = total / channels;
    }
    __syncthreads();
  }
}

// Lanes along channels. A team of 1 to 32 lanes sums the channels of a few pixels at a time.
template <typename T, bool kSquare, int kThreads, int kPack>
__device__ __forceinline__ void channel_means_along_channels(
    const FeatureView& view,
    int64_t sample,
    int begin,
    int end,
    accumulate_t<T> exponent,
    accumulate_t<T>* out  // (end - begin,)
) {
  using A = accumulate_t<T>;
  constexpr int kInFlight = 4;
  const T* data = static_cast<const T*>(view.data) + sample * view.stride_sample;
  const int packs = view.channels / kPack;
  int lanes = 1;
  while (lanes < packs && lanes < kWarpSize) lanes *= 2;
  const int teams = kThreads / lanes;
  const int team = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int first = begin; first < end; first += kInFlight * teams) {
    A sums[kInFlight] = {};
    const T* sources[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      // A team past the end reads the last pixel again and drops it, so that no load depends on a branch.
      sources[i] = data + pixel_offset(view, min(first + i * teams + team, end - 1));
    }
#pragma unroll 1
    for (int pack = lane; pack < packs; pack += lanes) {
      Pack<T, kPack> packed[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        packed[i] = kPack > 1 ? load_once<T, kPack>(sources[i] + pack * kPack)
                              : load_cached<T, kPack>(sources[i] + pack * kPack);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          sums[i] += activity<kSquare>(static_cast<A>(packed[i].values[j]), exponent);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const A sum = lane_sum(sums[i], 1, lanes);
      const int pixel = first + i * teams + team;
      if (lane == 0 && pixel < end) out[pixel - begin] = sum / static_cast<A>(view.channels);
    }
  }
}

// out[i] = mean over channels of |f|^p at pixel begin + i of one sample. Visible to other threads after a barrier.
template <typename T, bool kSquare, int kThreads>
__device__ __forceinline__ void channel_means(
    const FeatureView& view,
    int64_t sample,
    int begin,
    int end,
    accumulate_t<T> exponent,
    accumulate_t<T>* scratch,  // (kMeansScratch,), shared
    accumulate_t<T>* out) {
  // Other exponents than 2 are bound by power(), not by the width of the loads: the host gives them no pack walk.
  if constexpr (kSquare) {
    if (view.walk == Walk::kPixelPacks) {
      return channel_means_along_pixels<T, kSquare, kThreads, kPackSize<T>>(
          view, sample, begin, end, exponent, scratch, out);
    }
    if constexpr (sizeof(T) == 2) {
      if (view.walk == Walk::kPixelHalfPacks) {
        return channel_means_along_pixels<T, kSquare, kThreads, kPackSize<T> / 2>(
            view, sample, begin, end, exponent, scratch, out);
      }
    }
    if (view.walk == Walk::kChannelPacks) {
      return channel_means_along_channels<T, kSquare, kThreads, kPackSize<T>>(view, sample, begin, end, exponent, out);
    }
  }
  if (view.walk == Walk::kChannels) {
    return channel_means_along_channels<T, kSquare, kThreads, 1>(view, sample, begin, end, exponent, out);
  }
  channel_means_along_pixels<T, kSquare, kThreads, 1>(view, sample, begin, end, exponent, scratch, out);
}

}  // namespace frskd::cuda
