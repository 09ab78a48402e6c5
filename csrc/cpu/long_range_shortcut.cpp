// The end of a down-sampler in training: prelu(concat(pooled, expanded) + image weight + shift).
// Bytes: N + I read + N written a pixel; multiply-adds: N*(I + 2) a pixel. channels_last.
#include "affine_prelu.h"
#include "far_map.h"
#include "joined_maps.h"
#include "kernels.h"
#include "pixel_runs.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = LongRangeShortcut;

PixelRuns runs_of(const Problem& p) { return {p.pixels, 2 * p.channels() * bytes_of(p.type), 1}; }

template <class C>
struct Shared {
  JoinedVectors<C> vectors;
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory) : vectors(p, memory), bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type,
            [&](auto* type) { Shared<Compute<std::remove_pointer_t<decltype(type)>>>(p, memory).vectors.fill(p); });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const JoinedVectors<C> vectors = Shared<C>(p, memory).vectors;
  const PixelRuns runs = runs_of(p);
  T* out = static_cast<T*>(p.out);
  const bool far = is_far(out, p.pixels, p.channels()) && p.pooled_channels * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const JoinedPart<T> parts[] = {{static_cast<const T*>(p.pooled), nullptr, p.pooled_channels, 0},
                                 {static_cast<const T*>(p.expanded), nullptr, p.expanded_channels, p.pooled_channels}};
  for (int64_t run = begin; run < end; ++run) {
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      for (const JoinedPart<T>& part : parts) {
        for_channel_blocks<C>(part.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
          constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
          const int64_t in_result = part.first + channel;
          for (int64_t i = 0; i < pixels; ++i) {
            const T* from = part.map + (first + i) * part.channels + channel;
            T* to = out + (first + i) * p.channels() + in_result;
            if (i + kPixelsAhead < pixels) fetch_ahead<N, J>(from, part.channels);
            const ImagePixel<T> image(p, first + i);
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) {
              const auto v =
                  joined<N>(vectors, p.image_channels, image, in_result + j * N, load_first<N>(from + j * N, valid));
              const auto slope = load<N>(vectors.slope + in_result + j * N);
              store_rows<N>(to + j * N, prelu(v, slope), valid, far);
            }
          }
        });
      }
    });
  }
  if (far) finish_far_stores();
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

}  // namespace

extern const Kernel<Problem> long_range_shortcut = {carved_bytes<Shared>, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
