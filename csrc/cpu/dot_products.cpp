// Sums over contiguous runs of two matrices: a block of I x J dot products shares I + J loads a step.
#include "matrix_product.h"

namespace espk::ESPK_ISA {
namespace {

template <class C, int I, int J>
void add_block(const DotProducts<C>& p, int64_t row, int64_t column) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  V sum[I * J];
#pragma GCC unroll 16
  for (int i = 0; i < I * J; ++i) sum[i] = V{};
  const int64_t whole = p.depth - p.depth % N;
  for (int64_t part = 0; part < p.parts; ++part) {
    const C* a = p.a + row * p.a_row + part * p.a_part;
    const C* b = p.b + column * p.b_row + part * p.b_part;
    for (int64_t k = 0; k < whole; k += N) {
      V right[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) right[j] = load<N>(b + j * p.b_row + k);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
        const V left = load<N>(a + i * p.a_row + k);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[i * J + j] += left * right[j];
      }
    }
    if (whole < p.depth) {
      V right[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) right[j] = load_first<N>(b + j * p.b_row + whole, p.depth - whole);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
        const V left = load_first<N>(a + i * p.a_row + whole, p.depth - whole);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[i * J + j] += left * right[j];
      }
    }
  }
  C totals[I * J];
  if constexpr (I * J % N == 0) {
#pragma GCC unroll 8
    for (int first = 0; first < I * J; first += N) {
      V few[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) few[i] = sum[first + i];
      store<N>(totals + first, sum_lanes<N, C>(few));
    }
  } else {
    for (int i = 0; i < I * J; ++i) {
      C lanes[N];
      store<N>(lanes, sum[i]);
      totals[i] = lanes[0];
      for (int lane = 1; lane < N; ++lane) totals[i] += lanes[lane];
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < J; ++j) p.out[(row + i) * p.out_row + column + j] += totals[i * J + j];
  }
}

}  // namespace

template <class C>
void add_dots(const DotProducts<C>& p) {
  constexpr int I = 4, J = kRegisters == 32 ? 4 : 2;
  for (int64_t row = 0; row < p.rows;) {
    if (row + I <= p.rows) {
      int64_t column = 0;
      for (; column + J <= p.columns; column += J) add_block<C, I, J>(p, row, column);
      for (; column < p.columns; ++column) add_block<C, I, 1>(p, row, column);
      row += I;
    } else {
      for (int64_t column = 0; column < p.columns; ++column) add_block<C, 1, 1>(p, row, column);
      ++row;
    }
  }
}

template void add_dots(const DotProducts<float>& p);
template void add_dots(const DotProducts<double>& p);

}  // namespace espk::ESPK_ISA
