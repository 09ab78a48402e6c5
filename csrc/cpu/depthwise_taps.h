// What every depthwise pass, forward and backward, asks of the one inner loop in depthwise_taps.cpp: sums of
// weight x shifted tile over a list of taps.
#pragma once

#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {

constexpr int64_t kMaxTaps = 9 * kMaxBranches;

// Where a tap reads relative to its output, and which weight it takes.
struct Tap {
  int64_t offset, weight;
};

// Taps of a segment that read the same vectors for outputs `step` columns apart: one load serves up to three of them.
struct TapRun {
  static constexpr int kMostTaps = 3, kMostStep = 4;

  int64_t offset, weights[kMostTaps];
  int count, step;
  int alike;  // runs of this count and step from this one on, with no other between them
};

// Taps of one branch, `count` of them from `first` on, and the runs they form.
struct Segment {
  int first, count;
  int first_run, run_count;
};

struct TapList {
  Tap taps[kMaxTaps];
  TapRun runs[kMaxTaps];
  Segment segments[kMaxBranches];
  int count = 0, run_count = 0, segment_count = 0;

  void add(int64_t offset, int64_t weight) { taps[count++] = {offset, weight}; }
  void begin_segment() { segments[segment_count++] = {count, 0, run_count, 0}; }

  // `lanes` numbers lie between the columns of the tile; with 0, where a vector holds many columns, no taps form a run.
  void end_segment(int64_t lanes);
};

// How far any tap reaches that can touch a map of this size: a dilation of at least the size only ever meets zeros.
inline int64_t reach(const Pyramid& p, int64_t size) {
  int64_t farthest = 0;
  for (int64_t k = 0; k < p.branches; ++k) {
    if (p.dilations[k] < size) farthest = most(farthest, p.dilations[k]);
  }
  return farthest;
}

// Calls f(tap, y, x) for the 3x3 taps that can touch the map, with their distances.
template <class F>
inline void for_taps(int64_t dilation, int64_t height, int64_t width, F&& f) {
  for (int64_t i = 0; i < 3; ++i) {
    if (i != 1 && dilation >= height) continue;
    for (int64_t j = 0; j < 3; ++j) {
      if (j != 1 && dilation >= width) continue;
      f(3 * i + j, (i - 1) * dilation, (j - 1) * dilation);
    }
  }
}

// A block of outputs held in registers: `rows` x `columns` vectors.
struct BlockShape {
  int rows, columns;
};

// Sums of a strip: for each segment, and each of rows x columns output vectors, the sum of weight x tile over its taps.
// With `carry` a segment goes on from the sum of the one before it: hierarchical feature fusion costs nothing.
template <class C>
struct Sweep {
  int lanes;           // numbers in a vector: channels of a pixel (pixels), or columns of a plane
  bool pixels;         // weights are vectors, one number a channel; else one number for all lanes
  BlockShape shape;    // from choose_block
  const C* tile;       // output (row, column) has its taps around tile + first + row * row_step + column * lanes
  int64_t first = 0, row_step;
  int64_t round = INT64_MAX;  // the tile's size where its rows come round: the row after the last is the first
  int64_t rows, columns;
  int64_t panel;  // columns that go through all rows before the next ones, from panel_columns
  const TapList* taps;
  const C* weights;
  bool carry;
  C* out;
  int64_t out_segment, out_row, out_column;  // steps of the result
  int64_t valid, valid_step;                 // vector `column` holds valid - column * valid_step numbers to store
  const C *scale = nullptr, *shift = nullptr, *slope = nullptr;  // affine and PReLU of the result, all three or none
  int64_t epilogue_segment = 0;                                  // their step from segment to segment
  bool far = false;  // vectors are whole lines, and are stored past the cache
};

template <class C>
void sweep(const Sweep<C>& s);

// The block shape that wastes the fewest sums on a strip of rows x columns vectors of `lanes` numbers.
template <class C>
BlockShape choose_block(bool pixels, int64_t lanes, int64_t rows, int64_t columns);

// How many columns of vectors keep all that their taps touch, `rows` rows and reach_x columns to each side, in the
// first-level cache. Wider strips are swept panel by panel; on rows of 128 pixels that saves a twentieth of the time.
inline int64_t panel_columns(int64_t rows, int64_t reach_x, int64_t vector_bytes) {
  constexpr int64_t kNearBytes = 32 * 1024;
  return kNearBytes / (rows * vector_bytes) - 2 * reach_x;
}

// How the rows of a map are cut into strips: each has `rows` rows, and a tile of it with its borders stays in the cache.
struct Strips {
  int64_t rows, count;
};

constexpr int64_t kTileBytes = 256 * 1024, kMostTileBytes = 1024 * 1024;

// bytes_of_row: the tile rows of one row of the strip, 0 where they come round; overlap: rows read beyond those of the
// strip itself; others: units besides the strips; wanted: units at least, where rows allow.
inline Strips choose_strips(int64_t height, int64_t bytes_of_row, int64_t overlap, int64_t others, int64_t wanted = 8) {
  const int64_t row = most(bytes_of_row, 1);
  // Rows read twice cost as much as rows read once: a strip is no shorter than its overlap, where memory allows.
  const int64_t shortest = most(least(overlap, kMostTileBytes / row - overlap), 4);
  int64_t rows = most(kTileBytes / row - overlap, shortest);
  if (others < wanted) rows = least(rows, most(ceil_div(height * others, wanted), shortest));
  rows = least(rows, most(height, 1));
  const int64_t count = ceil_div(height, rows);
  return {count > 0 ? ceil_div(height, count) : rows, count};
}

}  // namespace espk::ESPK_ISA
