// Statistics of a batch: means and squared deviations per block, each thread's from values shifted by its first one,
// and a small launch that merges them.
#pragma once

#include "../operations/fusion.h"
#include "fusion_domain.cuh"

namespace frskd::cuda {

constexpr int kMeasureUnits = 4;  // positions of a thread whose loads are in flight together

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

// Two launches for all inputs.
template <typename T>
void launch_statistics(const FusionStatistics& call, Workspace room, cudaStream_t stream) {
  using A = accumulate_t<T>;
  constexpr int kSize = static_cast<int>(sizeof(T));
  const int64_t samples = call.inputs[0].size(0), channels = call.inputs[0].size(1);
  FusionStatisticsParameters<A> parameters{};
  parameters.targets_used = static_cast<int>(call.inputs.size());
  parameters.channels = static_cast<int>(channels);
  parameters.channel_blocks = static_cast<int>(ceil_divide(channels, kFinishChannels));
  int64_t blocks = 0;
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    FusionStatisticsTarget<A>& target = parameters.targets[i];
    target.map = map_of(call.inputs[i]);
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
    target.statistics = static_cast<A*>(call.statistics[i].data_ptr());
    target.epsilon = call.epsilons[i];
    target.count = static_cast<double>(samples) * static_cast<double>(pixels);
    target.chunk_count = static_cast<double>(target.domain.chunk) * target.domain.column_step;
  }
  launch(fusion_measure<T>, blocks, kFusionThreads, 0, stream, parameters);
  const int64_t finishing = parameters.targets_used * static_cast<int64_t>(parameters.channel_blocks);
  launch(fusion_merge_statistics<A>, finishing, kFusionThreads, 0, stream, parameters);
}

}  // namespace frskd::cuda
