// Rows of numbers on their way into a product of gradients, in the type that it computes in.
#pragma once

#include "kernels.h"
#include "row.h"

namespace espk::ESPK_ISA {

// Rows of a map in the compute type, for parts of it that lie `part` apart: as they lie, or copied.
template <class C>
struct Rows {
  const C* data;
  int64_t row, part;
};

template <class T>
inline Rows<Compute<T>> rows_of(const T* from, int64_t row, int64_t rows, int64_t columns, int64_t part, int64_t parts,
                                Slot slot) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    return {from, row, part};
  } else {
    C* copy = static_cast<C*>(scratch(slot, parts * rows * columns * static_cast<int64_t>(sizeof(C))));
    for (int64_t k = 0; k < parts; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        copy_row(copy + (k * rows + i) * columns, from + k * part + i * row, columns);
      }
    }
    return {copy, columns, rows * columns};
  }
}

}  // namespace espk::ESPK_ISA
