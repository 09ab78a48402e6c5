// Rows of pixels on their way into a matrix product: normalised, widened to the compute type, or where they lie.
#pragma once

#include "far_map.h"
#include "kernels.h"
#include "normalise.h"
#include "row.h"

namespace espk::ESPK_ISA {

// Pixels whose channels lie side by side, `pitch` numbers apart.
template <class C>
struct PixelRows {
  const C* data;
  int64_t pitch;
};

// From pixel to pixel of rows in the cache: an odd number of lines, so that the same channels of many pixels, which are
// what the product of a group reads, do not share a few of its sets.
template <class C>
inline int64_t spread_pitch(int64_t channels) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(C));
  return (ceil_div(channels, kLine) | 1) * kLine;
}

// `pixels` dense pixels of `channels` channels as the problem reads them; `slot` holds them where they are not read in
// place.
template <class T>
inline PixelRows<Compute<T>> input_rows(const NormaliseVectors<Compute<T>>& vectors, const Normalise& normalise,
                                        const T* from, int64_t channels, int64_t pixels, Slot slot) {
  using C = Compute<T>;
  if (!normalise.scale) {
    if constexpr (std::is_same_v<T, C>) return {from, channels};
  }
  const int64_t pitch = spread_pitch<C>(channels);
  C* rows = static_cast<C*>(scratch(slot, pixels * pitch * static_cast<int64_t>(sizeof(C))));
  if (!normalise.scale) {
    for (int64_t i = 0; i < pixels; ++i) copy_row(rows + i * pitch, from + i * channels, channels);
    return {rows, pitch};
  }
  for_channel_blocks<C>(channels, [&](auto lanes, auto vector_count, int64_t first, auto valid) {
    constexpr int N = decltype(lanes)::value, J = decltype(vector_count)::value;
    AffinePreluLanes<C, N> normaliser[J];
    for (int j = 0; j < J; ++j) normaliser[j] = vectors.template at<N>(first + j * N);
    for (int64_t i = 0; i < pixels; ++i) {
      const T* p = from + i * channels + first;
      C* to = rows + i * pitch + first;
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        store_first<N>(to + j * N, normaliser[j](load_first<N>(p + j * N, valid)), valid);
      }
    }
  });
  return {rows, pitch};
}

// The gradient in front of a norm for `pixels` pixels, from the one behind it and the norm's input.
template <class T>
inline PixelRows<Compute<T>> norm_gradient_rows(const NormGradientVectors<Compute<T>>& vectors, const T* grad,
                                                const T* map, int64_t channels, int64_t pixels, Slot slot) {
  using C = Compute<T>;
  const int64_t pitch = spread_pitch<C>(channels);
  C* rows = static_cast<C*>(scratch(slot, pixels * pitch * static_cast<int64_t>(sizeof(C))));
  for_channel_blocks<C>(channels, [&](auto lanes, auto vector_count, int64_t first, auto valid) {
    constexpr int N = decltype(lanes)::value, J = decltype(vector_count)::value;
    NormGradientLanes<C, N> gradient[J];
    for (int j = 0; j < J; ++j) gradient[j] = vectors.template at<N>(first + j * N);
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = i * channels + first;
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const auto g = load_first<N>(grad + at + j * N, valid), v = load_first<N>(map + at + j * N, valid);
        store_first<N>(rows + i * pitch + first + j * N, gradient[j](g, v), valid);
      }
    }
  });
  return {rows, pitch};
}

}  // namespace espk::ESPK_ISA
