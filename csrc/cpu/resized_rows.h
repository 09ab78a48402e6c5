// Rows of a map as bilinear resizing makes them, some columns and one block of channels at a time.
#pragma once

#include "bilinear.h"
#include "row.h"

namespace espk::ESPK_ISA {

template <class T>
struct ResizedRows {
  const T* x;  // the map's first pixel, from the block's first channel on
  int64_t valid, pixel;  // channels of the block, and of the map
  int64_t height, width, out_height, out_width;
  const Between<Compute<T>>* columns;  // from place_columns

  // Columns [first, end) of row `row`, N channels a column, as last(them); zeros beside the resized map. `mixed` has room
  // for the columns that they lie between.
  template <int N, class Last>
  void make(int64_t row, int64_t first, int64_t end, Compute<T>* mixed, Compute<T>* to, Last&& last) const {
    using C = Compute<T>;
    if (row < 0 || row >= out_height) return fill_zero(to, (end - first) * N);
    const int64_t begin = most(first, 0), stop = least(end, out_width);
    const int64_t left = columns[begin].first, right = columns[stop - 1].second + 1;
    const Between<C> rows(row, height, out_height);
    const T* upper = x + (rows.first * width + left) * pixel;
    const T* lower = x + (rows.second * width + left) * pixel;
    for (int64_t i = 0; i < right - left; ++i) {
      const Vector<C, N> a = load_first<N>(upper + i * pixel, valid);
      store<N>(mixed + i * N, rows.mix(a, load_first<N>(lower + i * pixel, valid)));
    }
    fill_zero(to, (begin - first) * N);
    fill_zero(to + (stop - first) * N, (end - stop) * N);
    for (int64_t i = begin; i < stop; ++i) {
      const Vector<C, N> a = load<N>(mixed + (columns[i].first - left) * N);
      const Vector<C, N> b = load<N>(mixed + (columns[i].second - left) * N);
      store<N>(to + (i - first) * N, last(columns[i].mix(a, b)));
    }
  }
};

}  // namespace espk::ESPK_ISA
