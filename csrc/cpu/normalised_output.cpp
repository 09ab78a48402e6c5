// The end of a unit in training: the last batch norm, the residual and the PReLU of a map whose moments are known.
// Bytes: C read (+ C of the residual) + C written a pixel. channels_last.
#include "far_map.h"
#include "kernels.h"
#include "normalise.h"
#include "pixel_runs.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = NormalisedOutput;

PixelRuns runs_of(const Problem& p) { return {p.pixels, 3 * p.channels * bytes_of(p.type), 1}; }

int64_t shared_bytes(const Problem& p) {
  return 3 * round_up((p.channels + 32) * 8, 64);  // at least three padded vectors of any compute type
}

template <class C>
NormaliseVectors<C> vectors_in(const Problem& p, void* memory) {
  Carving carving(memory);
  return {p.channels, carving};
}

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    vectors_in<Compute<std::remove_pointer_t<decltype(type)>>>(p, memory).fill(p.normalise, p.channels);
  });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const NormaliseVectors<C> vectors = vectors_in<C>(p, memory);
  const PixelRuns runs = runs_of(p);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool far = is_far(out, p.pixels, p.channels);
  for (int64_t run = begin; run < end; ++run) {
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      for_channel_blocks<C>(p.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
        constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
        AffinePreluLanes<C, N> normalise[J];
        for (int j = 0; j < J; ++j) normalise[j] = vectors.template at<N>(channel + j * N);
        for (int64_t i = 0; i < pixels; ++i) {
          const int64_t at = (first + i) * p.channels + channel;
          if (i + kPixelsAhead < pixels) {
            fetch_ahead<N, J>(x + at, p.channels);
            if (residual) fetch_ahead<N, J>(residual + at, p.channels);
          }
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j) {
            auto v = normalise[j].affine(load_first<N>(x + at + j * N, valid));
            if (residual) v += load_first<N>(residual + at + j * N, valid);
            store_rows<N>(out + at + j * N, prelu(v, normalise[j].slope), valid, far);
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

extern const Kernel<Problem> normalised_output = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
