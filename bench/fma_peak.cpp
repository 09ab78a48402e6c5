// Independent multiply-adds on values that stay in registers: no program can do more of them on this machine.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__x86_64__)
#define IN_REGISTER "+x"
#if defined(__AVX512F__)
#undef IN_REGISTER
#define IN_REGISTER "+v"
#endif
#else
#define IN_REGISTER "+w"
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Two units with a latency of four or five cycles need ten chains; twelve and the factors fit 16 registers.
constexpr int kChains = 12;
constexpr long kSteps = 1000000;

static void chains() {
  const Vector factor = Vector{} + 0.999f, term = Vector{} + 1e-3f;
  Vector sums[kChains] = {};
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = sums[i] * factor + term;
      asm volatile("" : IN_REGISTER(sums[i]));  // else the compiler sees that nobody reads them
    }
  }
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  double best = 0;
  for (int repeat = 0; repeat < 30; ++repeat) {
    std::atomic<int> ready{0};
    std::vector<double> seconds(threads);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        ready.fetch_add(1);
        while (ready.load() < threads) {
        }
        const auto start = std::chrono::steady_clock::now();
        chains();
        seconds[t] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
    }
    for (auto& thread : running) thread.join();
    const double slowest = *std::max_element(seconds.begin(), seconds.end());
    best = std::max(best, 2.0 * kLanes * kChains * kSteps * threads / slowest);
  }
  std::printf("%.6g\n", best);
}
