// The positions of a map, and how they are dealt out to blocks and threads.
//
// Every kernel of weighted fusion gives a block a range of positions: the pixels (or packs of them) of the map whose
// elements its threads own, for all channels or for a tile of them. Where channels lie side by side in memory
// (channels_last) a thread keeps its pack of channels, and index arithmetic and affine parameters serve the whole pack.
#pragma once

#include <algorithm>

#include "../common/config.h"
#include "device.cuh"
#include "feature_view.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

constexpr int kFusionThreads = 256;
constexpr int kFinishChannels = 32;  // channels of a finishing block, side by side
constexpr int kFinishSlices = kFusionThreads / kFinishChannels;

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

// The plan depends on shapes and strides alone, so results do not depend on the device. frskd_fast/native/fusion.py
// sizes the workspace by the first three.
constexpr int64_t kMostSumBlocks = 512;        // of one input in a pass that sums per channel
constexpr int64_t kMostElementBlocks = 4096;   // of one input in a pass that writes elements
constexpr int64_t kLeastSumPositions = 16;     // of a thread in a pass that sums per channel
constexpr int64_t kLeastElementPositions = 4;  // of a thread in a pass that writes elements
constexpr int64_t kMostLanes = 64;             // threads side by side along channels
constexpr int64_t kLimit = int64_t{1} << 30;   // elements of one sample: its positions are numbered by 31 bits

inline FusionMap map_of(const Tensor& tensor) {
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
inline bool allows_channel_packs(const FusionMap& map, int64_t channels, int pack, int element_size) {
  return map.stride_channel == 1 && channels % pack == 0 && map.stride_column % pack == 0 &&
         map.stride_row % pack == 0 && map.stride_sample % pack == 0 &&
         is_aligned(map.data, static_cast<int64_t>(pack) * element_size);
}

inline bool allows_pixel_packs(const FusionMap& map, int pack, int element_size) {
  return map.stride_column == 1 && map.width % pack == 0 && map.stride_row % pack == 0 &&
         map.stride_channel % pack == 0 && map.stride_sample % pack == 0 &&
         is_aligned(map.data, static_cast<int64_t>(pack) * element_size);
}

// Rows of such maps follow one another, so that packs may run over their ends.
inline bool is_flat(const FusionMap& map) {
  return map.height == 1 || map.stride_row == static_cast<int64_t>(map.width) * map.stride_column;
}

inline FusionMap flattened(FusionMap map) {
  map.width *= map.height;
  map.height = 1;
  map.stride_row = 0;
  return map;
}

inline bool prefers_channels(const FusionMap& map, int64_t channels) {
  return map.stride_channel == 1 && channels > 1 && map.height * map.width > 1;
}

// Positions of a (samples, channels, rows, columns) map, a position being `pack` elements where the walk takes packs.
inline FusionDomain make_domain(
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

// Hands out the workspace from front to back.
class Workspace {
 public:
  explicit Workspace(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return;
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

}  // namespace frskd::cuda
