// Host side of weighted fusion: checks, plan, launches. Registered in bindings.cu.
#include <algorithm>

#include "feature_view.cuh"
#include "fusion_kernels.cuh"
#include "operations.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

namespace {

// The plan depends on shapes and strides alone, so results do not depend on the device. frskd_fast/native/fusion.py
// sizes the workspace by the first three.
constexpr int64_t kMostSumBlocks = 512;        // of one input in a pass that sums per channel
constexpr int64_t kMostElementBlocks = 4096;   // of one input in a pass that writes elements
constexpr int64_t kLeastSumPositions = 16;     // of a thread in a pass that sums per channel
constexpr int64_t kLeastElementPositions = 4;  // of a thread in a pass that writes elements
constexpr int64_t kMostLanes = 64;             // threads side by side along channels
constexpr int64_t kLimit = int64_t{1} << 30;   // elements of one sample: its positions are numbered by 31 bits

FusionMap map_of(const Tensor& tensor) {
  const auto stride = [&](int64_t axis) { return tensor.size(axis) == 1 ? 0 : tensor.stride(axis); };
  FusionMap map{};
  map.data = tensor.data_ptr();
  map.stride_sample = stride(0);
  map.stride_channel = stride(1);
  map.stride_row = stride(2);
  map.stride_column = stride(3);
  map.height = static_cast<int>(tensor.size(2));
  map.width = static_cast<int>(tensor.size(3));
  return map;
}

// Whether every position can be read as `pack` channels, or as `pack` pixels of a row, by one aligned access.
bool allows_channel_packs(const FusionMap& map, int64_t channels, int pack, int element_size) {
  return map.stride_channel == 1 && channels % pack == 0 && map.stride_column % pack == 0 &&
         map.stride_row % pack == 0 && map.stride_sample % pack == 0 &&
         is_aligned(map.data, static_cast<int64_t>(pack) * element_size);
}

bool allows_pixel_packs(const FusionMap& map, int pack, int element_size) {
  return map.stride_column == 1 && map.width % pack == 0 && map.stride_row % pack == 0 &&
         map.stride_channel % pack == 0 && map.stride_sample % pack == 0 &&
         is_aligned(map.data, static_cast<int64_t>(pack) * element_size);
}

// Rows of such maps follow one another, so that packs may run over their ends.
bool is_flat(const FusionMap& map) {
  return map.height == 1 || map.stride_row == static_cast<int64_t>(map.width) * map.stride_column;
}

FusionMap flattened(FusionMap map) {
  map.width *= map.height;
  map.height = 1;
  map.stride_row = 0;
  return map;
}

bool prefers_channels(const FusionMap& map, int64_t channels) {
  return map.stride_channel == 1 && channels > 1 && map.height * map.width > 1;
}

template <typename A>
bool has_aligned_affine(const FusionInput<A>& input) {
  return is_aligned(input.statistics, 16) && is_aligned(input.gamma, 16) && is_aligned(input.beta, 16);
}

// Positions of a (samples, channels, rows, columns) map, a position being `pack` elements where the walk takes packs.
FusionDomain make_domain(
    int64_t samples,
    int64_t channels,
    int64_t rows,
    int64_t columns,
    FusionWalk walk,
    int pack,
    bool along_channels,  // neighbouring threads
    bool per_channel,     // every thread keeps its channels
    int64_t& blocks       // of the launch so far
) {
  FusionDomain domain{};
  domain.column_step = walk == FusionWalk::kPixelPacks ? pack : 1;
  domain.channel_step = walk == FusionWalk::kChannelPacks ? pack : 1;
  const bool keeps_channels = along_channels || per_channel;
  const int64_t units = keeps_channels ? channels / domain.channel_step : 1;
  const int64_t most_lanes = along_channels ? kMostLanes : 1;
  const int64_t tiles = ceil_divide(units, std::min(units, most_lanes));
  const int64_t lanes = ceil_divide(units, tiles);
  const int64_t groups = kFusionThreads / lanes;
  const int64_t column_count = columns / domain.column_step;
  const int64_t per_channel_count = rows * column_count;
  const int64_t per_sample = keeps_channels ? per_channel_count : channels * per_channel_count;
  domain.positions = samples * per_sample;
  domain.per_sample = make_divisor(per_sample);
  domain.per_channel = make_divisor(per_channel_count);
  domain.columns = make_divisor(column_count);
  domain.channel_units = static_cast<int>(units);
  domain.lanes = static_cast<int>(lanes);
  domain.groups = static_cast<int>(groups);
  domain.tiles = static_cast<int>(tiles);
  const int64_t least = per_channel ? kLeastSumPositions : kLeastElementPositions;
  const int64_t most_blocks = per_channel ? kMostSumBlocks : kMostElementBlocks;
  const int64_t most_chunks = std::max<int64_t>(1, most_blocks / tiles);
  const int64_t wanted = std::min(most_chunks, ceil_divide(domain.positions, groups * least));
  // Whole rounds of the block's groups.
  const int64_t chunk = wanted == 0 ? 1 : ceil_divide(ceil_divide(domain.positions, wanted), groups) * groups;
  STD_TORCH_CHECK(
      chunk <= kLimit, "the tensors have ", domain.positions, " positions, more than the blocks of one launch take; ",
      "split the batch.");
  const int64_t chunks = ceil_divide(domain.positions, chunk);
  domain.chunk = static_cast<int>(chunk);
  domain.chunks = static_cast<int>(chunks);
  domain.first_block = static_cast<unsigned>(blocks);
  blocks += tiles * chunks;
  return domain;
}

// The arguments that all passes over a node share.
struct NodeArguments {
  const std::vector<Tensor>& inputs;
  const std::vector<Tensor>& statistics;
  const std::vector<Tensor>& gammas;
  const std::vector<Tensor>& betas;
  const Tensor& weight;
  const std::vector<int64_t>& resamples;
  int64_t pre;
  int64_t act;
  int64_t weighting;
  double epsilon;

