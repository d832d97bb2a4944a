// Means, deviations, affine maps and weighted sums of the channels of each image, on the CPU. Some channels are read
// from memory once and gone over several times in the cache.
#pragma once

#include "channel_moments_call.h"
#include "parallel.h"

namespace frskd {
namespace {

// How numbers are read and written: in vectors, and one by one behind the last whole vector.
template <bool PastCache>
struct InVectors {
  template <typename T>
  static inline __attribute__((always_inline)) auto read(const T* from) {
    return load(from);
  }
  template <typename V, typename T>
  static inline __attribute__((always_inline)) void write(V value, T* to) {
    PastCache ? store_past_cache(value, to) : store(value, to);
  }
};
struct OneByOne {
  template <typename T>
  static inline __attribute__((always_inline)) auto read(const T* from) {
    return to_scalar(*from);
  }
  template <typename A, typename T>
  static inline __attribute__((always_inline)) void write(A value, T* to) {
    from_scalar(value, to);
  }
};

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// Some channels of which the pixels lie together, one channel behind the other.
template <typename A>
struct Planes {
  static constexpr int64 kMost = 8;
  int64 channels, pixels;

  static int64 step(const Map& map) { return map.stride_c; }  // the argument of `place`
  static int64 place(int64 step, int64 pixel, int64 channel) { return pixel + channel * step; }
  // The number of a channel, as a factor or a summand of what `how` reads.
  template <typename How>
  static inline __attribute__((always_inline)) A number(How, const A* numbers, int64 channel) {
    return numbers[channel];
  }
  template <bool PastCache, typename Step>
  inline __attribute__((always_inline)) void each(const Step& step) const {
    for (int64 channel = 0; channel < channels; ++channel) {
      int64 pixel = 0;
      for (; pixel + Lanes<A>::kWidth <= pixels; pixel += Lanes<A>::kWidth)
        step(InVectors<PastCache>{}, pixel, channel);
      for (; pixel < pixels; ++pixel) step(OneByOne{}, pixel, channel);
    }
  }
  // sums[channel] = sum over the pixels of term(how, pixel, channel); none of so many numbers that it would lose
  // digits.
  template <typename Term>
  inline __attribute__((always_inline)) void add_up(A* sums, const Term& term) const {
    constexpr int64 width = Lanes<A>::kWidth, longest = 4096;
    using V = typename Lanes<A>::Vector;
    const InVectors<false> vectors;
    double totals[kMost] = {};
    const int64 whole = pixels - pixels % width;
    for (int64 first = 0; first < whole; first += longest) {
      const int64 end = first + longest < whole ? first + longest : whole;
      V parts[kMost] = {};
      A added[kMost];
      for (int64 channel = 0; channel < channels; ++channel) {
        V one = {}, two = {}, three = {}, four = {};
        int64 pixel = first;
        for (; pixel + 4 * width <= end; pixel += 4 * width) {
          one += term(vectors, pixel, channel);
          two += term(vectors, pixel + width, channel);
          three += term(vectors, pixel + 2 * width, channel);
          four += term(vectors, pixel + 3 * width, channel);
        }
        for (; pixel < end; pixel += width) one += term(vectors, pixel, channel);
        parts[channel] = (one + two) + (three + four);
      }
      store_horizontal_sums<kMost>(parts, added);
      for (int64 channel = 0; channel < kMost; ++channel) totals[channel] += added[channel];
    }
    for (int64 channel = 0; channel < channels; ++channel) {
      for (int64 pixel = whole; pixel < pixels; ++pixel) totals[channel] += term(OneByOne{}, pixel, channel);
      sums[channel] = static_cast<A>(totals[channel]);
    }
  }
};

// Channels that lie together in each pixel.
template <typename A>
struct Group {
  static constexpr int64 kMost = 512;
  int64 channels, pixels;

