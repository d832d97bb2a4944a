// Which logits are read along their pixels, and how many pixels at once.
#pragma once

#include "logits_call.h"
#include "parallel.h"

namespace frskd {
namespace {

constexpr int64 kLargestPixelTile = 128;
constexpr int64 kSmallestPixelTile = 16;
constexpr int64 kCachedLogits = 32768;  // of one side
constexpr int64 kFewestPixels = 8;      // that are worth a vector

// Tile of pixels such that all its classes of student and teacher stay in the second-level cache between the two
// passes.
inline int64 pixel_tile(int64 classes) {
  const int64 fitting = kCachedLogits / classes / kSmallestPixelTile * kSmallestPixelTile;
  return fitting > kLargestPixelTile ? kLargestPixelTile
                                     : (fitting < kSmallestPixelTile ? kSmallestPixelTile : fitting);
}

inline bool absent_or_contiguous(const Map& map) { return map.data == nullptr || pixels_are_contiguous(map); }

inline bool along_pixels(const Head& head) {
  return pixels_of(head.student) >= kFewestPixels && pixels_are_contiguous(head.student) &&
         absent_or_contiguous(head.teacher) && absent_or_contiguous(head.student_gradient) &&
         absent_or_contiguous(head.teacher_gradient);
}

}  // namespace
}  // namespace frskd
