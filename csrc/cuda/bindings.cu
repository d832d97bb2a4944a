// Registers the CUDA implementations of the operations whose schemas are in ../bindings.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "operations.cuh"

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CUDA, m) {
  m.impl("logits_forward", TORCH_BOX(&frskd::cuda::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&frskd::cuda::logits_backward));
  m.impl("fusion_statistics", TORCH_BOX(&frskd::cuda::fusion_statistics));
  m.impl("fusion_forward", TORCH_BOX(&frskd::cuda::fusion_forward));
  m.impl("fusion_backward_sums", TORCH_BOX(&frskd::cuda::fusion_backward_sums));
  m.impl("fusion_backward", TORCH_BOX(&frskd::cuda::fusion_backward));
}
