// Arguments of the toy operation.
#pragma once

#include "operation.h"

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

}  // namespace frskd
