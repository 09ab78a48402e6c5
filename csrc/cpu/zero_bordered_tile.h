// A strip of rows of one map in the compute type with zeros around it, so that a dilated tap is one fixed offset and no
// inner loop ever asks whether it has left the map.
//
// A position holds `lanes` numbers: the channels of one block (channels_last), or one number (contiguous). With stride s
// the columns lie in s phases (column q at phase q % s, position q / s), so that the inputs of neighbouring outputs are
// neighbours for every tap.
#pragma once

#include "row.h"

namespace espk::ESPK_ISA {

struct Tile {
  int64_t stride, lanes;
  int64_t border_rows, border_columns;  // zeros above the map, and to the left of it (a multiple of the stride)
  int64_t rows, positions;  // positions of one phase

  // A tile in which `out_rows` x `out_columns` outputs find all taps at most reach_y, reach_x away.
  Tile(int64_t stride, int64_t lanes, int64_t reach_y, int64_t reach_x, int64_t out_rows, int64_t out_columns)
      : stride(stride),
        lanes(lanes),
        border_rows(reach_y),
        border_columns(round_up(reach_x, stride)),
        rows((out_rows - 1) * stride + 2 * reach_y + 1),
        positions(out_columns + (border_columns + reach_x) / stride) {}

  int64_t row_pitch() const { return stride * positions * lanes; }
  int64_t size() const { return rows * row_pitch(); }

  // As many of its rows, as a tile to fill.
  Tile of_rows(int64_t count) const {
    Tile part = *this;
    part.rows = count;
    return part;
  }

  // Where rows come round, the row after the last is the first: calls f(part, offset, first) for the parts of the tile, one
  // or several, that rows [begin, end) fill, with the part's offset in the tile and the first of its rows.
  template <class F>
  void for_rounds(int64_t begin, int64_t end, F&& f) const {
    while (begin < end) {
      const int64_t at = begin % rows, count = least(end - begin, rows - at);
      f(of_rows(count), at * row_pitch(), begin);
      begin += count;
    }
  }

  // Distance from the first output's element at row 0, position 0 to its tap at (y, x).
  int64_t offset(int64_t y, int64_t x) const {
    const int64_t column = x + border_columns;
    return (y + border_rows) * row_pitch() + ((column % stride) * positions + column / stride) * lanes;
  }
};

// The columns of a map `width` wide that a tile holds: position 0 of its first phase is column first - border_columns.
struct Columns {
  int64_t first, width;
};

// Calls copy(position, column, count) for the columns of each phase that lie in the map, and zero(position, count) for
// the positions beside them.
template <class Copy, class Zero>
inline void for_phases(const Tile& tile, Columns columns, Copy&& copy, Zero&& zero) {
  for (int64_t phase = 0; phase < tile.stride; ++phase) {
    const int64_t leftmost = columns.first - tile.border_columns + phase, position = phase * tile.positions;
    const int64_t begin = least(leftmost < 0 ? ceil_div(-leftmost, tile.stride) : 0, tile.positions);
    const int64_t end = most(begin, least(tile.positions, ceil_div(columns.width - leftmost, tile.stride)));
    zero(position, begin);
    if (begin < end) copy(position + begin, leftmost + begin * tile.stride, end - begin);
    zero(position + end, tile.positions - end);
  }
}

// The functions below write the map's rows and columns; the caller zeroes a tile when its memory or its sizes change.
// What lies beside the map stays zero from fill to fill where the tile always starts at the same row and column; `moving`
// says that it does not, and zeroes it.

// Rows first_row .. of the plane `from` [height][columns.width] into a tile of one lane.
template <class T>
void fill_plane(const Tile& tile, Compute<T>* to, const T* from, int64_t first_row, int64_t height, Columns columns,
                bool moving);

// Rows first_row .. of a map, tile.lanes numbers a position: read(pixel) gives those of the map's pixel as a vector of N
// lanes, the tile's.
template <int N, class C, class Read>
inline void fill_positions(const Tile& tile, C* to, int64_t first_row, int64_t height, Columns columns, bool moving,
                           Read&& read) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t y = first_row - tile.border_rows + r;
    C* out = to + r * tile.row_pitch();
    if (y < 0 || y >= height) {
      if (moving) fill_zero(out, tile.row_pitch());
      continue;
    }
    for_phases(
        tile, columns,
        [&](int64_t position, int64_t column, int64_t count) {
          const int64_t pixel = y * columns.width + column;
          for (int64_t i = 0; i < count; ++i) store<N>(out + (position + i) * N, read(pixel + i * tile.stride));
        },
        [&](int64_t position, int64_t count) {
          if (moving) fill_zero(out + position * N, count * N);
        });
  }
}

// The same of `channels` channels of a map in memory whose pixels lie `pixel` elements apart. Of a map `far` from the
// caches, rows are fetched two ahead.
template <class T>
void fill_pixels(const Tile& tile, Compute<T>* to, const T* from, int64_t first_row, int64_t height, Columns columns,
                 bool moving, int64_t pixel, int64_t channels, bool far = false);

}  // namespace espk::ESPK_ISA
