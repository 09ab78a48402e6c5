// One call of a kernel against the naive result: every way to cut its work, in memory whose bounds show.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "cases.h"
#include "cpu/kernels.h"

inline const espk::Kernels& kernels = espk::ESPK_ISA::kernels;
inline int failures = 0, checks = 0;

inline std::unique_ptr<void, void (*)(void*)> aligned(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, static_cast<size_t>(bytes > 0 ? bytes : 1))) std::abort();
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  return {data, std::free};
}

using Run = std::function<void(int64_t, int64_t)>;

// Ways to cut [0, units) that must not differ in a bit.
inline void whole(int64_t units, const Run& run) { run(0, units); }

inline void one_by_one_backwards(int64_t units, const Run& run) {
  for (int64_t unit = units; unit-- > 0;) run(unit, unit + 1);
}

inline void on_three_threads(int64_t units, const Run& run) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      if (units * t / 3 < units * (t + 1) / 3) run(units * t / 3, units * (t + 1) / 3);
    });
  for (std::thread& thread : threads) thread.join();
}

inline void by_thirds_backwards(int64_t units, const Run& run) {
  for (int64_t t = 3; t-- > 0;) {
    if (units * t / 3 < units * (t + 1) / 3) run(units * t / 3, units * (t + 1) / 3);
  }
}

// Each where it can find something: races need threads, and no byte out of bounds needs them. An emulator has none of a
// device's races either, and takes longer to begin a thread than to run a kernel.
#if defined(SANITIZES_THREADS)
inline constexpr auto kSplits = {on_three_threads};
#elif defined(EMULATED)
inline constexpr auto kSplits = {by_thirds_backwards};
#elif defined(SANITIZES_MEMORY)
inline constexpr auto kSplits = {whole, one_by_one_backwards};
#else
inline constexpr auto kSplits = {whole, one_by_one_backwards, on_three_threads};
#endif

// What a result lies in: by default a map of its own, not yet written. With `before`, a wider map that holds these numbers,
// which the kernel adds itself to from channel `first_channel` on. A number may be off by `error` before it is stored.
struct Target {
  Layout layout;
  const Tensor* before = nullptr;
  int64_t first_channel = 0;
  double error = 0;
};

template <class Problem>
void check(const char* what, const Case& s, const espk::Kernel<Problem>& kernel, Problem problem,
           void* Problem::* result, const Tensor& expected, const Target& target) {
  std::vector<unsigned char> first;
  for (auto split : kSplits) {
    const auto buffer = target.before ? std::make_unique<Buffer>(problem.type, target.layout, *target.before)
                                      : std::make_unique<Buffer>(problem.type, target.layout, expected.sizes);
    Buffer& out = *buffer;
    problem.*result = static_cast<unsigned char*>(out.data()) + target.first_channel * espk::bytes_of(problem.type);
    if constexpr (requires { problem.epilogue.residual; }) {
      if (target.before) problem.epilogue.residual = problem.*result;
    }
    const auto shared = aligned(kernel.shared_bytes(problem));
    if (kernel.before) kernel.before(problem, shared.get());
    const int64_t units = kernel.units(problem);
    if (units > 0) split(units, [&](int64_t begin, int64_t end) { kernel.run(problem, shared.get(), begin, end); });
    if (kernel.after) kernel.after(problem, shared.get());

    ++checks;
    std::string wrong;
    for (int64_t i = 0; i < expected.count() && wrong.empty(); ++i) {
      const double right = expected.values[static_cast<size_t>(i)];
      if (!(out.get(i) >= rounded(problem.type, right - target.error) &&
            out.get(i) <= rounded(problem.type, right + target.error))) {
        wrong =
            "value " + std::to_string(i) + " is " + std::to_string(out.get(i)) + " and not " + std::to_string(right);
      }
    }
    if (!out.guards_intact()) wrong = "memory beside the result was written";
    if (first.empty()) first = out.bits();
    if (first != out.bits()) wrong = "another split of the work gives other bits";
    if (!wrong.empty()) {
      ++failures;
      std::printf("FAIL %s, %s, type %d, %s: %s\n", what, s.name, static_cast<int>(problem.type),
                  target.layout == Layout::contiguous ? "contiguous" : "channels_last", wrong.c_str());
    }
  }
}

template <class Problem>
void check(const char* what, const Case& s, const espk::Kernel<Problem>& kernel, Problem problem,
           void* Problem::* result, const Tensor& expected) {
  check(what, s, kernel, problem, result, expected, Target{problem.layout});
}
