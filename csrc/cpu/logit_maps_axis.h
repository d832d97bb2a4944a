// Bilinear interpolation along one axis and its transpose. Between two neighbours of the low resolution, and behind the
// last, lies a cell of outputs: cell c interpolates between c and c + 1, the last one between itself and itself.
#pragma once

#include "parallel.h"

#if defined(FRSKD_AVX2) || defined(FRSKD_AVX512)
#include <immintrin.h>
#endif

namespace frskd {

// Raises; defined in a file that is compiled once, because kernels may not use the standard library.
[[noreturn]] void out_of_memory(std::int64_t bytes);

namespace {

// Scratch memory whose size the caller's arguments choose, so that where there is none it raises.
template <typename A>
struct Memory {
  explicit Memory(int64 count) {
    const int64 bytes = (static_cast<int64>(sizeof(A)) * count / kCacheLine + 1) * kCacheLine;
    data = static_cast<A*>(aligned_alloc(kCacheLine, bytes));
    if (data == nullptr) out_of_memory(bytes);
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  A* data;
};

template <typename A>
using Vector = typename Lanes<A>::Vector;
template <typename A>
using Mask = typename Lanes<A>::Mask;

template <typename A>
struct Axis {
  using Index = decltype(Mask<A>{}[0] + 0);
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  Axis(int64 cells, int64 outputs)
      : cells(cells), first(cells + 1), cell(outputs + kWidth), near(outputs + kWidth), far(outputs + kWidth) {
    const double scale = static_cast<double>(cells) / static_cast<double>(outputs);
    int64 reached = -1;
    for (int64 x = 0; x < outputs + kWidth; ++x) {
      // Whole vectors are read: past the end stands the last output.
      const double position = (static_cast<double>(x < outputs ? x : outputs - 1) + 0.5) * scale - 0.5;
      const double source = position > 0.0 ? position : 0.0;
      int64 place = static_cast<int64>(source);
      if (place >= cells) place = cells - 1;
      const double weight = source - static_cast<double>(place);
      cell.data[x] = static_cast<Index>(place);
      far.data[x] = static_cast<A>(weight < 1.0 ? weight : 1.0);
      near.data[x] = A(1) - far.data[x];
      if (x < outputs) {
        while (reached < place) first.data[++reached] = x;
      }
    }
    while (reached < cells) first.data[++reached] = outputs;
  }

  const int64 cells;
  Memory<int64> first;  // (cells + 1,): first output of each cell, then the number of outputs
  Memory<Index> cell;   // of each output, as the following
  Memory<A> near;       // weight of its cell's lower neighbour
  Memory<A> far;        // and of the upper one
};

// Lane i of the result is value[index[i]].
template <typename A>
inline Vector<A> permuted(Vector<A> value, Mask<A> index) {
#if defined(FRSKD_AVX2) && !defined(FRSKD_AVX512)
  if constexpr (sizeof(A) == 4) {
    return bits_of<Vector<A>>(_mm256_permutevar8x32_ps(bits_of<__m256>(value), bits_of<__m256i>(index)));
  }
#endif
#if defined(FRSKD_AVX512)
  if constexpr (sizeof(A) == 4) {
    return bits_of<Vector<A>>(_mm512_maskz_permutexvar_ps(0xffff, bits_of<__m512i>(index), bits_of<__m512>(value)));
  }
#endif
  Vector<A> result;
  for (int lane = 0; lane < Lanes<A>::kWidth; ++lane) result[lane] = value[index[lane]];
  return result;
}

// Lane j of values[i] becomes lane i of values[j].
template <typename A>
inline void transpose(Vector<A> values[]) {
  constexpr int width = Lanes<A>::kWidth;
#if defined(FRSKD_AVX2) && !defined(FRSKD_AVX512)
  if constexpr (width == 8) {
    __m256 rows[8], pairs[8];
    for (int i = 0; i < 8; ++i) rows[i] = bits_of<__m256>(values[i]);
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      values[i] = bits_of<Vector<A>>(_mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20));
      values[i + 4] = bits_of<Vector<A>>(_mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
    }
    return;
  }
#endif
#if defined(FRSKD_AVX512)
  if constexpr (width == 16) {
    // Each step exchanges one bit of the row's number with the same bit of the lane's.
    for (int step = 1; step < width; step *= 2) {
      Mask<A> lower = {}, upper = {};
      for (int lane = 0; lane < width; ++lane) {
        lower[lane] = lane & step ? width + lane - step : lane;
        upper[lane] = lane & step ? width + lane : lane + step;
      }
      for (int i = 0; i < width; ++i) {
        if (i & step) continue;
        const __m512 first = bits_of<__m512>(values[i]), second = bits_of<__m512>(values[i + step]);
        values[i] = bits_of<Vector<A>>(_mm512_permutex2var_ps(first, bits_of<__m512i>(lower), second));
        values[i + step] = bits_of<Vector<A>>(_mm512_permutex2var_ps(first, bits_of<__m512i>(upper), second));
      }
    }
    return;
  }
#endif
  A square[width * width];
  for (int i = 0; i < width; ++i) store(values[i], square + i * width);
  for (int j = 0; j < width; ++j) {
    for (int i = 0; i < width; ++i) values[j][i] = square[i * width + j];
  }
}

// Cells [first_cell, last_cell) of an axis and their outputs, in blocks of one vector.
template <typename A>
struct Tile {
  static constexpr int64 kWidth = Lanes<A>::kWidth;

