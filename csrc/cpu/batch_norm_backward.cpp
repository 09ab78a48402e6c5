// The gradient of a map through its batch norm and PReLU, whose sums are known.
// Bytes: 2*C read + C written a pixel. channels_last.
#include "far_map.h"
#include "kernels.h"
#include "normalise.h"
#include "pixel_runs.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = BatchNormBackward;

PixelRuns runs_of(const Problem& p) { return {p.pixels, 3 * p.channels * bytes_of(p.type), 1}; }

template <class C>
struct Shared {
  NormaliseVectors<C> normalise;
  NormGradientVectors<C> norm;
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory)
      : normalise(p.channels, memory), norm(p.norm, p.channels, memory), bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    shared.normalise.fill(p.normalise, p.channels);
    shared.norm.fill(p.norm, p.channels);
  });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  T* grad_x = static_cast<T*>(p.grad_x);
  const bool far = is_far(grad_x, p.pixels, p.channels);
  for (int64_t run = begin; run < end; ++run) {
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      for_channel_blocks<C>(p.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
        constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
        AffinePreluLanes<C, N> normalise[J];
        NormGradientLanes<C, N> norm[J];
        for (int j = 0; j < J; ++j) {
          normalise[j] = shared.normalise.template at<N>(channel + j * N);
          norm[j] = shared.norm.template at<N>(channel + j * N);
        }
        for (int64_t i = 0; i < pixels; ++i) {
          const int64_t at = (first + i) * p.channels + channel;
          if (i + kPixelsAhead < pixels) {
            fetch_ahead<N, J>(grad + at, p.channels);
            fetch_ahead<N, J>(x + at, p.channels);
          }
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j) {
            const auto g = load_first<N>(grad + at + j * N, valid), v = load_first<N>(x + at + j * N, valid);
            const auto between = normalise[j].affine(v) > Vector<C, N>{} ? g : g * normalise[j].slope;
            store_rows<N>(grad_x + at + j * N, norm[j](between, v), valid, far);
          }
        }
      });
    });
  }
  if (far) finish_far_stores();
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

}  // namespace

extern const Kernel<Problem> batch_norm_backward = {carved_bytes<Shared>, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
