// One strip of a spatial pyramid: the tile that its outputs find all their taps in, the taps, and the sweep over them.
#pragma once

#include "branch_weights.h"
#include "depthwise_taps.h"
#include "kernels.h"

namespace espk::ESPK_ISA {

// `innermost` is what a vector runs along: the columns of a plane, or the channels of one block of a pixel.
// The tile holds `rows` output rows; `step` of them are swept at a time (all, unless said otherwise), and it is
// `out_columns` output columns wide (all).
template <class C>
struct PyramidStrip {
  const Pyramid& problem;
  bool pixels;
  int lanes;
  int64_t valid, columns;
  BlockShape shape;
  Tile tile;
  TapList taps;

  PyramidStrip(const Pyramid& p, int64_t rows, int64_t innermost)
      : PyramidStrip(p, rows, innermost, rows, p.out_width) {}

  PyramidStrip(const Pyramid& p, int64_t rows, int64_t innermost, int64_t step, int64_t out_columns)
      : problem(p),
        pixels(p.layout == Layout::channels_last),
        lanes(vector_lanes<C>(innermost)),
        valid(innermost),
        columns(pixels ? out_columns : ceil_div(out_columns, lanes)),
        shape(choose_block<C>(pixels, lanes, step, columns)),
        tile(p.stride, pixels ? lanes : 1, reach(p, p.height), reach(p, p.width), rows + shape.rows - 1,
             round_up(columns, shape.columns) * (pixels ? 1 : lanes)) {
    for (int64_t k = 0; k < p.branches; ++k) {
      taps.begin_segment();
      for_taps(p.dilations[k], p.height, p.width,
               [&](int64_t tap, int64_t y, int64_t x) { taps.add(tile.offset(y, x), 9 * k + tap); });
      taps.end_segment(pixels ? lanes : 0);
    }
  }

  // Memory for `count` tiles, all zero.
  C* zeroed_tiles(int64_t count = 1) const {
    C* tiles = static_cast<C*>(scratch(Slot::tile, count * tile.size() * static_cast<int64_t>(sizeof(C))));
    fill_zero(tiles, count * tile.size());
    return tiles;
  }

  // All but where the results go (planes: out_column is set already).
  Sweep<C> sweep(const C* filled, int64_t rows, const C* weights) const {
    Sweep<C> s{};
    s.lanes = lanes;
    s.pixels = pixels;
    s.shape = shape;
    s.tile = filled;
    s.row_step = problem.stride * tile.row_pitch();
    s.rows = rows;
    s.columns = columns;
    s.panel = panel_columns(2 * tile.border_rows + shape.rows, pixels ? tile.border_columns / problem.stride : 1,
                            problem.stride * lanes * static_cast<int64_t>(sizeof(C)));
    s.taps = &taps;
    s.weights = weights;
    s.carry = problem.hff;
    s.out_column = lanes;
    s.valid = valid;
    s.valid_step = pixels ? 0 : lanes;
    return s;
  }
};

// Channels `channel` and on of the first branch; all three vectors, or none.
template <class C>
inline void set_epilogue(Sweep<C>& sweep, const SpatialPyramid& p, int64_t channel) {
  if (!p.epilogue.scale) return;
  sweep.scale = static_cast<const C*>(p.epilogue.scale) + channel;
  sweep.shift = static_cast<const C*>(p.epilogue.shift) + channel;
  sweep.slope = static_cast<const C*>(p.epilogue.slope) + channel;
  sweep.epilogue_segment = p.channels;
}

// Maps that strips are cut from: blocks of channels, or single channels.
template <class C>
inline int64_t pyramid_maps(const Pyramid& p) {
  return p.layout == Layout::channels_last ? ceil_div(p.channels, kLanes<C>) : p.channels;
}

// The same cut on every machine of an instruction set and for every number of threads.
template <class C>
inline Strips pyramid_strips(const Pyramid& p) {
  const int64_t lanes = p.layout == Layout::channels_last ? least(kLanes<C>, p.channels) : 1;
  const int64_t reach_y = reach(p, p.height);
  const int64_t row_bytes = (p.width + 2 * reach(p, p.width)) * lanes * static_cast<int64_t>(sizeof(C));
  return choose_strips(p.out_height, p.stride * row_bytes, ceil_div(2 * reach_y + 1, p.stride),
                       p.batch * pyramid_maps<C>(p));
}

}  // namespace espk::ESPK_ISA
