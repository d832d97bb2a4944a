// What both passes of attention transfer read: the features of a pyramid, powers of them, and their sums over the
// channels.
#pragma once

#include "parallel.h"

namespace frskd {
namespace {

constexpr int64 kPixelTile = 1024;  // accumulators of a tile stay in the first-level cache
// Channels summed before they join the sum of their group, and a group's before they join the total: keeps the rounding
// of long sums small.
constexpr int64 kChannelBlock = 32;
constexpr int64 kChannelGroup = 512;
constexpr int kRowsAtOnce = 4;  // channels read together, so that the sums are loaded and stored once for all of them
constexpr int kPartialSums =
    4;  // of one pixel whose channels are contiguous: additions that do not wait for each other
// Bytes of a tile's row from which on channels are read one after the other, as they lie in memory: the processor
// fetches one stream ahead better than four that lie close together. In shorter rows loading and storing the sums costs
// more.
constexpr int64 kPlaneInOrder = 512;

// Elements of one sample over all levels: the work of one step of the sample loop.
inline int64 sample_elements(const Map* maps, int64 levels) {
  int64 total = 0;
  for (int64 level = 0; level < levels; ++level) total += maps[level].channels * pixels_of(maps[level]);
  return total;
}

// Pixels of the largest level.
inline int64 largest_map(const Map* maps, int64 levels) {
  int64 largest = 0;
  for (int64 level = 0; level < levels; ++level) {
    largest = pixels_of(maps[level]) > largest ? pixels_of(maps[level]) : largest;
  }
  return largest;
}

// Elements from the first pixel of a sample to `pixel`. Two divisions cost as much as the 64 channels of a pixel, so
// they are left to maps whose rows do not follow each other.
inline __attribute__((always_inline)) int64 offset_of(const Map& map, int64 pixel) {
  if (map.stride_h == map.width * map.stride_w) return pixel * map.stride_w;
  return (pixel / map.width) * map.stride_h + (pixel % map.width) * map.stride_w;
}

template <typename V>
inline __attribute__((always_inline)) V absolute(V value) {
  return value < V{} ? -value : value;
}

inline float power(float base, double exponent) { return __builtin_powf(base, static_cast<float>(exponent)); }
inline double power(double base, double exponent) { return __builtin_pow(base, exponent); }

template <typename V>
inline V lanes_power(V base, double exponent) {
  V result = {};
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(base[0]); ++lane) result[lane] = power(base[lane], exponent);
  return result;
}

// |f|^p; Square is p = 2.
template <bool Square, typename V>
inline __attribute__((always_inline)) V raised(V value, double exponent) {
  if constexpr (Square) return value * value;
  return lanes_power(absolute(value), exponent);
}

// sign(f) * |f|^(p - 1)
template <bool Square, typename V>
inline __attribute__((always_inline)) V derivative(V value, double exponent) {
  if constexpr (Square) return value;
  const V zero = {};
  const V one = zero + 1;
  // A NaN is neither above nor below zero and passes through as itself.
  const V sign = value > zero ? one : (value < zero ? -one : value);
  return sign * lanes_power(absolute(value), exponent - 1.0);
}

// out[pixel] = sum_c |f|^p for the pixels [begin, end) of one sample, along the pixels of a channel.
template <bool Square, typename T, typename A>
void power_sums_along_pixels(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  const T* base = static_cast<const T*>(map.data) + sample * map.stride_n;
  using B = Block<T>;
  A block[kPixelTile], group[kPixelTile];
  for (int64 tile = begin; tile < end; tile += kPixelTile) {
    const int64 count = end - tile < kPixelTile ? end - tile : kPixelTile;
    const int64 whole = count - count % B::kElements;
    A* total = out + (tile - begin);
    A* group_sums = map.channels <= kChannelGroup ? total : group;
    A* sums = map.channels <= kChannelBlock ? total : block;
    const auto clear = [&](A* values) {
      for (int64 pixel = 0; pixel < count; ++pixel) values[pixel] = 0;
    };
    const auto add = [&](const A* values, A* to) {
      if (values == to) return;
      for (int64 pixel = 0; pixel < count; ++pixel) to[pixel] += values[pixel];
    };
    clear(total);
    const bool in_order = count * static_cast<int64>(sizeof(T)) >= kPlaneInOrder;
    const auto add_rows = [&](auto rows, int64 channel) __attribute__((always_inline)) {
      constexpr int Rows = decltype(rows)::kValue;
      const T* row = base + channel * map.stride_c + tile;
      const int64 next = map.stride_c;
      for (int64 pixel = 0; pixel < whole; pixel += B::kElements) {
        V values[Rows][B::kVectors];
        for (int r = 0; r < Rows; ++r) B::read(row + r * next + pixel, values[r]);
        for (int v = 0; v < B::kVectors; ++v) {
          V sum = raised<Square>(values[0][v], exponent);
          if constexpr (Rows == kRowsAtOnce) {
            sum += raised<Square>(values[1][v], exponent);
            sum += raised<Square>(values[2][v], exponent) + raised<Square>(values[3][v], exponent);
          }
          A* place = sums + pixel + v * width;
          store(load(place) + sum, place);
        }
      }
      for (int64 pixel = whole; pixel < count; pixel += width) {
        const int64 rest = count - pixel < width ? count - pixel : width;
        V sum = raised<Square>(load_first(row + pixel, rest), exponent);
        for (int r = 1; r < Rows; ++r) sum += raised<Square>(load_first(row + r * next + pixel, rest), exponent);
        store_first(load_first(sums + pixel, rest) + sum, sums + pixel, rest);
      }
    };
    for (int64 first = 0; first < map.channels; first += kChannelBlock) {
      const int64 last = first + kChannelBlock < map.channels ? first + kChannelBlock : map.channels;
      if (first % kChannelGroup == 0) clear(group_sums);
      if (sums != total) clear(sums);
      int64 channel = first;
      if (!in_order) {
        for (; channel + kRowsAtOnce <= last; channel += kRowsAtOnce) add_rows(Constant<kRowsAtOnce>{}, channel);
      }
      for (; channel < last; ++channel) add_rows(Constant<1>{}, channel);
      add(sums, group_sums);
      if (last % kChannelGroup == 0 || last == map.channels) add(group_sums, total);
    }
    B::collect(total, whole);
  }
}

// The same along the channels of a pixel.
template <bool Square, typename T, typename A>
void power_sums_along_channels(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  const T* base = static_cast<const T*>(map.data) + sample * map.stride_n;
  using B = Block<T>;
  const auto point_at = [&](int64 pixel) { return base + offset_of(map, pixel); };
  // Sums of one pixel whose channels are contiguous, still spread over the lanes.
  const auto channel_sums = [&](int64 pixel) __attribute__((always_inline)) {
    constexpr int steps = kPartialSums / B::kVectors;
    const T* point = point_at(pixel);
    V sums[kPartialSums] = {};
    int64 channel = 0;
    for (; channel + kPartialSums * width <= map.channels; channel += kPartialSums * width) {
      V values[kPartialSums];
      for (int step = 0; step < steps; ++step) {
        B::read(point + channel + step * B::kElements, values + step * B::kVectors);
      }
      for (int part = 0; part < kPartialSums; ++part) sums[part] += raised<Square>(values[part], exponent);
    }
    for (; channel + width <= map.channels; channel += width)
      sums[0] += raised<Square>(load(point + channel), exponent);
    if (channel < map.channels) {
      sums[1] += raised<Square>(load_first(point + channel, map.channels - channel), exponent);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  int64 start = begin;
  if (map.stride_c == 1) {
    for (; start + width <= end; start += width) {
      V sums[width];
      for (int64 lane = 0; lane < width; ++lane) sums[lane] = channel_sums(start + lane);
      store_horizontal_sums<width>(sums, out + start - begin);
    }
  }
  for (int64 pixel = start; pixel < end; ++pixel) {
    if (map.stride_c == 1) {
      const V sums[width] = {channel_sums(pixel)};
      A totals[width];
      store_horizontal_sums<width>(sums, totals);
      out[pixel - begin] = totals[0];
    } else {
      const T* point = point_at(pixel);
      A total = 0;
      for (int64 first = 0; first < map.channels; first += width) {
        V gathered = {};
        for (int64 lane = 0; lane < width && first + lane < map.channels; ++lane) {
          gathered[lane] = to_scalar(point[(first + lane) * map.stride_c]);
        }
        total += horizontal_sum(raised<Square>(gathered, exponent));
      }
      out[pixel - begin] = total;
    }
  }
}

template <bool Square, typename T, typename A>
void power_sums(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  pixels_are_contiguous(map) ? power_sums_along_pixels<Square, T>(map, sample, begin, end, exponent, out)
                             : power_sums_along_channels<Square, T>(map, sample, begin, end, exponent, out);
}

template <typename T, typename A>
void power_sums(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  exponent == 2.0 ? power_sums<true, T>(map, sample, begin, end, exponent, out)
                  : power_sums<false, T>(map, sample, begin, end, exponent, out);
}

}  // namespace
}  // namespace frskd
