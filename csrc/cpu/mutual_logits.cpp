// Entry point of the operation `mutual_logits` on the CPU; the sums over the rows, in double.
#include "../operations/mutual_logits_checks.h"
#include "mutual_logits_call.h"
#include "tensors.h"
#include "threads.h"

namespace frskd {
namespace {

// 1 / rows that have a label.
double inverse_valid_of(const MutualLogits& call) {
  std::int64_t valid = 0;
  for (std::int64_t n = 0; call.labels != nullptr && n < call.batch; ++n) {
    valid += call.labels[n * call.label_stride] != call.ignore_index;
  }
  return valid == 0 ? 0.0 : 1.0 / static_cast<double>(valid);
}

template <typename A>
void reduce(const MutualLogits& call, A* loss, A* terms) {
  const A* rows = static_cast<const A*>(call.rows);
  const double inverse_batch = call.batch > 0 ? 1.0 / static_cast<double>(call.batch) : 0.0;
  double total = 0;
  for (std::int64_t term = 0; term < 2 * call.heads; ++term) {
    const bool divergence = term >= call.heads;
    double sum = 0;
    for (std::int64_t n = 0; n < call.batch; ++n) sum += rows[term * call.batch + n];
    const double mean = sum * (divergence ? inverse_batch : call.inverse_valid);
    terms[term] = static_cast<A>(mean);
    total += divergence ? call.weight * mean : mean;
  }
  *loss = static_cast<A>(total);
}

template <typename A>
void mutual_logits_typed(const MutualLogitsForward& arguments, MutualLogits call, Element element) {
  call.weight = *static_cast<const A*>(arguments.weight.data_ptr());
  kernels<MutualLogitsKernels>().forward(call, element, run_parallel, thread_count());
  reduce(call, static_cast<A*>(arguments.loss.data_ptr()), static_cast<A*>(arguments.terms.data_ptr()));
}

void mutual_logits_forward(const MutualLogitsForward& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  const std::vector<Map> logits = maps_of(arguments.logits);
  MutualLogits call{};
  call.logits = logits.data();
  call.heads = static_cast<std::int64_t>(logits.size());
  call.batch = arguments.logits[0].size(0);
  call.classes = arguments.logits[0].size(1);
  if (arguments.targets) {
    call.labels = static_cast<const std::int64_t*>(arguments.targets->data_ptr());
    call.label_stride = arguments.targets->stride(0);
  }
  call.ignore_index = arguments.settings.ignore_index;
  call.temperature = arguments.settings.temperature;
  call.offset = arguments.settings.offset;
  call.inverse_valid = inverse_valid_of(call);
  call.rows = data_or_null(arguments.rows);
  call.gradients = data_or_null(arguments.gradients);
  const Element element = element_of(kind.dtype);
  kind.accumulate == ScalarType::Double ? mutual_logits_typed<double>(arguments, call, element)
                                        : mutual_logits_typed<float>(arguments, call, element);
}

FRSKD_CPU_OPERATION(mutual_logits_forward)

}  // namespace
}  // namespace frskd
