// Device code of the attention-transfer loss. One block serves one (level, sample) or a tile of it.
//
// forward   fused: maps in shared memory, loss and coefficients from there: each feature is read once, one launch
//           tiled: raw maps to a workspace by many blocks, then one block per (level, sample) as above: two launches
// backward  one launch over all levels: read the feature and its coefficient, write the gradient
#pragma once

#include "../common/attention_math.h"
#include "device.cuh"
#include "feature_view.cuh"

namespace frskd::cuda {

constexpr int kMaxLevels = 8;  // per launch: the levels travel by value in the kernel's parameters
constexpr int kMaxFeatures = 2 * kMaxLevels;
constexpr int kFusedThreads = 512;
constexpr int kTileThreads = 256;
constexpr int kFinishThreads = 512;
constexpr int kGradientThreads = 256;
constexpr int kGradientUnits = 4;  // accesses in flight per thread of the backward kernel

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
        return channel_means_along_pixels<T, kSquare, kThreads, 4>(view, sample, begin, end, exponent, scratch, out);
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

// q = a / max(||a||, floor). Multiplying by the reciprocal in double is exact enough for float and spares it slow
// divisions; double itself is divided, so that a map of one pixel gives exactly 1.
struct Normaliser {
  double norm;
  double clamped;
  double inverse;

