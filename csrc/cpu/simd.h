// Vectors of float or double by the compiler's vector extension: one source serves SSE2, AVX2, AVX-512 and NEON.
// Included only by kernel files that are compiled once per instruction set, so everything has internal linkage and no
// standard header is used.
#pragma once

#include <cstdint>

#if defined(FRSKD_AVX2) || defined(FRSKD_AVX512)
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

#if defined(FRSKD_AVX512)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t UInts __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t UShorts __attribute__((vector_size(kVectorBytes / 2)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t Longs __attribute__((vector_size(kVectorBytes)));

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

template <typename A, typename V, typename M>
struct LanesOf {
  using Vector = V;
  using Mask = M;
  static constexpr int kWidth = sizeof(V) / sizeof(A);
  // Less zero, which unlike more zero keeps the sign of -0.
  static inline __attribute__((always_inline)) Vector splat(A value) { return value - Vector{}; }
  static inline __attribute__((always_inline)) Mask first(int64 count) {
    Mask index = {};
    for (int lane = 0; lane < kWidth; ++lane) index[lane] = lane;
    return index < static_cast<decltype(index[0] + 0)>(count) - Mask{};
  }
};

template <>
struct Lanes<float> : LanesOf<float, Floats, Ints> {};
template <>
struct Lanes<double> : LanesOf<double, Doubles, Longs> {};

