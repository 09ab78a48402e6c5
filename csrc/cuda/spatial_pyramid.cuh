// The inner loop of the spatial pyramid forward: the taps of one branch for the pixels and channels of one thread.
#pragma once

#include "pyramid.cuh"

namespace espk::cuda {

// Adds them to `sums`. `in_window` is the staged input, `image` where it came from, from the block's first channel on: read
// in place, through the prologue that has filled the window else, where nothing is staged.
template <class Traits, class T, class Prologue>
__device__ __forceinline__ void add_branch(Compute<T> (&sums)[Traits::rows][Traits::channels], const PyramidShape& s,
                                           int k, const Compute<T>* weights, const Window& window, const T* in_window,
                                           const T* image, const Place& place, int channels, const Item& at,
                                           int row_groups, const Prologue& prologue) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  C w[9][kVector];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) w[tap][v] = weights[(k * 9 + tap) * s.cut.channels + at.channel + v];
  }
  const int64_t dilation = s.dilations[k];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const int i = tap / 3 - 1, j = tap % 3 - 1;
    if ((i != 0 && dilation >= s.height) || (j != 0 && dilation >= s.width)) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = at.row + r * row_groups;
      C values[kVector] = {};
      if constexpr (Traits::staged) {
        const int d = static_cast<int>(dilation), stride = static_cast<int>(s.stride);
        load<kVector>(values, in_window + (row * stride + s.halo_rows + i * d) * window.row_step +
                                  (at.column * stride + s.halo_columns + j * d) * window.column_step +
                                  at.channel * window.channel_step);
      } else {
        const int64_t y = (place.row + row) * s.stride + i * dilation;
        const int64_t x = (place.column + at.column) * s.stride + j * dilation;
        if (y >= 0 && y < s.height && x >= 0 && x < s.width && at.channel < channels) {
          const T* from = image + y * s.in.row + x * s.in.column + at.channel * s.in.channel;
          load_through<kVector>(values, from, prologue.template channels<kVector>(place.channel + at.channel));
        }
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[r][v] += w[tap][v] * values[v];
    }
  }
}

// The plan of a cut, and the bytes that a kernel keeps in shared memory besides.
inline PyramidPlan forward_plan(const Pyramid& p, const Cut& cut, int64_t besides) {
  PyramidPlan plan = pyramid_plan(p, cut);
  plan.window = input_window(p, plan.shape);
  plan.window_bytes = bytes_of(p.type) * plan.window.count();
  plan.shared_bytes = branch_weight_bytes(p, cut) + besides + plan.window_bytes;
  return plan;
}

}  // namespace espk::cuda
