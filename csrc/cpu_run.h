// Units of a kernel's work on torch's threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace espk {

// torch's own, behind a function so that no header of torch's is needed to launch.
int64_t thread_count();
void parallel_for(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Runs all units of a kernel whose weights are prepared, on as many of torch's threads as have enough to do that waking
// them pays (a thread costs about as much as 100 000 multiply-adds, or as many numbers that a copy moves).
template <class Problem>
void run_units(const Kernel<Problem>& kernel, Problem problem, void* prepared) {
  if constexpr (requires { problem.threads; }) problem.threads = thread_count();
  const int64_t units = kernel.units(problem);
  if (units > 0) {
    constexpr int64_t kWorthAThread = 100'000;
    int64_t work = problem.multiply_adds();
    if constexpr (requires { problem.numbers(); }) work = problem.numbers();
    const int64_t threads_worth = work / kWorthAThread + 1;
    struct Context {
      const Kernel<Problem>& kernel;
      const Problem& problem;
      void* prepared;
    } context{kernel, problem, prepared};
    parallel_for(
        units, (units + threads_worth - 1) / threads_worth,
        [](void* given, int64_t begin, int64_t end) {
          const Context& c = *static_cast<Context*>(given);
          c.kernel.run(c.problem, c.prepared, begin, end);
        },
        &context);
  }
  if (kernel.after) kernel.after(problem, prepared);
}

}  // namespace espk
