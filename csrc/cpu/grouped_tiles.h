// What a grouped convolution reads: for each input of a group a zero-bordered tile whose lanes are groups.
#pragma once

#include "depthwise_taps.h"
#include "turn.h"

namespace espk::ESPK_ISA {

// Columns that blocks of 4, 7 and 14 divide: a map goes by panel by panel.
inline int64_t group_panel(const GroupedConvolution& p) { return least(p.width, 84); }

template <class C>
inline Strips group_strips(const GroupedConvolution& p) {
  const int64_t row_bytes = (group_panel(p) + 2) * p.in * kLanes<C> * static_cast<int64_t>(sizeof(C));
  return choose_strips(p.height, row_bytes, 2, p.batch);
}

// `count` groups of an image from `first` on.
template <class T>
struct GroupTiles {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  const GroupedConvolution& p;
  const Tile& tile;
  C* tiles;
  int64_t image, first, count;

  void fill(int64_t first_row, Columns columns) const {
    if (p.in == 1) {
      const T* map = static_cast<const T*>(p.x) + image * p.height * p.width * p.groups;
      fill_pixels(tile, tiles, map + first, first_row, p.height, columns, true, p.groups, count);
    } else if (count == N && p.in == 2) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<2>(to, from); });
    } else if (count == N && p.in == 3) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<3>(to, from); });
    } else if (count == N && p.in == 4) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<4>(to, from); });
    } else if (count == N && p.in == 8) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<8>(to, from); });
    } else {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) {
        for (int64_t j = 0; j < p.in; ++j, to += tile.size()) {
          for (int64_t lane = 0; lane < N; ++lane) to[lane] = lane < count ? load_one(from + lane * p.in + j) : C(0);
        }
      });
    }
  }

 private:
  // Where the inputs of a group lie side by side: place(to, from) puts those of a pixel into their tiles.
  template <class Place>
  void fill_in_turn(int64_t first_row, Columns columns, Place&& place) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t y = first_row - tile.border_rows + r;
      C* row = tiles + r * tile.row_pitch();
      auto zero = [&](int64_t position, int64_t positions) {
        for (int64_t j = 0; j < p.in; ++j) fill_zero(row + j * tile.size() + position * N, positions * N);
      };
      if (y < 0 || y >= p.height) {
        zero(0, tile.positions);
        continue;
      }
      const T* map = static_cast<const T*>(p.x) + (image * p.height + y) * p.width * p.in_channels() + first * p.in;
      for_phases(
          tile, columns,
          [&](int64_t position, int64_t column, int64_t positions) {
            for (int64_t i = 0; i < positions; ++i) {
              place(row + (position + i) * N, map + (column + i) * p.in_channels());
            }
          },
          zero);
    }
  }

  // In inputs of N groups. Of a power of two, each round puts every other number of what the round before left in front,
  // first by the last bit of an input's number, in the end by its first; N inputs are a matrix to transpose.
  template <int In>
  void separate(C* to, const T* from) const {
    if constexpr (In == N) {
      turn_square<N>(from, N, [&](int i, Vector<C, N> v) { store<N>(to + i * tile.size(), v); });
    } else if constexpr (In == 3) {
      constexpr std::make_index_sequence<N> lanes{};
      const Vector<C, N> v[] = {load<N>(from), load<N>(from + N), load<N>(from + 2 * N)};
      store<N>(to, every_third<0>(v, lanes));
      store<N>(to + tile.size(), every_third<1>(v, lanes));
      store<N>(to + 2 * tile.size(), every_third<2>(v, lanes));
    } else {
      constexpr std::make_index_sequence<N> lanes{};
      Vector<C, N> v[In], last[In];
#pragma GCC unroll 8
      for (int i = 0; i < In; ++i) v[i] = load<N>(from + i * N);
#pragma GCC unroll 3
      for (int bit = 1; bit < In; bit *= 2) {
        __builtin_memcpy(&last, &v, sizeof v);
#pragma GCC unroll 4
        for (int i = 0; i < In / 2; ++i) {
          v[i] = every_other<0>(last[2 * i], last[2 * i + 1], lanes);
          v[In / 2 + i] = every_other<1>(last[2 * i], last[2 * i + 1], lanes);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < In; ++i) store<N>(to + i * tile.size(), v[i]);
    }
  }
};

}  // namespace espk::ESPK_ISA