  Tile(const Axis<A>& axis, int64 first_cell, int64 last_cell)
      : axis(axis),
        first_cell(first_cell),
        last_cell(last_cell),
        begin(axis.first.data[first_cell]),
        count(axis.first.data[last_cell] - begin),
        blocks((count + kWidth - 1) / kWidth) {}

  const Axis<A>& axis;
  const int64 first_cell, last_cell;
  const int64 begin;   // first output
  const int64 count;   // of outputs
  const int64 blocks;  // of outputs
};

// One row of a map from the first cell of a tile to the neighbour of its last one, as (class, place) of accumulate
// type.
template <typename T, typename A>
inline void read_line(const Map& map, int64 n, int64 row, const Tile<A>& tile, A* line, int64 stride) {
  constexpr int64 width = Lanes<A>::kWidth;
  const int64 last = map.width - 1;
  const int64 inside = tile.last_cell - tile.first_cell + (tile.last_cell <= last);  // places
  const T* source =
      static_cast<const T*>(map.data) + n * map.stride_n + row * map.stride_h + tile.first_cell * map.stride_w;
  int64 k = 0;
  if (map.stride_c == 1) {
    for (; k + width <= map.channels; k += width) {
      int64 place = 0;
      for (; place + width <= inside; place += width) {
        Vector<A> values[width];
        for (int64 i = 0; i < width; ++i) values[i] = load(source + (place + i) * map.stride_w + k);
        transpose<A>(values);
        for (int64 i = 0; i < width; ++i) store(values[i], line + (k + i) * stride + place);
      }
      for (; place < inside; ++place) {
        for (int64 i = 0; i < width; ++i) {
          line[(k + i) * stride + place] = to_scalar(source[place * map.stride_w + k + i]);
        }
      }
    }
  }
  for (; k < map.channels; ++k) {
    const T* from = source + k * map.stride_c;
    A* to = line + k * stride;
    int64 place = 0;
    if (map.stride_w == 1) {
      for (; place + width <= inside; place += width) store(load(from + place), to + place);
    }
    for (; place < inside; ++place) to[place] = to_scalar(from[place * map.stride_w]);
  }
  if (tile.last_cell > last) {
    for (k = 0; k < map.channels; ++k) line[k * stride + inside] = line[k * stride + inside - 1];
  }
}

// Interpolates a line along the row: blocks x (class, lane).
template <typename A>
inline void interpolate(const A* line, int64 stride, int64 classes, const Tile<A>& tile, A* out) {
  constexpr int64 width = Lanes<A>::kWidth;
  for (int64 block = 0; block < tile.blocks; ++block) {
    const int64 x = tile.begin + block * width;
    Mask<A> index;
    __builtin_memcpy(&index, tile.axis.cell.data + x, sizeof(index));
    // Neighbouring outputs are at most one place apart.
    const auto base = index[0];
    index = index - base;
    const A* from = line + base - tile.first_cell;
    const Vector<A> near = load(tile.axis.near.data + x), far = load(tile.axis.far.data + x);
    A* to = out + block * classes * width;
    for (int64 k = 0; k < classes; ++k) {
      const A* places = from + k * stride;
      store(near * permuted<A>(load(places), index) + far * permuted<A>(load(places + 1), index), to + k * width);
    }
  }
}

// The transpose of `interpolate` for one row of a gradient map: each place gathers the outputs of its own cell and of
// the one before. Tiles of a row come in order; the place between two tiles gets a share of both. The outputs are zeros
// afterwards. `turned` has room for all outputs with their classes in whole vectors, `places` for a vector of each
// place.
template <typename A>
inline void gather(
    A* outputs, int64 classes, const Tile<A>& tile, A* turned, A* places, A* row, int64 stride_c, int64 stride_w) {
  constexpr int64 width = Lanes<A>::kWidth;
  const Axis<A>& axis = tile.axis;
  const int64 cells = tile.last_cell - tile.first_cell;
  const bool ends = tile.last_cell == axis.cells;
  // From outputs in lanes to classes in lanes: (vector of classes, output).
  const int64 size = tile.blocks * width * width;
  A* from = outputs;
  for (int64 block = 0; block < tile.blocks; ++block) {
    for (int64 first = 0; first < classes; first += width) {
      const int64 present = classes - first < width ? classes - first : width;
      Vector<A> values[width];
      for (int64 i = 0; i < width; ++i) values[i] = i < present ? load(from + i * width) : Vector<A>{};
      for (int64 i = 0; i < present; ++i) store(Vector<A>{}, from + i * width);
      from += present * width;
      transpose<A>(values);
      A* to = turned + first / width * size + block * width * width;
      for (int64 i = 0; i < width; ++i) store(values[i], to + i * width);
    }
  }
  for (int64 first = 0; first < classes; first += width) {
    const int64 present = classes - first < width ? classes - first : width;
    const A* of_classes = turned + first / width * size;
    Vector<A> before = {};  // what the cell before gives
    A* to = row + first * stride_c + tile.first_cell * stride_w;
    if (tile.first_cell > 0) {
      for (int64 i = 0; i < present; ++i) before[i] = to[i * stride_c];
    }
    for (int64 cell = 0; cell < cells; ++cell) {
      Vector<A> low = before, high = {};
      const int64 end = axis.first.data[tile.first_cell + cell + 1];
      for (int64 x = axis.first.data[tile.first_cell + cell]; x < end; ++x) {
        const Vector<A> value = load(of_classes + (x - tile.begin) * width);
        low += value * axis.near.data[x];
        high += value * axis.far.data[x];
      }
      store(low, places + cell * width);
      before = high;
    }
    // Behind the last place lies the last place again.
    const int64 last = ends ? cells - 1 : cells, count = last + 1;
    store(ends ? load(places + last * width) + before : before, places + last * width);
    if (stride_c == 1) {
      for (int64 place = 0; place < count; ++place) {
        store_up_to(load(places + place * width), to + place * stride_w, present);
      }
      continue;
    }
    int64 place = 0;
    if (stride_w == 1) {
      for (; place + width <= count; place += width) {
        Vector<A> values[width];
        for (int64 i = 0; i < width; ++i) values[i] = load(places + (place + i) * width);
        transpose<A>(values);
        for (int64 i = 0; i < present; ++i) store(values[i], to + i * stride_c + place);
      }
    }
    for (; place < count; ++place) {
      for (int64 i = 0; i < present; ++i) to[i * stride_c + place * stride_w] = places[place * width + i];
    }
  }
}

}  // namespace
}  // namespace frskd
