// What both directions of a recurrent layer share: the numbers that rows of the batch carry from step to step, and a
// product of all of them with packed weights in each.
#pragma once

#include "kernels.h"
#include "matrix_product.h"
#include "normalise.h"

namespace espk::ESPK_ISA {

// Rows whose numbers are kept in the cache at once.
constexpr int64_t kMostRecurrentRows = 48;

constexpr int64_t kGates = 4;

template <class C>
struct RecurrentRows {
  C *hidden, *cell;  // [rows, H]
  C* sums;  // [rows, 4 H], in front of the gates

  RecurrentRows(int64_t rows, int64_t size) {
    const int64_t bytes = carve(rows, size, nullptr);
    carve(rows, size, scratch(Slot::rows, bytes));
  }

 private:
  int64_t carve(int64_t rows, int64_t size, void* memory) {
    Carving carving(memory);
    hidden = carving.take<C>(rows * size);
    cell = carving.take<C>(rows * size);
    sums = carving.take<C>(rows * kGates * size);
    return carving.bytes();
  }
};

// out [rows, columns] = a [rows, depth] times the packed weights.
template <class C>
inline MatrixProduct<C> recurrent_product(int64_t rows, int64_t depth, int64_t columns, const C* a, const void* packed,
                                          C* out) {
  MatrixProduct<C> product{};
  product.rows = rows;
  product.columns = columns;
  product.depth = depth;
  product.a = a;
  product.a_row = depth;
  product.a_depth = 1;
  product.b = static_cast<const C*>(packed);
  product.b_packed = true;
  product.out = out;
  product.out_row = columns;
  return product;
}

template <class Problem>
int64_t packed_recurrent_bytes(const Problem& p, int64_t depth, int64_t columns) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return packed_columns_size<C>(depth, columns) * static_cast<int64_t>(sizeof(C));
  });
}

// Calls f(null pointer of the stored type, first row, rows) for parts of the rows [begin, end).
template <class Problem, class F>
void for_recurrent_rows(const Problem& p, int64_t begin, int64_t end, F&& f) {
  with_type(p.type, [&](auto* type) {
    for (int64_t first = begin; first < end; first += kMostRecurrentRows) {
      f(type, first, least(kMostRecurrentRows, end - first));
    }
  });
}

}  // namespace espk::ESPK_ISA
