// Which instruction set runs, decided once when the library loads, and the memory that kernels work in.
// Compiled for the baseline only, so that it runs on every machine.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace espk {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
  bool by_default = true;  // whether it is chosen where nobody names one
};

#if defined(__x86_64__)
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool runs_avx512_bf16() {
  unsigned a = 0, b, c, d;
  return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Tiles are state that Linux keeps for a thread only once its process has asked for them, which costs those that never
// use them nothing.
[[maybe_unused]] bool runs_amx() {
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
  constexpr long kAskForState = 0x1023, kTileData = 18;
  unsigned a, b, c, d = 0;
  return runs_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

#if defined(ESPK_HAVE_AMX) || defined(ESPK_HAVE_AVX512_BF16)
Kernels with_bfloat16(const Kernels& kernels, const Bfloat16Arithmetic& arithmetic) {
  Kernels with = kernels;
  with.bfloat16 = &arithmetic;
  return with;
}
#endif
#ifdef ESPK_HAVE_AMX
const Kernels kAmx = with_bfloat16(avx512::kernels, amx::bfloat16_arithmetic);
#endif
#ifdef ESPK_HAVE_AVX512_BF16
const Kernels kAvx512Bf16 = with_bfloat16(avx512::kernels, avx512_bf16::bfloat16_arithmetic);
#endif

// Best first.
const InstructionSet kInstructionSets[] = {
#ifdef ESPK_HAVE_AMX
    {"amx", &kAmx, runs_amx},
#endif
#ifdef ESPK_HAVE_AVX512_BF16
    // On a Xeon that multiplies pairs at half the rate of single numbers s=2.0 took 1.2 times as long with it.
    {"avx512_bf16", &kAvx512Bf16, runs_avx512_bf16, !__builtin_cpu_is("intel")},
#endif
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
    if (set.by_default && set.runs_here()) return &set;
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
