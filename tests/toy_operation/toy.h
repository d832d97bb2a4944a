// Arguments of the toy operation, and their checks.
#pragma once

#include "operations/checks.h"

namespace frskd {

struct ToyPair {
  Tensor student;  // (N,)
  Tensor teacher;  // (N,)
  FRSKD_INPUTS(student, teacher)
};

struct Toy {
  ToyPair pair;
  double scale;
  Tensor out;  // (N,)
  FRSKD_INPUTS(pair, scale)
  FRSKD_OUTPUTS(out)
};

inline void check(const Toy& call, Device device) {
  const auto& [student, teacher] = call.pair;
  const Kind kind = kind_of(student, "student", device);
  const std::int64_t count = student.numel();
  check_dtype(student, "student", ScalarType::Double);
  check_numbers(student, "student", kind, {count});
  check_numbers(teacher, "teacher", kind, {count});
  check_numbers(call.out, "out", kind, {count});
}

}  // namespace frskd
