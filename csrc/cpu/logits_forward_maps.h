// Losses of class logits whose pixels lie together (NCHW maps): neighbouring pixels in vector lanes, a class at a time.
#pragma once

#include "logits_maps.h"
#include "logits_row.h"

namespace frskd {
namespace {

// The losses and statistics of `count` neighbouring pixels.
template <typename P, typename T, typename A>
void logits_forward_pixels(const Logits& call, const Head& head, int64 n, int64 first, int64 count, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  constexpr int64 capacity = kLargestPixelTile;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const int64 classes = s.channels;
  constexpr bool teacher = P::kTeacher, ce = P::kCrossEntropy;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool smooth = P::kExtra && call.label_smoothing > 0.0;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_base = static_cast<const T*>(s.data) + n * s.stride_n + first;
  const T* teacher_base = teacher ? static_cast<const T*>(t.data) + n * t.stride_n + first : nullptr;

  A maximum_s[capacity], maximum_t[capacity], plain_s[capacity], plain_t[capacity], tempered_s[capacity];
  A tempered_t[capacity], crossed[capacity], mass[capacity], label_s[capacity], label_t[capacity];
  A shifted_s[capacity], shifted_t[capacity], shares[capacity];
  for (int64 pixel = 0; pixel < capacity; ++pixel) {
    plain_s[pixel] = plain_t[pixel] = tempered_s[pixel] = tempered_t[pixel] = crossed[pixel] = 0;
    mass[pixel] = label_s[pixel] = label_t[pixel] = shifted_s[pixel] = shifted_t[pixel] = 0;
    maximum_s[pixel] = maximum_t[pixel] = 0;
  }
  const auto at = [&](const auto* plane, int64 pixel) {
    return pixel + width <= count ? load(plane + pixel) : load_first(plane + pixel, count - pixel);
  };
  for (int64 k = 0; k < classes; ++k) {
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V value = at(student_base + k * s.stride_c, pixel);
      store(k == 0 ? value : ::frskd::maximum(load(maximum_s + pixel), value), maximum_s + pixel);
      if (teacher) {
        const V other = at(teacher_base + k * t.stride_c, pixel);
        store(k == 0 ? other : ::frskd::maximum(load(maximum_t + pixel), other), maximum_t + pixel);
      }
    }
  }
  for (int64 k = 0; k < classes; ++k) {
    if (soft) {
      for (int64 pixel = 0; pixel < count; ++pixel) {
        shares[pixel] = row_of<const A>(q, position_of(s, n, first + pixel))[k * q.stride_c];
      }
    }
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V student_difference = at(student_base + k * s.stride_c, pixel) - load(maximum_s + pixel);
      const auto student_exp = exponentials<P::kTemperature, ce, teacher>(student_difference, inverse_temperature);
      if (ce) store(load(plain_s + pixel) + student_exp.plain, plain_s + pixel);
      if (smooth) store(load(shifted_s + pixel) + student_difference, shifted_s + pixel);
      V teacher_difference = {};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        const auto teacher_exp = exponentials<P::kTemperature, ce, true>(teacher_difference, inverse_temperature);
        store(load(tempered_s + pixel) + student_exp.tempered, tempered_s + pixel);
        store(load(tempered_t + pixel) + teacher_exp.tempered, tempered_t + pixel);
        const V product = teacher_exp.tempered * (teacher_difference - student_difference);
        store(load(crossed + pixel) + (teacher_exp.tempered == V{} ? V{} : product), crossed + pixel);
        if (ce) store(load(plain_t + pixel) + teacher_exp.plain, plain_t + pixel);
        if (smooth) store(load(shifted_t + pixel) + teacher_difference, shifted_t + pixel);
      }
      if (soft) {
        const V share = load(shares + pixel);
        store(load(mass + pixel) + share, mass + pixel);
        store(load(label_s + pixel) + (share == V{} ? V{} : share * student_difference), label_s + pixel);
        if (teacher) store(load(label_t + pixel) + (share == V{} ? V{} : share * teacher_difference), label_t + pixel);
      }
    }
  }
  A log_plain_s[capacity], log_plain_t[capacity], log_tempered_s[capacity], log_tempered_t[capacity];
  for (int64 pixel = 0; pixel < count; pixel += width) {
    store(logarithm(load(plain_s + pixel)), log_plain_s + pixel);
    store(logarithm(load(plain_t + pixel)), log_plain_t + pixel);
    store(logarithm(load(tempered_s + pixel)), log_tempered_s + pixel);
    store(logarithm(load(tempered_t + pixel)), log_tempered_t + pixel);
  }
  for (int64 pixel = 0; pixel < count; ++pixel) {
    RowTotals<A> totals = {};
    totals.student_max = maximum_s[pixel];
    totals.teacher_max = maximum_t[pixel];
    totals.student_log_sum = log_plain_s[pixel];
    totals.teacher_log_sum = log_plain_t[pixel];
    totals.student_log_sum_tempered = log_tempered_s[pixel];
    totals.teacher_log_sum_tempered = log_tempered_t[pixel];
    totals.teacher_sum_tempered = tempered_t[pixel];
    totals.cross = crossed[pixel];
    totals.mass = mass[pixel];
    totals.student_label = label_s[pixel];
    totals.teacher_label = label_t[pixel];
    totals.student_shifted = shifted_s[pixel];
    totals.teacher_shifted = shifted_t[pixel];
    write_losses<P>(
        call, head, position_of(s, n, first + pixel), row + pixel, student_base + pixel,
        teacher ? teacher_base + pixel : nullptr, totals);
  }
}

}  // namespace
}  // namespace frskd