  ScalarType dtype() const { return inputs[0].scalar_type(); }
  ScalarType accumulate() const { return accumulate_dtype(dtype()); }
};

void check_map(const Tensor& map, const std::string& name, const Tensor& first, ScalarType dtype) {
  check_device(map, name, first);
  check_dtype(map, name, dtype);
  STD_TORCH_CHECK(map.dim() == 4, name, " has shape ", shape_of(map), ", but (N, C, H, W) was wanted.");
  STD_TORCH_CHECK(
      map.size(0) == first.size(0) && map.size(1) == first.size(1), name, " has shape ", shape_of(map),
      ", but batch size ", first.size(0), " and ", first.size(1), " channels, those of inputs[0], were wanted.");
  STD_TORCH_CHECK(
      map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, name, " has shape ", shape_of(map),
      ", but at least one channel and one pixel were wanted.");
  STD_TORCH_CHECK(
      map.size(0) <= kLimit && map.size(1) <= kLimit && map.size(2) <= kLimit && map.size(3) <= kLimit &&
          map.size(2) * map.size(3) <= kLimit && map.size(1) * map.size(2) * map.size(3) <= kLimit,
      name, " has shape ", shape_of(map), ", but at most 2^30 samples of at most 2^30 elements are supported.");
}

void check_inputs(const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(
      !inputs.empty() && inputs.size() <= kMostFusionInputs, "inputs has ", inputs.size(), " tensors, but 1 to ",
      kMostFusionInputs, " were wanted.");
  STD_TORCH_CHECK(inputs[0].defined(), "inputs[0] is an undefined tensor, but a CUDA tensor was wanted.");
  STD_TORCH_CHECK(inputs[0].dim() == 4, "inputs[0] has shape ", shape_of(inputs[0]), ", but (N, C, H, W) was wanted.");
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_map(inputs[i], name_of("inputs", i), inputs[0], inputs[0].scalar_type());
  }
}

