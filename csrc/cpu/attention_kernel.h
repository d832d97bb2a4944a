// Attention transfer on the CPU. One sample of one level: both power means a, then norm, loss and coefficients.
#pragma once

#include "../common/attention_math.h"
#include "attention_call.h"
#include "parallel.h"

namespace frskd {
namespace {

constexpr int64 kPixelTile = 1024;  // accumulators of a tile stay in the first-level cache
constexpr int64 kChannelBlock =
    32;  // channels summed before they join the total: keeps the rounding of long sums small
// Bytes of a tile's row from which on channels are read one after the other, as they lie in memory: the processor
// fetches one stream ahead better than four that lie close together. In shorter rows loading and storing the sums costs
// more.
constexpr int64 kPlaneInOrder = 512;

// Elements from the first pixel of a sample to `pixel`. Two divisions cost as much as the 64 channels of a pixel, so
// they are left to maps whose rows do not follow each other.
inline __attribute__((always_inline)) int64 offset_of(const Map& map, int64 pixel) {
  if (map.stride_h == map.width * map.stride_w) return pixel * map.stride_w;
  return (pixel / map.width) * map.stride_h + (pixel % map.width) * map.stride_w;
}

enum class Exponent { kOne, kTwo, kThree, kFour, kAny };

inline Exponent classify(double exponent) {
  return exponent == 1.0   ? Exponent::kOne
         : exponent == 2.0 ? Exponent::kTwo
         : exponent == 3.0 ? Exponent::kThree
         : exponent == 4.0 ? Exponent::kFour
                           : Exponent::kAny;
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

// |f|^p
template <Exponent E, typename V>
inline __attribute__((always_inline)) V raised(V value, double exponent) {
  if constexpr (E == Exponent::kOne) return absolute(value);
  if constexpr (E == Exponent::kTwo) return value * value;
  if constexpr (E == Exponent::kThree) return absolute(value) * (value * value);
  if constexpr (E == Exponent::kFour) return (value * value) * (value * value);
  return lanes_power(absolute(value), exponent);
}

// sign(f) * |f|^(p - 1)
template <Exponent E, typename V>
inline __attribute__((always_inline)) V derivative(V value, double exponent) {
  if constexpr (E == Exponent::kTwo) return value;
  if constexpr (E == Exponent::kThree) return absolute(value) * value;
  if constexpr (E == Exponent::kFour) return (value * value) * value;
  const V zero = {};
  const V one = zero + 1;
  // A NaN is neither above nor below zero and passes through as itself.
  const V sign = value > zero ? one : (value < zero ? -one : value);
  if constexpr (E == Exponent::kOne) return sign;
  return sign * lanes_power(absolute(value), exponent - 1.0);
}

// out[pixel] = sum_c |f|^p for the pixels [begin, end) of one sample.
template <Exponent E, typename T, typename A>
void power_sums(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  const T* base = static_cast<const T*>(map.data) + sample * map.stride_n;
  using B = Block<T>;
  if (pixels_are_contiguous(map)) {
    A block[kPixelTile];
    for (int64 tile = begin; tile < end; tile += kPixelTile) {
      const int64 count = end - tile < kPixelTile ? end - tile : kPixelTile;
      const int64 whole = count - count % B::kElements;
      A* total = out + (tile - begin);
      const bool direct = map.channels <= kChannelBlock;
      A* sums = direct ? total : block;
      for (int64 pixel = 0; pixel < count; ++pixel) total[pixel] = 0;
      const bool in_order = count * static_cast<int64>(sizeof(T)) >= kPlaneInOrder;
      // `Rows` channels at once, so that the sums are loaded and stored once for all of them.
      const auto add_rows = [&](auto rows, int64 channel) __attribute__((always_inline)) {
        constexpr int Rows = decltype(rows)::kValue;
        const T* row = base + channel * map.stride_c + tile;
        const int64 next = map.stride_c;
        for (int64 pixel = 0; pixel < whole; pixel += B::kElements) {
          V values[Rows][B::kVectors];
          for (int r = 0; r < Rows; ++r) B::read(row + r * next + pixel, values[r]);
          for (int v = 0; v < B::kVectors; ++v) {
            V sum = raised<E>(values[0][v], exponent);
            if constexpr (Rows == 4) {
              sum += raised<E>(values[1][v], exponent);
              sum += raised<E>(values[2][v], exponent) + raised<E>(values[3][v], exponent);
            }
            A* place = sums + pixel + v * width;
            store(load(place) + sum, place);
          }
        }
        for (int64 pixel = whole; pixel < count; pixel += width) {
          const int64 rest = count - pixel < width ? count - pixel : width;
          V sum = raised<E>(load_first(row + pixel, rest), exponent);
          for (int r = 1; r < Rows; ++r) sum += raised<E>(load_first(row + r * next + pixel, rest), exponent);
          store_first(load_first(sums + pixel, rest) + sum, sums + pixel, rest);
        }
      };
      for (int64 first = 0; first < map.channels; first += kChannelBlock) {
        const int64 last = first + kChannelBlock < map.channels ? first + kChannelBlock : map.channels;
        if (!direct) {
          for (int64 pixel = 0; pixel < count; ++pixel) sums[pixel] = 0;
        }
        int64 channel = first;
        if (!in_order) {
          for (; channel + 4 <= last; channel += 4) add_rows(Constant<4>{}, channel);
        }
        for (; channel < last; ++channel) add_rows(Constant<1>{}, channel);
        if (!direct) {
          for (int64 pixel = 0; pixel < count; ++pixel) total[pixel] += sums[pixel];
        }
      }
      B::collect(total, whole);
    }
    return;
  }
  const auto point_at = [&](int64 pixel) { return base + offset_of(map, pixel); };
  // Sums of one pixel whose channels are contiguous, still spread over the lanes.
  const auto channel_sums = [&](int64 pixel) __attribute__((always_inline)) {
    constexpr int steps = 4 / B::kVectors;
    const T* point = point_at(pixel);
    V sums[4] = {};
    int64 channel = 0;
    for (; channel + 4 * width <= map.channels; channel += 4 * width) {
      V values[4];
      for (int step = 0; step < steps; ++step) {
        B::read(point + channel + step * B::kElements, values + step * B::kVectors);
      }
      for (int part = 0; part < 4; ++part) sums[part] += raised<E>(values[part], exponent);
    }
    for (; channel + width <= map.channels; channel += width) sums[0] += raised<E>(load(point + channel), exponent);
    if (channel < map.channels) {
      sums[1] += raised<E>(load_first(point + channel, map.channels - channel), exponent);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  int64 start = begin;
  if (map.stride_c == 1) {
    for (; start + width <= end; start += width) {
      V sums[width];
      for (int64 lane = 0; lane < width; ++lane) sums[lane] = channel_sums(start + lane);
      store(horizontal_sums(sums), out + start - begin);
    }
  }
  for (int64 pixel = start; pixel < end; ++pixel) {
    if (map.stride_c == 1) {
      V sums[width] = {channel_sums(pixel)};
      out[pixel - begin] = horizontal_sums(sums)[0];
    } else {
      const T* point = point_at(pixel);
      A total = 0;
      for (int64 first = 0; first < map.channels; first += width) {
        V gathered = {};
        for (int64 lane = 0; lane < width && first + lane < map.channels; ++lane) {
          gathered[lane] = to_scalar(point[(first + lane) * map.stride_c]);
        }
        total += horizontal_sum(raised<E>(gathered, exponent));
      }
      out[pixel - begin] = total;
    }
  }
}

template <typename T, typename A>
void power_sums(const Map& map, int64 sample, int64 begin, int64 end, double exponent, A* out) {
  switch (classify(exponent)) {
    case Exponent::kOne:
      return power_sums<Exponent::kOne, T>(map, sample, begin, end, exponent, out);
    case Exponent::kTwo:
      return power_sums<Exponent::kTwo, T>(map, sample, begin, end, exponent, out);
    case Exponent::kThree:
      return power_sums<Exponent::kThree, T>(map, sample, begin, end, exponent, out);
    case Exponent::kFour:
      return power_sums<Exponent::kFour, T>(map, sample, begin, end, exponent, out);
    case Exponent::kAny:
      return power_sums<Exponent::kAny, T>(map, sample, begin, end, exponent, out);
  }
}

// sum_i first_i * second_i in double: squares of a float map can pass the float range.
struct DoubleSum {
  Double4 low = {}, high = {};
  inline __attribute__((always_inline)) void add(const Widened& first, const Widened& second) {
    low += first.low * second.low;
    high += first.high * second.high;
  }
  double total() const { return horizontal_sum(low + high); }
};

// Turns channel sums into q = a / max(||a||, floor) in place and returns ||a||.
template <typename A>
A normalise(A* map, int64 pixels, int64 channels) {
  constexpr int64 width = Lanes<A>::kWidth;
  DoubleSum squares;
  const A inverse_channels = A(1) / static_cast<A>(channels);
  for (int64 pixel = 0; pixel < pixels; pixel += width) {
    const auto mean = load_up_to(map + pixel, pixels - pixel) * inverse_channels;
    store_up_to(mean, map + pixel, pixels - pixel);
    squares.add(widened(mean), widened(mean));
  }
  const A norm = static_cast<A>(__builtin_sqrt(squares.total()));
  // Divided, not multiplied by an inverse: a map of one pixel is then exactly 1.
  const A divisor = clamped_norm(norm);
  for (int64 pixel = 0; pixel < pixels; pixel += width) {
    store_up_to(load_up_to(map + pixel, pixels - pixel) / divisor, map + pixel, pixels - pixel);
  }
  return norm;
}

// The first `lanes` of eight: all at once, or by a call for the few that end a map.
template <typename V>
inline __attribute__((always_inline)) V lanes_from(const std::uint8_t* bytes, int64 lanes) {
  V value = {};
  if (lanes >= 8) {
    __builtin_memcpy(&value, bytes, sizeof(V));
  } else {
    __builtin_memcpy(&value, bytes, static_cast<std::size_t>(lanes) * sizeof(value[0]));
  }
  return value;
}
template <typename V>
inline __attribute__((always_inline)) void lanes_to(V value, std::uint8_t* bytes, int64 lanes) {
  if (lanes >= 8) {
    __builtin_memcpy(bytes, &value, sizeof(V));
  } else {
    __builtin_memcpy(bytes, &value, static_cast<std::size_t>(lanes) * sizeof(value[0]));
  }
}

// What is stored between the passes when features have 8 or 11 bits of mantissa: 16 bits of a coefficient's. Rounding
// would carry a NaN whose lower bits are all ones into a number; those of half-precision features and of arithmetic
// have zeros.
inline void store_coefficients(const Coefficients& coefficients, int64 at, int64 rest, Float8 value) {
  if (coefficients.packed == 0) return store_up_to(value, static_cast<float*>(coefficients.data) + at, rest);
  std::uint8_t* bytes = static_cast<std::uint8_t*>(coefficients.data);
  const UInt8 rounded = bits_of<UInt8>(value) + 0x80u;
  lanes_to(__builtin_convertvector(rounded >> 16, UShort8), bytes + 2 * at, rest);
  lanes_to(__builtin_convertvector((rounded >> 8) & 0xffu, UByte8), bytes + 2 * coefficients.packed + at, rest);
}
inline void store_coefficients(const Coefficients& coefficients, int64 at, int64 rest, Double4 value) {
  store_up_to(value, static_cast<double*>(coefficients.data) + at, rest);
}

template <typename A>
inline typename Lanes<A>::Vector load_coefficients(const Coefficients& coefficients, int64 at, int64 rest) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (coefficients.packed != 0) {
      const std::uint8_t* bytes = static_cast<const std::uint8_t*>(coefficients.data);
      const UShort8 upper = lanes_from<UShort8>(bytes + 2 * at, rest);
      const UByte8 third = lanes_from<UByte8>(bytes + 2 * coefficients.packed + at, rest);
      return bits_of<Float8>(
          (__builtin_convertvector(upper, UInt8) << 16) | (__builtin_convertvector(third, UInt8) << 8));
    }
  }
  return load_up_to(static_cast<const A*>(coefficients.data) + at, rest);
}

// Loss and coefficients of one (level, sample) from the channel sums of both sides, which become q in place.
template <typename A>
void finish_sample(
    const AttentionForward& call, int64 level, int64 sample, int64 level_offset, A* student, A* teacher) {
  constexpr int64 width = Lanes<A>::kWidth;
  const Map& map = call.students[level];
  const int64 pixels = map.height * map.width;
  const A student_norm = normalise(student, pixels, map.channels);
  const A teacher_norm = normalise(teacher, pixels, call.teachers[level].channels);
  DoubleSum squares, student_products, teacher_products;
  for (int64 pixel = 0; pixel < pixels; pixel += width) {
    const Widened ours = widened(load_up_to(student + pixel, pixels - pixel));
    const Widened other = widened(load_up_to(teacher + pixel, pixels - pixel));
    const Widened difference = {ours.low - other.low, ours.high - other.high};
    squares.add(difference, difference);
    student_products.add(ours, difference);
    teacher_products.add(other, difference);
  }
  static_cast<A*>(call.losses)[level * call.batch + sample] =
      static_cast<A>(squares.total() / static_cast<double>(pixels));
  const int64 offset = call.batch * level_offset + sample * pixels;
  const auto write_coefficients = [&](const Coefficients& coefficients, const A* own, const A* other, double projection,
                                      A norm, int64 channels) {
    if (coefficients.data == nullptr) return;
    const A scale = static_cast<A>(call.exponent / channels * 2.0 / pixels);
    for (int64 pixel = 0; pixel < pixels; pixel += width) {
      const int64 rest = pixels - pixel;
      const auto value = attention_coefficient(
          load_up_to(own + pixel, rest), load_up_to(other + pixel, rest), static_cast<A>(projection), norm, scale);
      store_coefficients(coefficients, offset + pixel, rest, value);
    }
  };
  write_coefficients(call.student_coefficients, student, teacher, student_products.total(), student_norm, map.channels);
  write_coefficients(
      call.teacher_coefficients, teacher, student, -teacher_products.total(), teacher_norm,
      call.teachers[level].channels);
}

// Elements of one sample over all levels and both sides: the work of one step of the sample loop.
inline int64 sample_elements(const Map* maps, int64 levels) {
  int64 total = 0;
  for (int64 level = 0; level < levels; ++level) total += maps[level].channels * pixels_of(maps[level]);
  return total;
}

template <typename T, typename A>
void attention_forward_typed(const AttentionForward& call, ParallelFor run, int threads) {
  int64 largest = 0, total = 0;
  for (int64 level = 0; level < call.levels; ++level) {
    const int64 pixels = pixels_of(call.students[level]);
    largest = pixels > largest ? pixels : largest;
    total += pixels;
  }
  if (call.batch >= threads) {
    const int64 work = sample_elements(call.students, call.levels) + sample_elements(call.teachers, call.levels);
    parallel(run, call.batch, grain_for(work), [&](int64 begin, int64 end) {
      Scratch<A> student(largest), teacher(largest);
      for (int64 sample = begin; sample < end; ++sample) {
        int64 offset = 0;
        for (int64 level = 0; level < call.levels; ++level) {
          const int64 pixels = pixels_of(call.students[level]);
          power_sums<T>(call.students[level], sample, 0, pixels, call.exponent, student.data);
          power_sums<T>(call.teachers[level], sample, 0, pixels, call.exponent, teacher.data);
          finish_sample(call, level, sample, offset, student.data, teacher.data);
          offset += pixels;
        }
      }
    });
    return;
  }
  // Few large samples: split the pixels instead. A pixel's sum does not depend on the split, so neither do the bits.
  Scratch<A> sums(2 * call.batch * total);
  const int64 tiles_per_sample = (total + kPixelTile - 1) / kPixelTile + call.levels;
  parallel(run, call.batch * tiles_per_sample, 1, [&](int64 begin, int64 end) {
    for (int64 step = begin; step < end; ++step) {
      const int64 sample = step / tiles_per_sample;
      int64 tile = step % tiles_per_sample;
      int64 offset = 0;
      for (int64 level = 0; level < call.levels; ++level) {
        const int64 pixels = pixels_of(call.students[level]);
        const int64 tiles = (pixels + kPixelTile - 1) / kPixelTile;
        if (tile < tiles) {
          const int64 first = tile * kPixelTile;
          const int64 last = first + kPixelTile < pixels ? first + kPixelTile : pixels;
          A* student = sums.data + (sample * total + offset) + first;
          A* teacher = student + call.batch * total;
          power_sums<T>(call.students[level], sample, first, last, call.exponent, student);
          power_sums<T>(call.teachers[level], sample, first, last, call.exponent, teacher);
          break;
        }
        tile -= tiles;
        offset += pixels;
      }
    }
  });
  for (int64 sample = 0; sample < call.batch; ++sample) {
    int64 offset = 0;
    for (int64 level = 0; level < call.levels; ++level) {
      A* student = sums.data + (sample * total + offset);
      finish_sample(call, level, sample, offset, student, student + call.batch * total);
      offset += pixels_of(call.students[level]);
    }
  }
}

template <typename T>
inline bool aligned_for_streaming(const T* pointer, int64 count, int64 width) {
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(width) * sizeof(T);
  return count % width == 0 && reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// gradient = weight[pixel] * sign(f) |f|^(p-1) for the channels [begin, end) of one sample.
template <Exponent E, typename T, typename A>
void scale_sample(
    const Map& feature,
    const Map& gradient,
    int64 sample,
    int64 begin,
    int64 end,
    double exponent,
    A grad,
    const Coefficients& coefficients,
    int64 offset,  // of the sample's coefficients
    A* weights,
    bool streaming) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  const int64 pixels = pixels_of(feature);
  const T* in = static_cast<const T*>(feature.data) + sample * feature.stride_n;
  T* out = static_cast<T*>(gradient.data) + sample * gradient.stride_n;
  for (int64 pixel = 0; pixel < pixels; pixel += width) {
    const auto coefficient = load_coefficients<A>(coefficients, offset + pixel, pixels - pixel);
    store_up_to(quiet(coefficient * grad), weights + pixel, pixels - pixel);
  }
  using B = Block<T>;
  // gradient = weight * derivative for one block, by ordinary or cache-bypassing stores.
  const auto scale_block = [exponent](const V* weight, const T* source, T* target, auto past_cache)
                               __attribute__((always_inline)) {
                                 V values[B::kVectors];
                                 B::read(source, values);
                                 for (int v = 0; v < B::kVectors; ++v)
                                   values[v] = weight[v] * derivative<E>(values[v], exponent);
                                 if constexpr (decltype(past_cache)::kValue != 0) {
                                   B::write_past_cache(values, target);
                                 } else {
                                   B::write(values, target);
                                 }
                               };
  if (pixels_are_contiguous(feature) && pixels_are_contiguous(gradient)) {
    const int64 whole = pixels - pixels % B::kElements;
    B::deal(weights, whole);
    for (int64 channel = begin; channel < end; ++channel) {
      const T* source = in + channel * feature.stride_c;
      T* target = out + channel * gradient.stride_c;
      const auto run = [&](auto past_cache) __attribute__((always_inline)) {
        for (int64 pixel = 0; pixel < whole; pixel += B::kElements) {
          V weight[B::kVectors];
          for (int v = 0; v < B::kVectors; ++v) weight[v] = load(weights + pixel + v * width);
          scale_block(weight, source + pixel, target + pixel, past_cache);
        }
      };
      if (streaming && aligned_for_streaming(target, pixels, B::kElements)) {
        run(Constant<1>{});
        continue;
      }
      run(Constant<0>{});
      for (int64 pixel = whole; pixel < pixels; pixel += width) {
        const int64 rest = pixels - pixel < width ? pixels - pixel : width;
        const V value = load_first(weights + pixel, rest) * derivative<E>(load_first(source + pixel, rest), exponent);
        store_first(value, target + pixel, rest);
      }
    }
    return;
  }
  const int64 channels = end - begin;
  const bool channels_contiguous = feature.stride_c == 1 && gradient.stride_c == 1;
  for (int64 pixel = 0; pixel < pixels; ++pixel) {
    const T* source = in + begin * feature.stride_c + offset_of(feature, pixel);
    T* target = out + begin * gradient.stride_c + offset_of(gradient, pixel);
    const V weight = L::splat(weights[pixel]);
    if (!channels_contiguous) {
      for (int64 first = 0; first < channels; first += width) {
        const int64 count = channels - first < width ? channels - first : width;
        V gathered = {};
        for (int64 lane = 0; lane < count; ++lane) {
          gathered[lane] = to_scalar(source[(first + lane) * feature.stride_c]);
        }
        const V value = weight * derivative<E>(gathered, exponent);
        for (int64 lane = 0; lane < count; ++lane) {
          from_scalar(value[lane], target + (first + lane) * gradient.stride_c);
        }
      }
      continue;
    }
    const V both[2] = {weight, weight};
    if (streaming && aligned_for_streaming(target, channels, B::kElements)) {
      for (int64 channel = 0; channel < channels; channel += B::kElements) {
        scale_block(both, source + channel, target + channel, Constant<1>{});
      }
      continue;
    }
    int64 channel = 0;
    for (; channel + B::kElements <= channels; channel += B::kElements) {
      scale_block(both, source + channel, target + channel, Constant<0>{});
    }
    for (; channel < channels; channel += width) {
      const int64 rest = channels - channel < width ? channels - channel : width;
      store_first(weight * derivative<E>(load_first(source + channel, rest), exponent), target + channel, rest);
    }
  }
}

template <typename T, typename A>
void attention_backward_typed(const AttentionBackward& call, ParallelFor run, int threads) {
  int64 largest = 0;
  for (int64 level = 0; level < call.levels; ++level) {
    const int64 pixels = pixels_of(call.features[level]);
    largest = pixels > largest ? pixels : largest;
  }
  // Few samples: split the channels as well.
  const int64 splits = call.batch >= threads || call.batch == 0 ? 1 : (threads + call.batch - 1) / call.batch * 4;
  const int64 work = sample_elements(call.features, call.levels) / splits;
  parallel(run, call.batch * splits, grain_for(work), [&](int64 begin, int64 end) {
    Scratch<A> weights(largest);
    for (int64 step = begin; step < end; ++step) {
      const int64 sample = step / splits, split = step % splits;
      int64 offset = 0;
      for (int64 level = 0; level < call.levels; ++level) {
        const Map& feature = call.features[level];
        const Map& gradient = call.gradients[level];
        const int64 pixels = pixels_of(feature);
        const A upstream =
            static_cast<const A*>(call.grad)[level * call.grad_stride_level + sample * call.grad_stride_sample];
        const A grad = upstream * static_cast<A>(call.scale);
        const int64 place = call.batch * offset + sample * pixels;
        const int64 first = feature.channels * split / splits, last = feature.channels * (split + 1) / splits;
        const auto apply = [&](auto kernel) {
          kernel(
              feature, gradient, sample, first, last, call.exponent, grad, call.coefficients, place, weights.data,
              call.stream);
        };
        switch (classify(call.exponent)) {
          case Exponent::kOne:
            apply(scale_sample<Exponent::kOne, T, A>);
            break;
          case Exponent::kTwo:
            apply(scale_sample<Exponent::kTwo, T, A>);
            break;
          case Exponent::kThree:
            apply(scale_sample<Exponent::kThree, T, A>);
            break;
          case Exponent::kFour:
            apply(scale_sample<Exponent::kFour, T, A>);
            break;
          case Exponent::kAny:
            apply(scale_sample<Exponent::kAny, T, A>);
            break;
        }
        offset += pixels;
      }
    }
    if (call.stream) finish_streaming();
  });
}

template <typename T, typename A>
void attention_map_typed(const AttentionMap& call, ParallelFor run, int) {
  const int64 pixels = pixels_of(call.feature);
  parallel(run, call.batch, grain_for(call.feature.channels * pixels), [&](int64 begin, int64 end) {
    for (int64 sample = begin; sample < end; ++sample) {
      A* map = static_cast<A*>(call.map) + sample * pixels;
      power_sums<T>(call.feature, sample, 0, pixels, call.exponent, map);
      static_cast<A*>(call.norm)[sample] = normalise(map, pixels, call.feature.channels);
    }
  });
}

void attention_forward(const AttentionForward& call, Element element, ParallelFor run, int threads) {
  switch (element) {
    case Element::kFloat32:
      return attention_forward_typed<float, float>(call, run, threads);
    case Element::kFloat64:
      return attention_forward_typed<double, double>(call, run, threads);
    case Element::kBFloat16:
      return attention_forward_typed<BFloat16, float>(call, run, threads);
    case Element::kFloat16:
      return attention_forward_typed<Half, float>(call, run, threads);
  }
}

void attention_backward(const AttentionBackward& call, Element element, ParallelFor run, int threads) {
  switch (element) {
    case Element::kFloat32:
      return attention_backward_typed<float, float>(call, run, threads);
    case Element::kFloat64:
      return attention_backward_typed<double, double>(call, run, threads);
    case Element::kBFloat16:
      return attention_backward_typed<BFloat16, float>(call, run, threads);
    case Element::kFloat16:
      return attention_backward_typed<Half, float>(call, run, threads);
  }
}

void attention_map(const AttentionMap& call, Element element, ParallelFor run, int threads) {
  switch (element) {
    case Element::kFloat32:
      return attention_map_typed<float, float>(call, run, threads);
    case Element::kFloat64:
      return attention_map_typed<double, double>(call, run, threads);
    case Element::kBFloat16:
      return attention_map_typed<BFloat16, float>(call, run, threads);
    case Element::kFloat16:
      return attention_map_typed<Half, float>(call, run, threads);
  }
}

}  // namespace
}  // namespace frskd
