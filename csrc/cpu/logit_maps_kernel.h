// Losses and low-resolution gradients of interpolated class maps on the CPU, without a map of K channels at full size.
//
// The rows of the maps are cut into bands, which threads share, and a band into tiles of columns that stay in the
// cache. A tile is walked cell by cell downwards: a row of the maps is interpolated along itself once, the rows of
// pixels between two of them are blends, whose gradients are summed into the two, and a row of gradients whose both
// cells are done is gathered to the low resolution. What a band gives to the first row of the next one is added when
// all bands are done.
#pragma once

#include "logit_maps_pixels.h"

namespace frskd {
namespace {

constexpr int64 kTileBytes = 1 << 18;  // rows of logits and gradients of one tile, to stay in the second-level cache
constexpr int64 kExponentialBytes = 1 << 16;  // of a group of rows of pixels
constexpr int64 kLargestGroup = 8;            // rows of pixels
constexpr int64 kBandRows = 16;
constexpr int64 kLeastBands = 32;  // of the whole batch where there are rows enough, for the threads

// How a call is cut, by its sizes alone: results do not depend on the number of threads.
template <typename A>
struct MapsPlan {
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  explicit MapsPlan(const LogitMaps& call)
      : rule(call),
        rows(call.student.height, call.height),
        columns(call.student.width, call.width),
        networks(call.has_teacher ? 2 : 1),
        both(call.has_teacher && call.labels != nullptr && call.temperature != 1.0),
        scale(call.has_teacher && call.labels == nullptr ? static_cast<A>(1.0 / call.temperature) : A(1)) {
    const int64 classes = rule.classes, height = rows.cells, width = columns.cells;
    for (int slot = 0; slot < kGradientMaps; ++slot) {
      place_of_map[slot] = gradients;
      gradients += call.gradients[slot].data != nullptr;
    }
    band = call.batch * height / kLeastBands;
    band = band < 1 ? 1 : band > kBandRows ? kBandRows : band;
    bands = (height + band - 1) / band;
    const int64 bytes_of_pixel = (2 * networks + 2 * gradients) * classes * static_cast<int64>(sizeof(A));
    tile_cells = kTileBytes / bytes_of_pixel * width / call.width;
    const int64 least = (2 * kWidth * width + call.width - 1) / call.width;
    tile_cells = tile_cells < least ? least : tile_cells > width ? width : tile_cells;
    for (int64 first = 0; first < width; first += tile_cells) {
      const int64 blocks = tile_at(first).blocks;
      most_blocks = blocks > most_blocks ? blocks : most_blocks;
    }
    line_stride = (tile_cells + 1 + 2 * kWidth) / kWidth * kWidth;
    exponentials_of_row = (both ? 4 : 2) * classes * kWidth;
    group = kExponentialBytes / (exponentials_of_row * static_cast<int64>(sizeof(A)));
    group = group < 1 ? 1 : group > kLargestGroup ? kLargestGroup : group;
  }

  Tile<A> tile_at(int64 first) const {
    const int64 last = first + tile_cells;
    return Tile<A>(columns, first, last < columns.cells ? last : columns.cells);
  }
  int64 border_of(int64 item, int slot) const {  // where the row stands that a band hands to the next
    return (item * gradients + place_of_map[slot]) * rule.classes * columns.cells;
  }

