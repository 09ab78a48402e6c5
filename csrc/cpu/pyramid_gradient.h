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
    for_taps(p.dilations[k], p.height, p.width, [&](int64_t tap, int64_t y, int64_t x) {
      if ((a - y) % p.stride == 0 && (b - x) % p.stride == 0) {
        list.add(k * tile.size() + tile.offset((a - y) / p.stride, (b - x) / p.stride), 9 * k + tap);
      }
    });
  }
  list.end_segment(p.layout == Layout::channels_last ? tile.lanes : 0);
  return list;
}

// One strip of the gradient of a block of `channels` channels, or of a plane: the tile that each branch fills, in which the
// taps of every class lie, and the sweeps over them. Made once for many strips: taps cost hundreds of divisions.
template <class C>
class GradientStrip {
 public:
  const Pyramid& problem;
  const bool pixels;
  const int64_t channels;
  const int lanes;
  const BlockShape shape;
  const Tile tile;

  GradientStrip(const Pyramid& p, int64_t rows, int64_t channels_of_block)
      : problem(p),
        pixels(p.layout == Layout::channels_last),
        channels(channels_of_block),
        lanes(vector_lanes<C>(pixels ? channels : class_size(p, p.width, 0))),
        shape(choose_block<C>(pixels, lanes, rows, vectors(0))),
        tile(1, pixels ? lanes : 1, gradient_reach(p, p.height), gradient_reach(p, p.width), round_up(rows, shape.rows),
             round_up(vectors(0), shape.columns) * (pixels ? 1 : lanes)) {}

  // `rows` rows of class (a, b), from the filled tiles of all branches; all but where the results go.
  Sweep<C> sweep(int64_t a, int64_t b, int64_t rows, const C* tiles, const C* weights) {
    Sweep<C> s{};
    s.lanes = lanes;
    s.pixels = pixels;
    s.shape = shape;
    s.tile = tiles;
    s.row_step = tile.row_pitch();
    s.rows = rows;
    s.columns = vectors(b);
    s.panel = panel_columns(problem.branches * (2 * tile.border_rows + 1), pixels ? tile.border_columns : 1,
                            lanes * static_cast<int64_t>(sizeof(C)));
    s.taps = &taps(a, b);
    s.weights = weights;
    s.valid = pixels ? channels : class_size(problem, problem.width, b);
    s.valid_step = pixels ? 0 : lanes;
    return s;
  }

 private:
  static constexpr int64_t kKeptStride = 2;  // networks have no longer one; s*s classes of it could fill the memory
  TapList taps_[kKeptStride * kKeptStride];

  // Vectors of one row of the classes (.., b).
  int64_t vectors(int64_t b) const {
    const int64_t columns = class_size(problem, problem.width, b);
    return pixels ? columns : ceil_div(columns, lanes);
  }

  const TapList& taps(int64_t a, int64_t b) {
    const bool kept = problem.stride <= kKeptStride;
    TapList& list = taps_[kept ? a * problem.stride + b : 0];
    if (!kept || list.segment_count == 0) list = class_taps(problem, tile, a, b);
    return list;
  }
};

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
