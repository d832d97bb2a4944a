// Vectors of float or double by the compiler's vector extension: one source serves SSE2, AVX2 and NEON. Included only
// by kernel files that are compiled once per instruction set, so everything has internal linkage and no standard header
// is used.
#pragma once

#include <cstdint>

#if defined(FRSKD_AVX2)
#include <immintrin.h>
#endif

namespace frskd {
namespace {

using int64 = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef std::int32_t Int8 __attribute__((vector_size(32)));
typedef std::uint32_t UInt8 __attribute__((vector_size(32)));
typedef std::uint16_t UShort8 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef std::int64_t Long4 __attribute__((vector_size(32)));

template <typename To, typename From>
inline __attribute__((always_inline)) To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent_and_mantissa = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  if ((half & 0x7c00u) == 0x7c00u) {
    return bits_of<float>(sign | 0x7f800000u | exponent_and_mantissa);  // infinity or NaN
  }
  // 2^112 moves the exponent bias from 15 to 127; subnormals become normal on the way.
  return bits_of<float>(sign | bits_of<std::uint32_t>(bits_of<float>(exponent_and_mantissa) * 0x1p112f));
}

inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = bits_of<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Subnormal halves are multiples of 2^-24: adding 0.5 leaves that multiple, rounded to even, in the low bits.
    const float shifted = bits_of<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of<std::uint32_t>(shifted) - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

inline float to_scalar(BFloat16 value) { return bits_of<float>(static_cast<std::uint32_t>(value.bits) << 16); }
inline float to_scalar(Half value) { return half_to_float(value.bits); }
inline float to_scalar(float value) { return value; }
inline double to_scalar(double value) { return value; }

inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = bits_of<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_scalar(float value, float* out) { *out = value; }
inline void from_scalar(double value, double* out) { *out = value; }
inline void from_scalar(float value, BFloat16* out) { out->bits = float_to_bfloat16(value); }
inline void from_scalar(float value, Half* out) { out->bits = float_to_half(value); }

// The vector type of an accumulate type, and how to load element type T into it.
template <typename A>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Float8;
  using Mask = Int8;
  static constexpr int kWidth = 8;
  static inline __attribute__((always_inline)) Vector splat(float value) {
    return Vector{value, value, value, value, value, value, value, value};
  }
  static inline __attribute__((always_inline)) Mask first(int64 count) {
    const Mask index = {0, 1, 2, 3, 4, 5, 6, 7};
    const std::int32_t n = static_cast<std::int32_t>(count);
    return index < Mask{n, n, n, n, n, n, n, n};
  }
};

template <>
struct Lanes<double> {
  using Vector = Double4;
  using Mask = Long4;
  static constexpr int kWidth = 4;
  static inline __attribute__((always_inline)) Vector splat(double value) { return Vector{value, value, value, value}; }
  static inline __attribute__((always_inline)) Mask first(int64 count) {
    const Mask index = {0, 1, 2, 3};
    return index < Mask{count, count, count, count};
  }
};

inline __attribute__((always_inline)) Float8 load(const float* pointer) {
  Float8 value;
  __builtin_memcpy(&value, pointer, 32);
  return value;
}
inline __attribute__((always_inline)) Double4 load(const double* pointer) {
  Double4 value;
  __builtin_memcpy(&value, pointer, 32);
  return value;
}
inline __attribute__((always_inline)) Float8 load(const BFloat16* pointer) {
#ifdef FRSKD_AVX2
  __m128i half;
  __builtin_memcpy(&half, pointer, 16);
  return bits_of<Float8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  UShort8 half;
  __builtin_memcpy(&half, pointer, 16);
  const UInt8 wide = __builtin_convertvector(half, UInt8) << 16;
  return bits_of<Float8>(wide);
#endif
}
inline __attribute__((always_inline)) Float8 load(const Half* pointer) {
#ifdef FRSKD_AVX2
  __m128i half;
  __builtin_memcpy(&half, pointer, 16);
  return bits_of<Float8>(_mm256_cvtph_ps(half));
#else
  Float8 value;
  for (int lane = 0; lane < 8; ++lane) value[lane] = half_to_float(pointer[lane].bits);
  return value;
#endif
}