void check_choice(int64_t value, const std::string& name, int64_t choices) {
  STD_TORCH_CHECK(
      value >= 0 && value < choices, name, " is ", value, ", but a number from 0 to ", choices - 1, " was wanted.");
}

// `output` is the output or its gradient.
void check_node(const NodeArguments& node, const Tensor& output, const char* output_name) {
  const std::vector<Tensor>& inputs = node.inputs;
  check_inputs(inputs);
  const int64_t channels = inputs[0].size(1);
  check_count(node.statistics.size(), "statistics", inputs.size());
  check_count(node.gammas.size(), "gammas", inputs.size());
  check_count(node.betas.size(), "betas", inputs.size());
  STD_TORCH_CHECK(
      node.resamples.size() == inputs.size(), "resamples has ", node.resamples.size(), " numbers, but ", inputs.size(),
      " were wanted.");
  check_choice(node.pre, "pre", 3);
  check_choice(node.act, "act", 3);
  check_choice(node.weighting, "weighting", 4);
  check_contiguous(node.weight, "weight", inputs[0], node.accumulate(), {static_cast<int64_t>(inputs.size())});
  check_map(output, output_name, inputs[0], node.dtype());
  const int64_t height = output.size(2), width = output.size(3);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = name_of("inputs", i);
    check_choice(node.resamples[i], name_of("resamples", i), 3);
    const int64_t input_height = inputs[i].size(2), input_width = inputs[i].size(3);
    const bool fits = node.resamples[i] == kResampleNone ? input_height == height && input_width == width
                      : node.resamples[i] == kResampleUp
                          ? input_height <= height && input_width <= width
                          : (input_height + 1) / 2 == height && (input_width + 1) / 2 == width;
    const char* wanted = node.resamples[i] == kResampleNone ? "the same size"
                         : node.resamples[i] == kResampleUp ? "at most that size"
                                                            : "a size whose half, rounded up, is that";
    STD_TORCH_CHECK(
        fits, name, " has shape ", shape_of(inputs[i]), ", but ", output_name, " has ", shape_of(output), " and ",
        wanted, " was wanted.");
    const Tensor* const affine[3] = {&node.statistics[i], &node.gammas[i], &node.betas[i]};
    const char* const names[3] = {"statistics", "gammas", "betas"};
    for (int k = 0; k < 3; ++k) check_device(*affine[k], name_of(names[k], i), inputs[0]);
    const bool normalised = affine[0]->numel() > 0;
    for (int k = 1; k < 3; ++k) {
      STD_TORCH_CHECK(
          (affine[k]->numel() > 0) == normalised, name_of(names[k], i), " has ", affine[k]->numel(), " elements and ",
          name_of("statistics", i), " ", affine[0]->numel(), ", but either all of them or none were wanted.");
    }
    if (!normalised) continue;
    STD_TORCH_CHECK(
        affine[0]->dim() == 2 && affine[0]->size(0) >= 2, name_of("statistics", i), " has shape ", shape_of(*affine[0]),
        ", but (2, ", channels, ") or more rows were wanted.");
    check_contiguous(
        *affine[0], name_of("statistics", i), inputs[0], node.accumulate(), {affine[0]->size(0), channels});
    for (int k = 1; k < 3; ++k) {
      check_contiguous(*affine[k], name_of(names[k], i), inputs[0], node.accumulate(), {channels});
    }
  }
}

