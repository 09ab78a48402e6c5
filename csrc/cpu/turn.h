// A matrix turned in squares of registers: the step between pixels and planes.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

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
        Vector<C, N> square[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) square[i] = load<N>(x + i * from_row);
        transpose<N, C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store<N>(out + i * to_row, square[i]);
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