  PixelRule<A> rule;
  Axis<A> rows, columns;
  const int64 networks;
  const bool both;  // whether exponentials are taken at temperature 1 and at another one
  const A scale;    // of the logits where they are taken once
  int64 gradients = 0;
  int64 place_of_map[kGradientMaps];  // among those that are wanted
  int64 band, bands;                  // rows of a band, bands of an image
  int64 tile_cells;
  int64 most_blocks = 0;
  int64 line_stride;
  int64 exponentials_of_row;
  int64 group;  // rows of pixels whose exponentials are held
};

// The memory of one thread.
template <typename A>
struct MapsWorkspace {
  explicit MapsWorkspace(const MapsPlan<A>& plan)
      : row_size(plan.most_blocks * plan.rule.classes * Lanes<A>::kWidth),
        line(plan.rule.classes * plan.line_stride + Lanes<A>::kWidth),
        logits(2 * plan.networks * row_size),
        gradients(2 * plan.gradients * row_size),
        exponentials(plan.group * plan.exponentials_of_row),
        turned(row_size + plan.most_blocks * Lanes<A>::kWidth * Lanes<A>::kWidth),
        places((plan.tile_cells + 1) * Lanes<A>::kWidth) {
    for (int64 i = 0; i < plan.rule.classes * plan.line_stride + Lanes<A>::kWidth; ++i) line.data[i] = 0;
    for (int64 i = 0; i < 2 * plan.gradients * row_size; ++i) gradients.data[i] = 0;
    int64 next = 0;
    for (int slot = 0; slot < kGradientMaps; ++slot) {
      const bool wanted = plan.rule.call.gradients[slot].data != nullptr;
      for (int parity = 0; parity < 2; ++parity) {
        gradient_rows[slot][parity] = wanted ? gradients.data + next++ * row_size : nullptr;
      }
    }
  }

  A* logit_row(int64 network, int64 parity) const { return logits.data + (2 * network + parity) * row_size; }

