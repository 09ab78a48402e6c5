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
inline void sum_suffixes(C* tiles, int64_t branches, int64_t size) {
  constexpr int N = kLanes<C>;
  for (int64_t k = branches - 2; k >= 0; --k) {
    C* to = tiles + k * size;
    const C* from = to + size;
    int64_t i = 0;
    for (; i + N <= size; i += N) store<N>(to + i, load<N>(to + i) + load<N>(from + i));
    for (; i < size; ++i) to[i] += from[i];
  }
}

// sums[t] += sum over a row of gradient x tile for Count taps; `columns` vectors of N lanes, the last with `last` valid
// lanes. Lanes behind the map are never multiplied: they may hold another row's infinity.
template <class C, int N, int Count>
inline void add_taps(C* sums, const C* gradient, const C* tile, const Tap* taps, int64_t columns, int64_t last) {
  using V = Vector<C, N>;
  V sum[Count];
#pragma GCC unroll 9
  for (int t = 0; t < Count; ++t) sum[t] = load<N>(sums + taps[t].weight * N);
  const int64_t whole = last == N ? columns : columns - 1;
  for (int64_t x = 0; x < whole; ++x) {
    const V g = load<N>(gradient + x * N);
#pragma GCC unroll 9
    for (int t = 0; t < Count; ++t) sum[t] += g * load<N>(tile + taps[t].offset + x * N);
  }
  if (whole < columns) {
    const V g = load_first<N>(gradient + whole * N, last);
#pragma GCC unroll 9
    for (int t = 0; t < Count; ++t) sum[t] += g * load_first<N>(tile + taps[t].offset + whole * N, last);
  }
#pragma GCC unroll 9
  for (int t = 0; t < Count; ++t) store<N>(sums + taps[t].weight * N, sum[t]);
}

// The same for all taps of branch `k`, which are 9 where its dilation is less than the map, else those that can touch it.
template <class C, int N>
inline void add_row(C* sums, const C* gradient, const C* tile, const TapList& taps, int64_t k, int64_t columns,
                    int64_t last) {
  const Segment segment = taps.segments[k];
  const Tap* first = taps.taps + segment.first;
  switch (segment.count) {
    case 9: return add_taps<C, N, 9>(sums, gradient, tile, first, columns, last);
    case 3: return add_taps<C, N, 3>(sums, gradient, tile, first, columns, last);
    default: return add_taps<C, N, 1>(sums, gradient, tile, first, columns, last);
  }
}

}  // namespace espk::ESPK_ISA
