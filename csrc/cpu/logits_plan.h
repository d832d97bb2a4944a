// What a call of the logits kernels computes, fixed at compile time, and the exponentials it takes for that.
#pragma once

#include "logits_call.h"
#include "simd.h"

namespace frskd {
namespace {

// exp(d) from e = exp(d / T): for T = 1, 2, 4 a power of it saves the second exponential.
enum class Temperature { kOne, kTwo, kFour, kAny };

inline Temperature classify_temperature(double temperature) {
  return temperature == 1.0   ? Temperature::kOne
         : temperature == 2.0 ? Temperature::kTwo
         : temperature == 4.0 ? Temperature::kFour
                              : Temperature::kAny;
}

template <typename V>
struct Exponentials {
  V plain;     // exp(d)
  V tempered;  // exp(d / T)
};

template <Temperature K, bool Plain, bool Tempered, typename V, typename A>
inline __attribute__((always_inline)) Exponentials<V> exponentials(V difference, A inverse_temperature) {
  if constexpr (!Tempered) return {exponential(difference), V{}};
  const V tempered = exponential(difference * inverse_temperature);
  if constexpr (!Plain) return {V{}, tempered};
  if constexpr (K == Temperature::kOne) return {tempered, tempered};
  const V square = tempered * tempered;
  if constexpr (K == Temperature::kTwo) return {square, tempered};
  if constexpr (K == Temperature::kFour) return {square * square, tempered};
  return {exponential(difference), tempered};
}

// What a call needs, fixed at compile time so that the inner loops hold no decisions. `Extra` is everything rare:
// probabilities, label smoothing, a divergence that also pulls the teacher.
template <Temperature K, bool CrossEntropy, bool Teacher, bool Extra>
struct Plan {
  static constexpr Temperature kTemperature = K;
  static constexpr bool kCrossEntropy = CrossEntropy;
  static constexpr bool kTeacher = Teacher;
  static constexpr bool kExtra = Extra;
};

template <typename Body>
inline void with_plan(double temperature, bool cross_entropy, bool teacher, bool extra, const Body& body) {
  if (!teacher)
    return extra ? body(Plan<Temperature::kAny, true, false, true>{})
                 : body(Plan<Temperature::kAny, true, false, false>{});
  if (extra) return body(Plan<Temperature::kAny, true, true, true>{});
  if (!cross_entropy) return body(Plan<Temperature::kAny, false, true, false>{});
  switch (classify_temperature(temperature)) {
    case Temperature::kOne:
      return body(Plan<Temperature::kOne, true, true, false>{});
    case Temperature::kTwo:
      return body(Plan<Temperature::kTwo, true, true, false>{});
    case Temperature::kFour:
      return body(Plan<Temperature::kFour, true, true, false>{});
    case Temperature::kAny:
      return body(Plan<Temperature::kAny, true, true, false>{});
  }
}

// The rare cases of a call: they share one slower body.
inline bool has_extra(const Logits& call, bool backward) {
  return call.has_probabilities || (backward ? call.kd_to_teacher : call.label_smoothing > 0.0);
}

}  // namespace
}  // namespace frskd
