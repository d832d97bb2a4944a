// The FRSKD objective from its unreduced parts on the CPU: one pass over the numbers, in double.
#include <algorithm>
#include <vector>

#include "../operations/combine_checks.h"
#include "threads.h"

namespace frskd {
namespace {

constexpr std::int64_t kBlockRows = 4096;

struct Sums {
  double ce_student = 0, ce_teacher = 0, kd = 0, weight = 0;
};

// Blocks of rows are summed in order, and their sums in the order of the blocks: the threads do not show.
template <typename A>
Sums sums_of(const A* losses, std::int64_t rows) {  // (4, rows)
  struct Blocks {
    const A* losses;
    std::int64_t rows;
    std::vector<Sums> sums;
  } blocks{losses, rows, std::vector<Sums>((rows + kBlockRows - 1) / kBlockRows)};
  const auto sum_blocks = [](std::int64_t begin, std::int64_t end, void* context) {
    Blocks& all = *static_cast<Blocks*>(context);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t last = std::min((block + 1) * kBlockRows, all.rows);
      Sums sums;
      // Every sum waits for its previous addition, so four at a time take as long as one.
      for (std::int64_t row = block * kBlockRows; row < last; ++row) {
        sums.ce_student += all.losses[row];
        sums.ce_teacher += all.losses[all.rows + row];
        sums.kd += all.losses[2 * all.rows + row];
        sums.weight += all.losses[3 * all.rows + row];
      }
      all.sums[block] = sums;
    }
  };
  run_parallel(static_cast<std::int64_t>(blocks.sums.size()), 1, sum_blocks, &blocks);
  Sums total;
  for (const Sums& sums : blocks.sums) {
    total.ce_student += sums.ce_student;
    total.ce_teacher += sums.ce_teacher;
    total.kd += sums.kd;
    total.weight += sums.weight;
  }
  return total;
}

template <typename A>
void combine_typed(const Combine& call) {
  const A* attention = static_cast<const A*>(call.attention_losses.data_ptr());
  const A* logits = static_cast<const A*>(call.logits_losses.data_ptr());
  const std::int64_t levels = call.attention_losses.size(0), batch = call.attention_losses.size(1);
  const std::int64_t rows = call.logits_losses.size(1);
  const Sums sums = sums_of(logits, rows);
  double feature = 0;
  for (std::int64_t index = 0; index < levels * batch; ++index) feature += attention[index];
  if (batch > 0) feature /= static_cast<double>(batch);
  const double inverse_valid = !call.has_targets || sums.weight == 0 ? 0 : 1 / sums.weight;
  const double ce_student = call.has_targets ? sums.ce_student * inverse_valid : 0,
               ce_teacher = call.has_targets ? sums.ce_teacher * inverse_valid : 0;
  const double kd = rows > 0 ? sums.kd / static_cast<double>(rows) : 0;
  const double attention_term = levels > 0 ? call.beta * feature : 0;
  const double total = ce_student + ce_teacher + call.alpha * kd + attention_term;
  const double parts[5] = {total, ce_student, ce_teacher, kd, feature};
  for (int part = 0; part < 5; ++part) static_cast<A*>(call.parts.data_ptr())[part] = static_cast<A>(parts[part]);
  const std::size_t count = call.scalars.size(), first = count == 1 ? 0 : 1;
  for (std::size_t i = 0; i < count; ++i) {
    *static_cast<A*>(call.scalars[i].data_ptr()) = static_cast<A>(parts[first + i]);
  }
}

void combine(const Combine& call) {
  const bool wide = check(call, Device::kCpu).accumulate == ScalarType::Double;
  wide ? combine_typed<double>(call) : combine_typed<float>(call);
}

FRSKD_CPU_OPERATION(combine)

}  // namespace
}  // namespace frskd