// To bfloat16, in the upper half of each number. A NaN must have zeros in the lower half, or rounding it up could end
// at infinity or zero: those made from bfloat16 numbers and `quiet` ones have.
inline __attribute__((always_inline)) UInts rounded_to_bfloat16(Floats value) {
  const UInts bits = bits_of<UInts>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
// In the lower half, the upper half zero; any NaN.
inline __attribute__((always_inline)) UInts bfloat16_bits(Floats value) {
  const UInts quiet = UInts{} + 0x7fc0u;
  return value != value ? quiet : rounded_to_bfloat16(value) >> 16;
}

// What the compiler makes of vector operations is good, but not of these: 16-bit numbers to float and back, the larger
// of two numbers (`second` where one is a NaN), and stores that bypass the cache, by which a gradient larger than the
// cache is written without being read first. Their pointer must be aligned to the vector's bytes in memory.
#if defined(FRSKD_AVX512)
// With a mask that keeps all lanes: without one GCC 12 warns of the intrinsics' own uninitialised variable.
constexpr bool kHasStreamingStores = true;
constexpr __mmask16 kAll = 0xffff;
typedef __m512i Packed;    // as many bytes as a vector
typedef __m256i Packed16;  // as many 16-bit numbers as a vector has floats
inline __attribute__((always_inline)) Floats widen_bfloat16(Packed16 bits) {
  return bits_of<Floats>(_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bits), 16));
}
inline __attribute__((always_inline)) Packed16 narrow_bfloat16(Floats value) {
  return _mm512_maskz_cvtepi32_epi16(kAll, bits_of<__m512i>(bfloat16_bits(value)));
}
inline __attribute__((always_inline)) Floats widen_half(Packed16 bits) {
  return bits_of<Floats>(_mm512_maskz_cvtph_ps(kAll, bits));
}
inline __attribute__((always_inline)) Packed16 narrow_half(Floats value) {
  return _mm512_maskz_cvtps_ph(kAll, bits_of<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
}
inline __attribute__((always_inline)) Floats larger(Floats first, Floats second) {
  return bits_of<Floats>(_mm512_maskz_max_ps(kAll, bits_of<__m512>(first), bits_of<__m512>(second)));
}
inline __attribute__((always_inline)) void stream(Packed value, void* pointer) {
  _mm512_stream_si512(static_cast<Packed*>(pointer), value);
}
inline __attribute__((always_inline)) void stream(Packed16 value, void* pointer) {
  _mm256_stream_si256(static_cast<Packed16*>(pointer), value);
}
inline void finish_streaming() { _mm_sfence(); }
#elif defined(FRSKD_AVX2)
constexpr bool kHasStreamingStores = true;
typedef __m256i Packed;
typedef __m128i Packed16;
inline __attribute__((always_inline)) Floats widen_bfloat16(Packed16 bits) {
  return bits_of<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __attribute__((always_inline)) Packed16 narrow_bfloat16(Floats value) {
  const __m256i wide = bits_of<__m256i>(bfloat16_bits(value));
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
inline __attribute__((always_inline)) Floats widen_half(Packed16 bits) {
  return bits_of<Floats>(_mm256_cvtph_ps(bits));
}
inline __attribute__((always_inline)) Packed16 narrow_half(Floats value) {
  return _mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
}
inline __attribute__((always_inline)) Floats larger(Floats first, Floats second) {
  return bits_of<Floats>(_mm256_max_ps(bits_of<__m256>(first), bits_of<__m256>(second)));
}
inline __attribute__((always_inline)) void stream(Packed value, void* pointer) {
  _mm256_stream_si256(static_cast<Packed*>(pointer), value);
}
inline __attribute__((always_inline)) void stream(Packed16 value, void* pointer) {
  _mm_stream_si128(static_cast<Packed16*>(pointer), value);
}
inline void finish_streaming() { _mm_sfence(); }
#else
constexpr bool kHasStreamingStores = false;
typedef UInts Packed;
typedef UShorts Packed16;
inline __attribute__((always_inline)) Floats widen_bfloat16(Packed16 bits) {
  return bits_of<Floats>(__builtin_convertvector(bits, UInts) << 16);
}
inline __attribute__((always_inline)) Packed16 narrow_bfloat16(Floats value) {
  return __builtin_convertvector(bfloat16_bits(value), UShorts);
}
inline __attribute__((always_inline)) Floats widen_half(Packed16 bits) {
  Floats value;
  for (int lane = 0; lane < Lanes<float>::kWidth; ++lane) value[lane] = half_to_float(bits[lane]);
  return value;
}
inline __attribute__((always_inline)) Packed16 narrow_half(Floats value) {
  Packed16 bits;
  for (int lane = 0; lane < Lanes<float>::kWidth; ++lane) bits[lane] = float_to_half(value[lane]);
  return bits;
}
inline __attribute__((always_inline)) Floats larger(Floats first, Floats second) {
  return first > second ? first : second;
}
template <typename V>
inline void stream(V value, void* pointer) {
  __builtin_memcpy(pointer, &value, sizeof(value));
}
inline void finish_streaming() {}
#endif

template <typename V>
inline __attribute__((always_inline)) V bytes_at(const void* pointer) {
  V value;
  __builtin_memcpy(&value, pointer, sizeof(value));
  return value;
}
inline __attribute__((always_inline)) Floats load(const float* pointer) { return bytes_at<Floats>(pointer); }
inline __attribute__((always_inline)) Doubles load(const double* pointer) { return bytes_at<Doubles>(pointer); }
inline __attribute__((always_inline)) Floats load(const BFloat16* pointer) {
  return widen_bfloat16(bytes_at<Packed16>(pointer));
}
inline __attribute__((always_inline)) Floats load(const Half* pointer) {
  return widen_half(bytes_at<Packed16>(pointer));
}

// A vector as it lies in memory of the given type.
inline __attribute__((always_inline)) Packed in_memory(Floats value, float*) { return bits_of<Packed>(value); }
inline __attribute__((always_inline)) Packed in_memory(Doubles value, double*) { return bits_of<Packed>(value); }
inline __attribute__((always_inline)) Packed16 in_memory(Floats value, BFloat16*) { return narrow_bfloat16(value); }
inline __attribute__((always_inline)) Packed16 in_memory(Floats value, Half*) { return narrow_half(value); }

template <typename V, typename T>
inline __attribute__((always_inline)) void store(V value, T* pointer) {
  const auto bytes = in_memory(value, pointer);
  __builtin_memcpy(pointer, &bytes, sizeof(bytes));
}
template <typename V, typename T>
inline __attribute__((always_inline)) void store_past_cache(V value, T* pointer) {
  stream(in_memory(value, pointer), pointer);
}

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
    store_past_cache(values[0], pointer);
  }
  template <typename A>
  static void deal(A*, int64) {}
  template <typename A>
  static void collect(A*, int64) {}
};

#if defined(FRSKD_AVX2) || defined(FRSKD_AVX512)
template <>
struct Block<BFloat16> {
  using Vector = Floats;
  static constexpr int kVectors = 2;
  static constexpr int64 kWidth = Lanes<float>::kWidth, kElements = 2 * kWidth;
  static inline __attribute__((always_inline)) void read(const BFloat16* pointer, Vector values[]) {
    const UInts pairs = bytes_at<UInts>(pointer);
    values[0] = bits_of<Floats>(pairs << 16);
    values[1] = bits_of<Floats>(pairs & 0xffff0000u);
  }
  static inline __attribute__((always_inline)) Packed packed(const Vector values[]) {
    const UInts even = rounded_to_bfloat16(values[0]) >> 16, odd = rounded_to_bfloat16(values[1]) & 0xffff0000u;
    return bits_of<Packed>(even | odd);
  }
  static inline __attribute__((always_inline)) void write(const Vector values[], BFloat16* pointer) {
    const Packed pairs = packed(values);
    __builtin_memcpy(pointer, &pairs, sizeof(pairs));
  }
  static inline __attribute__((always_inline)) void write_past_cache(const Vector values[], BFloat16* pointer) {
    stream(packed(values), pointer);
  }
  static void deal(float* numbers, int64 count) {
    for (int64 first = 0; first + kElements <= count; first += kElements) {
      float dealt[kElements];
      for (int k = 0; k < kWidth; ++k) {
        dealt[k] = numbers[first + 2 * k];
        dealt[kWidth + k] = numbers[first + 2 * k + 1];
      }
      __builtin_memcpy(numbers + first, dealt, sizeof(dealt));
    }
  }
  static void collect(float* numbers, int64 count) {
    for (int64 first = 0; first + kElements <= count; first += kElements) {
      float collected[kElements];
      for (int k = 0; k < kWidth; ++k) {
        collected[2 * k] = numbers[first + k];
        collected[2 * k + 1] = numbers[first + kWidth + k];
      }
      __builtin_memcpy(numbers + first, collected, sizeof(collected));
    }
  }
};
#endif

template <typename T>
inline auto load_first(const T* pointer, int64 count) -> decltype(load(pointer)) {
  T padded[kVectorBytes / sizeof(load(pointer)[0])] = {};
  for (int64 lane = 0; lane < count; ++lane) padded[lane] = pointer[lane];
  return load(padded);
}
template <typename V, typename T>
inline void store_first(V value, T* pointer, int64 count) {
  T padded[kVectorBytes / sizeof(value[0])];
  store(value, padded);
  for (int64 lane = 0; lane < count; ++lane) pointer[lane] = padded[lane];
}

// NaNs become the default one, whose lower bits are zeros.
inline __attribute__((always_inline)) Floats quiet(Floats value) {
  return value != value ? Floats{} + __builtin_nanf("") : value;
}
inline __attribute__((always_inline)) Doubles quiet(Doubles value) { return value; }

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

// The lower and the upper lanes of a vector.
template <typename Number, int Bytes>
struct Halves {
  typedef Number Half __attribute__((vector_size(Bytes / 2)));
  Half low, high;
};
template <typename V>
inline __attribute__((always_inline)) auto halves(V value) {
  const auto number = value[0];  // without a reference
  return bits_of<Halves<decltype(number + 0), sizeof(V)>>(value);
}

// A vector of the accumulate type in double.
struct Widened {
  Doubles low, high;
};
inline __attribute__((always_inline)) Widened widened(Floats value) {
  const auto both = halves(value);
  return {__builtin_convertvector(both.low, Doubles), __builtin_convertvector(both.high, Doubles)};
}
inline __attribute__((always_inline)) Widened widened(Doubles value) { return {value, Doubles{}}; }

// NaN wins: a maximum that dropped a NaN would hide it. The way from `second` to the result is the short one, for a
// loop that hands its result on.
template <typename V>
inline __attribute__((always_inline)) V maximum(V first, V second) {
  return (first > second) | (first != first) ? first : second;
}
inline __attribute__((always_inline)) Floats maximum(Floats first, Floats second) {
  const Ints is_nan = first != first;
  return is_nan ? first : larger(first, second);
}

// The largest lane, or NaN.
template <typename V>
inline __attribute__((always_inline)) auto horizontal_maximum(V value) {
  if constexpr (sizeof(V) == 2 * sizeof(value[0])) {
    return maximum(value[0], value[1]);
  } else {
    const auto both = halves(value);
    return horizontal_maximum(maximum(both.low, both.high));
  }
}
template <typename V>
inline __attribute__((always_inline)) auto horizontal_sum(V value) {
  if constexpr (sizeof(V) == 2 * sizeof(value[0])) {
    return value[0] + value[1];
  } else {
    const auto both = halves(value);
    return horizontal_sum(both.low + both.high);
  }
}

#if defined(FRSKD_AVX512)
inline __attribute__((always_inline)) __m256 eight_lanes(Floats value) {
  const auto both = halves(value);
  return bits_of<__m256>(both.low + both.high);
}
#elif defined(FRSKD_AVX2)
inline __attribute__((always_inline)) __m256 eight_lanes(Floats value) { return bits_of<__m256>(value); }
#endif

// The sums of the lanes of `Count` vectors, a multiple of 8; the same for a vector whatever stands beside it.
template <int Count, typename A>
inline __attribute__((always_inline)) void store_horizontal_sums(const typename Lanes<A>::Vector values[], A* out) {
#if defined(FRSKD_AVX2) || defined(FRSKD_AVX512)
  if constexpr (sizeof(A) == 4) {
    for (int first = 0; first < Count; first += 8) {
      __m256 pairs[4];
      for (int k = 0; k < 4; ++k) {
        pairs[k] = _mm256_hadd_ps(eight_lanes(values[first + 2 * k]), eight_lanes(values[first + 2 * k + 1]));
      }
      const __m256 low = _mm256_hadd_ps(pairs[0], pairs[1]), high = _mm256_hadd_ps(pairs[2], pairs[3]);
      const __m256 sums =
          _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
      __builtin_memcpy(out + first, &sums, sizeof(sums));
    }
    return;
  }
#endif
  for (int k = 0; k < Count; ++k) out[k] = horizontal_sum(values[k]);
}

// exp(x) for x <= 88, relative error about 1e-7; exactly 0 below -88 (where the true value is under 1e-38), NaN stays
// NaN.
inline __attribute__((always_inline)) Floats exponential(Floats x) {
  const Floats zero = {};
  const Floats lowest = zero - 88.03f;  // rounds to 2^-127, whose exponent field is 0: the result is then 0
  const Floats clamped = larger(lowest, x);
  const Floats magic = zero + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the rounded integer
  const Floats shifted = clamped * 1.44269504f + magic;
  const Floats integer = shifted - magic;
  Floats rest = clamped - integer * 0.693359375f;
  rest = rest - integer * -2.12194440e-4f;
  // In pairs of coefficients: as many operations as Horner's rule in a shorter chain.
  const Floats square = rest * rest;
  const Floats high = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  const Floats middle = rest * 8.3334519073e-3f + 4.1665795894e-2f;
  const Floats low = rest * 1.6666665459e-1f + 5.0000001201e-1f;
  const Floats polynomial = ((high * square + middle) * square + low) * square + (rest + 1.0f);
  const Ints scale = (bits_of<Ints>(shifted) << 23) + (127 << 23);
  return polynomial * bits_of<Floats>(scale);
}
inline Doubles exponential(Doubles x) {
  for (int lane = 0; lane < Lanes<double>::kWidth; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// ln(x) for normal x > 0, relative error about 1e-7; infinity and NaN stay themselves.
inline __attribute__((always_inline)) Floats logarithm(Floats x) {
  const Floats zero = {};
  const Ints bits = bits_of<Ints>(x);
  // x = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const Ints shifted = bits - 0x3f3504f3;
  const Ints exponent_bits = shifted & static_cast<std::int32_t>(0xff800000u);
  const Floats mantissa = bits_of<Floats>(bits - exponent_bits);
  const Floats exponent = __builtin_convertvector(exponent_bits >> 23, Floats);
  const Floats f = mantissa - 1.0f;
  const Floats square = f * f;
  const Floats eighth = f * 7.0376836292e-2f - 1.1514610310e-1f;
  const Floats sixth = f * 1.1676998740e-1f - 1.2420140846e-1f;
  const Floats fourth = f * 1.4249322787e-1f - 1.6668057665e-1f;
  const Floats second = f * 2.0000714765e-1f - 2.4999993993e-1f;
  const Floats polynomial = (((eighth * square + sixth) * square + fourth) * square + second) * f + 3.3333331174e-1f;
  Floats tail = polynomial * f * square + exponent * -2.12194440e-4f;
  tail = tail - square * 0.5f;
  const Floats result = (f + tail) + exponent * 0.693359375f;
  const Ints special = (x - x) != zero;
  return special ? x : result;
}
inline Doubles logarithm(Doubles x) {
  for (int lane = 0; lane < Lanes<double>::kWidth; ++lane) x[lane] = __builtin_log(x[lane]);
  return x;
}

}  // namespace
}  // namespace frskd
