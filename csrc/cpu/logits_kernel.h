// The losses of class logits and their gradients on the CPU: which rows go which way through memory.
#pragma once

#include "logits_backward_maps.h"
#include "logits_backward_rows.h"
#include "logits_forward_maps.h"
#include "logits_forward_rows.h"

namespace frskd {
namespace {

// Visits every row or tile of pixels of every head once: body(head, head_index, n, first, count, row) where count is 0
// for a row. With `joined`, a head whose rows are computed with those of another is not visited.
template <typename Body>
void for_each_piece(const Logits& call, ParallelFor run, bool joined, const Body& body) {
  struct Pieces {
    bool tiled;
    int64 pixels, tile;  // of an image, of a piece
    int64 in_image, count;
    int64 elements;  // of a piece
  };
  const auto pieces_of = [&](const Head& head) {
    const int64 pixels = pixels_of(head.student), channels = head.student.channels;
    const bool tiled = along_pixels(head);
    const int64 tile = tiled ? pixel_tile(channels) : 1;
    const int64 in_image = (pixels + tile - 1) / tile;
    const int64 count = joined && head.is_exchanged ? 0 : head.batch * in_image;
    return Pieces{tiled, pixels, tile, in_image, count, tile * channels};
  };
  int64 elements = 0;
  for (int64 index = 0; index < call.count; ++index) {
    const Pieces pieces = pieces_of(call.heads[index]);
    elements += pieces.count * pieces.elements;
  }
  // One loop over the elements of all heads; a piece belongs to the thread in whose range it begins. An exponential
  // costs about as much as eight loads.
  parallel(run, elements, grain_for(8), [&](int64 begin, int64 end) {
    int64 offset = 0;
    for (int64 index = 0; index < call.count; ++index) {
      const Head& head = call.heads[index];
      const Pieces pieces = pieces_of(head);
      const auto first_from = [&](int64 position) {
        const int64 step = position <= offset ? 0 : (position - offset + pieces.elements - 1) / pieces.elements;
        return step < pieces.count ? step : pieces.count;
      };
      const int64 last = first_from(end);
      for (int64 step = first_from(begin); step < last; ++step) {
        const int64 n = step / pieces.in_image, first = step % pieces.in_image * pieces.tile;
        const int64 left = pieces.pixels - first, count = left < pieces.tile ? left : pieces.tile;
        body(head, index, n, first, pieces.tiled ? count : 0, head.first_row + n * pieces.pixels + first);
      }
      offset += pieces.count * pieces.elements;
    }
  });
}

// Whether heads with student and teacher exchanged are computed together.
template <typename P>
constexpr bool kJoined = P::kTeacher && !P::kExtra;

// body(plan of this row, whether it serves a second head). Where no label of the row counts it takes the plan without a
// cross-entropy, which has the same divergence and, the gradient of the cross-entropy being 0, the same gradient.
template <typename P, typename Body>
inline void with_row_plan(const Logits& call, const Head& head, const RowPosition& at, const Body& body) {
  if constexpr (kJoined<P>) {
    using DivergenceAlone = Plan<Temperature::kAny, false, true, false>;
    const auto ignored = [&](const std::int64_t* labels, const std::int64_t strides[3]) {
      return labels == nullptr || label_at(labels, strides, at) == call.ignore_index;
    };
    const bool unlabelled = ignored(head.labels, head.label_strides) && ignored(head.labels_b, head.label_b_strides);
    if (head.exchanged != nullptr) {
      // One body for all temperatures.
      using Any = Plan<Temperature::kAny, P::kCrossEntropy, true, false>;
      unlabelled ? body(DivergenceAlone{}, Constant<true>{}) : body(Any{}, Constant<true>{});
    } else {
      unlabelled ? body(DivergenceAlone{}, Constant<false>{}) : body(P{}, Constant<false>{});
    }
  } else {
    body(P{}, Constant<false>{});
  }
}

template <typename T, typename A>
void logits_forward_typed(const Logits& call, ParallelFor run) {
  with_plan(call.temperature, call.has_targets, call.has_teacher, has_extra(call, false), [&](auto plan) {
    using P = decltype(plan);
    for_each_piece(call, run, kJoined<P>, [&](const Head& head, int64, int64 n, int64 first, int64 count, int64 row) {
      if (count > 0) {
        logits_forward_pixels<P, T, A>(call, head, n, first, count, row);
      } else {
        const RowPosition at = position_of(head.student, n, first);
        const auto compute = [&](auto chosen, auto both) {
          logits_forward_row<decltype(chosen), decltype(both)::kValue, T, A>(call, head, at, row);
        };
        with_row_plan<P>(call, head, at, compute);
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
    for_each_piece(
        call, run, kJoined<P>, [&](const Head& head, int64 index, int64 n, int64 first, int64 count, int64 row) {
          if (count > 0) {
            logits_backward_pixels<P, T, A>(call, head, index, n, first, count, row);
          } else {
            const RowPosition at = position_of(head.student, n, first);
            const auto compute = [&](auto chosen, auto both) {
              logits_backward_row<decltype(chosen), decltype(both)::kValue, T, A>(call, head, index, at, row);
            };
            with_row_plan<P>(call, head, at, compute);
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