// Fills everything that does not depend on a walk.
template <typename A>
FusionNode<A> make_node(const NodeArguments& arguments, const Tensor& output) {
  FusionNode<A> node{};
  node.weight = static_cast<const A*>(arguments.weight.data_ptr());
  node.epsilon = static_cast<A>(arguments.epsilon);
  node.inputs_used = static_cast<int>(arguments.inputs.size());
  node.channels = static_cast<int>(output.size(1));
  node.height = static_cast<int>(output.size(2));
  node.width = static_cast<int>(output.size(3));
  node.pre = static_cast<int>(arguments.pre);
  node.act = static_cast<int>(arguments.act);
  node.weighting = static_cast<int>(arguments.weighting);
  const auto exact_shift = [](int source, int size) {
    // Nearest neighbour by a power of two is exact in float32 up to 2^24.
    for (int shift = 0; size <= (1 << 24) && shift < 24; ++shift) {
      if (source << shift == size) return shift;
      if (source << shift > size) break;
    }
    return -1;
  };
  for (size_t i = 0; i < arguments.inputs.size(); ++i) {
    FusionInput<A>& input = node.inputs[i];
    input.map = map_of(arguments.inputs[i]);
    input.resample = static_cast<int>(arguments.resamples[i]);
    if (arguments.statistics[i].numel() > 0) {
      input.statistics = static_cast<const A*>(arguments.statistics[i].data_ptr());
      input.gamma = static_cast<const A*>(arguments.gammas[i].data_ptr());
      input.beta = static_cast<const A*>(arguments.betas[i].data_ptr());
    }
    if (input.resample == kResampleUp) {
      input.row_shift = exact_shift(input.map.height, node.height);
      input.column_shift = exact_shift(input.map.width, node.width);
    }
  }
  return node;
}

template <typename A>
bool node_allows_channel_packs(const FusionNode<A>& node, int pack, int element_size) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [&](const FusionInput<A>& input) {
    return allows_channel_packs(input.map, node.channels, pack, element_size) && has_aligned_affine(input);
  });
}

// A pack of pooled pixels takes two packs of its input's rows, which must not be padded at their start. Up-sampled
// inputs are read element by element.
template <typename A>
bool node_allows_pixel_packs(const FusionNode<A>& node, int pack, int element_size) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [&](const FusionInput<A>& input) {
    return input.resample == kResampleUp || (allows_pixel_packs(input.map, pack, element_size) &&
                                             (input.resample == kResampleNone || input.map.width % 2 == 0));
  });
}

template <typename A>
bool is_flat(const FusionNode<A>& node) {
  return std::all_of(node.inputs, node.inputs + node.inputs_used, [](const FusionInput<A>& input) {
    return input.resample == kResampleNone && is_flat(input.map);
  });
}

template <typename T>
void launch_forward(const NodeArguments& arguments, const Tensor& out, cudaStream_t stream) {
  using A = accumulate_t<T>;
  constexpr int kSize = static_cast<int>(sizeof(T));
  FusionForwardParameters<A> parameters{};
  FusionNode<A>& node = parameters.node;
  node = make_node<A>(arguments, out);
  parameters.out = map_of(out);
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
      out.size(0), node.channels, node.height, node.width, parameters.walk, kPack, along_channels, false, blocks);
  launch(fusion_fuse<T>, blocks, kFusionThreads, 0, stream, parameters);
}

// Hands out the workspace from front to back.
class Workspace {
 public:
  Workspace(const std::optional<Tensor>& tensor, const Tensor& first, ScalarType dtype) {
    if (!tensor.has_value()) return;
    check_contiguous(*tensor, "workspace", first, dtype, {tensor->numel()});
    data_ = tensor->data_ptr();
    numel_ = tensor->numel();
  }

  template <typename A>
  A* take(int64_t numel) {
    used_ += numel;
    STD_TORCH_CHECK(
        used_ <= numel_, "workspace has ", numel_, " elements, but tensors of this size need ", used_, " or more.");
    return static_cast<A*>(data_) + (used_ - numel);
  }

 private:
  void* data_ = nullptr;
  int64_t numel_ = 0;
  int64_t used_ = 0;
};

