// The one matrix kernel behind every pointwise pass: out[i][j] = sum over k of a[i][k] * b[k][j], then the epilogue.
// Vectors run along j; a is read one number at a time.
#pragma once

#include "turn.h"

namespace espk::ESPK_ISA {

// Rows of `a` in one register block of `vectors` vectors: as many sums as registers hold beside the vectors of b.
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;
constexpr int block_rows(int vectors) {
  if (kRegisters == 32) return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 12 : vectors == 2 ? 6 : 4;
}

// Rows of one packed block of `a` (see pack_rows), and the most vectors that a block multiplies them by.
constexpr int kPackedVectors = 3;
constexpr int kPackedRows = block_rows(kPackedVectors);

// Memory that is read next, fetched into the second-level cache a line at a time between the blocks of products: while
// those multiply, the memory would otherwise stand still.
struct Ahead {
  static constexpr int kMost = 4;
  const char* at[kMost];
  int64_t lines[kMost];
  int count = 0;
  int64_t multiply_adds_a_line = 1, credit = 0;

  template <class T>
  void add(const T* from, int64_t numbers) {
    at[count] = reinterpret_cast<const char*>(from);
    lines[count++] = numbers * static_cast<int64_t>(sizeof(T)) / 64;
  }
  // Spreads the lines over the products to come.
  void over(int64_t multiply_adds) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += lines[i];
    multiply_adds_a_line = total > 0 && multiply_adds > total ? multiply_adds / total : 1;
  }
  // Counts are kept in registers while lines are fetched: through memory each would take the latency of a store and a load.
  void spend(int64_t multiply_adds) {
    credit += multiply_adds;
    while (count > 0 && credit >= multiply_adds_a_line) {
      const int64_t due = least(credit / multiply_adds_a_line, lines[count - 1]);
      const char* from = at[count - 1];
      for (int64_t i = 0; i < due; ++i) __builtin_prefetch(from + 64 * i, 0, 2);
      at[count - 1] = from + 64 * due;
      lines[count - 1] -= due;
      credit -= due * multiply_adds_a_line;
      if (lines[count - 1] == 0) --count;
    }
  }
};

template <class C>
struct MatrixProduct {
  int64_t rows, columns, depth;
  Ahead* ahead = nullptr;  // not with packed a

  const C* a;
  int64_t a_row, a_depth;  // steps of a plain matrix
  const int64_t* a_offsets = nullptr;  // or where step k of the depth lies in each row; b is packed then
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

// out[i][j] += sum over k of a[i][k] * b[j][k], k running through `parts` runs of `depth` numbers (the images of a
// batch), each a_part and b_part behind the one before. Vectors run along k.
template <class C>
struct DotProducts {
  int64_t rows, columns, depth, parts;
  const C* a;
  int64_t a_row, a_part;
  const C* b;
  int64_t b_row, b_part;
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

// Where block `block` of packed columns begins, or `columns` behind the last.
template <class C>
inline int64_t packed_block(int64_t columns, int64_t block) {
  int64_t begin = columns;
  for_column_blocks<C>(columns, kMostVectors, [&](int64_t first, int64_t, int, int64_t) {
    if (block-- == 0) begin = first;
  });
  return begin;
}

// Elements of packed columns, and of packed rows.
template <class C>
inline int64_t packed_columns_size(int64_t depth, int64_t columns) {
  return depth * round_up(columns, kLanes<C>);
}

inline int64_t packed_rows_size(int64_t depth, int64_t rows) { return depth * round_up(rows, kPackedRows); }

// A matrix in memory to pack from: element(i, j) lies at data[i * row + j * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;

  Compute<T> operator()(int64_t i, int64_t j) const { return load_one(data + i * row + j * column); }
  Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// sums [out][in] += gradient times x over `pixels` pixels: gradient(o, pixel), and x in pixels x_pixel apart.
template <class C>
inline MatrixProduct<C> weight_gradient(C* sums, int64_t out, int64_t in, int64_t pixels, Matrix<C> gradient,
                                        const C* x, int64_t x_pixel) {
  MatrixProduct<C> product{};
  product.rows = out;
  product.columns = in;
  product.depth = pixels;
  product.a = gradient.data;
  product.a_row = gradient.row;
  product.a_depth = gradient.column;
  product.b = x;
  product.b_depth = x_pixel;
  product.out = sums;
  product.out_row = in;
  product.add = true;
  return product;
}

// Writes rows x columns numbers, row after row of `pitch` >= columns, with zeros behind each row. N is the width of the
// pieces that are turned where the matrix lies the other way in memory.
template <int N, class T>
inline void pack(Compute<T>* to, int64_t pitch, Matrix<T> matrix, int64_t rows, int64_t columns) {
  using C = Compute<T>;
  for (int64_t j = 0; j < pitch; j += N) {
    const int64_t valid = least(N, columns - j);
    int64_t i = 0;
    if (matrix.row == 1 && valid == N) {
      for (; i + N <= rows; i += N) {
        turn_square<N>(matrix.from(i, j).data, matrix.column,
                       [&](int k, Vector<C, N> v) { store<N>(to + (i + k) * pitch + j, v); });
      }
    } else if (matrix.column == 1) {
      for (; i < rows; ++i) store<N>(to + i * pitch + j, load_first<N>(matrix.from(i, j).data, most(valid, 0)));
    }
    for (; i < rows; ++i) {
      for (int64_t k = 0; k < N; ++k) to[i * pitch + j + k] = k < valid ? matrix(i, j + k) : C(0);
    }
  }
}

// b [depth][columns] so that a block of columns reads one run of memory: [block][k][vectors * lanes].
template <class T>
inline void pack_columns(Compute<T>* to, Matrix<T> b, int64_t depth, int64_t columns) {
  using C = Compute<T>;
  for_column_blocks<C>(columns, kMostVectors, [&](int64_t first, int64_t vectors, int lanes, int64_t valid) {
    with_lanes<C>(lanes, [&](auto width) {
      constexpr int N = decltype(width)::value;
      pack<N>(to + first * depth, vectors * N, b.from(0, first), depth, valid);
    });
  });
}

// a [rows][depth] as [block of kPackedRows rows][k][row].
template <class T>
inline void pack_rows(Compute<T>* to, Matrix<T> a, int64_t rows, int64_t depth) {
  constexpr int N = kPackedRows;
  for (int64_t first = 0; first < rows; first += N) {
    const Matrix<T> turned{a.from(first, 0).data, a.column, a.row};
    pack<N>(to + first * depth, N, turned, depth, least(N, rows - first));
  }
}

}  // namespace espk::ESPK_ISA
