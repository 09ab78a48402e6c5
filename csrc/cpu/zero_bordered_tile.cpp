#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {

template <class T>
void fill_plane(const Tile& tile, Compute<T>* to, const T* from, int64_t first_row, int64_t height, Columns columns,
                bool moving) {
  for (int64_t r = 0; r < tile.rows; ++r, to += tile.row_pitch()) {
    const int64_t y = first_row - tile.border_rows + r;
    if (y < 0 || y >= height) {
      if (moving) fill_zero(to, tile.row_pitch());
      continue;
    }
    for_phases(
        tile, columns,
        [&](int64_t position, int64_t column, int64_t count) {
          gather_in(to + position, from + y * columns.width + column, count, tile.stride);
        },
        [&](int64_t position, int64_t count) {
          if (moving) fill_zero(to + position, count);
        });
  }
}

template <class T>
void fill_pixels(const Tile& tile, Compute<T>* to, const T* from, int64_t first_row, int64_t height, Columns columns,
                 bool moving, int64_t pixel, int64_t channels, bool far) {
  with_lanes<Compute<T>>(tile.lanes, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    if (far) {
      fill_positions<N>(tile, to, first_row, height, columns, moving, [&](int64_t at) {
        __builtin_prefetch(from + (at + 2 * columns.width) * pixel, 0, 2);
        return load_first<N>(from + at * pixel, channels);
      });
    } else if (channels == N) {
      fill_positions<N>(tile, to, first_row, height, columns, moving,
                        [&](int64_t at) { return load<N>(from + at * pixel); });
    } else {
      fill_positions<N>(tile, to, first_row, height, columns, moving,
                        [&](int64_t at) { return load_first<N>(from + at * pixel, channels); });
    }
  });
}

template void fill_plane(const Tile&, float*, const float*, int64_t, int64_t, Columns, bool);
template void fill_pixels(const Tile&, float*, const float*, int64_t, int64_t, Columns, bool, int64_t, int64_t, bool);
template void fill_plane(const Tile&, double*, const double*, int64_t, int64_t, Columns, bool);
template void fill_pixels(const Tile&, double*, const double*, int64_t, int64_t, Columns, bool, int64_t, int64_t, bool);
template void fill_plane(const Tile&, float*, const bfloat16*, int64_t, int64_t, Columns, bool);
template void fill_pixels(const Tile&, float*, const bfloat16*, int64_t, int64_t, Columns, bool, int64_t, int64_t,
                          bool);
template void fill_plane(const Tile&, float*, const float16*, int64_t, int64_t, Columns, bool);
template void fill_pixels(const Tile&, float*, const float16*, int64_t, int64_t, Columns, bool, int64_t, int64_t, bool);

}  // namespace espk::ESPK_ISA