// Chooses the walk over one input in a backward pass and deals out its positions.
template <typename T>
void plan_target(
    FusionTarget<accumulate_t<T>>& target,
    const FusionNode<accumulate_t<T>>& node,
    const FusionMap& grad,
    int64_t samples,
    bool per_channel,
    int64_t& blocks) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  const FusionInput<accumulate_t<T>>& input = node.inputs[target.input];
  const bool recompute = node.act != kActivationNone;
  const bool pool = input.resample == kResamplePool;
  // Squares of 2x2 pixels are as many as the output's pixels.
  int64_t rows = pool ? node.height : input.map.height;
  int64_t columns = pool ? node.width : input.map.width;
  FusionMap maps[3] = {input.map, grad, target.gradient.data != nullptr ? target.gradient : input.map};
  // Where only equal positions of these maps are looked at, their rows may count as one.
  if (input.resample == kResampleNone && !recompute &&
      std::all_of(maps, maps + 3, [](const FusionMap& map) { return is_flat(map); })) {
    for (FusionMap& map : maps) map = flattened(map);
    columns *= rows;
    rows = 1;
  }
  const int pack = recompute ? kGatherPack<T, true, true> : pool ? kGatherPack<T, true, false> : kPackSize<T>;
  const auto all = [&](auto allows) { return std::all_of(maps, maps + 3, allows); };
  const bool channel_packs =
      pack > 1 && all([&](const FusionMap& map) { return allows_channel_packs(map, node.channels, pack, kSize); }) &&
      has_aligned_affine(input) && (!recompute || node_allows_channel_packs(node, pack, kSize));
  // Neighbouring threads at neighbouring pixels of a resampled row read whole sectors anyway.
  const bool pixel_packs = input.resample == kResampleNone && !recompute &&
                           all([&](const FusionMap& map) { return allows_pixel_packs(map, pack, kSize); });
  target.walk = channel_packs ? FusionWalk::kChannelPacks : pixel_packs ? FusionWalk::kPixelPacks : FusionWalk::kScalar;
  const bool along_channels = channel_packs || (!pixel_packs && prefers_channels(input.map, node.channels));
  target.domain =
      make_domain(samples, node.channels, rows, columns, target.walk, pack, along_channels, per_channel, blocks);
}

template <typename T>
void launch_gather(const FusionGatherParameters<accumulate_t<T>>& parameters, int64_t blocks, cudaStream_t stream) {
  const bool recompute = parameters.node.act != kActivationNone;
  launch(recompute ? fusion_gather<T, true> : fusion_gather<T, false>, blocks, kFusionThreads, 0, stream, parameters);
}

// Adds up the partial sums of a pass into `sums` (empty: there are none) and the weight's gradient.
template <typename A>
void launch_finish(
    const FusionGatherParameters<A>& gather,
    double epsilon,
    const std::vector<Tensor>& sums,
    const Tensor& weight_gradient,
    cudaStream_t stream) {
  const FusionNode<A>& node = gather.node;
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

void check_no_depthwise(const std::optional<Tensor>& tensor) {
  STD_TORCH_CHECK(!tensor, "depthwise is given, but only the CPU kernels convolve the fused map; leave it out.");
}

}  // namespace