inline __attribute__((always_inline)) UShort8 to_bfloat16(Float8 value) {
  const UInt8 bits = bits_of<UInt8>(value);
  const UInt8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Int8 is_nan = value != value;
  const UInt8 quiet = UInt8{} + 0x7fc0u;
  const UInt8 kept = is_nan ? quiet : rounded;
#ifdef FRSKD_AVX2
  const __m256i wide = bits_of<__m256i>(kept);
  return bits_of<UShort8>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(kept, UShort8);
#endif
}

inline __attribute__((always_inline)) void store(Float8 value, float* pointer) {
  __builtin_memcpy(pointer, &value, 32);
}
inline __attribute__((always_inline)) void store(Double4 value, double* pointer) {
  __builtin_memcpy(pointer, &value, 32);
}
inline __attribute__((always_inline)) void store(Float8 value, BFloat16* pointer) {
  const UShort8 half = to_bfloat16(value);
  __builtin_memcpy(pointer, &half, 16);
}
inline __attribute__((always_inline)) void store(Float8 value, Half* pointer) {
#ifdef FRSKD_AVX2
  const __m128i half = _mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(pointer, &half, 16);
#else
  for (int lane = 0; lane < 8; ++lane) pointer[lane].bits = float_to_half(value[lane]);
#endif
}

