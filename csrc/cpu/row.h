// Numbers that lie one behind the other, zeroed, copied and gathered.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

template <class C>
inline void fill_zero(C* p, int64_t n) {
  __builtin_memset(p, 0, static_cast<std::size_t>(n) * sizeof(C));
}

// A copy of n numbers into the compute type, or from it, rounded to the stored type.
template <class To, class From>
inline void copy_row(To* to, const From* from, int64_t n) {
  constexpr int N = kLanes<Compute<To>>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store<N>(to + i, load<N>(from + i));
  if (i < n) store_first<N>(to + i, load_first<N>(from + i, n - i), n - i);
}

// `count` numbers `step` apart.
template <class T>
inline void gather_in(Compute<T>* to, const T* from, int64_t count, int64_t step) {
  constexpr int N = kLanes<Compute<T>>;
  int64_t i = 0;
  if (step == 1) return copy_row(to, from, count);
  if (step == 2) {
    constexpr std::make_index_sequence<N> lanes{};
    // The last whole vector ends before the last number wanted, so that nothing behind it is read.
    for (; i + N < count; i += N) {
      const T* p = from + 2 * i;
      store<N>(to + i, every_other<0>(load<N>(p), load<N>(p + N), lanes));
    }
    for (; i < count; i += N) {
      const int64_t left = least(count - i, N), read = 2 * left - 1;
      const T* p = from + 2 * i;
      const auto lower = load_first<N>(p, read);
      const auto upper = read > N ? load_first<N>(p + N, read - N) : decltype(lower){};
      store_first<N>(to + i, every_other<0>(lower, upper, lanes), left);
    }
    return;
  }
  for (; i < count; ++i) to[i] = load_one(from + i * step);
}

}  // namespace espk::ESPK_ISA
