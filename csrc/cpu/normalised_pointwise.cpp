// Group pointwise convolution of a map that is normalised on the way in, with the moments of its result: what the batch
// norm in front asks of a map and what the one behind asks, in one pass. Training only, channels_last.
// Bytes: M read + N written a pixel; multiply-adds: M*N/groups a pixel.
#include "channel_sums.h"
#include "far_map.h"
#include "kernels.h"
#include "normalised_rows.h"
#include "pixel_runs.h"
#include "pointwise_weights.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = NormalisedPointwise;

PointwiseWeights weights_of(const Problem& p) {
  return {p.type, true, p.groups, p.in_channels / p.groups, p.out_channels / p.groups, false};
}

PixelRuns runs_of(const Problem& p) {
  return {p.pixels, (p.in_channels + p.out_channels) * (p.type == Type::float64 ? 8 : 4), p.out_channels};
}

template <class C>
struct Shared {
  C* weights;
  NormaliseVectors<C> normalise;
  PieceMoments<C> moments;
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory)
      : weights(memory.take<C>(weights_of(p).bytes() / static_cast<int64_t>(sizeof(C)))),
        normalise(p.in_channels, memory),
        moments(p.moments.mean ? runs_of(p).count : 0, p.out_channels, memory),
        bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    weights_of(p).prepare(p.weight, shared.weights);
    shared.normalise.fill(p.normalise, p.in_channels);
  });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  const PointwiseWeights weights = weights_of(p);
  const bool far = std::is_same_v<T, C> && is_far(static_cast<const T*>(p.out), p.pixels, p.out_channels);
  for (int64_t run = begin; run < end; ++run) {
    const T* first_out = static_cast<const T*>(p.out) + runs.begin(run) * p.out_channels;
    if (p.moments.mean) shared.moments.begin(run, 0, p.out_channels);
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t next) {
      const T* x = static_cast<const T*>(p.x) + first * p.in_channels;
      T* out = static_cast<T*>(p.out) + first * p.out_channels;
      const PixelRows<C> z = input_rows(shared.normalise, p.normalise, x, p.in_channels, pixels, Slot::map);
      Ahead ahead;  // of what is overwritten too: the machine reads lines before it writes to them
      if (!far) ahead.add(out + pixels * p.out_channels, next * p.out_channels);
      ahead.add(x + pixels * p.in_channels, next * p.in_channels);
      ahead.over(pixels * p.in_channels * weights.out);
      T* made = far ? static_cast<T*>(scratch(Slot::rows, pixels * p.out_channels * int64_t{sizeof(T)})) : out;
      multiply_pixels<T>(weights, shared.weights, z.data, z.pitch, pixels, Epilogue{}, made, p.out_channels, &ahead);
      if (far && out == first_out) copy_row(out, made, p.out_channels);
      if (p.moments.mean) shared.moments.add(run, 0, p.out_channels, first_out, made, p.out_channels, pixels);
      if constexpr (std::is_same_v<T, C>) {
        if (far) copy_far(out, made, pixels * p.out_channels);
      }
    });
    if (p.moments.mean) shared.moments.finish(run, 0, p.out_channels, first_out, runs.size(run));
  }
  if (far) finish_far_stores();
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  if (!p.moments.mean) return;
  with_type(p.type, [&](auto* type) {
    const PixelRuns runs = runs_of(p);
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    shared.moments.merge(p.moments, runs.count, [&](int64_t run) { return runs.size(run); });
  });
}

}  // namespace

extern const Kernel<Problem> normalised_pointwise = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
