// Attention transfer, forward: the power means of both sides, then norm, loss and coefficients of one sample of one
// level; and the attention map.
#pragma once

#include "../common/attention_math.h"
#include "attention_call.h"
#include "attention_features.h"

namespace frskd {
namespace {

// sum_i first_i * second_i in double: squares of a float map can pass the float range.
struct DoubleSum {
  Doubles low = {}, high = {};
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

// Loss and coefficients of one (level, sample) from the channel sums of both sides, which become q in place.
template <typename A>
void finish_sample(
    const AttentionForwardCall& call, int64 level, int64 sample, int64 level_offset, A* student, A* teacher) {
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
  const auto write_coefficients = [&](void* coefficients, const A* own, const A* other, double projection, A norm,
                                      int64 channels) {
    if (coefficients == nullptr) return;
    const A scale = static_cast<A>(call.exponent / channels * 2.0 / pixels);
    for (int64 pixel = 0; pixel < pixels; pixel += width) {
      const int64 rest = pixels - pixel;
      const auto value = attention_coefficient(
          load_up_to(own + pixel, rest), load_up_to(other + pixel, rest), static_cast<A>(projection), norm, scale);
      store_up_to(value, static_cast<A*>(coefficients) + offset + pixel, rest);
    }
  };
  write_coefficients(call.student_coefficients, student, teacher, student_products.total(), student_norm, map.channels);
  write_coefficients(
      call.teacher_coefficients, teacher, student, -teacher_products.total(), teacher_norm,
      call.teachers[level].channels);
}

template <typename T, typename A>
void attention_forward_typed(const AttentionForwardCall& call, ParallelFor run, int threads) {
  if (call.batch >= threads) {
    const int64 largest = largest_map(call.students, call.levels);
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
  int64 total = 0;
  for (int64 level = 0; level < call.levels; ++level) total += pixels_of(call.students[level]);
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

template <typename T, typename A>
void attention_map_typed(const AttentionMapCall& call, ParallelFor run, int) {
  const int64 pixels = pixels_of(call.feature);
  parallel(run, call.batch, grain_for(call.feature.channels * pixels), [&](int64 begin, int64 end) {
    for (int64 sample = begin; sample < end; ++sample) {
      A* map = static_cast<A*>(call.map) + sample * pixels;
      power_sums<T>(call.feature, sample, 0, pixels, call.exponent, map);
      static_cast<A*>(call.norm)[sample] = normalise(map, pixels, call.feature.channels);
    }
  });
}

void attention_forward(const AttentionForwardCall& call, Element element, ParallelFor run, int threads) {
  with_element(element, [&](auto type, auto number) {
    attention_forward_typed<decltype(type), decltype(number)>(call, run, threads);
  });
}

void attention_map(const AttentionMapCall& call, Element element, ParallelFor run, int threads) {
  with_element(element, [&](auto type, auto number) {
    attention_map_typed<decltype(type), decltype(number)>(call, run, threads);
  });
}

}  // namespace
}  // namespace frskd