void fusion_statistics(
    const std::vector<Tensor>& inputs,
    const std::vector<double>& epsilons,
    const std::vector<Tensor>& statistics,
    const std::optional<Tensor>& workspace) {
  check_inputs(inputs);
  const Tensor& first = inputs[0];
  const ScalarType dtype = first.scalar_type();
  const int64_t samples = first.size(0), channels = first.size(1);
  STD_TORCH_CHECK(
      epsilons.size() == inputs.size(), "epsilons has ", epsilons.size(), " numbers, but ", inputs.size(),
      " were wanted.");
  check_count(statistics.size(), "statistics", inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_contiguous(statistics[i], name_of("statistics", i), first, accumulate_dtype(dtype), {3, channels});
  }
  Workspace room(workspace, first, accumulate_dtype(dtype));

  const DeviceGuard guard(first);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(dtype, "inputs[0]", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    constexpr int kSize = static_cast<int>(sizeof(T));
    FusionStatisticsParameters<A> parameters{};
    parameters.targets_used = static_cast<int>(inputs.size());
    parameters.channels = static_cast<int>(channels);
    parameters.channel_blocks = static_cast<int>(ceil_divide(channels, kFinishChannels));
    int64_t blocks = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      FusionStatisticsTarget<A>& target = parameters.targets[i];
      target.map = map_of(inputs[i]);
      const int64_t pixels = static_cast<int64_t>(target.map.height) * target.map.width;
      if (is_flat(target.map)) target.map = flattened(target.map);
      target.walk = allows_channel_packs(target.map, channels, kPackSize<T>, kSize) ? FusionWalk::kChannelPacks
                    : allows_pixel_packs(target.map, kPackSize<T>, kSize)           ? FusionWalk::kPixelPacks
                                                                                    : FusionWalk::kScalar;
      const bool along_channels = target.walk == FusionWalk::kChannelPacks ||
                                  (target.walk == FusionWalk::kScalar && prefers_channels(target.map, channels));
      target.domain = make_domain(
          samples, channels, target.map.height, target.map.width, target.walk, kPackSize<T>, along_channels, true,
          blocks);
      target.partials = room.take<A>(2 * channels * target.domain.chunks);
      target.statistics = static_cast<A*>(statistics[i].data_ptr());
      target.epsilon = epsilons[i];
      target.count = static_cast<double>(samples) * static_cast<double>(pixels);
      target.chunk_count = static_cast<double>(target.domain.chunk) * target.domain.column_step;
    }
    launch(fusion_measure<T>, blocks, kFusionThreads, 0, stream, parameters);
    launch(
        fusion_merge_statistics<A>, parameters.targets_used * static_cast<int64_t>(parameters.channel_blocks),
        kFusionThreads, 0, stream, parameters);
  });
}

void fusion_forward(
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& statistics,
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,
    const std::vector<int64_t>& resamples,
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const Tensor& out,
    const std::optional<Tensor>& depthwise) {
  check_no_depthwise(depthwise);
  const NodeArguments node{inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon};
  check_node(node, out, "out");
  if (inputs[0].size(0) == 0) return;

  const DeviceGuard guard(inputs[0]);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(
      node.dtype(), "inputs[0]", [&](auto tag) { launch_forward<typename decltype(tag)::type>(node, out, stream); });
}

void fusion_backward_sums(
    const Tensor& grad,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& statistics,
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,
    const std::vector<int64_t>& resamples,
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const std::vector<Tensor>& sums,
    const Tensor& weight_gradient,
    const std::optional<Tensor>& workspace,
    const std::optional<Tensor>& depthwise,
    const std::optional<Tensor>&,
    const std::optional<Tensor>&) {
  check_no_depthwise(depthwise);
  const NodeArguments arguments{inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon};
  check_node(arguments, grad, "grad");
  const Tensor& first = inputs[0];
  const int64_t channels = first.size(1);
  check_count(sums.size(), "sums", inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = name_of("sums", i);
    if (statistics[i].numel() > 0) {
      check_contiguous(sums[i], name, first, arguments.accumulate(), {2, channels});
    } else {
      check_device(sums[i], name, first);
      STD_TORCH_CHECK(
          sums[i].numel() == 0, name, " has shape ", shape_of(sums[i]), ", but ", name_of("inputs", i),
          " is not normalised and an empty tensor was wanted.");
    }
  }
  check_contiguous(
      weight_gradient, "weight_gradient", first, arguments.accumulate(), {static_cast<int64_t>(inputs.size())});
  Workspace room(workspace, first, arguments.accumulate());

  const DeviceGuard guard(first);
  const cudaStream_t stream = guard.stream();
  dispatch_floating(arguments.dtype(), "inputs[0]", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    FusionGatherParameters<A> parameters{};
    parameters.node = make_node<A>(arguments, grad);
    parameters.grad = map_of(grad);
    int64_t blocks = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const bool normalised = statistics[i].numel() > 0;
      // Weights of one have no gradient, so an input that is not normalised then has nothing to add up.
      if (!normalised && weighting == kWeightSum) continue;
      FusionTarget<A>& target = parameters.targets[parameters.targets_used++];
      target.input = static_cast<int>(i);
      plan_target<T>(target, parameters.node, parameters.grad, first.size(0), true, blocks);
      const int64_t chunks = target.domain.chunks;
      if (normalised) target.channel_partials = room.take<A>(2 * channels * chunks);
      if (weighting != kWeightSum) target.derivative_partials = room.take<A>(target.domain.tiles * chunks);
    }
    launch_gather<T>(parameters, blocks, stream);
    launch_finish(parameters, epsilon, sums, weight_gradient, stream);
  });
}

