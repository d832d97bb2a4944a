// Mean and variance of each channel of a map over batch and pixels.
#pragma once

#include "fusion_node.h"

namespace frskd {
namespace {

constexpr int64 kStatisticsBlock = 1024;  // channels
constexpr int64 kStatisticsTile = 8192;   // elements read twice, which stay in the cache between
constexpr int64 kStatisticsRow = 1024;    // elements of a plane in one piece that are read as a row

// Mean and sum of squared deviations of a part; parts merge without cancellation (Chan et al.).
struct Moments {
  double mean, squares;
};

// What a part of `count` elements weighs in a merge with `total_count` others.
struct Share {
  Share(double total_count, double count)
      : of_mean(count / (total_count + count)), of_square(total_count * count / (total_count + count)) {}
  double of_mean, of_square;
};

inline __attribute__((always_inline)) void merge(Moments& total, const Share& share, double mean, double squares) {
  const double difference = mean - total.mean;
  total.mean += difference * share.of_mean;
  total.squares += squares + difference * difference * share.of_square;
}

// Adds the pixels of one sample to `size` channels that lie together, `counted` elements of each of which are in
// `into`. Twice over pixels that stay in the first-level cache: their mean, then the deviations from it.
template <typename T, typename A>
void add_moments_along_channels(const Map& map, const T* data, int64 size, double counted, A* scratch, Moments* into) {
  using V = typename Lanes<A>::Vector;
  const int64 width = Lanes<A>::kWidth;
  const int64 pixels = pixels_of(map), padded = (size + width - 1) / width * width;
  const int64 step = kStatisticsTile / padded;
  A* mean = scratch;
  A* squares = mean + kStatisticsBlock;
  A* drift = squares + kStatisticsBlock;
  for (int64 tile = 0; tile < pixels; tile += step) {
    const int64 count = pixels - tile < step ? pixels - tile : step;
    for (int64 k = 0; k < padded; ++k) mean[k] = squares[k] = drift[k] = 0;
    const auto each_pixel = [&](const auto& body) __attribute__((always_inline)) {
      for (int64 pixel = tile; pixel < tile + count; ++pixel) {
        const T* point = data + pixel / map.width * map.stride_h + pixel % map.width * map.stride_w;
        for (int64 k = 0; k < padded; k += width) body(load_some(point + k, size - k, width), k);
      }
    };
    each_pixel([&](V x, int64 k) __attribute__((always_inline)) { store(load(mean + k) + x, mean + k); });
    const A inverse = A(1) / static_cast<A>(count);
    for (int64 k = 0; k < padded; ++k) mean[k] *= inverse;
    each_pixel([&](V x, int64 k) __attribute__((always_inline)) {
      const V deviation = x - load(mean + k);
      store(load(squares + k) + deviation * deviation, squares + k);
      store(load(drift + k) + deviation, drift + k);
    });
    const Share share(counted, static_cast<double>(count));
    const double inverse_count = 1.0 / static_cast<double>(count);
    for (int64 k = 0; k < size; ++k) {
      // What rounding left of the deviations' sum, which would be 0 of the exact mean.
      const double left = drift[k], shift = left * inverse_count;
      merge(into[k], share, mean[k] + shift, squares[k] - left * shift);
    }
    counted += static_cast<double>(count);
  }
}

// Adds one plane to its channel, row by row.
template <typename T, typename A>
void add_moments_of_plane(const Map& map, const T* plane, double counted, Moments& into) {
  using V = typename Lanes<A>::Vector;
  const int64 width = Lanes<A>::kWidth, pixels = pixels_of(map);
  const bool flat = map.stride_w == 1 && (map.stride_h == map.width || map.height == 1);
  const int64 rows = flat ? (pixels + kStatisticsRow - 1) / kStatisticsRow : map.height;
  for (int64 row = 0; row < rows; ++row) {
    const T* line = plane + row * (flat ? kStatisticsRow : map.stride_h);
    const int64 rest = pixels - row * kStatisticsRow;
    const int64 count = !flat ? map.width : rest < kStatisticsRow ? rest : kStatisticsRow;
    const int64 whole = map.stride_w == 1 ? count - count % width : 0;
    V sums = {};
    for (int64 x = 0; x < whole; x += width) sums += load(line + x);
    A sum = horizontal_sum(sums);
    for (int64 x = whole; x < count; ++x) sum += to_scalar(line[x * map.stride_w]);
    const A mean = sum / static_cast<A>(count);
    V squares = {}, drifts = {};
    for (int64 x = 0; x < whole; x += width) {
      const V deviation = load(line + x) - mean;
      squares += deviation * deviation;
      drifts += deviation;
    }
    double square = horizontal_sum(squares), left = horizontal_sum(drifts);
    for (int64 x = whole; x < count; ++x) {
      const A deviation = to_scalar(line[x * map.stride_w]) - mean;
      square += static_cast<double>(deviation) * static_cast<double>(deviation);
      left += deviation;
    }
    const double shift = left / static_cast<double>(count);
    const Share share(counted, static_cast<double>(count));
    merge(into, share, static_cast<double>(mean) + shift, square - left * shift);
    counted += static_cast<double>(count);
  }
}

template <typename T, typename A>
void map_statistics(const MapStatistics& call, ParallelFor run) {
  const Map& map = call.input;
  const int64 channels = map.channels, pixels = pixels_of(map);
  const int64 groups = call.batch < kSampleGroups ? call.batch : kSampleGroups;
  const bool along_channels = channels_are_contiguous(map) && channels > 1;
  const int64 block = channels < kStatisticsBlock ? channels : kStatisticsBlock;
  const int64 blocks = (channels + block - 1) / block;
  Scratch<Moments> parts(groups * channels);
  parallel(run, groups * blocks, 1, [&](int64 begin, int64 end) {
    Scratch<A> scratch(3 * kStatisticsBlock);
    for (int64 unit = begin; unit < end; ++unit) {
      const int64 group = unit / blocks, first = unit % blocks * block;
      const int64 size = channels - first < block ? channels - first : block;
      const int64 first_sample = call.batch * group / groups, last_sample = call.batch * (group + 1) / groups;
      Moments* into = parts.data + group * channels + first;
      for (int64 k = 0; k < size; ++k) into[k] = {0, 0};
      for (int64 sample = first_sample; sample < last_sample; ++sample) {
        const double counted = static_cast<double>((sample - first_sample) * pixels);
        const T* data = static_cast<const T*>(map.data) + sample * map.stride_n + first * map.stride_c;
        if (along_channels) {
          add_moments_along_channels<T, A>(map, data, size, counted, scratch.data, into);
        } else {
          for (int64 k = 0; k < size; ++k) add_moments_of_plane<T, A>(map, data + k * map.stride_c, counted, into[k]);
        }
      }
    }
  });
  A* out = static_cast<A*>(call.statistics);
  for (int64 channel = 0; channel < channels; ++channel) {
    Moments total = {0, 0};
    double counted = 0;
    for (int64 group = 0; group < groups; ++group) {
      const int64 samples = call.batch * (group + 1) / groups - call.batch * group / groups;
      const double count = static_cast<double>(samples * pixels);
      const Moments& part = parts.data[group * channels + channel];
      merge(total, Share(counted, count), part.mean, part.squares);
      counted += count;
    }
    const double variance = total.squares / counted;
    out[channel] = static_cast<A>(total.mean);
    out[channels + channel] = static_cast<A>(1.0 / __builtin_sqrt(variance + call.epsilon));
    out[2 * channels + channel] = static_cast<A>(variance);
  }
}

}  // namespace
}  // namespace frskd
