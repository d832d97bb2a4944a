// Attention transfer, backward: one launch over all levels reads the features and their coefficients and writes the
// gradients.
#pragma once

#include "attention_means.cuh"

namespace frskd::cuda {

constexpr int kGradientThreads = 256;
constexpr int kGradientUnits = 4;  // accesses in flight per thread

template <typename A>
struct GradientLevel {
  FeatureView feature;  // its walk is one that the gradient allows too
  FeatureView gradient;
  const A* coefficients;  // (N, pixels)
  int64_t units;          // accesses per sample
  unsigned blocks;        // per sample
  unsigned first_block;
};

template <typename A>
struct GradientParameters {
  GradientLevel<A> levels[kMaxLevels];
  const A* upstream;  // (L, N), from this launch's first level on
  int64_t upstream_stride_level;
  int64_t upstream_stride_sample;
  int levels_used;
  A scale;
  A exponent;
};

// factor * c * sign(f) * |f|^(p-1)
template <bool kSquare, typename A>
__device__ __forceinline__ A feature_gradient(A factor, A value, A exponent) {
  if constexpr (kSquare) {
    return factor * value;
  } else {
    const A sign = static_cast<A>(value > A(0)) - static_cast<A>(value < A(0));
    return factor * sign * power(magnitude(value), exponent - A(1));
  }
}

// Units of one sample are numbered with the walk's axis fastest; a block takes kGradientUnits * kGradientThreads of
// them.
template <typename T, bool kSquare, int kPack, bool kAlongChannels>
__device__ __forceinline__ void write_gradient(
    const GradientLevel<accumulate_t<T>>& level,
    int64_t sample,
    int64_t first,  // unit
    accumulate_t<T> upstream,
    accumulate_t<T> exponent) {
  using A = accumulate_t<T>;
  const T* feature = static_cast<const T*>(level.feature.data) + sample * level.feature.stride_sample;
  T* gradient = static_cast<T*>(const_cast<void*>(level.gradient.data)) + sample * level.gradient.stride_sample;
  const A* coefficients = level.coefficients + sample * level.feature.pixels;
  const unsigned fast = static_cast<unsigned>((kAlongChannels ? level.feature.channels : level.feature.pixels) / kPack);
  // One 64-bit division per thread block; within the block 32 bits suffice.
  const unsigned slow_start = static_cast<unsigned>(first / fast);
  const unsigned fast_start = static_cast<unsigned>(first % fast);
  const int64_t left = level.units - first;
  int64_t target[kGradientUnits];
  int pixel[kGradientUnits];
  Pack<T, kPack> values[kGradientUnits];
#pragma unroll
  for (int i = 0; i < kGradientUnits; ++i) {
    const unsigned local = static_cast<unsigned>(i) * kGradientThreads + threadIdx.x;
    // Threads past the end read the last unit again and do not write, so that no load depends on a branch.
    const unsigned unit = fast_start + (local < left ? local : static_cast<unsigned>(left - 1));
    const int slow = static_cast<int>(slow_start + unit / fast);
    const int along = static_cast<int>(unit % fast) * kPack;
    const int channel = kAlongChannels ? along : slow;
    pixel[i] = kAlongChannels ? slow : along;
    target[i] = channel * level.gradient.stride_channel + pixel_offset(level.gradient, pixel[i]);
    const T* source = feature + channel * level.feature.stride_channel + pixel_offset(level.feature, pixel[i]);
    values[i] = kPack > 1 ? load_once<T, kPack>(source) : load_cached<T, kPack>(source);
  }
#pragma unroll
  for (int i = 0; i < kGradientUnits; ++i) {
    if (static_cast<int64_t>(i) * kGradientThreads + threadIdx.x >= left) break;
    Pack<T, kPack> result;
    if constexpr (kAlongChannels || kPack == 1) {
      const A factor = upstream * __ldg(coefficients + pixel[i]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        result.values[j] =
            static_cast<T>(feature_gradient<kSquare>(factor, static_cast<A>(values[i].values[j]), exponent));
      }
    } else {
      constexpr int kPart = kPack < kPackSize<A> ? kPack : kPackSize<A>;
#pragma unroll
      for (int part = 0; part < kPack; part += kPart) {
        const Pack<A, kPart> factors = load_cached<A, kPart>(coefficients + pixel[i] + part);
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          result.values[part + j] = static_cast<T>(feature_gradient<kSquare>(
              upstream * factors.values[j], static_cast<A>(values[i].values[part + j]), exponent));
        }
      }
    }
    store<T, kPack>(gradient + target[i], result);
  }
}

template <typename T, bool kSquare>
__global__ void __launch_bounds__(kGradientThreads, kSquare && sizeof(T) < 8 ? 4 : 2)
    attention_gradient(const __grid_constant__ GradientParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  int index = 0;
  while (index + 1 < parameters.levels_used && blockIdx.x >= parameters.levels[index + 1].first_block) ++index;
  const GradientLevel<A>& level = parameters.levels[index];
  const unsigned block = blockIdx.x - level.first_block;
  const int64_t sample = block / level.blocks;
  const int64_t first = static_cast<int64_t>(block % level.blocks) * (kGradientUnits * kGradientThreads);
  const A upstream =
      parameters.upstream[index * parameters.upstream_stride_level + sample * parameters.upstream_stride_sample] *
      parameters.scale;
  const A exponent = parameters.exponent;
  const Walk walk = level.feature.walk;
  if constexpr (kSquare) {
    if (walk == Walk::kPixelPacks) {
      return write_gradient<T, kSquare, kPackSize<T>, false>(level, sample, first, upstream, exponent);
    }
    if constexpr (sizeof(T) == 2) {
      if (walk == Walk::kPixelHalfPacks) {
        return write_gradient<T, kSquare, kPackSize<T> / 2, false>(level, sample, first, upstream, exponent);
      }
    }
    if (walk == Walk::kChannelPacks) {
      return write_gradient<T, kSquare, kPackSize<T>, true>(level, sample, first, upstream, exponent);
    }
  }
  if (walk == Walk::kChannels) return write_gradient<T, kSquare, 1, true>(level, sample, first, upstream, exponent);
  write_gradient<T, kSquare, 1, false>(level, sample, first, upstream, exponent);
}

}  // namespace frskd::cuda
