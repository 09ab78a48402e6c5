// The moments of a map for the batch norm behind it. Two-stage, in order. Bytes: C read a pixel. channels_last.
#include "channel_sums.h"
#include "kernels.h"
#include "pixel_runs.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = MapMoments;

PixelRuns runs_of(const Problem& p) { return {p.pixels, p.channels * bytes_of(p.type), 2 * p.channels}; }

template <class C>
struct Shared {
  PieceMoments<C> moments;
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory) : moments(runs_of(p).count, p.channels, memory), bytes(memory.bytes()) {}
};

void before(const Problem&, void*) {}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  const Shared<Compute<T>> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  for (int64_t run = begin; run < end; ++run) {
    const T* origin = static_cast<const T*>(p.x) + runs.begin(run) * p.channels;
    shared.moments.begin(run, 0, p.channels);
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      const T* x = static_cast<const T*>(p.x) + first * p.channels;
      shared.moments.add(run, 0, p.channels, origin, x, p.channels, pixels);
    });
    shared.moments.finish(run, 0, p.channels, origin, runs.size(run));
  }
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const PixelRuns runs = runs_of(p);
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    shared.moments.merge(p.moments, runs.count, [&](int64_t run) { return runs.size(run); });
  });
}

}  // namespace

extern const Kernel<Problem> map_moments = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