  const int64 row_size;
  Memory<A> line;
  Memory<A> logits;     // networks x (upper, lower) x blocks x (class, lane)
  Memory<A> gradients;  // the same for each gradient map; zeros between tiles
  Memory<A> exponentials;
  Memory<A> turned, places;
  A* gradient_rows[kGradientMaps][2];
};

// Gradients of a group of rows of one block.
template <typename A, bool kTeacher, bool kBoth>
inline void add_gradients(
    const MapsPlan<A>& plan,
    const Corners<A>& student,
    const Corners<A>& teacher,
    const A* exponentials,
    const PixelRow<A> rows[],
    int64 count,
    A* const upper[],
    A* const lower[]) {
  using V = Vector<A>;
  const PixelRule<A>& rule = plan.rule;
  const LogitMaps& call = rule.call;
  const int64 classes = rule.classes, size = classes * Lanes<A>::kWidth, step = plan.exponentials_of_row;
  const A* plain_student = exponentials;
  const A* plain_teacher = plain_student + size;
  const A* tempered_student = kBoth ? plain_teacher + size : plain_student;
  const A* tempered_teacher = kBoth ? tempered_student + size : plain_teacher;
  const bool joint = call.grads[0] != nullptr;
  V factors[2 * 3 * kLargestGroup];
  const auto add = [&](int slot, auto terms, const A* const sources[], const auto& factor_of) {
    constexpr int kTerms = decltype(terms)::kValue;
    for (int64 r = 0; r < count; ++r) {
      for (int term = 0; term < kTerms; ++term) {
        const V factor = factor_of(rows[r], term);
        factors[2 * (r * kTerms + term)] = factor * rows[r].near;
        factors[2 * (r * kTerms + term) + 1] = factor * rows[r].far;
      }
    }
    accumulate<A, kTerms>(sources, step, factors, count, classes, upper[slot], lower[slot]);
  };
  if (upper[kCeStudent] != nullptr) {
    if (joint && kBoth) {
      const A* const sources[] = {plain_student, tempered_student, tempered_teacher};
      add(kCeStudent, Constant<3>{}, sources, [](const PixelRow<A>& row, int term) {
        return term == 0 ? row.ce_student : term == 1 ? row.kd_student : -row.kd_teacher;
      });
    } else if (joint && kTeacher) {
      const A* const sources[] = {plain_student, plain_teacher};
      add(kCeStudent, Constant<2>{}, sources, [](const PixelRow<A>& row, int term) {
        return term == 0 ? row.ce_student + row.kd_student : -row.kd_teacher;
      });
    } else {
      add(kCeStudent, Constant<1>{}, &plain_student, [](const PixelRow<A>& row, int) { return row.ce_student; });
    }
    for (int64 r = 0; call.labels != nullptr && r < count; ++r) {
      subtract_labels(rule, rows[r], rows[r].own_student, rows[r].smooth_student, upper[kCeStudent], lower[kCeStudent]);
    }
  }
  if (!kTeacher) return;
  if (upper[kKdStudent] != nullptr) {
    const A* const sources[] = {tempered_student, tempered_teacher};
    add(kKdStudent, Constant<2>{}, sources,
        [](const PixelRow<A>& row, int term) { return term == 0 ? row.kd_student : -row.kd_teacher; });
  }
  if (upper[kCeTeacher] != nullptr && call.labels != nullptr) {
    add(kCeTeacher, Constant<1>{}, &plain_teacher, [](const PixelRow<A>& row, int) { return row.ce_teacher; });
    for (int64 r = 0; r < count; ++r) {
      subtract_labels(rule, rows[r], rows[r].own_teacher, rows[r].smooth_teacher, upper[kCeTeacher], lower[kCeTeacher]);
    }
  }
  const int slot = joint ? kCeTeacher : kKdTeacher;
  if (upper[slot] != nullptr && (!joint || call.kd_to_teacher)) {
    for (int64 r = 0; r < count; ++r) {
      accumulate_divergence(rule, student, teacher, tempered_teacher + r * step, rows[r], upper[slot], lower[slot]);
    }
  }
}

// Losses, and gradients where they are wanted, of the pixels between the two rows of logits, of one tile.
template <typename A, bool kTeacher, bool kBoth>
inline void walk_cell(
    const MapsPlan<A>& plan,
    const MapsWorkspace<A>& space,
    const Tile<A>& tile,
    int64 n,
    int64 cell,
    int64 parity,
    Totals<A>& totals) {
  constexpr int64 width = Lanes<A>::kWidth;
  const int64 size = plan.rule.classes * width;
  const int64 begin = plan.rows.first.data[cell], end = plan.rows.first.data[cell + 1];
  // Behind the last row lies the last row again.
  const int64 below = cell + 1 < plan.rows.cells ? 1 - parity : parity;
  const A scale = kBoth ? A(1) / plan.rule.temperature : plan.scale;
  for (int64 block = 0; block < tile.blocks; ++block) {
    const int64 at = block * size, x = block * width;
    const int64 count = tile.count - x < width ? tile.count - x : width;
    const auto corners_of = [&](int64 network) {
      return Corners<A>{space.logit_row(network, parity) + at, space.logit_row(network, below) + at};
    };
    const Corners<A> student = corners_of(0), teacher = kTeacher ? corners_of(1) : student;
    A *upper[kGradientMaps], *lower[kGradientMaps];
    for (int slot = 0; slot < kGradientMaps; ++slot) {
      const bool wanted = space.gradient_rows[slot][0] != nullptr;
      upper[slot] = wanted ? space.gradient_rows[slot][parity] + at : nullptr;
      lower[slot] = wanted ? space.gradient_rows[slot][below] + at : nullptr;
    }
    for (int64 first = begin; first < end; first += plan.group) {
      PixelRow<A> rows[kLargestGroup];
      const int64 present = end - first < plan.group ? end - first : plan.group;
      for (int64 r = 0; r < present; ++r) {
        PixelRow<A>& row = rows[r];
        row.y = first + r;
        row.near = plan.rows.near.data[row.y];
        row.far = plan.rows.far.data[row.y];
        A* exponentials = space.exponentials.data + r * plan.exponentials_of_row;
        softmax<A, kTeacher, kBoth>(plan.rule, student, teacher, scale, exponentials, row);
        finish_pixels<A, kTeacher, kBoth>(plan.rule, student, teacher, n, tile.begin + x, count, row, totals);
      }
      if (plan.gradients > 0) {
        add_gradients<A, kTeacher, kBoth>(plan, student, teacher, space.exponentials.data, rows, present, upper, lower);
      }
    }
  }
}

template <typename T, typename A>
inline void read_logits(
    const MapsPlan<A>& plan, const MapsWorkspace<A>& space, const Tile<A>& tile, int64 n, int64 row, int64 parity) {
  const LogitMaps& call = plan.rule.call;
  for (int64 network = 0; network < plan.networks; ++network) {
    read_line<T>(network == 0 ? call.student : call.teacher, n, row, tile, space.line.data, plan.line_stride);
    interpolate(space.line.data, plan.line_stride, plan.rule.classes, tile, space.logit_row(network, parity));
  }
}

template <typename T, typename A>
void walk_band(const MapsPlan<A>& plan, const MapsWorkspace<A>& space, int64 item, A* borders, Totals<A>& totals) {
  const LogitMaps& call = plan.rule.call;
  const int64 n = item / plan.bands, begin = item % plan.bands * plan.band, classes = plan.rule.classes;
  const int64 end = begin + plan.band < plan.rows.cells ? begin + plan.band : plan.rows.cells;
  const auto walk = plan.both          ? walk_cell<A, true, true>
                    : call.has_teacher ? walk_cell<A, true, false>
                                       : walk_cell<A, false, false>;
  for (int64 first = 0; first < plan.columns.cells; first += plan.tile_cells) {
    const Tile<A> tile = plan.tile_at(first);
    int64 parity = 0;
    read_logits<T>(plan, space, tile, n, begin, parity);
    for (int64 cell = begin; cell < end; ++cell) {
      if (cell + 1 < plan.rows.cells) read_logits<T>(plan, space, tile, n, cell + 1, 1 - parity);
      walk(plan, space, tile, n, cell, parity, totals);
      for (int slot = 0; slot < kGradientMaps; ++slot) {
        A* row = space.gradient_rows[slot][parity];
        if (row == nullptr) continue;
        const Map& map = call.gradients[slot];
        A* to = static_cast<A*>(map.data) + n * map.stride_n + cell * map.stride_h;
        gather(row, classes, tile, space.turned.data, space.places.data, to, map.stride_c, map.stride_w);
      }
      parity = 1 - parity;
    }
    if (end == plan.rows.cells) continue;
    for (int slot = 0; slot < kGradientMaps; ++slot) {
      A* row = space.gradient_rows[slot][parity];
      if (row == nullptr) continue;
      A* to = borders + plan.border_of(item, slot);
      gather(row, classes, tile, space.turned.data, space.places.data, to, plan.columns.cells, 1);
    }
  }
}

template <typename A>
void add_borders(const MapsPlan<A>& plan, int64 item, const A* borders) {
  const int64 n = item / plan.bands, row = (item % plan.bands + 1) * plan.band;
  if (row >= plan.rows.cells) return;
  for (int slot = 0; slot < kGradientMaps; ++slot) {
    const Map& map = plan.rule.call.gradients[slot];
    if (map.data == nullptr) continue;
    A* to = static_cast<A*>(map.data) + n * map.stride_n + row * map.stride_h;
    const A* from = borders + plan.border_of(item, slot);
    for (int64 k = 0; k < map.channels; ++k) {
      for (int64 x = 0; x < map.width; ++x) to[k * map.stride_c + x * map.stride_w] += from[k * map.width + x];
    }
  }
}

void logit_maps(const LogitMaps& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    const MapsPlan<A> plan(call);
    const int64 items = call.batch * plan.bands;
    const Memory<Totals<A>> totals(items);
    const Memory<A> borders(plan.border_of(items, 0));
    // Each logit of each pixel costs about as much as forty loads.
    const int64 cost = 40 * plan.networks * plan.rule.classes * call.height / plan.bands * call.width;
    parallel(run, items, grain_for(cost), [&](int64 begin, int64 end) {
      const MapsWorkspace<A> space(plan);
      for (int64 item = begin; item < end; ++item) {
        totals.data[item] = {};
        walk_band<T>(plan, space, item, borders.data, totals.data[item]);
      }
    });
    if (plan.gradients > 0) {
      parallel(
          run, items, grain_for(plan.gradients * plan.rule.classes * plan.columns.cells), [&](int64 begin, int64 end) {
            for (int64 item = begin; item < end; ++item) add_borders(plan, item, borders.data);
          });
    }
    if (call.sums == nullptr) return;
    constexpr int kLanes = sizeof(totals.data->sums[0].low) / sizeof(double);
    for (int term = 0; term < 4; ++term) {
      double total = 0;
      for (int64 item = 0; item < items; ++item) {
        const auto& sum = totals.data[item].sums[term];
        for (int lane = 0; lane < kLanes; ++lane) total += sum.low[lane] + sum.high[lane];
      }
      static_cast<A*>(call.sums)[term] = static_cast<A>(total);
    }
  });
}

}  // namespace
}  // namespace frskd
