// Attention transfer, forward, and the attention map. One block serves one (level, sample) or a tile of it.
//
// fused: maps in shared memory, loss and coefficients from there: each feature is read once, one launch
// tiled: raw maps to a workspace by many blocks, then one block per (level, sample) as above: two launches
#pragma once

#include "attention_means.cuh"

namespace frskd::cuda {

constexpr int kMaxFeatures = 2 * kMaxLevels;
constexpr int kFusedThreads = 512;
constexpr int kTileThreads = 256;
constexpr int kFinishThreads = 512;

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

}  // namespace frskd::cuda
