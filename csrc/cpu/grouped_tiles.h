// What a grouped convolution reads: for each input of a group a zero-bordered tile whose lanes are groups.
#pragma once

#include "turn.h"
#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {

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

  // In, a power of two, inputs of N groups. Each round puts every other number of what the round before left in front,
  // first by the last bit of an input's number, in the end by its first; N inputs are a matrix to transpose.
  template <int In>
  void separate(C* to, const T* from) const {
    if constexpr (In == N) {
      turn_square<N>(from, N, [&](int i, Vector<C, N> v) { store<N>(to + i * tile.size(), v); });
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
