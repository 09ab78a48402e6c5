// Register-blocked matrix product: I rows x J vectors of sums stay in registers while the depth goes by; each step
// loads J vectors, reads I numbers, and does I * J fused multiply-adds.
#include "matrix_product.h"

#include "affine_prelu.h"

namespace espk::ESPK_ISA {
namespace {

// The first `rows` rows of a block's sums [..][vectors][N] into the result; of the last vector, what `valid` says.
template <class C, int N>
void store_part(const MatrixProduct<C>& p, const C* sums, int vectors, int64_t row, int64_t column, int64_t rows,
                int64_t valid) {
  using V = Vector<C, N>;
  const V one = broadcast<C, N>(C(1));
  for (const int64_t end = row + rows; row < end; ++row) {
    for (int j = 0; j < vectors; ++j, sums += N) {
      const int64_t count = vectors == 1 ? valid : N, first = column + j * N;
      auto parameter = [&](const C* values, V other) {
        if (!values) return other;
        return p.epilogue_of_columns ? load_first<N>(values + first, count) : broadcast<C, N>(values[row]);
      };
      C* out = p.out + row * p.out_row + first;
      V v = load<N>(sums);
      if (p.add) {
        v += load_first<N>(out, count);
      } else {
        // The very steps of store_block: which of the two a number meets depends on how the rows are cut.
        v = v * parameter(p.scale, one) + parameter(p.shift, V{});
        if (p.residual) v = v + load_first<N>(p.residual + row * p.residual_row + first, count);
        v = prelu(v, parameter(p.slope, one));
      }
      store_first<N>(out, v, count);
    }
  }
}

// A whole block from its registers. A step that is left out multiplies by one or adds nothing, which costs less than to
// ask for it at each vector, in run time and, most of all, in compile time.
template <class C, int N, int I, int J>
[[gnu::always_inline]] inline void store_block(const MatrixProduct<C>& p, const Vector<C, N> (&sum)[I][J], int64_t row,
                                               int64_t column) {
  using V = Vector<C, N>;
  C* out = p.out + row * p.out_row + column;
  if (p.add) {
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        C* at = out + i * p.out_row + j * N;
        store<N>(at, sum[i][j] + load<N>(at));
      }
    }
    return;
  }
  const C* residual = p.residual ? p.residual + row * p.residual_row + column : nullptr;
  auto finish = [&](int i, int j, V v, V scale, V shift, V slope) [[gnu::always_inline]] {
    v = v * scale + shift;
    if (residual) v = v + load<N>(residual + i * p.residual_row + j * N);
    store<N>(out + i * p.out_row + j * N, prelu(v, slope));
  };
  const V one = broadcast<C, N>(C(1));
  if (p.epilogue_of_columns) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      auto numbers = [&](const C* values, V other) { return values ? load<N>(values + column + j * N) : other; };
      const V scale = numbers(p.scale, one), shift = numbers(p.shift, V{}), slope = numbers(p.slope, one);
#pragma GCC unroll 16
      for (int i = 0; i < I; ++i) finish(i, j, sum[i][j], scale, shift, slope);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      auto number = [&](const C* values, V other) { return values ? broadcast<C, N>(values[row + i]) : other; };
      const V scale = number(p.scale, one), shift = number(p.shift, V{}), slope = number(p.slope, one);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) finish(i, j, sum[i][j], scale, shift, slope);
    }
  }
}

// One block from (row, column) on. `store_rows` <= I rows reach the result; of the last vector, what `valid` says.
// PartialB: the vector of b has only `valid` numbers to read. OffsetA: steps of a lie where p.a_offsets says.
template <class C, int N, int I, int J, bool PartialB, bool OffsetA>
void multiply_block(const MatrixProduct<C>& p, const C* a, int64_t a_row, int64_t a_depth, const C* b, int64_t b_depth,
                    int64_t row, int64_t column, int64_t store_rows, int64_t valid) {
  using V = Vector<C, N>;
  // Four rows share a pointer, so that all addresses fit the integer registers.
  constexpr int kQuads = (I + 3) / 4;
  const C* quad[kQuads];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) quad[q] = a + 4 * q * a_row;
  V sum[I][J];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) sum[i][j] = V{};
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    const int64_t offset = OffsetA ? p.a_offsets[k] : 0;
    V vector[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      vector[j] = PartialB ? load_first<N>(b + j * N, valid) : load<N>(b + j * N);
    }
    b += b_depth;
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const V number = broadcast<C, N>(quad[i / 4][(i % 4) * a_row + offset]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sum[i][j] += number * vector[j];
    }
    if constexpr (!OffsetA) {
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) quad[q] += a_depth;
    }
  }
  if (store_rows == I && valid % N == 0) return store_block<C, N, I, J>(p, sum, row, column);
  C results[I * J * N];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) store<N>(results + (i * J + j) * N, sum[i][j]);
  }
  store_part<C, N>(p, results, J, row, column, store_rows, valid);
}

