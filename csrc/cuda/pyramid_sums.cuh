// Sums over the pixels of a part, one a channel, of a kernel that works on items (pyramid.cuh) of channels_last maps. A
// thread stays with its channels and keeps its own sums in shared memory, out of the registers that the taps need: no
// barrier until the part ends.
#pragma once

#include "channel_sums.cuh"
#include "pyramid.cuh"

namespace espk::cuda {

// `maps` sums of the kind Sums (channel_sums.cuh) for each channel of a block.
template <class C, class Traits, class Sums>
struct ThreadSums {
  static constexpr int vector = Traits::channels, count = Sums::count;

  C* first;  // [map][sum][thread][channels of a thread]

  static int64_t numbers(int64_t maps) { return maps * count * Traits::threads * vector; }

  __device__ C* of(int map, int sum, int thread) const {
    return first + ((map * count + sum) * Traits::threads + thread) * vector;
  }

  __device__ void clear(int maps) const {
    for (int i = 0; i < maps * count; ++i) {
      C* to = of(i / count, i % count, static_cast<int>(threadIdx.x));
#pragma unroll
      for (int v = 0; v < vector; ++v) to[v] = 0;
    }
  }

  __device__ __forceinline__ void add(int map, const Sums (&sums)[vector]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      C* to = of(map, i, static_cast<int>(threadIdx.x));
      C values[vector];
      load<vector>(values, to);
#pragma unroll
      for (int v = 0; v < vector; ++v) values[v] += sums[v].at[i];
      store<vector>(to, values);
    }
  }

  // Of all `threads` that have channels, in order; `vectors` neighbours share a pixel's channels.
  __device__ void total(C (&to)[count], int map, int channel, int threads, int vectors) const {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = 0;
    for (int thread = channel / vector; thread < threads; thread += vectors) {
#pragma unroll
      for (int i = 0; i < count; ++i) to[i] += of(map, i, thread)[channel % vector];
    }
  }
};

// How many threads work, so that each stays with its channels from round to round.
template <class Traits>
__device__ int threads_of(const Items& items) {
  return Traits::threads / items.channels * items.channels;
}

// The pixels of a block's rectangle that lie in a map of `height` x `width`.
__device__ inline int64_t pixels_of(const Place& place, const Cut& cut, int64_t height, int64_t width) {
  return least(cut.rows, height - place.row) * least(cut.columns, width - place.column);
}

// Into which parts the rectangles go, and how many of them.
inline int64_t summed_rectangles(const Pyramid& p, const Cut& cut) {
  return tiles_a_part(rectangles_of(p, cut), cut.slices);
}
inline int64_t pyramid_parts(const Pyramid& p, const Cut& cut) {
  return ceil_div(rectangles_of(p, cut), summed_rectangles(p, cut));
}

}  // namespace espk::cuda
