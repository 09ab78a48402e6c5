// CUDA on the CPU, for tests: a kernel's source compiles with g++ and its blocks run one after the other, each thread of
// a block on a stack of its own. Threads take turns in a fixed order and change only at barriers, so a missing barrier
// is a wrong result each time; `backwards` reverses the order, which shows those that the first order hides.
//
// What a device would refuse or leave undefined ends the programme or fails the launch: too much shared memory, a
// barrier that some threads do not reach. Shared memory is NaN before each block, and AddressSanitizer guards its end.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace espk::cuda {
// The block's dynamic shared memory, which a kernel declares extern; a little more than the largest architecture has.
alignas(128) inline unsigned char shared_memory_block[256 * 1024];
}  // namespace espk::cuda

namespace emulation {

inline int shared_memory_of_architecture = 163 * 1024;  // sm_80; 227 KiB on sm_90
inline bool backwards = false;
inline int64_t grid_limit = 3;  // few blocks, each of which goes around
inline int64_t enough_blocks = 1;  // the blocks from which on a shape takes the large variant
inline int64_t launches = 0;
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> shared_memory_allowed;

constexpr int kWarp = 32;
constexpr size_t kStack = 512 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

// Where a stack was left, as the compiler's own setjmp keeps it. swapcontext would ask the kernel about signals each
// time, and AddressSanitizer then clears the whole stack: a hundred times slower.
struct Point {
  void* words[5];
};

__attribute__((noinline, no_sanitize("address"))) inline void jump(Point& to) { __builtin_longjmp(to.words, 1); }

__attribute__((noinline, no_sanitize("address"))) inline void change(Point& from, Point& to) {
  if (__builtin_setjmp(from.words) == 0) jump(to);
}

// One thread of the block; it goes on to the next block's when this one is done.
struct Fiber {
  Point point;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  bool started = false, done = false;
  const Barrier* waiting = nullptr;
  int64_t generation = 0;
};

struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(1024);  // they never move
  Point scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  int current = 0, count = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchanged;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Block block;

inline void leave_scheduler([[maybe_unused]] const Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, to.stack, kStack);
#endif
}

inline void enter_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
}

inline void leave_fiber([[maybe_unused]] void** keep) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, block.scheduler_stack, block.scheduler_stack_size);
#endif
}

inline void enter_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void back_to_scheduler(Fiber& self) {
  leave_fiber(&self.fake_stack);
  change(self.point, block.scheduler);
  enter_fiber(self.fake_stack);
}

inline void fiber_main() {
  enter_fiber(nullptr);
  for (;;) {
    block.body(block.argument);
    Fiber& self = block.fibers[static_cast<size_t>(block.current)];
    self.done = true;
    back_to_scheduler(self);
  }
}

// Back to the scheduler until `barrier` has seen everybody.
inline void wait(Barrier& barrier, int everybody) {
  Fiber& self = block.fibers[static_cast<size_t>(block.current)];
  if (++barrier.arrived == everybody) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self.waiting = &barrier;
  self.generation = barrier.generation;
  back_to_scheduler(self);
  self.waiting = nullptr;
}

inline void wait_for_block() { wait(block.all, block.count); }

inline void wait_for_warp() {
  const int warp = block.current / kWarp, left = block.count - warp * kWarp;
  wait(block.warps[static_cast<size_t>(warp)], left < kWarp ? left : kWarp);
}

// The first switch to a stack.
__attribute__((noinline)) inline void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (__builtin_setjmp(block.scheduler.words) == 0) setcontext(&context);
}

inline void resume(int index) {
  Fiber& fiber = block.fibers[static_cast<size_t>(index)];
  block.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  leave_scheduler(fiber);
  if (fiber.started) {
    change(block.scheduler, fiber.point);
  } else {
    fiber.started = true;
    start(fiber);
  }
  enter_scheduler();
}

inline void run_block(int threads, void (*body)(void*), void* argument) {
  block.count = threads;
  block.body = body;
  block.argument = argument;
  block.all = {};
  block.warps.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), {});
  block.exchanged.assign(static_cast<size_t>(threads), 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[static_cast<size_t>(i)];
    if (!fiber.stack) {
      fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber.stack == MAP_FAILED) fail("no memory for a thread's stack");
    }
    fiber.done = false;
    fiber.waiting = nullptr;
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int turn = 0; turn < threads; ++turn) {
      const int index = backwards ? threads - 1 - turn : turn;
      const Fiber& fiber = block.fibers[static_cast<size_t>(index)];
      if (fiber.done || (fiber.waiting && fiber.waiting->generation == fiber.generation)) continue;
      resume(index);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) fail("some threads wait at a barrier that the others never reach");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::wait_for_warp(); }

namespace emulation {

// The value that lane `source(lane)` of this warp holds; a lane that does not exist gives one's own.
template <class T, class Source>
T exchange(T value, Source source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int self = block.current, lane = self % kWarp, warp = self - lane;
  std::memcpy(&block.exchanged[static_cast<size_t>(self)], &value, sizeof(T));
  wait_for_warp();
  const int from = source(lane);
  if (from >= 0 && from < kWarp && warp + from < block.count) {
    std::memcpy(&value, &block.exchanged[static_cast<size_t>(warp + from)], sizeof(T));
  }
  wait_for_warp();
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, [mask](int lane) { return lane ^ mask; });
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, [delta](int lane) { return lane + static_cast<int>(delta); });
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid value" : "invalid configuration";
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::shared_memory_of_architecture;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::shared_memory_of_architecture) return emulation::last_error = cudaErrorInvalidValue;
  emulation::shared_memory_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  const auto allowed = emulation::shared_memory_allowed.find(reinterpret_cast<const void*>(kernel));
  const int most = emulation::shared_memory_of_architecture;
  const int asked = allowed == emulation::shared_memory_allowed.end() ? 48 * 1024 : allowed->second;
  if (shared > static_cast<size_t>(asked < most ? asked : most)) return emulation::last_error = cudaErrorInvalidValue;
  const bool fits = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                    grid.z <= 65535 && threads.x > 0 && threads.x <= 1024 && threads.y == 1 && threads.z == 1;
  if (!fits) return emulation::last_error = cudaErrorInvalidConfiguration;
  ++emulation::launches;
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, static_cast<const Params*>(arguments[0])};
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        unsigned char* memory = espk::cuda::shared_memory_block;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(memory, sizeof espk::cuda::shared_memory_block);
#endif
        std::memset(memory, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(memory + shared, sizeof espk::cuda::shared_memory_block - shared);
#endif
        emulation::run_block(
            static_cast<int>(threads.x),
            [](void* argument) {
              const Call& one = *static_cast<const Call*>(argument);
              one.kernel(*one.params);
            },
            &call);
      }
  return cudaSuccess;
}
