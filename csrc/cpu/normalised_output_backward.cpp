// The gradient through the last PReLU of a unit, which is the residual's too, with the sums of the batch norm in front of
// it, or the sums alone. Two-stage, in order. Bytes: 2*C read (+ C of the residual) + C written a pixel. channels_last.
#include "channel_sums.h"
#include "far_map.h"
#include "kernels.h"
#include "pixel_runs.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = NormalisedOutputBackward;

PixelRuns runs_of(const Problem& p) { return {p.pixels, 4 * p.channels * bytes_of(p.type), 3 * p.channels}; }

template <class C>
struct Shared {
  NormaliseVectors<C> normalise;
  PieceSums<C> sums;
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory)
      : normalise(p.channels, memory), sums(runs_of(p).count, p.channels, memory), bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const Shared<C> shared(p, memory);
    shared.normalise.fill(p.normalise, p.channels);
    fill_vector<C>(shared.sums.mean, p.sums.mean, p.channels, 0);
  });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* grad_x = static_cast<T*>(p.grad_x);
  const bool far = grad_x && is_far(grad_x, p.pixels, p.channels);
  for (int64_t run = begin; run < end; ++run) {
    shared.sums.begin(run, 0, p.channels);
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      for_channel_blocks<C>(p.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
        constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
        AffinePreluLanes<C, N> normalise[J];
        NormSumLanes<C, N> sums[J];
        for (int j = 0; j < J; ++j) {
          normalise[j] = shared.normalise.template at<N>(channel + j * N);
          sums[j] = shared.sums.template at<N>(channel + j * N);
        }
        for (int64_t i = 0; i < pixels; ++i) {
          const int64_t at = (first + i) * p.channels + channel;
          if (i + kPixelsAhead < pixels) {
            for (const T* map : {grad, x, residual}) {
              if (map) fetch_ahead<N, J>(map + at, p.channels);
            }
          }
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j) {
            const auto g = load_first<N>(grad + at + j * N, valid), v = load_first<N>(x + at + j * N, valid);
            if (!p.normalise.slope) {
              sums[j].add(g, v);
              continue;
            }
            auto before = normalise[j].affine(v);
            if (residual) before += load_first<N>(residual + at + j * N, valid);
            const auto between = sums[j].add(g, before, v, normalise[j].slope);
            if (grad_x) store_rows<N>(grad_x + at + j * N, between, valid, far);
          }
        }
        for (int j = 0; j < J; ++j) shared.sums.add(run, channel + j * N, sums[j], valid);
      });
    });
  }
  if (far) finish_far_stores();
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    shared.sums.merge(p.sums, runs_of(p).count);
  });
}

}  // namespace

extern const Kernel<Problem> normalised_output_backward = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
