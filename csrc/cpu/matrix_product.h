// The one matrix kernel behind every pointwise pass: out[i][j] = sum over k of a[i][k] * b[k][j], then the epilogue.
// Vectors run along j; a is read one number at a time.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

// Rows of `a` in one register block of `vectors` vectors: as many sums as registers hold beside the vectors of b.
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;
constexpr int block_rows(int vectors) {
  if (kRegisters == 32) return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 12 : vectors == 2 ? 6 : 4;
}

// Rows of one packed block of `a` (see pack_rows): those of the widest block of vectors that planes use.
constexpr int kPackedRows = block_rows(3);

template <class C>
struct MatrixProduct {
  int64_t rows, columns, depth;

  const C* a;
  int64_t a_row, a_depth;  // steps of a plain matrix
  bool a_packed = false;   // a from pack_rows instead: blocks of kPackedRows rows, padded with zeros

  const C* b;
  int64_t b_depth;        // step of a plain matrix
  bool b_packed = false;  // b from pack_columns instead

  C* out;
  int64_t out_row;
  bool add = false;  // out += the product, instead of out = epilogue(product)

  // prelu(product * scale + shift + residual, slope); null leaves a step out. One number a column, or a row.
  bool epilogue_of_columns = true;
  const C *scale = nullptr, *shift = nullptr, *slope = nullptr;
  const C* residual = nullptr;
  int64_t residual_row = 0;
};

template <class C>
void multiply(const MatrixProduct<C>& product);

// out[i][j] += sum over k of a[i][k] * b[j][k]: vectors run along k.
template <class C>
struct DotProducts {
  int64_t rows, columns, depth;
  const C* a;
  int64_t a_row;
  const C* b;
  int64_t b_row;
  C* out;
  int64_t out_row;
};

template <class C>
void add_dots(const DotProducts<C>& dots);

// Calls f(first column, vectors, lanes, valid columns) for the blocks that `columns` columns are cut into: whole
// vectors first, in blocks of at most kMostVectors, then one narrower vector with the rest.
template <class C, class F>
inline void for_column_blocks(int64_t columns, int64_t most_vectors, F&& f) {
  constexpr int N = kLanes<C>;
  int64_t first = 0;
  for (int64_t left = columns / N; left > 0;) {
    // 5 vectors as 3 + 2 rather than 4 + 1: a block of one vector loads as much as it multiplies.
    const int64_t vectors = left == most_vectors + 1 ? (left + 1) / 2 : least(left, most_vectors);
    f(first, vectors, N, vectors * N);
    first += vectors * N;
    left -= vectors;
  }
  if (first < columns) f(first, int64_t{1}, vector_lanes<C>(columns - first), columns - first);
}

// Elements of packed columns, and of packed rows.
template <class C>
inline int64_t packed_columns_size(int64_t depth, int64_t columns) {
  return depth * round_up(columns, kLanes<C>);
}

inline int64_t packed_rows_size(int64_t depth, int64_t rows) { return depth * round_up(rows, kPackedRows); }

// Packs element(k, j) so that a block of columns reads one run of memory: [block][k][vectors * lanes], zero-padded.
template <class C, class Element>
inline void pack_columns(C* to, int64_t depth, int64_t columns, Element&& element) {
  for_column_blocks<C>(columns, kMostVectors, [&](int64_t first, int64_t vectors, int lanes, int64_t valid) {
    C* block = to + first * depth;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < vectors * lanes; ++j) *block++ = j < valid ? element(k, first + j) : C(0);
    }
  });
}

// Packs element(i, k) as [block of kPackedRows rows][k][row], zero-padded.
template <class C, class Element>
inline void pack_rows(C* to, int64_t rows, int64_t depth, Element&& element) {
  for (int64_t first = 0; first < rows; first += kPackedRows) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < kPackedRows; ++i) *to++ = first + i < rows ? element(first + i, k) : C(0);
    }
  }
}

}  // namespace espk::ESPK_ISA
