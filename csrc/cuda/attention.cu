// Host side of the attention-transfer operations: checks, plan, launches.
#include <algorithm>

#include "../operations/attention_checks.h"
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

namespace {

// A fused block may use this much shared memory; every device since sm_80 offers more, and two such blocks fit.
constexpr int64_t kMaxFusedSharedBytes = 64 * 1024;
// Rates that decide between one fused launch and two tiled ones, in bytes per nanosecond. Estimates from data sheets of
// sm_80 to sm_100, to be replaced by measured ones.
constexpr double kBlockRate = 40.0;           // one block alone on its multiprocessor
constexpr double kMultiprocessorRate = 25.0;  // one multiprocessor while all of them read
constexpr double kSecondLaunch = 3000.0;      // ns
constexpr int kTileUnits = 64;                // packs of pixels (or pixels, along channels) per tile

FeatureView view_of(const Tensor& tensor, double exponent) {
  const int64_t shape[4] = {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
  const int64_t strides[4] = {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  FeatureView view = make_feature_view(tensor.data_ptr(), shape, strides);
  view.walk = choose_walk(view, static_cast<int>(tensor.element_size()));
  if (exponent != 2.0) view.walk = without_packs(view.walk);
  return view;
}

int64_t pixels_of(const Tensor& feature) { return feature.size(2) * feature.size(3); }

int64_t bytes_per_sample(const Tensor& feature) {
  return feature.size(1) * pixels_of(feature) * static_cast<int64_t>(feature.element_size());
}

// One fused launch, when the maps fit and the largest level's block, working alone at the end, costs less than a second
// launch would.
bool prefers_fused(
    const std::vector<Tensor>& students,
    const std::vector<Tensor>& teachers,
    int64_t samples,
    bool has_workspace,
    int multiprocessors) {
  double total = 0.0, largest = 0.0;
  for (size_t level = 0; level < students.size(); ++level) {
    const int64_t pixels = pixels_of(students[level]);
    int64_t shared_bytes = 0;
    dispatch_floating(students[0].scalar_type(), [&](auto tag) {
      shared_bytes = fused_shared_bytes<typename decltype(tag)::type>(pixels);
    });
    if (shared_bytes > kMaxFusedSharedBytes) return false;
    const double bytes = static_cast<double>(bytes_per_sample(students[level]) + bytes_per_sample(teachers[level]));
    total += bytes * static_cast<double>(samples);
    largest = std::max(largest, bytes);
  }
  if (!has_workspace) return true;
  return largest / kBlockRate <= total / (kMultiprocessorRate * multiprocessors) + kSecondLaunch;
}

template <typename T>
void add_tiles(
    TileParameters<accumulate_t<T>>& parameters,
    int64_t& blocks,
    const FeatureView& view,
    int64_t samples,
    accumulate_t<T>* map  // (N, pixels)
) {
  const int index = parameters.features_used++;
  const bool along_channels = view.walk == Walk::kChannels || view.walk == Walk::kChannelPacks;
  const int tile_pixels = kTileUnits * (along_channels ? 1 : walk_pack(view.walk, static_cast<int>(sizeof(T))));
  const int64_t tiles = ceil_divide(view.pixels, tile_pixels);
  parameters.features[index] = view;
  parameters.maps[index] = map;
  parameters.first_block[index] = static_cast<unsigned>(blocks);
  parameters.tiles[index] = static_cast<int>(tiles);
  parameters.tile_pixels[index] = tile_pixels;
  blocks += samples * tiles;
  // A larger grid is refused by launch; the 32-bit numbers of its blocks are never used.
}

template <typename T>
void launch_tiles(const TileParameters<accumulate_t<T>>& parameters, int64_t blocks, bool square, cudaStream_t stream) {
  launch(square ? attention_tiles<T, true> : attention_tiles<T, false>, blocks, kTileThreads, 0, stream, parameters);
}

template <typename T>
struct ForwardOutputs {
  using A = accumulate_t<T>;
  A* losses;                // (L, N)
  A* student_coefficients;  // flat, or null
  A* teacher_coefficients;
  A* student_maps;  // workspace, flat like the coefficients, or null
  A* teacher_maps;
};

template <typename T>
void forward_levels(
    const std::vector<Tensor>& students,
    const std::vector<Tensor>& teachers,
    size_t begin,  // first level of this launch
    size_t end,
    int64_t offset,  // of level `begin` in the flat outputs
    double exponent,
    bool fused,
    const ForwardOutputs<T>& outputs,
    cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t samples = students[0].size(0);
  const bool square = exponent == 2.0;
  FusedParameters<A> fused_parameters{};
  TileParameters<A> tile_parameters{};
  FinishParameters<A> finish_parameters{};
  fused_parameters.samples = finish_parameters.samples = static_cast<unsigned>(samples);
  fused_parameters.exponent = tile_parameters.exponent = static_cast<A>(exponent);
  int64_t shared_bytes = 0, tile_blocks = 0;
  for (size_t level = begin; level < end; ++level) {
    const size_t slot = level - begin;
    const FeatureView student = view_of(students[level], exponent);
    const FeatureView teacher = view_of(teachers[level], exponent);
    const double per_pixel = exponent * 2.0 / student.pixels;
    const auto at_offset = [&](A* flat) { return flat == nullptr ? nullptr : flat + offset; };
    LevelOutputs<A> level_outputs{};
    level_outputs.losses = outputs.losses + static_cast<int64_t>(level) * samples;
    level_outputs.student_coefficients = at_offset(outputs.student_coefficients);
    level_outputs.teacher_coefficients = at_offset(outputs.teacher_coefficients);
    level_outputs.student_scale = static_cast<A>(per_pixel / student.channels);
    level_outputs.teacher_scale = static_cast<A>(per_pixel / teacher.channels);
    if (fused) {
      fused_parameters.students[slot] = student;
      fused_parameters.teachers[slot] = teacher;
      fused_parameters.outputs[slot] = level_outputs;
      shared_bytes = std::max(shared_bytes, fused_shared_bytes<T>(student.pixels));
    } else {
      finish_parameters.student_maps[slot] = outputs.student_maps + offset;
      finish_parameters.teacher_maps[slot] = outputs.teacher_maps + offset;
      finish_parameters.outputs[slot] = level_outputs;
      finish_parameters.pixels[slot] = student.pixels;
      add_tiles<T>(tile_parameters, tile_blocks, student, samples, outputs.student_maps + offset);
      add_tiles<T>(tile_parameters, tile_blocks, teacher, samples, outputs.teacher_maps + offset);
    }
    offset += samples * student.pixels;
  }
  const int64_t blocks = samples * static_cast<int64_t>(end - begin);
  if (fused) {
    launch(
        square ? attention_fused<T, true> : attention_fused<T, false>, blocks, kFusedThreads, shared_bytes, stream,
        fused_parameters);
  } else {
    launch_tiles<T>(tile_parameters, tile_blocks, square, stream);
    launch(attention_finish<A>, blocks, kFinishThreads, 0, stream, finish_parameters);
  }
}

template <typename T>
void gradient_levels(
    const Tensor& upstream,
    double scale,
    const std::vector<Tensor>& features,
    size_t begin,
    size_t end,
    const accumulate_t<T>* coefficients,  // of level `begin`
    double exponent,
    const std::vector<Tensor>& gradients,
    cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t samples = features[0].size(0);
  GradientParameters<A> parameters{};
  parameters.upstream_stride_level = upstream.stride(0);
  parameters.upstream_stride_sample = upstream.stride(1);
  parameters.upstream =
      static_cast<const A*>(upstream.data_ptr()) + static_cast<int64_t>(begin) * parameters.upstream_stride_level;
  parameters.levels_used = static_cast<int>(end - begin);
  parameters.scale = static_cast<A>(scale);
  parameters.exponent = static_cast<A>(exponent);
  int64_t blocks = 0;
  for (size_t level = begin; level < end; ++level) {
    GradientLevel<A>& target = parameters.levels[level - begin];
    target.feature = view_of(features[level], exponent);
    target.gradient = view_of(gradients[level], exponent);
    Walk walk = choose_common_walk(target.feature, target.gradient, static_cast<int>(sizeof(T)));
    const bool reads_packs = walk == Walk::kPixelPacks || walk == Walk::kPixelHalfPacks;
    if (exponent != 2.0 || (reads_packs && !is_aligned(coefficients, 16))) walk = without_packs(walk);
    target.feature.walk = walk;
    target.coefficients = coefficients;
    target.units = static_cast<int64_t>(target.feature.channels) * target.feature.pixels /
                   walk_pack(walk, static_cast<int>(sizeof(T)));
    const int64_t blocks_per_sample = ceil_divide(target.units, kGradientUnits * kGradientThreads);
    target.blocks = static_cast<unsigned>(std::min(blocks_per_sample, kMaxBlocks));
    target.first_block = static_cast<unsigned>(blocks);
    blocks += samples * blocks_per_sample;
    coefficients += samples * target.feature.pixels;
  }
  launch(
      exponent == 2.0 ? attention_gradient<T, true> : attention_gradient<T, false>, blocks, kGradientThreads, 0, stream,
      parameters);
}

void attention_forward(const AttentionForward& call) {
  const Levels levels = check(call, Device::kCuda);
  const std::vector<Tensor>&students = call.students, &teachers = call.teachers;
  const int64_t samples = levels.batch, numel = samples * levels.pixels;
  if (samples == 0) return;

  const DeviceGuard guard(students[0]);
  const cudaStream_t stream = guard.stream();
  const bool fused = prefers_fused(students, teachers, samples, call.workspace.has_value(), guard.multiprocessors());
  STD_TORCH_CHECK(
      fused || call.workspace.has_value(), "workspace is None, but maps of this size need one of ", 2 * numel,
      " elements.");
  dispatch_floating(levels.kind.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    ForwardOutputs<T> outputs{};
    const auto pointer = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? static_cast<A*>(tensor->data_ptr()) : nullptr;
    };
    outputs.losses = static_cast<A*>(call.losses.data_ptr());
    outputs.student_coefficients = pointer(call.student_coefficients);
    outputs.teacher_coefficients = pointer(call.teacher_coefficients);
    outputs.student_maps = pointer(call.workspace);
    outputs.teacher_maps = call.workspace.has_value() ? outputs.student_maps + numel : nullptr;
    int64_t offset = 0;
    for (size_t begin = 0; begin < students.size(); begin += kMaxLevels) {
      const size_t end = std::min(begin + kMaxLevels, students.size());
      forward_levels<T>(students, teachers, begin, end, offset, call.exponent, fused, outputs, stream);
      for (size_t level = begin; level < end; ++level) offset += samples * pixels_of(students[level]);
    }
  });
}

void attention_backward(const AttentionBackward& call) {
  const Levels levels = check(call, Device::kCuda);
  const std::vector<Tensor>&features = call.features, &gradients = call.gradients;
  const int64_t samples = levels.batch;
  if (samples == 0) return;

  const DeviceGuard guard(features[0]);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(levels.kind.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const accumulate_t<T>* level_coefficients = static_cast<const accumulate_t<T>*>(call.coefficients.data_ptr());
    for (size_t begin = 0; begin < features.size(); begin += kMaxLevels) {
      const size_t end = std::min(begin + kMaxLevels, features.size());
      gradient_levels<T>(
          call.grad, call.scale, features, begin, end, level_coefficients, call.exponent, gradients, stream);
      for (size_t level = begin; level < end; ++level) level_coefficients += samples * pixels_of(features[level]);
    }
  });
}

void attention_map(const AttentionMap& call) {
  const Kind kind = check(call, Device::kCuda);
  const Tensor &feature = call.feature, &map = call.map;
  const int64_t samples = feature.size(0);
  if (samples == 0) return;

  const DeviceGuard guard(feature);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(kind.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    TileParameters<A> tile_parameters{};
    tile_parameters.exponent = static_cast<A>(call.exponent);
    int64_t blocks = 0;
    add_tiles<T>(tile_parameters, blocks, view_of(feature, call.exponent), samples, static_cast<A*>(map.data_ptr()));
    launch_tiles<T>(tile_parameters, blocks, call.exponent == 2.0, stream);
    NormaliseParameters<A> normalise{};
    normalise.maps = static_cast<A*>(map.data_ptr());
    normalise.norms = static_cast<A*>(call.norm.data_ptr());
    normalise.pixels = static_cast<int>(pixels_of(feature));
    launch(attention_normalise<A>, samples, kFinishThreads, 0, stream, normalise);
  });
}

FRSKD_CUDA_OPERATION(attention_forward)
FRSKD_CUDA_OPERATION(attention_backward)
FRSKD_CUDA_OPERATION(attention_map)

}  // namespace

}  // namespace frskd::cuda
