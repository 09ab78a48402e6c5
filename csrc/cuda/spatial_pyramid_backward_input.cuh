// The inner loop of the gradient of the spatial pyramid's input: branch k is a part of the outputs k..K, so a window of the
// gradient in shared memory becomes the sum of more and more branches, from the last to the first, and each pixel gathers
// its taps from it.
#pragma once

#include "pyramid.cuh"

namespace espk::cuda {

// The first multiple of `stride` that is not below `value`, divided by it.
__host__ __device__ inline int64_t first_multiple(int64_t value, int64_t stride) {
  return value > 0 ? ceil_div(value, stride) : -(-value / stride);
}

// All threads of the block; `busy` are those with pixels. The gradient goes through a prologue (normalise.cuh).
template <class Traits, class T, class Prologue>
__device__ __forceinline__ void gather_branches(Compute<T> (&sums)[Traits::rows][Traits::channels],
                                                const PyramidShape& s, const T* grad_map, const Compute<T>* weights,
                                                const Window& window, Compute<T>* in_window, bool vector_fill,
                                                const Place& place, int channels, const Item& at, bool busy,
                                                int row_groups, const Prologue& prologue) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const int stride = static_cast<int>(s.stride);
  const int64_t top = first_multiple(place.row - s.halo_rows, s.stride);
  const int64_t left = first_multiple(place.column - s.halo_columns, s.stride);
  // Pixel (0, 0) of this block in units of the window's rows and columns, times the stride.
  const int row_offset = static_cast<int>(place.row - top * s.stride);
  const int column_offset = static_cast<int>(place.column - left * s.stride);
  for (int k = s.branches - 1; k >= 0; --k) {
    const T* grad = grad_map + place.image * s.out.image + (k * s.channels + place.channel) * s.out.channel;
    if constexpr (Traits::staged) {
      const MapView<T> map{grad, s.out, s.out_height, s.out_width, channels};
      __syncthreads();
      if (s.hff && k < s.branches - 1) {
        fill_window<Fill::add>(in_window, window, map, top, left, vector_fill, prologue,
                               k * s.channels + place.channel);
      } else {
        fill_window<Fill::replace>(in_window, window, map, top, left, vector_fill, prologue,
                                   k * s.channels + place.channel);
      }
    }
    __syncthreads();
    if (!busy) continue;
    const int64_t dilation = s.dilations[k];
    C w[9][kVector];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) w[tap][v] = weights[(k * 9 + tap) * s.cut.channels + at.channel + v];
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int i = tap / 3 - 1, j = tap % 3 - 1;
      if ((i != 0 && dilation >= s.height) || (j != 0 && dilation >= s.width)) continue;
      const int d = static_cast<int>(dilation);
      int column = at.column + column_offset - j * d;
      if (column % stride != 0) continue;
      column /= stride;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        int row = at.row + r * row_groups + row_offset - i * d;
        if (row % stride != 0) continue;
        row /= stride;
        C values[kVector] = {};
        if constexpr (Traits::staged) {
          load<kVector>(values, in_window + row * window.row_step + column * window.column_step +
                                    at.channel * window.channel_step);
        } else {
          const int64_t y = top + row, x = left + column;
          if (y < 0 || y >= s.out_height || x < 0 || x >= s.out_width || at.channel >= channels) continue;
          const T* from = grad + y * s.out.row + x * s.out.column + at.channel * s.out.channel;
          for (int n = k; n < (s.hff ? s.branches : k + 1); ++n) {
            C value[1];
            load_through<1>(value, from, prologue.template channels<1>(n * s.channels + place.channel + at.channel));
            values[0] += value[0];
            from += s.channels * s.out.channel;
          }
        }
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[r][v] += w[tap][v] * values[v];
      }
    }
  }
}

// The window of the gradient that a cut of the input needs, in the type of the sums, and the bytes that a kernel keeps in shared
// memory besides.
inline PyramidPlan backward_plan(const Pyramid& p, const Cut& cut, int64_t besides) {
  PyramidPlan plan = pyramid_plan(p, cut);
  plan.window = window_of(p.layout, (cut.rows - 1 + 2 * int64_t{plan.shape.halo_rows}) / p.stride + 1,
                          (cut.columns - 1 + 2 * int64_t{plan.shape.halo_columns}) / p.stride + 1, cut.channels);
  plan.window_bytes = (p.type == Type::float64 ? 8 : 4) * plan.window.count();
  plan.shared_bytes = branch_weight_bytes(p, cut) + besides + plan.window_bytes;
  return plan;
}

}  // namespace espk::cuda
