// What the gradients of a pyramid share. For the input: pixels of one class (a, b), which all meet the same taps, as sums
// over tiles of the branches' gradients. For the weights: dot products of rows of those with the tile of the input.
#pragma once

#include "depthwise_taps.h"

namespace espk::ESPK_ISA {

// How far the taps of any class reach in the gradient's map.
inline int64_t gradient_reach(const Pyramid& p, int64_t size) { return (reach(p, size) + p.stride - 1) / p.stride; }

// Rows (or columns) of class a among `size`.
inline int64_t class_size(const Pyramid& p, int64_t size, int64_t a) {
  return size > a ? ceil_div(size - a, p.stride) : 0;
}

// The taps of class (a, b): those of every branch that hit a row and a column of the gradient.
inline TapList class_taps(const Pyramid& p, const Tile& tile, int64_t a, int64_t b) {
  TapList list;
  list.begin_segment();
  for (int64_t k = 0; k < p.branches; ++k) {
    for_taps(p, k, [&](int64_t tap, int64_t y, int64_t x) {
      if ((a - y) % p.stride == 0 && (b - x) % p.stride == 0) {
        list.add(k * tile.size() + tile.offset((a - y) / p.stride, (b - x) / p.stride), 9 * k + tap);
      }
    });
  }
  list.end_segment(p.layout == Layout::channels_last ? tile.lanes : 0);
  return list;
}

// Turns the K filled tiles of the branches' gradients into their suffix sums.
template <class C>
void sum_suffixes(C* tiles, int64_t branches, int64_t size);

// sums[tap] += sum over a row of gradient x tile, for the taps of branch `k` that can touch the map. A row is `columns`
// vectors of `lanes` numbers, the last with `last` valid ones: those behind the map are never multiplied, since they may
// hold another row's infinity. Compiled for float and double.
template <class C>
void add_row(int lanes, C* sums, const C* gradient, const C* tile, const TapList& taps, int64_t k, int64_t columns,
             int64_t last);

}  // namespace espk::ESPK_ISA
