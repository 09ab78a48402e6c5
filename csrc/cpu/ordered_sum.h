// The second stage of sums whose first left one partial sum a run: these are added in order.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

// to[i] = the sum of partials[run * size + i] over `runs` runs; of none, zeros.
template <class T>
inline void sum_in_order(T* to, const Compute<T>* partials, int64_t runs, int64_t size) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  for (int64_t i = 0; i < size; i += N) {
    const int64_t valid = least(N, size - i);
    Vector<C, N> sum{};
    if (runs > 0) sum = load_first<N>(partials + i, valid);
    for (int64_t run = 1; run < runs; ++run) sum += load_first<N>(partials + run * size + i, valid);
    store_first<N>(to + i, sum, valid);
  }
}

}  // namespace espk::ESPK_ISA
