// Bilinear resizing with corners aligned: where an output lies in the input, and two rows mixed into one.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

// Where output `i` of `out_size` lies in an input of `size`, corners on corners: between `first` and `second`.
template <class C>
struct Between {
  int64_t first, second;
  C share_of_first, share_of_second;

  Between(int64_t i, int64_t size, int64_t out_size) {
    const double at = out_size > 1 ? static_cast<double>(i) * static_cast<double>(size - 1) / (out_size - 1) : 0.0;
    first = least(static_cast<int64_t>(at), size - 1);
    second = size == out_size ? first : least(first + 1, size - 1);  // no share of an infinity is 0
    share_of_second = static_cast<C>(at - static_cast<double>(first));
    share_of_first = C(1) - share_of_second;
  }

  // As torch does it: two equal infinities stay what they are, which their difference is not.
  template <class V>
  V mix(V a, V b) const {
    return a * share_of_first + b * share_of_second;
  }
};

// All columns, the same for every row: a division each.
template <class C>
inline void place_columns(Between<C>* to, int64_t width, int64_t out_width) {
  for (int64_t x = 0; x < out_width; ++x) to[x] = Between<C>(x, width, out_width);
}

// Their bytes at most, and the same in the compute type of `type`, as a kernel prepares them.
inline int64_t columns_bytes(int64_t out_width) { return out_width * static_cast<int64_t>(sizeof(Between<double>)); }

inline void place_columns(Type type, void* to, int64_t width, int64_t out_width) {
  with_type(type, [&](auto* t) {
    place_columns(static_cast<Between<Compute<std::remove_pointer_t<decltype(t)>>>*>(to), width, out_width);
  });
}

// Row `rows` of a map [H, W, C] whose rows hold `row` numbers, from the two that it lies between.
template <class T>
inline void mix_rows(Compute<T>* mixed, const T* map, const Between<Compute<T>>& rows, int64_t row) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T *upper = map + rows.first * row, *lower = map + rows.second * row;
  for_whole_vectors<N>(row, [&](int64_t i, int64_t valid) {
    const Vector<C, N> a = load_first<N>(upper + i, valid), b = load_first<N>(lower + i, valid);
    store_first<N>(mixed + i, rows.mix(a, b), valid);
  });
}

}  // namespace espk::ESPK_ISA
