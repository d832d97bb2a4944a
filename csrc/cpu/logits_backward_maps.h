// Gradients of class logits whose pixels lie together (NCHW maps): neighbouring pixels in vector lanes, a class at a
// time.
#pragma once

#include "logits_maps.h"
#include "logits_row.h"

namespace frskd {
namespace {

// The gradients of `count` neighbouring pixels.
template <typename P, typename T, typename A>
void logits_backward_pixels(
    const Logits& call, const Head& head, int64 head_index, int64 n, int64 first, int64 count, int64 row) {
  using L = Lanes<A>;
  using V = typename L::Vector;
  constexpr int64 width = L::kWidth;
  constexpr int64 capacity = kLargestPixelTile;
  const Map& s = head.student;
  const Map& t = head.teacher;
  const Map& q = head.probabilities;
  const Map& ds = head.student_gradient;
  const Map& dt = head.teacher_gradient;
  const int64 classes = s.channels;
  constexpr bool ce = P::kCrossEntropy, teacher = P::kTeacher;
  const bool soft = P::kExtra && q.data != nullptr;
  const bool student_wanted = ds.data != nullptr, teacher_wanted = dt.data != nullptr;
  const A inverse_temperature = A(1) / static_cast<A>(call.temperature);
  const T* student_base = static_cast<const T*>(s.data) + n * s.stride_n + first;
  const T* teacher_base = teacher ? static_cast<const T*>(t.data) + n * t.stride_n + first : nullptr;
  T* student_out = student_wanted ? static_cast<T*>(ds.data) + n * ds.stride_n + first : nullptr;
  T* teacher_out = teacher_wanted ? static_cast<T*>(dt.data) + n * dt.stride_n + first : nullptr;

  A maximum_s[capacity], maximum_t[capacity], scale_s[capacity], scale_t[capacity], kd_s[capacity], kd_t[capacity];
  A smooth_s[capacity], smooth_t[capacity], grad_s[capacity], grad_t[capacity], grad_kd[capacity], offset[capacity];
  A divergence[capacity], shares[capacity];
  RowLabels<A> labels[capacity];
  A kept = A(1) - static_cast<A>(call.label_smoothing);
  for (int64 pixel = 0; pixel < capacity; ++pixel) {
    maximum_s[pixel] = maximum_t[pixel] = scale_s[pixel] = scale_t[pixel] = kd_s[pixel] = kd_t[pixel] = 0;
    smooth_s[pixel] = smooth_t[pixel] = grad_s[pixel] = grad_t[pixel] = grad_kd[pixel] = offset[pixel] = 0;
    divergence[pixel] = shares[pixel] = 0;
  }
  for (int64 pixel = 0; pixel < count; ++pixel) {
    const RowPosition at = position_of(s, n, first + pixel);
    RowGradient<A> g = row_gradient<A>(call, head, head_index, at, row + pixel);
    if (soft) {
      const A* label_row = row_of<const A>(q, at);
      A total = 0;
      for (int64 k = 0; k < classes; ++k) total += label_row[k * q.stride_c];
      g.mass = kept * total + static_cast<A>(call.label_smoothing);
    }
    labels[pixel] = g.labels;
    maximum_s[pixel] = g.statistics[kStudentMax];
    maximum_t[pixel] = g.statistics[kTeacherMax];
    // exp of a single number, by the same function as the lanes, so that both ways through memory agree.
    const auto inverse = [](A log_sum) { return exponential(L::splat(-log_sum))[0]; };
    scale_s[pixel] = g.grad_student * g.mass * inverse(g.statistics[kStudentLogSum]);
    scale_t[pixel] = g.grad_teacher * g.mass * inverse(g.statistics[kTeacherLogSum]);
    kd_s[pixel] = inverse(g.statistics[kStudentLogSumTempered]);
    kd_t[pixel] = inverse(g.statistics[kTeacherLogSumTempered]);
    smooth_s[pixel] = g.grad_student * g.smooth_share;
    smooth_t[pixel] = g.grad_teacher * g.smooth_share;
    grad_s[pixel] = g.grad_student * kept;
    grad_t[pixel] = g.grad_teacher * kept;
    grad_kd[pixel] = g.grad_kd;
    offset[pixel] = g.statistics[kTeacherLogSumTempered] - g.statistics[kStudentLogSumTempered];
    divergence[pixel] = g.divergence;
  }
  const auto at = [&](const auto* plane, int64 pixel) {
    return pixel + width <= count ? load(plane + pixel) : load_first(plane + pixel, count - pixel);
  };
  const auto write = [&](V value, T* plane, int64 pixel) {
    if (pixel + width <= count) {
      store(value, plane + pixel);
    } else {
      store_first(value, plane + pixel, count - pixel);
    }
  };
  for (int64 k = 0; k < classes; ++k) {
    if (soft || head.labels != nullptr) {
      for (int64 pixel = 0; pixel < count; ++pixel) {
        if (soft) {
          shares[pixel] = row_of<const A>(q, position_of(s, n, first + pixel))[k * q.stride_c];
        } else {
          const RowLabels<A>& own = labels[pixel];
          shares[pixel] = (own.index[0] == k ? own.weight[0] : A(0)) + (own.index[1] == k ? own.weight[1] : A(0));
        }
      }
    }
    for (int64 pixel = 0; pixel < count; pixel += width) {
      const V student_difference = at(student_base + k * s.stride_c, pixel) - load(maximum_s + pixel);
      const auto student_exp = exponentials<P::kTemperature, ce, teacher>(student_difference, inverse_temperature);
      V teacher_difference = {};
      Exponentials<V> teacher_exp = {V{}, V{}};
      if (teacher) {
        teacher_difference = at(teacher_base + k * t.stride_c, pixel) - load(maximum_t + pixel);
        teacher_exp = exponentials<P::kTemperature, ce, true>(teacher_difference, inverse_temperature);
      }
      const V share = load(shares + pixel);
      const V tempered_t = teacher_exp.tempered * load(kd_t + pixel);
      if (student_wanted) {
        V value = {};
        if (ce) {
          value += student_exp.plain * load(scale_s + pixel) - (load(smooth_s + pixel) + load(grad_s + pixel) * share);
        }
        if (teacher) value += load(grad_kd + pixel) * (student_exp.tempered * load(kd_s + pixel) - tempered_t);
        write(value, student_out + k * ds.stride_c, pixel);
      }
      if (teacher_wanted) {
        V value = {};
        if (ce) {
          value += teacher_exp.plain * load(scale_t + pixel) - (load(smooth_t + pixel) + load(grad_t + pixel) * share);
        }
        if (P::kExtra && call.kd_to_teacher) {
          const V log_ratio = (teacher_difference - student_difference) * inverse_temperature - load(offset + pixel);
          const V pull = load(grad_kd + pixel) * tempered_t * (log_ratio - load(divergence + pixel));
          value += teacher_exp.tempered == V{} ? V{} : pull;
        }
        write(value, teacher_out + k * dt.stride_c, pixel);
      }
    }
  }
}

}  // namespace
}  // namespace frskd