// Every kind of block is compiled, the largest ones longest. float64, which the other types are checked with, and offsets,
// which a network's first convolution has, go without blocks of more than two vectors and of half the rows.
template <class C, bool OffsetA>
constexpr bool kAllBlocks = sizeof(C) < 8 && !OffsetA;

// All rows of J vectors of columns, of which b has its steps `b_depth` apart.
template <class C, int N, int J, bool PartialB, bool OffsetA>
void multiply_columns(const MatrixProduct<C>& p, const C* b, int64_t b_depth, int64_t column, int64_t valid) {
  // The columns of packed rows come in blocks that are no wider.
  if constexpr (J <= kPackedVectors) {
    if (p.a_packed) {
      for (int64_t row = 0; row < p.rows; row += kPackedRows) {
        multiply_block<C, N, kPackedRows, J, PartialB, false>(p, p.a + row * p.depth, 1, kPackedRows, b, b_depth, row,
                                                              column, least(kPackedRows, p.rows - row), valid);
      }
      return;
    }
  }
  constexpr int I = block_rows(J);
  int64_t row = 0;
  for (; row + I <= p.rows; row += I) {
    multiply_block<C, N, I, J, PartialB, OffsetA>(p, p.a + row * p.a_row, p.a_row, p.a_depth, b, b_depth, row, column,
                                                  I, valid);
    if (p.ahead) p.ahead->spend(int64_t{I} * J * N * p.depth);
  }
  if constexpr (kAllBlocks<C, OffsetA>) {
    constexpr int Half = I / 2;
    for (; row + Half <= p.rows; row += Half) {
      multiply_block<C, N, Half, J, PartialB, false>(p, p.a + row * p.a_row, p.a_row, p.a_depth, b, b_depth, row,
                                                     column, Half, valid);
    }
  }
  if constexpr (sizeof(C) < 8) {
    // Two rows at a time hide twice as much of the latency of a multiply-add: 32 rows are 12 + 12 + 6 + 2.
    for (; row + 2 <= p.rows; row += 2) {
      multiply_block<C, N, 2, J, PartialB, OffsetA>(p, p.a + row * p.a_row, p.a_row, p.a_depth, b, b_depth, row, column,
                                                    2, valid);
    }
  }
  for (; row < p.rows; ++row) {
    multiply_block<C, N, 1, J, PartialB, OffsetA>(p, p.a + row * p.a_row, p.a_row, p.a_depth, b, b_depth, row, column,
                                                  1, valid);
  }
}

template <class C, bool OffsetA>
void multiply_all(const MatrixProduct<C>& p) {
  // Packed rows come in blocks of the height that suits three vectors.
  for_column_blocks<C>(p.columns, p.a_packed ? kPackedVectors : kMostVectors,
                       [&](int64_t first, int64_t vectors, int lanes, int64_t valid) {
                         constexpr int N = kLanes<C>;
                         const C* b = p.b_packed ? p.b + first * p.depth : p.b + first;
                         if (lanes == N && valid % N == 0) {
                           const int64_t b_depth = p.b_packed ? vectors * N : p.b_depth;
                           if constexpr (kAllBlocks<C, OffsetA>) {
                             if (vectors == kMostVectors)
                               return multiply_columns<C, N, kMostVectors, false, OffsetA>(p, b, b_depth, first, N);
                             if (vectors == 3)
                               return multiply_columns<C, N, 3, false, OffsetA>(p, b, b_depth, first, N);
                           }
                           for (; vectors >= 2; vectors -= 2, first += 2 * N, b += 2 * N) {
                             multiply_columns<C, N, 2, false, OffsetA>(p, b, b_depth, first, N);
                           }
                           if (vectors == 1) multiply_columns<C, N, 1, false, OffsetA>(p, b, b_depth, first, N);
                           return;
                         }
                         with_lanes<C>(lanes, [&](auto width) {
                           constexpr int W = decltype(width)::value;
                           if (OffsetA || p.b_packed || valid == W) {
                             multiply_columns<C, W, 1, false, OffsetA>(p, b, p.b_packed ? W : p.b_depth, first, valid);
                           } else {
                             multiply_columns<C, W, 1, true, false>(p, b, p.b_depth, first, valid);
                           }
                         });
                       });
}

}  // namespace

template <class C>
void multiply(const MatrixProduct<C>& p) {
  if (p.a_offsets) {
    multiply_all<C, true>(p);
  } else {
    multiply_all<C, false>(p);
  }
}

template void multiply(const MatrixProduct<float>& p);
template void multiply(const MatrixProduct<double>& p);

}  // namespace espk::ESPK_ISA
