// Runs the blocks and threads of a grid on the CPU. The files of csrc/cuda register themselves for CPU tensors.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace frskd::cuda {

constexpr size_t kSharedBytes = 96 * 1024;
uint4 frskd_dynamic_shared_memory[kSharedBytes / sizeof(uint4)];

}  // namespace frskd::cuda

namespace emulation {

dim3 thread_index, block_index;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // NaN as a float or double

enum class State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  ucontext_t context;  // enters the thread; later switches jump, which costs no system call
  jmp_buf resume;
  bool entered = false;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  State state = State::kDone;
  int line = 0;  // of the barrier or shuffle it waits at
  unsigned char value[16];
  size_t bytes = 0;
  int lane_offset = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler_context;
jmp_buf scheduler;
unsigned current;
std::string failure;
const std::function<void()>* body;
std::map<const void*, int> shared_limits;

void fail(const std::string& text) {
  if (failure.empty()) failure = text;
}

void yield(State state, int line) {
  fibers[current].state = state;
  fibers[current].line = line;
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  fibers[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
void resume(unsigned thread) {
  current = thread;
  thread_index = dim3(thread);
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  swapcontext(&scheduler_context, &fiber.context);
}

// The order in which the threads of a block run between two barriers: results must not depend on it.
std::vector<unsigned> thread_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  const char* setting = std::getenv("EMULATION_ORDER");
  const std::string name = setting ? setting : "ascending";
  if (name == "descending") std::reverse(order.begin(), order.end());
  if (name == "shuffled") std::shuffle(order.begin(), order.end(), std::mt19937(7));
  return order;
}

bool all_wait(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state != state || fibers[i].line != fibers[begin].line) return false;
  }
  return true;
}

void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

void exchange_warp(unsigned begin) {
  unsigned char values[kWarp][16];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = fibers[begin + lane];
    if (fiber.lane_offset != fibers[begin].lane_offset || fiber.bytes != fibers[begin].bytes)
      fail("lanes disagree in a shuffle");
    std::memcpy(values[lane], fiber.value, sizeof(fiber.value));
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(fibers[begin + lane].value, values[lane ^ static_cast<unsigned>(fibers[begin].lane_offset)], 16);
  }
}

void run_block(unsigned threads, const std::vector<unsigned>& order) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
    fiber.entered = false;
  }
  while (failure.empty()) {
    bool progress = false;
    for (const unsigned i : order) {
      if (fibers[i].state != State::kReady) continue;
      progress = true;
      resume(i);
    }
    if (all_wait(0, threads, State::kBarrier)) {
      release(0, threads);
      continue;
    }
    for (unsigned begin = 0; begin < threads; begin += kWarp) {
      if (!all_wait(begin, begin + kWarp, State::kShuffle)) continue;
      exchange_warp(begin);
      release(begin, begin + kWarp);
      progress = true;
    }
    if (progress) continue;
    const auto waiting = std::find_if(
        fibers.begin(), fibers.begin() + threads, [](const Fiber& fiber) { return fiber.state != State::kDone; });
    if (waiting == fibers.begin() + threads) return;
    fail("some threads never reach the barrier or shuffle of line " + std::to_string(waiting->line));
  }
}

}  // namespace

void barrier(int line) { yield(State::kBarrier, line); }

void exchange(unsigned mask, void* value, size_t bytes, int lane_offset, int line) {
  if (mask != 0xffffffffu) fail("a shuffle names fewer than 32 lanes");
  const unsigned self = current;
  std::memcpy(fibers[self].value, value, bytes);
  fibers[self].bytes = bytes;
  fibers[self].lane_offset = lane_offset;
  yield(State::kShuffle, line);
  std::memcpy(value, fibers[self].value, bytes);
}

void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("a load is not aligned to its " + std::to_string(bytes) + " bytes");
}

void run_grid(const cudaLaunchConfig_t& configuration, const void* kernel, const std::function<void()>& thread) {
  const unsigned threads = configuration.blockDim.x;
  const size_t shared = configuration.dynamicSmemBytes;
  const auto limit = shared_limits.find(kernel);
  failure.clear();
  if (threads == 0 || threads > 1024 || threads % kWarp != 0)
    fail("a block has " + std::to_string(threads) + " threads");
  // 48 KB less the kernels' static shared memory, whose size the compiler test bounds by 1 KB.
  if (shared > 47 * 1024 && (limit == shared_limits.end() || static_cast<size_t>(limit->second) < shared)) {
    fail("more than 47 KB of dynamic shared memory without cudaFuncSetAttribute");
  }
  if (fibers.size() < threads) fibers.resize(threads);
  body = &thread;
  const std::vector<unsigned> order = thread_order(threads);
  unsigned char* memory = reinterpret_cast<unsigned char*>(frskd::cuda::frskd_dynamic_shared_memory);
  for (unsigned block = 0; block < configuration.gridDim.x && failure.empty(); ++block) {
    std::memset(memory, kPoison, frskd::cuda::kSharedBytes);
    block_index = dim3(order.front() == 0 ? block : configuration.gridDim.x - 1 - block);
    run_block(threads, order);
    const auto touched = [](unsigned char byte) { return byte != kPoison; };
    if (std::any_of(memory + shared, memory + frskd::cuda::kSharedBytes, touched)) {
      fail("a block writes past its dynamic shared memory");
    }
  }
  if (!failure.empty()) throw std::runtime_error("emulated kernel: " + failure);
}

}  // namespace emulation

cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  const char* setting = std::getenv("EMULATION_MULTIPROCESSORS");
  *value = setting ? std::atoi(setting) : 132;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, int, int value) {
  emulation::shared_limits[kernel] = value;
  return cudaSuccess;
}

// What a CUDA build of PyTorch would provide. The library is linked with -Bsymbolic, so these win inside it.
extern "C" {

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* handle) {
  *handle = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char*) {}

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

}  // extern "C"