void fusion_backward(
    const Tensor& grad,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& statistics,
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,
    const std::vector<Tensor>& sums,
    const std::vector<int64_t>& resamples,
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const std::vector<int64_t>& positions,
    const std::vector<Tensor>& gradients,
    const std::optional<Tensor>& weight_gradient,
    const std::optional<Tensor>& workspace) {
  const NodeArguments arguments{inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon};
  check_node(arguments, grad, "grad");
  const Tensor& first = inputs[0];
  const int64_t samples = first.size(0), channels = first.size(1);
  check_count(sums.size(), "sums", inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = name_of("sums", i);
    check_device(sums[i], name, first);
    if (sums[i].numel() == 0) continue;
    STD_TORCH_CHECK(
        statistics[i].numel() > 0, name, " has shape ", shape_of(sums[i]), ", but ", name_of("inputs", i),
        " is not normalised and an empty tensor was wanted.");
    check_contiguous(sums[i], name, first, arguments.accumulate(), {2, channels});
  }
  check_count(gradients.size(), "gradients", positions.size());
  const Tensor* wanted[kMostFusionInputs] = {};
  for (size_t k = 0; k < positions.size(); ++k) {
    check_choice(positions[k], name_of("positions", k), static_cast<int64_t>(inputs.size()));
    STD_TORCH_CHECK(
        k == 0 || positions[k] > positions[k - 1], "positions holds ", positions[k], " after ", positions[k - 1],
        ", but rising numbers were wanted.");
    const size_t input = static_cast<size_t>(positions[k]);
    check_device(gradients[k], name_of("gradients", k), first);
    check_dtype(gradients[k], name_of("gradients", k), arguments.dtype());
    check_same_shape(gradients[k], name_of("gradients", k), inputs[input], name_of("inputs", input));
    wanted[input] = &gradients[k];
  }
  if (weight_gradient.has_value()) {
    check_contiguous(
        *weight_gradient, "weight_gradient", first, arguments.accumulate(), {static_cast<int64_t>(inputs.size())});
  }
  Workspace room(workspace, first, arguments.accumulate());

  const DeviceGuard guard(first);
  const cudaStream_t stream = guard.stream();
  const bool derives = weight_gradient.has_value() && weighting != kWeightSum;
  dispatch_floating(arguments.dtype(), "inputs[0]", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    FusionGatherParameters<A> parameters{};
    parameters.node = make_node<A>(arguments, grad);
    parameters.grad = map_of(grad);
    int64_t blocks = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (wanted[i] == nullptr && !derives) continue;
      FusionTarget<A>& target = parameters.targets[parameters.targets_used++];
      target.input = static_cast<int>(i);
      if (wanted[i] != nullptr) target.gradient = map_of(*wanted[i]);
      if (sums[i].numel() > 0) target.sums = static_cast<const A*>(sums[i].data_ptr());
      target.inverse_count = static_cast<A>(
          1.0 / (static_cast<double>(samples) * static_cast<double>(inputs[i].size(2) * inputs[i].size(3))));
      plan_target<T>(target, parameters.node, parameters.grad, samples, false, blocks);
      if (derives) {
        target.derivative_partials = room.take<A>(static_cast<int64_t>(target.domain.tiles) * target.domain.chunks);
      }
    }
    launch_gather<T>(parameters, blocks, stream);
    if (weight_gradient.has_value()) launch_finish(parameters, epsilon, {}, *weight_gradient, stream);
  });
}

}  // namespace frskd::cuda
