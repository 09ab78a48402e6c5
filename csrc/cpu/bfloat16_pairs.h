// Weights in the order in which products of bfloat16 pairs read them.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

constexpr int64_t kPairColumns = 16;  // of a block

// Numbers of the packed weights [depth][columns] of one group: blocks of kPairColumns columns, [depth / 2][column][2],
// the last filled up with zeros.
inline int64_t packed_pairs_size(int64_t depth, int64_t columns) { return depth * round_up(columns, kPairColumns); }

// element(k, j) gives the bits of one weight.
template <class Element>
inline void pack_pairs(uint16_t* to, int64_t depth, int64_t columns, Element&& element) {
  for (int64_t first = 0; first < columns; first += kPairColumns) {
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t j = first; j < first + kPairColumns; ++j) {
        for (int64_t i = k; i < k + 2; ++i) *to++ = j < columns ? element(i, j) : uint16_t{0};
      }
    }
  }
}

}  // namespace espk::ESPK_ISA
