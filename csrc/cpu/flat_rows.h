// Depthwise taps over rows of pixels as runs of numbers: a vector holds parts of several pixels, a tap one column beside it
// reads as many numbers beside it as a pixel has channels, and no lane is idle. Ten channels, a block a pixel, would fill
// ten lanes of sixteen.
#pragma once

#include <numeric>

#include "affine_prelu.h"
#include "kernels.h"
#include "normalise.h"
#include "row.h"

namespace espk::ESPK_ISA {

// Rows whose sums of one vector are in registers: they share its weights, and hide the latency of the multiply-adds.
constexpr int kFlatRows = 8;

// Numbers [origin, origin + pitch) of some rows.
template <class T>
struct FlatRows {
  T* numbers;
  int64_t origin, pitch;

  T* at(int64_t row, int64_t number) const { return numbers + row * pitch + (number - origin); }
};

// An odd number of cache lines: rows a power of two apart would share few sets of the cache.
template <class C>
inline int64_t flat_pitch(int64_t numbers) {
  constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(C));
  return (ceil_div(numbers, line) | 1) * line;
}

// Vectors of a panel of a row: panels are equal, and of some 768 numbers, so that rows of several maps stay in the
// second-level cache.
inline int64_t flat_panel(int64_t vectors, int lanes, int64_t channels) {
  return ceil_div(vectors, ceil_div(vectors * lanes, most(768, 4 * channels)));
}

// Room for `rows` rows of vectors [first, end) and of `beside` numbers to each side.
template <class C>
inline FlatRows<C> rows_around(int64_t rows, int64_t first, int64_t end, int64_t beside) {
  constexpr int N = kLanes<C>;
  const int64_t vectors = ceil_div(beside, N), pitch = flat_pitch<C>((end - first + 2 * vectors) * N);
  return {static_cast<C*>(scratch(Slot::rows, rows * pitch * static_cast<int64_t>(sizeof(C)))), (first - vectors) * N,
          pitch};
}

// Row `row` of `rows`: number(i, valid) is the vector from number i of the map's row on, zeros lie beside it.
template <class C, class Number>
inline void fill_row(const FlatRows<C>& rows, int64_t row, int64_t length, Number&& number) {
  constexpr int N = kLanes<C>;
  const int64_t begin = most(rows.origin, 0), end = least(rows.origin + rows.pitch, length);
  fill_zero(rows.at(row, rows.origin), begin - rows.origin);
  C* to = rows.at(row, begin);
  for_whole_vectors<N>(end - begin,
                       [&](int64_t i, int64_t valid) { store_first<N>(to + i, number(begin + i, valid), valid); });
  fill_zero(rows.at(row, end), rows.origin + rows.pitch - end);
}

// For each vector of a row its weights [taps][N], then scale, shift and slope [3][N]; the same again after `period` vectors.
template <class C>
struct FlatWeights {
  static constexpr int N = kLanes<C>;

  C* blocks = nullptr;
  int64_t taps = 0, period = 0;

  int64_t size() const { return (taps + 3) * N; }
  int64_t numbers() const { return period * size(); }
  const C* end() const { return blocks + numbers(); }
  C* of(int64_t vector) const { return blocks + vector % period * size(); }

  FlatWeights() = default;
  FlatWeights(int64_t taps, int64_t period, Carving& memory) : taps(taps), period(period) {
    blocks = memory.take<C>(numbers());
  }

  // The same for every pixel of rows of `length` numbers: after a whole number of pixels one begins where a vector does.
  static FlatWeights of_channels(int64_t taps, int64_t length, int64_t channels, Carving& memory) {
    return {taps, least(ceil_div(length, N), channels / std::gcd(channels, int64_t{N})), memory};
  }

  // weight(channel, tap); a vector of the epilogue that is none is `otherwise`.
  template <class Weight>
  void fill(int64_t channels, const Epilogue& epilogue, Weight&& weight) const {
    for (int64_t number = 0; number < period * N; ++number) {
      const int64_t channel = number % channels;
      C* to = of(number / N) + number % N;
      for (int64_t tap = 0; tap < taps; ++tap, to += N) *to = weight(channel, tap);
      auto put = [&](const void* values, C otherwise) {
        *to = values ? static_cast<const C*>(values)[channel] : otherwise;
        to += N;
      };
      put(epilogue.scale, 1);
      put(epilogue.shift, 0);
      put(epilogue.slope, 1);
    }
  }

