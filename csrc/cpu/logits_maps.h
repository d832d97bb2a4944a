// Which logits are read along their pixels, and how many pixels at once.
#pragma once

#include "logits_call.h"
#include "parallel.h"

namespace frskd {
namespace {

constexpr int64 kLargestPixelTile = 128;
constexpr int64 kSmallestPixelTile = 16;

// Tile of pixels such that all its classes of student and teacher stay in the second-level cache between the two
// passes.
inline int64 pixel_tile(int64 classes) {
  const int64 fitting = 32768 / classes / 16 * 16;
  return fitting > kLargestPixelTile ? kLargestPixelTile
                                     : (fitting < kSmallestPixelTile ? kSmallestPixelTile : fitting);
}

inline bool absent_or_contiguous(const Map& map) { return map.data == nullptr || pixels_are_contiguous(map); }

inline bool along_pixels(const Head& head) {
  return pixels_of(head.student) >= 8 && pixels_are_contiguous(head.student) && absent_or_contiguous(head.teacher) &&
         absent_or_contiguous(head.student_gradient) && absent_or_contiguous(head.teacher_gradient);
}

}  // namespace
}  // namespace frskd
