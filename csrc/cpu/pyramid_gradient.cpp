#include "pyramid_gradient.h"

namespace espk::ESPK_ISA {
namespace {

template <class C, int N, int Count>
void add_taps(C* sums, const C* gradient, const C* tile, const Tap* taps, int64_t columns, int64_t last) {
  using V = Vector<C, N>;
  V sum[Count];
#pragma GCC unroll 9
  for (int t = 0; t < Count; ++t) sum[t] = load<N>(sums + taps[t].weight * N);
  const int64_t whole = last == N ? columns : columns - 1;
  for (int64_t x = 0; x < whole; ++x) {
    const V g = load<N>(gradient + x * N);
#pragma GCC unroll 9
    for (int t = 0; t < Count; ++t) sum[t] += g * load<N>(tile + taps[t].offset + x * N);
  }
  if (whole < columns) {
    const V g = load_first<N>(gradient + whole * N, last);
#pragma GCC unroll 9
    for (int t = 0; t < Count; ++t) sum[t] += g * load_first<N>(tile + taps[t].offset + whole * N, last);
  }
#pragma GCC unroll 9
  for (int t = 0; t < Count; ++t) store<N>(sums + taps[t].weight * N, sum[t]);
}

}  // namespace

template <class C>
void sum_suffixes(C* tiles, int64_t branches, int64_t size) {
  constexpr int N = kLanes<C>;
  for (int64_t k = branches - 2; k >= 0; --k) {
    C* to = tiles + k * size;
    const C* from = to + size;
    int64_t i = 0;
    for (; i + N <= size; i += N) store<N>(to + i, load<N>(to + i) + load<N>(from + i));
    for (; i < size; ++i) to[i] += from[i];
  }
}

// The taps of a branch are 9 where its dilation is less than the map, else those that can touch it.
template <class C>
void add_row(int lanes, C* sums, const C* gradient, const C* tile, const TapList& taps, int64_t k, int64_t columns,
             int64_t last) {
  const Segment segment = taps.segments[k];
  const Tap* first = taps.taps + segment.first;
  with_lanes<C>(lanes, [&](auto width) {
    constexpr int N = decltype(width)::value;
    switch (segment.count) {
      case 9: return add_taps<C, N, 9>(sums, gradient, tile, first, columns, last);
      case 3: return add_taps<C, N, 3>(sums, gradient, tile, first, columns, last);
      default: return add_taps<C, N, 1>(sums, gradient, tile, first, columns, last);
    }
  });
}

template void sum_suffixes(float* tiles, int64_t branches, int64_t size);
template void sum_suffixes(double* tiles, int64_t branches, int64_t size);
template void add_row(int lanes, float* sums, const float* gradient, const float* tile, const TapList& taps, int64_t k,
                      int64_t columns, int64_t last);
template void add_row(int lanes, double* sums, const double* gradient, const double* tile, const TapList& taps,
                      int64_t k, int64_t columns, int64_t last);

}  // namespace espk::ESPK_ISA