  static int64 step(const Map& map) { return map.width > 1 ? map.stride_w : map.stride_h; }
  static int64 place(int64 step, int64 pixel, int64 channel) { return pixel * step + channel; }
  template <typename How>
  static inline __attribute__((always_inline)) auto number(How how, const A* numbers, int64 channel) {
    return how.read(numbers + channel);
  }
  template <bool PastCache, typename Step>
  static inline __attribute__((always_inline)) void each_channel(int64 channels, const Step& step) {
    int64 channel = 0;
    for (; channel + Lanes<A>::kWidth <= channels; channel += Lanes<A>::kWidth) step(InVectors<PastCache>{}, channel);
    for (; channel < channels; ++channel) step(OneByOne{}, channel);
  }
  template <bool PastCache, typename Step>
  inline __attribute__((always_inline)) void each(const Step& step) const {
    for (int64 pixel = 0; pixel < pixels; ++pixel) {
      each_channel<PastCache>(channels, [=](auto how, int64 k) __attribute__((always_inline)) { step(how, pixel, k); });
    }
  }
  template <typename Term>
  inline __attribute__((always_inline)) void add_up(A* sums, const Term& term) const {
    constexpr int64 longest = 256;
    alignas(kCacheLine) A part[kMost] = {};
    A* const parts = part;
    for (int64 channel = 0; channel < channels; ++channel) sums[channel] = 0;
    for (int64 first = 0; first < pixels; first += longest) {
      const int64 end = first + longest < pixels ? first + longest : pixels;
      int64 at = first;
      for (; at + 4 <= end; at += 4) {
        each_channel<false>(channels, [=](auto how, int64 k) __attribute__((always_inline)) {
          const auto two = term(how, at, k) + term(how, at + 1, k), more = term(how, at + 2, k) + term(how, at + 3, k);
          how.write(how.read(parts + k) + (two + more), parts + k);
        });
      }
      for (; at < end; ++at) {
        each_channel<false>(channels, [=](auto how, int64 k) __attribute__((always_inline)) {
          how.write(how.read(parts + k) + term(how, at, k), parts + k);
        });
      }
      for (int64 channel = 0; channel < channels; ++channel) {
        sums[channel] += part[channel];
        part[channel] = 0;
      }
    }
  }
};

// Calls body(channels that are taken at a time, first number of theirs, x, other), each on one thread.
template <typename Set, typename T, typename Body>
inline void each_set(const ChannelMoments& call, ParallelFor run, const Body& body) {
  const int64 channels = call.x.channels, pixels = pixels_of(call.x);
  const int64 sets = (channels + Set::kMost - 1) / Set::kMost;
  parallel(run, call.batch * sets, grain_for(pixels * Set::kMost), [&](int64 begin, int64 end) {
    for (int64 index = begin; index < end; ++index) {
      const int64 n = index / sets, first = index % sets * Set::kMost;
      const Set set = {channels - first < Set::kMost ? channels - first : Set::kMost, pixels};
      const auto at = [&](const Map& map) {
        return static_cast<T*>(map.data) + n * map.stride_n + first * map.stride_c;
      };
      body(set, n * channels + first, at(call.x), call.other.data == nullptr ? nullptr : at(call.other));
    }
    if (call.stream) finish_streaming();
  });
}

// What lambdas need is copied into them: the compiler would read it again behind every store.

// out = (x - centre) * scale + shift.
template <typename Set, typename T, typename A>
inline void write_affine(
    const ChannelMoments& call, const Set& set, const T* x, T* out, const A* centre, const A* scale, const A* shift) {
  const int64 from = Set::step(call.x), to = Set::step(call.other);
  const auto step = [=](auto how, int64 pixel, int64 channel) __attribute__((always_inline)) {
    const auto difference = how.read(x + Set::place(from, pixel, channel)) - Set::number(how, centre, channel);
    const auto value = difference * Set::number(how, scale, channel) + Set::number(how, shift, channel);
    how.write(value, out + Set::place(to, pixel, channel));
  };
  // Vectors past the cache have to begin where one would if memory were made of them.
  constexpr unsigned long bytes = kVectorBytes * sizeof(T) / sizeof(A);
  const unsigned long apart = sizeof(T) * static_cast<unsigned long>(to);
  if (kHasStreamingStores && call.stream && (reinterpret_cast<std::uintptr_t>(out) | apart) % bytes == 0) {
    set.template each<true>(step);
  } else {
    set.template each<false>(step);
  }
}

template <typename Set, typename T, typename A>
void forward_typed(const ChannelMoments& call, ParallelFor run) {
  each_set<Set, T>(call, run, [&](const Set& set, int64 first, const T* x, T* out) {
    A *mean = static_cast<A*>(call.mean) + first, *std = static_cast<A*>(call.std) + first;
    const int64 from = Set::step(call.x);
    const auto read = [=](auto how, int64 pixel, int64 channel)
                          __attribute__((always_inline)) { return how.read(x + Set::place(from, pixel, channel)); };
    A sums[Set::kMost], centre[Set::kMost], scale[Set::kMost] = {};
    set.add_up(sums, read);
    for (int64 k = 0; k < set.channels; ++k) mean[k] = centre[k] = sums[k] / static_cast<A>(set.pixels);
    const A* const middle = centre;
    set.add_up(sums, [=](auto how, int64 pixel, int64 channel) __attribute__((always_inline)) {
      const auto difference = read(how, pixel, channel) - Set::number(how, middle, channel);
      return difference * difference;
    });
    for (int64 k = 0; k < set.channels; ++k) {
      std[k] = square_root(sums[k] / static_cast<A>(call.divisor) + static_cast<A>(call.epsilon));
    }
    if (out == nullptr) return;
    // A deviation that overflowed makes NaN, not the constant that dividing by it would.
    for (int64 k = 0; k < set.channels; ++k) {
      scale[k] = (static_cast<const A*>(call.scale) + first)[k] / std[k] + A(0) * std[k];
    }
    write_affine(call, set, x, out, middle, scale, static_cast<const A*>(call.shift) + first);
  });
}

template <typename Set, typename T, typename A>
void affine_typed(const ChannelMoments& call, ParallelFor run) {
  each_set<Set, T>(call, run, [&](const Set& set, int64 first, const T* x, T* out) {
    write_affine(
        call, set, x, out, static_cast<const A*>(call.mean) + first, static_cast<const A*>(call.scale) + first,
        static_cast<const A*>(call.shift) + first);
  });
}

template <typename Set, typename T, typename A>
void sums_typed(const ChannelMoments& call, ParallelFor run) {
  each_set<Set, T>(call, run, [&](const Set& set, int64 first, const T* x, const T* grad) {
    const A* centre = static_cast<const A*>(call.mean) + first;
    const int64 of_x = Set::step(call.x), of_grad = Set::step(call.other);
    const auto slope = [=](auto how, int64 pixel, int64 channel) __attribute__((always_inline)) {
      return how.read(grad + Set::place(of_grad, pixel, channel));
    };
    set.add_up(static_cast<A*>(call.plain) + first, slope);
    set.add_up(
        static_cast<A*>(call.weighted) + first,
        [=](auto how, int64 pixel, int64 channel) __attribute__((always_inline)) {
          const auto difference = how.read(x + Set::place(of_x, pixel, channel)) - Set::number(how, centre, channel);
          return slope(how, pixel, channel) * difference;
        });
  });
}

void moments_forward(const ChannelMoments& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    call.channels_together ? forward_typed<Group<A>, T, A>(call, run) : forward_typed<Planes<A>, T, A>(call, run);
  });
}

void moments_affine(const ChannelMoments& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    call.channels_together ? affine_typed<Group<A>, T, A>(call, run) : affine_typed<Planes<A>, T, A>(call, run);
  });
}

void moments_sums(const ChannelMoments& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    call.channels_together ? sums_typed<Group<A>, T, A>(call, run) : sums_typed<Planes<A>, T, A>(call, run);
  });
}

}  // namespace
}  // namespace frskd
