// Registers the CUDA implementations of the operations whose schemas are in ../bindings.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "operations.cuh"

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&frskd::cuda::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&frskd::cuda::attention_backward));
  m.impl("attention_map", TORCH_BOX(&frskd::cuda::attention_map));
}