// Stores that bypass the cache: a gradient larger than the cache is then written without being read first.
// The pointer must be aligned to the vector's bytes in memory.
#ifdef FRSKD_AVX2
constexpr bool kHasStreamingStores = true;
inline __attribute__((always_inline)) void stream(Float8 value, float* pointer) {
  _mm256_stream_ps(pointer, bits_of<__m256>(value));
}
inline __attribute__((always_inline)) void stream(Double4 value, double* pointer) {
  _mm256_stream_pd(pointer, bits_of<__m256d>(value));
}
inline __attribute__((always_inline)) void stream(Float8 value, BFloat16* pointer) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(pointer), bits_of<__m128i>(to_bfloat16(value)));
}
inline __attribute__((always_inline)) void stream(Float8 value, Half* pointer) {
  _mm_stream_si128(
      reinterpret_cast<__m128i*>(pointer), _mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
inline void finish_streaming() { _mm_sfence(); }
#else
constexpr bool kHasStreamingStores = false;
template <typename V, typename T>
inline void stream(V value, T* pointer) {
  store(value, pointer);
}
inline void finish_streaming() {}
#endif

// A block is what one step of an inner loop reads of element type T: one vector, or two for bfloat16, whose even and
// odd elements widen with one instruction each. `deal` puts numbers of the accumulate type into a block's order,
// `collect` takes them back.
template <typename T>
struct Block {
  using Vector = decltype(load(static_cast<const T*>(nullptr)));
  static constexpr int kVectors = 1;
  static constexpr int64 kElements = sizeof(Vector) / sizeof(Vector{}[0]);
  static inline __attribute__((always_inline)) void read(const T* pointer, Vector values[]) {
    values[0] = load(pointer);
  }
  static inline __attribute__((always_inline)) void write(const Vector values[], T* pointer) {
    store(values[0], pointer);
  }
  static inline __attribute__((always_inline)) void write_past_cache(const Vector values[], T* pointer) {
    stream(values[0], pointer);
  }
  template <typename A>
  static void deal(A*, int64) {}
  template <typename A>
  static void collect(A*, int64) {}
};

#ifdef FRSKD_AVX2
template <>
struct Block<BFloat16> {
  using Vector = Float8;
  static constexpr int kVectors = 2;
  static constexpr int64 kElements = 16;
  static inline __attribute__((always_inline)) void read(const BFloat16* pointer, Vector values[]) {
    __m256i pairs;
    __builtin_memcpy(&pairs, pointer, 32);
    values[0] = bits_of<Float8>(_mm256_slli_epi32(pairs, 16));
    values[1] = bits_of<Float8>(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // To bfloat16, in the upper half. A NaN must have zeros in the lower half, or rounding it up could end at infinity or
  // zero: those made from bfloat16 numbers and `quiet` ones have.
  static inline __attribute__((always_inline)) UInt8 rounded(Float8 value) {
    const UInt8 bits = bits_of<UInt8>(value);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static inline __attribute__((always_inline)) __m256i packed(const Vector values[]) {
    const UInt8 even = rounded(values[0]) >> 16, odd = rounded(values[1]) & 0xffff0000u;
    return bits_of<__m256i>(even | odd);
  }
  static inline __attribute__((always_inline)) void write(const Vector values[], BFloat16* pointer) {
    const __m256i pairs = packed(values);
    __builtin_memcpy(pointer, &pairs, 32);
  }
  static inline __attribute__((always_inline)) void write_past_cache(const Vector values[], BFloat16* pointer) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(pointer), packed(values));
  }
  static void deal(float* numbers, int64 count) {
    for (int64 first = 0; first + kElements <= count; first += kElements) {
      float dealt[kElements];
      for (int k = 0; k < 8; ++k) {
        dealt[k] = numbers[first + 2 * k];
        dealt[8 + k] = numbers[first + 2 * k + 1];
      }
      __builtin_memcpy(numbers + first, dealt, sizeof(dealt));
    }
  }
  static void collect(float* numbers, int64 count) {
    for (int64 first = 0; first + kElements <= count; first += kElements) {
      float collected[kElements];
      for (int k = 0; k < 8; ++k) {
        collected[2 * k] = numbers[first + k];
        collected[2 * k + 1] = numbers[first + 8 + k];
      }
      __builtin_memcpy(numbers + first, collected, sizeof(collected));
    }
  }
};
#endif

template <typename T>
inline auto load_first(const T* pointer, int64 count) -> decltype(load(pointer)) {
  T padded[8] = {};
  for (int64 lane = 0; lane < count; ++lane) padded[lane] = pointer[lane];
  return load(padded);
}
template <typename V, typename T>
inline void store_first(V value, T* pointer, int64 count) {
  T padded[8];
  store(value, padded);
  for (int64 lane = 0; lane < count; ++lane) pointer[lane] = padded[lane];
}

// NaNs become the default one, whose lower bits are zeros.
inline __attribute__((always_inline)) Float8 quiet(Float8 value) {
  return value != value ? Float8{} + __builtin_nanf("") : value;
}
inline __attribute__((always_inline)) Double4 quiet(Double4 value) { return value; }

// The first `count` lanes, without a copy where that is all of them.
template <typename T>
inline __attribute__((always_inline)) auto load_up_to(const T* pointer, int64 count) -> decltype(load(pointer)) {
  constexpr int64 width = sizeof(load(pointer)) / sizeof(load(pointer)[0]);
  return count >= width ? load(pointer) : load_first(pointer, count);
}
template <typename V, typename T>
inline __attribute__((always_inline)) void store_up_to(V value, T* pointer, int64 count) {
  constexpr int64 width = sizeof(V) / sizeof(value[0]);
  if (count >= width) {
    store(value, pointer);
  } else {
    store_first(value, pointer, count);
  }
}

// A vector of the accumulate type in double.
struct Widened {
  Double4 low, high;
};
inline __attribute__((always_inline)) Widened widened(Float8 value) {
  struct Halves {
    Float4 low, high;
  };
  const Halves halves = bits_of<Halves>(value);
  return {__builtin_convertvector(halves.low, Double4), __builtin_convertvector(halves.high, Double4)};
}
inline __attribute__((always_inline)) Widened widened(Double4 value) { return {value, Double4{}}; }

template <typename V>
inline __attribute__((always_inline)) auto horizontal_sum(V value) {
  constexpr int width = sizeof(V) / sizeof(value[0]);
  if constexpr (width == 8) {
    return ((value[0] + value[4]) + (value[1] + value[5])) + ((value[2] + value[6]) + (value[3] + value[7]));
  } else {
    return (value[0] + value[2]) + (value[1] + value[3]);
  }
}

// Lane i of the result is the sum of the lanes of values[i]: as many sums at once as a vector has lanes.
inline __attribute__((always_inline)) Float8 horizontal_sums(const Float8 values[8]) {
#ifdef FRSKD_AVX2
  __m256 pairs[4];
  for (int k = 0; k < 4; ++k) {
    pairs[k] = _mm256_hadd_ps(bits_of<__m256>(values[2 * k]), bits_of<__m256>(values[2 * k + 1]));
  }
  const __m256 low = _mm256_hadd_ps(pairs[0], pairs[1]), high = _mm256_hadd_ps(pairs[2], pairs[3]);
  return bits_of<Float8>(
      _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
#else
  Float8 sums = {};
  for (int k = 0; k < 8; ++k) sums[k] = horizontal_sum(values[k]);
  return sums;
#endif
}
inline Double4 horizontal_sums(const Double4 values[4]) {
  return Double4{
      horizontal_sum(values[0]), horizontal_sum(values[1]), horizontal_sum(values[2]), horizontal_sum(values[3])};
}

// NaN wins: a maximum that dropped a NaN would hide it. The way from `second` to the result is the short one, for a
// loop that hands its result on.
template <typename V>
inline __attribute__((always_inline)) V maximum(V first, V second) {
  return (first > second) | (first != first) ? first : second;
}
#ifdef FRSKD_AVX2
inline __attribute__((always_inline)) Float8 maximum(Float8 first, Float8 second) {
  const Int8 is_nan = first != first;
  const Float8 larger = bits_of<Float8>(_mm256_max_ps(bits_of<__m256>(first), bits_of<__m256>(second)));
  return is_nan ? first : larger;
}
#endif

// The largest lane, or NaN.
inline __attribute__((always_inline)) float horizontal_maximum(Float8 value) {
  const Float8 halves = maximum(value, Float8{value[4], value[5], value[6], value[7]});
  const Float8 pairs = maximum(halves, Float8{halves[2], halves[3]});
  return maximum(pairs, Float8{pairs[1]})[0];
}
inline double horizontal_maximum(Double4 value) {
  const Double4 halves = maximum(value, Double4{value[2], value[3]});
  return maximum(halves, Double4{halves[1]})[0];
}

// exp(x) for x <= 88, relative error about 1e-7; exactly 0 below -88 (where the true value is under 1e-38), NaN stays
// NaN.
inline __attribute__((always_inline)) Float8 exponential(Float8 x) {
  const Float8 zero = {};
  const Float8 lowest = zero - 88.03f;  // rounds to 2^-127, whose exponent field is 0: the result is then 0
#ifdef FRSKD_AVX2
  const Float8 clamped = bits_of<Float8>(_mm256_max_ps(bits_of<__m256>(lowest), bits_of<__m256>(x)));
#else
  const Float8 clamped = lowest > x ? lowest : x;
#endif
  const Float8 magic = zero + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the rounded integer
  const Float8 shifted = clamped * 1.44269504f + magic;
  const Float8 integer = shifted - magic;
  Float8 rest = clamped - integer * 0.693359375f;
  rest = rest - integer * -2.12194440e-4f;
  // In pairs of coefficients: as many operations as Horner's rule in a shorter chain.
  const Float8 square = rest * rest;
  const Float8 high = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  const Float8 middle = rest * 8.3334519073e-3f + 4.1665795894e-2f;
  const Float8 low = rest * 1.6666665459e-1f + 5.0000001201e-1f;
  const Float8 polynomial = ((high * square + middle) * square + low) * square + (rest + 1.0f);
  const Int8 scale = (bits_of<Int8>(shifted) << 23) + (127 << 23);
  return polynomial * bits_of<Float8>(scale);
}
inline Double4 exponential(Double4 x) {
  return Double4{__builtin_exp(x[0]), __builtin_exp(x[1]), __builtin_exp(x[2]), __builtin_exp(x[3])};
}

// ln(x) for normal x > 0, relative error about 1e-7; infinity and NaN stay themselves.
inline __attribute__((always_inline)) Float8 logarithm(Float8 x) {
  const Float8 zero = {};
  const Int8 bits = bits_of<Int8>(x);
  // x = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const Int8 shifted = bits - 0x3f3504f3;
  const Int8 exponent_bits = shifted & static_cast<std::int32_t>(0xff800000u);
  const Float8 mantissa = bits_of<Float8>(bits - exponent_bits);
  const Float8 exponent = __builtin_convertvector(exponent_bits >> 23, Float8);
  const Float8 f = mantissa - 1.0f;
  const Float8 square = f * f;
  const Float8 eighth = f * 7.0376836292e-2f - 1.1514610310e-1f;
  const Float8 sixth = f * 1.1676998740e-1f - 1.2420140846e-1f;
  const Float8 fourth = f * 1.4249322787e-1f - 1.6668057665e-1f;
  const Float8 second = f * 2.0000714765e-1f - 2.4999993993e-1f;
  const Float8 polynomial = (((eighth * square + sixth) * square + fourth) * square + second) * f + 3.3333331174e-1f;
  Float8 tail = polynomial * f * square + exponent * -2.12194440e-4f;
  tail = tail - square * 0.5f;
  const Float8 result = (f + tail) + exponent * 0.693359375f;
  const Int8 special = (x - x) != zero;
  return special ? x : result;
}
inline Double4 logarithm(Double4 x) {
  return Double4{__builtin_log(x[0]), __builtin_log(x[1]), __builtin_log(x[2]), __builtin_log(x[3])};
}

}  // namespace
}  // namespace frskd
