// The losses of class logits and their gradients on the CPU: which rows go which way through memory.
#pragma once

#include "logits_backward_maps.h"
#include "logits_backward_rows.h"
#include "logits_forward_maps.h"
#include "logits_forward_rows.h"

namespace frskd {
namespace {

// Visits every row or tile of pixels of every head once: body(head, head_index, n, first, count, row) where count is 0
// for a row.
template <typename Body>
void for_each_piece(const Logits& call, ParallelFor run, const Body& body) {
  for (int64 index = 0; index < call.count; ++index) {
    const Head& head = call.heads[index];
    const int64 pixels = pixels_of(head.student);
    const bool tiled = along_pixels(head);
    const int64 tile = tiled ? pixel_tile(head.student.channels) : 1;
    const int64 pieces = pixels == 0 ? 0 : (pixels + tile - 1) / tile;
    // An exponential costs about as much as eight loads.
    parallel(run, head.batch * pieces, grain_for(8 * tile * head.student.channels), [&](int64 begin, int64 end) {
      for (int64 step = begin; step < end; ++step) {
        const int64 n = step / pieces, first = step % pieces * tile;
        const int64 count = pixels - first < tile ? pixels - first : tile;
        body(head, index, n, first, tiled ? count : 0, head.first_row + n * pixels + first);
      }
    });
  }
}

// Whether no label of this row counts: it then takes the plan without a cross-entropy, which has the same divergence
// and, the gradient of the cross-entropy being 0, the same gradient.
template <typename P>
inline bool without_cross_entropy(const Logits& call, const Head& head, const RowPosition& at) {
  if (!P::kCrossEntropy || !P::kTeacher || P::kExtra || head.labels == nullptr) return false;
  return label_at(head.labels, head.label_strides, at) == call.ignore_index &&
         (head.labels_b == nullptr || label_at(head.labels_b, head.label_b_strides, at) == call.ignore_index);
}
using DivergenceAlone = Plan<Temperature::kAny, false, true, false>;

template <typename T, typename A>
void logits_forward_typed(const Logits& call, ParallelFor run) {
  with_plan(call.temperature, call.has_targets, call.has_teacher, has_extra(call, false), [&](auto plan) {
    using P = decltype(plan);
    for_each_piece(call, run, [&](const Head& head, int64, int64 n, int64 first, int64 count, int64 row) {
      if (count > 0) {
        logits_forward_pixels<P, T, A>(call, head, n, first, count, row);
      } else {
        const RowPosition at = position_of(head.student, n, first);
        if (without_cross_entropy<P>(call, head, at)) {
          logits_forward_row<DivergenceAlone, T, A>(call, head, at, row);
        } else {
          logits_forward_row<P, T, A>(call, head, at, row);
        }
      }
    });
  });
  const A* weights = static_cast<const A*>(call.losses) + 3 * call.rows;
  for (int64 index = 0; index < call.count; ++index) {
    const Head& head = call.heads[index];
    double valid = 0;
    const int64 rows = head.batch * pixels_of(head.student);
    for (int64 row = 0; row < rows; ++row) valid += weights[head.first_row + row];
    static_cast<A*>(call.inverse_valid)[index] = valid == 0 ? A(0) : static_cast<A>(1.0 / valid);
  }
}

template <typename T, typename A>
void logits_backward_typed(const Logits& call, ParallelFor run) {
  with_plan(call.temperature, call.has_targets, call.has_teacher, has_extra(call, true), [&](auto plan) {
    using P = decltype(plan);
    for_each_piece(call, run, [&](const Head& head, int64 index, int64 n, int64 first, int64 count, int64 row) {
      if (count > 0) {
        logits_backward_pixels<P, T, A>(call, head, index, n, first, count, row);
      } else {
        const RowPosition at = position_of(head.student, n, first);
        if (without_cross_entropy<P>(call, head, at)) {
          logits_backward_row<DivergenceAlone, T, A>(call, head, index, at, row);
        } else {
          logits_backward_row<P, T, A>(call, head, index, at, row);
        }
      }
    });
  });
}

void logits_forward(const Logits& call, Element element, ParallelFor run, int) {
  with_element(
      element, [&](auto number, auto sum) { logits_forward_typed<decltype(number), decltype(sum)>(call, run); });
}

void logits_backward(const Logits& call, Element element, ParallelFor run, int) {
  with_element(
      element, [&](auto number, auto sum) { logits_backward_typed<decltype(number), decltype(sum)>(call, run); });
}

}  // namespace
}  // namespace frskd
