// A matrix turned in squares of registers: the step between pixels and planes.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

// Calls column(j, numbers) for each column of the N x N numbers at `from`, rows `row` apart.
template <int N, class T, class Column>
[[gnu::always_inline]] inline void turn_square(const T* from, int64_t row, Column&& column) {
  using C = Compute<T>;
#if defined(__AVX2__)
  // Halves of rows four apart come into one register as they are loaded, for which no shuffle is needed: 16 of them are,
  // and half as many registers.
  if constexpr (std::is_same_v<T, float> && N == 8) {
    const float* rows[] = {from, from + 4 * row};
    asm("" : "+r"(rows[0]), "+r"(rows[1]));  // or compilers keep an address a row, and spill
#pragma GCC unroll 2
    for (int half = 0; half < N; half += 4) {
      __m256 v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + i * row + half));
        v[i] = _mm256_insertf128_ps(low, _mm_loadu_ps(rows[1] + i * row + half), 1);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256d above = (__m256d)(i == 0 ? _mm256_unpacklo_ps(v[0], v[1]) : _mm256_unpackhi_ps(v[0], v[1]));
        const __m256d below = (__m256d)(i == 0 ? _mm256_unpacklo_ps(v[2], v[3]) : _mm256_unpackhi_ps(v[2], v[3]));
        column(half + 2 * i, (Vector<C, N>)_mm256_unpacklo_pd(above, below));
        column(half + 2 * i + 1, (Vector<C, N>)_mm256_unpackhi_pd(above, below));
      }
    }
    return;
  }
#endif
  Vector<C, N> square[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) square[i] = load<N>(from + i * row);
  transpose<N, C>(square);
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) column(j, square[j]);
}

// to[j][i] = from[i][j], rows `to_row` and `from_row` apart. Types of two bytes go through float32 and back, which changes no
// number.
template <class T>
inline void turn(T* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t columns) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  for (int64_t column = 0; column < columns; column += N) {
    const int64_t wide = least(N, columns - column);
    for (int64_t row = 0; row < rows; row += N) {
      const int64_t high = least(N, rows - row);
      const T* x = from + row * from_row + column;
      T* out = to + column * to_row + row;
      if (wide == N && high == N) {
        turn_square<N>(x, from_row, [&](int i, Vector<C, N> v) { store<N>(out + i * to_row, v); });
      } else {
        Vector<C, N> square[N]{};  // one of its own, in memory: the other stays in registers
        for (int64_t i = 0; i < high; ++i) square[i] = load_first<N>(x + i * from_row, wide);
        transpose<N, C>(square);
        for (int64_t i = 0; i < wide; ++i) store_first<N>(out + i * to_row, square[i], high);
      }
    }
  }
}

}  // namespace espk::ESPK_ISA