  // Filters [channels][maps][3][3] in the order of sweep_flat.
  template <class T>
  void fill_filters(const T* filters, int64_t maps, int64_t channels, const Epilogue& epilogue) const {
    fill(channels, epilogue, [&](int64_t channel, int64_t tap) {
      return load_one(filters + (channel * maps + tap / 9) * 9 + tap % 3 * 3 + tap % 9 / 3);
    });
  }
};

// Where sums go: vectors [first, end) of `count` rows of `length` numbers.
template <class T>
struct FlatSums {
  FlatRows<T> rows;
  int64_t first, end, count, length;

  template <int N>
  [[gnu::always_inline]] void store_column(const Vector<Compute<T>, N> (&sum)[kFlatRows], int64_t vector,
                                           const Compute<T>* affine) const {
    const AffinePreluLanes<Compute<T>, N> finish{load<N>(affine), load<N>(affine + N), load<N>(affine + 2 * N)};
    const int64_t left = length - vector * N;
    T* to = rows.at(0, vector * N);
    if (left >= N && count == kFlatRows) {
#pragma GCC unroll 8
      for (int r = 0; r < kFlatRows; ++r) store<N>(to + r * rows.pitch, finish(sum[r]));
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kFlatRows; ++r) {
        if (r < count) store_first<N>(to + r * rows.pitch, finish(sum[r]), left);
      }
    }
  }
};

// Where the window of each of kFlatRows rows begins, from the first one's on: one row below the one before, or one and a
// half (half a row is left out, first of all where the first one's number is Odd), or two.
template <int Halves, int Odd>
constexpr int window_of(int row) {
  return (row + Odd) * Halves / 2 - Odd * Halves / 2;
}

// Sums over several maps, each `map_step` numbers behind the one before, of taps over `Window` rows and `reach` columns to
// each side. Row 0 of `from` is the first of the first window. Weights: [maps][columns][rows]. A number is loaded once for
// all rows that it serves.
template <int Window, int Halves, int Odd, class C, class T>
[[gnu::noinline]] void sweep_flat(const FlatRows<C>& from, int64_t maps, int64_t map_step, int64_t reach,
                                  int64_t channels, const FlatWeights<C>& weights, const FlatSums<T>& sums) {
  constexpr int N = kLanes<C>, touched = window_of<Halves, Odd>(kFlatRows - 1) + Window;
  using V = Vector<C, N>;
  const C* w = weights.of(sums.first);
  for (int64_t vector = sums.first; vector < sums.end; ++vector) {
    V sum[kFlatRows] = {};
    const C* left = from.at(0, vector * N - reach * channels);
    for (int64_t k = 0; k < maps; ++k, left += map_step) {
      const C* p = left;
      for (int64_t column = -reach; column <= reach; ++column, p += channels, w += Window * N) {
        V weight[Window];
#pragma GCC unroll 4
        for (int u = 0; u < Window; ++u) weight[u] = load<N>(w + u * N);
        // Each sum takes its rows from the first on, wherever in these it lies: so its bits do not tell where a strip began.
        const C* at = p;
#pragma GCC unroll 20
        for (int row = 0; row < touched; ++row, at += from.pitch) {
          asm("" : "+r"(at));  // compilers keep the place of each row in memory, and read it again, if they know it
          V v = load<N>(at);
          hold(v);
#pragma GCC unroll 4
          for (int u = 0; u < Window; ++u) {
#pragma GCC unroll 8
            for (int r = 0; r < kFlatRows; ++r) {
              if (window_of<Halves, Odd>(r) + u == row) sum[r] += weight[u] * v;
            }
          }
        }
      }
    }
    sums.template store_column<N>(sum, vector, w);
    w += 3 * N;
    if (w == weights.end()) w = weights.blocks;
  }
}

// A map of `height` rows convolved depthwise 3x3, from row `row` on.
template <class T, class To>
void filter_rows(const T* map, int64_t height, int64_t row, int64_t channels, const FlatWeights<Compute<T>>& weights,
                 const FlatSums<To>& sums) {
  using C = Compute<T>;
  const FlatRows<C> rows = rows_around<C>(kFlatRows + 2, sums.first, sums.end, channels);
  for (int64_t y = row - 1; y <= row + sums.count; ++y) {
    if (y < 0 || y >= height) {
      fill_zero(rows.at(y - row + 1, rows.origin), rows.pitch);
    } else {
      const T* from = map + y * sums.length;
      fill_row(rows, y - row + 1, sums.length,
               [&](int64_t i, int64_t valid) { return load_first<kLanes<C>>(from + i, valid); });
    }
  }
  sweep_flat<3, 2, 0>(rows, 1, 0, 1, channels, weights, sums);
}

}  // namespace espk::ESPK_ISA
