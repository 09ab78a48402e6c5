// Which instruction set runs, decided once when the library loads, and the memory that kernels work in.
// Compiled for the baseline only, so that it runs on every machine.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace espk {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const InstructionSet kInstructionSets[] = {
#ifdef ESPK_HAVE_AVX512
    {"avx512", &avx512::kernels, runs_avx512},
#endif
#ifdef ESPK_HAVE_AVX2
    {"avx2", &avx2::kernels, runs_avx2},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) return &set;
  }
  return nullptr;
}

const InstructionSet* first_choice() {
  const char* named = std::getenv("ESPKERNELS_ISA");
  if (named && *named) {
    if (const InstructionSet* set = find(named)) return set;
  }
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) return &set;
  }
  return nullptr;  // not reached: baseline runs everywhere
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{first_choice()};
  return set;
}

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;

  ~Block() { release(); }
  void release() {
    ::operator delete(data, std::align_val_t{64});
    data = nullptr;
    bytes = 0;
  }
};

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

const char* isa() { return chosen().load()->name; }

bool isa_available(const char* name) { return find(name) != nullptr; }

bool set_isa(const char* name) {
  const InstructionSet* set = find(name);
  if (set) chosen().store(set);
  return set != nullptr;
}

void* scratch(Slot slot, int64_t bytes) {
  thread_local Block blocks[kSlots];
  Block& block = blocks[static_cast<int>(slot)];
  if (block.bytes < bytes) {
    block.release();
    block.data = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64});
    block.bytes = bytes;
  }
  return block.data;
}

}  // namespace espk