  __device__ __forceinline__ explicit Normaliser(double sum_of_squares) : norm(sqrt(sum_of_squares)) {
    // Written so that a NaN norm stays NaN.
    clamped = norm < kNormFloor ? kNormFloor : norm;
    inverse = 1.0 / clamped;
  }
  __device__ __forceinline__ float operator()(float activity) const { return static_cast<float>(activity * inverse); }
  __device__ __forceinline__ double operator()(double activity) const { return activity / clamped; }
};

// What one (level, sample) writes.
template <typename A>
struct SampleOutputs {
  A* loss;
  A* student_coefficients;  // (pixels,), or null
  A* teacher_coefficients;  // (pixels,), or null
};

// Loss and coefficients from the two raw maps. The squares of a float map can pass the float range, so the norms are
// summed in double.
template <typename A, int kThreads>
__device__ __forceinline__ void finish_sample(
    const A* student_map,  // (pixels,)
    const A* teacher_map,  // (pixels,)
    int pixels,
    A student_scale,  // p / C * 2 / pixels
    A teacher_scale,  // p / D * 2 / pixels
    const SampleOutputs<A>& outputs) {
  __shared__ static double norm_scratch[2 * kThreads / kWarpSize];
  __shared__ static A loss_scratch[3 * kThreads / kWarpSize];
  const int thread = static_cast<int>(threadIdx.x);
  double squares[2] = {0.0, 0.0};
  for (int i = thread; i < pixels; i += kThreads) {
    const double student = student_map[i];
    const double teacher = teacher_map[i];
    squares[0] += student * student;
    squares[1] += teacher * teacher;
  }
  block_sum<kThreads>(squares, norm_scratch);
  const Normaliser normalise_student(squares[0]);
  const Normaliser normalise_teacher(squares[1]);

  A sums[3] = {};  // sum (q_s - q_t)^2, <q_s, q_s - q_t>, <q_t, q_t - q_s>
  for (int i = thread; i < pixels; i += kThreads) {
    const A student = normalise_student(student_map[i]);
    const A teacher = normalise_teacher(teacher_map[i]);
    const A difference = student - teacher;
    sums[0] += difference * difference;
    sums[1] += student * difference;
    sums[2] -= teacher * difference;
  }
  block_sum<kThreads>(sums, loss_scratch);
  if (thread == 0) *outputs.loss = sums[0] / static_cast<A>(pixels);
  if (outputs.student_coefficients == nullptr && outputs.teacher_coefficients == nullptr) return;

  for (int i = thread; i < pixels; i += kThreads) {
    const A student = normalise_student(student_map[i]);
    const A teacher = normalise_teacher(teacher_map[i]);
    if (outputs.student_coefficients != nullptr) {
      outputs.student_coefficients[i] =
          attention_coefficient(student, teacher, sums[1], static_cast<A>(normalise_student.norm), student_scale);
    }
    if (outputs.teacher_coefficients != nullptr) {
      outputs.teacher_coefficients[i] =
          attention_coefficient(teacher, student, sums[2], static_cast<A>(normalise_teacher.norm), teacher_scale);
    }
  }
}

template <typename A>
struct LevelOutputs {
  A* losses;                // (N,)
  A* student_coefficients;  // (N, pixels), or null
  A* teacher_coefficients;  // (N, pixels), or null
  A student_scale;          // p / C * 2 / pixels
  A teacher_scale;          // p / D * 2 / pixels
};

template <typename A>
__device__ __forceinline__ SampleOutputs<A> sample_outputs(const LevelOutputs<A>& level, int64_t sample, int pixels) {
  return {
      level.losses + sample,
      level.student_coefficients == nullptr ? nullptr : level.student_coefficients + sample * pixels,
      level.teacher_coefficients == nullptr ? nullptr : level.teacher_coefficients + sample * pixels};
}

template <typename A>
struct FusedParameters {
  FeatureView students[kMaxLevels];
  FeatureView teachers[kMaxLevels];
  LevelOutputs<A> outputs[kMaxLevels];
  unsigned samples;
  A exponent;
};

// Dynamic shared memory of a fused block: scratch, then the student's and the teacher's map.
template <typename T>
constexpr int64_t fused_shared_bytes(int64_t pixels) {
  return (kMeansScratch<T, kFusedThreads> + 2 * pixels) * static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <typename T, bool kSquare>
__global__ void __launch_bounds__(kFusedThreads, kSquare ? 2 : 1)
    attention_fused(const __grid_constant__ FusedParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  const unsigned level = blockIdx.x / parameters.samples;
  const int64_t sample = blockIdx.x % parameters.samples;
  const FeatureView& student = parameters.students[level];
  const FeatureView& teacher = parameters.teachers[level];
  const LevelOutputs<A>& outputs = parameters.outputs[level];
  const int pixels = student.pixels;
  A* scratch = reinterpret_cast<A*>(dynamic_shared_memory());
  A* student_map = scratch + kMeansScratch<T, kFusedThreads>;
  A* teacher_map = student_map + pixels;
  channel_means<T, kSquare, kFusedThreads>(student, sample, 0, pixels, parameters.exponent, scratch, student_map);
  channel_means<T, kSquare, kFusedThreads>(teacher, sample, 0, pixels, parameters.exponent, scratch, teacher_map);
  __syncthreads();
  finish_sample<A, kFusedThreads>(
      student_map, teacher_map, pixels, outputs.student_scale, outputs.teacher_scale,
      sample_outputs(outputs, sample, pixels));
}

template <typename A>
struct TileParameters {
  FeatureView features[kMaxFeatures];
  A* maps[kMaxFeatures];  // (N, pixels) each
  unsigned first_block[kMaxFeatures + 1];
  int tiles[kMaxFeatures];  // per sample
  int tile_pixels[kMaxFeatures];
  int features_used;
  A exponent;
};

template <typename T, bool kSquare>
__global__ void __launch_bounds__(kTileThreads, kSquare ? 4 : 2)
    attention_tiles(const __grid_constant__ TileParameters<accumulate_t<T>> parameters) {
  using A = accumulate_t<T>;
  __shared__ static A scratch[kMeansScratch<T, kTileThreads>];
  int index = 0;
  while (index + 1 < parameters.features_used && blockIdx.x >= parameters.first_block[index + 1]) ++index;
  const unsigned block = blockIdx.x - parameters.first_block[index];
  const unsigned tiles = static_cast<unsigned>(parameters.tiles[index]);
  const FeatureView& feature = parameters.features[index];
  const int64_t sample = block / tiles;
  const int begin = static_cast<int>(block % tiles) * parameters.tile_pixels[index];
  const int end = min(begin + parameters.tile_pixels[index], feature.pixels);
  channel_means<T, kSquare, kTileThreads>(
      feature, sample, begin, end, parameters.exponent, scratch,
      parameters.maps[index] + sample * feature.pixels + begin);
}

template <typename A>
struct FinishParameters {
  const A* student_maps[kMaxLevels];  // (N, pixels) each
  const A* teacher_maps[kMaxLevels];
  LevelOutputs<A> outputs[kMaxLevels];
  int pixels[kMaxLevels];
  unsigned samples;
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    attention_finish(const __grid_constant__ FinishParameters<A> parameters) {
  const unsigned level = blockIdx.x / parameters.samples;
  const int64_t sample = blockIdx.x % parameters.samples;
  const int pixels = parameters.pixels[level];
  const LevelOutputs<A>& outputs = parameters.outputs[level];
  finish_sample<A, kFinishThreads>(
      parameters.student_maps[level] + sample * pixels, parameters.teacher_maps[level] + sample * pixels, pixels,
      outputs.student_scale, outputs.teacher_scale, sample_outputs(outputs, sample, pixels));
}

template <typename A>
struct NormaliseParameters {
  A* maps;   // (N, pixels): raw in, q out
  A* norms;  // (N,)
  int pixels;
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    attention_normalise(const __grid_constant__ NormaliseParameters<A> parameters) {
  __shared__ static double scratch[kFinishThreads / kWarpSize];
  const int64_t sample = blockIdx.x;
  A* map = parameters.maps + sample * parameters.pixels;
  double squares[1] = {0.0};
  for (int i = static_cast<int>(threadIdx.x); i < parameters.pixels; i += kFinishThreads) {
    const double value = map[i];
    squares[0] += value * value;
  }
  block_sum<kFinishThreads>(squares, scratch);
  const Normaliser normalise(squares[0]);
  for (int i = static_cast<int>(threadIdx.x); i < parameters.pixels; i += kFinishThreads) {
    map[i] = normalise(map[i]);
  }
  if (threadIdx.x == 0) parameters.norms[sample] = static_cast<A>(normalise.norm);
}

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
        return write_gradient<T, kSquare, 4, false>(level, sample, first, upstream, exponent);
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
