// Narrow groups by picking: each step picks, for every lane, one input of its own group out of the two vectors that hold the
// inputs of all groups of a set.
#pragma once

#include "affine_prelu.h"
#include "narrow_groups.h"

namespace espk::ESPK_ISA {

// Lane i of the result is lane places[i] of `low` followed by `high`.
template <class C>
inline Vector<C, kLanes<C>> pick(Vector<C, kLanes<C>> low, Vector<C, kLanes<C>> high, const Index<C>* places) {
  const __m512i at = _mm512_loadu_si512(places);
  if constexpr (sizeof(C) == 8) {
    return (Vector<C, kLanes<C>>)_mm512_permutex2var_pd((__m512d)low, at, (__m512d)high);
  } else {
    return (Vector<C, kLanes<C>>)_mm512_permutex2var_ps((__m512)low, at, (__m512)high);
  }
}

// The same of one vector. Without a mask GCC 12 warns of what its own header leaves undefined.
template <class C>
inline Vector<C, kLanes<C>> pick(Vector<C, kLanes<C>> from, const Index<C>* places) {
  const __m512i at = _mm512_loadu_si512(places);
  if constexpr (sizeof(C) == 8) {
    return (Vector<C, kLanes<C>>)_mm512_mask_permutexvar_pd((__m512d)from, (__mmask8)-1, at, (__m512d)from);
  } else {
    return (Vector<C, kLanes<C>>)_mm512_mask_permutexvar_ps((__m512)from, (__mmask16)-1, at, (__m512)from);
  }
}

// What is known of a set: its groups' weights, where each lane finds its input in each step, and their epilogue.
template <class C>
struct PickedSet {
  static constexpr int N = kLanes<C>;
  using V = Vector<C, N>;

  const C* weights;
  const Index<C>* places;
  int64_t inputs, outputs;
  V scale, shift, slope;  // a step that is left out multiplies by one or adds nothing

  PickedSet(const MatrixProduct<C>& p, const C* weights, const Index<C>* places, int64_t inputs, int64_t outputs)
      : weights(weights),
        places(places),
        inputs(inputs),
        outputs(outputs),
        scale(p.scale ? load_first<N>(p.scale, outputs) : broadcast<C, N>(1)),
        shift(p.shift ? load_first<N>(p.shift, outputs) : V{}),
        slope(p.slope ? load_first<N>(p.slope, outputs) : broadcast<C, N>(1)) {}
};

// Pixels `row` to `row` + P: they share the loads of weights and places. Two: the inputs fill more than one vector.
template <class C, int P, bool Two>
void multiply_picked(const MatrixProduct<C>& p, const PickedSet<C>& set, int64_t depth, int64_t row) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  V low[P], high[P], sum[P];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    const C* a = p.a + (row + i) * p.a_row;
    low[i] = load_first<N>(a, set.inputs);
    if constexpr (Two) high[i] = load_first<N>(a + N, set.inputs - N);
    sum[i] = V{};
  }
  const C* weights = set.weights;
  const Index<C>* places = set.places;
  for (int64_t j = 0; j < depth; ++j, weights += N, places += N) {
    const V weight = load<N>(weights);
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) {
      if constexpr (Two) {
        sum[i] += weight * pick<C>(low[i], high[i], places);
      } else {
        sum[i] += weight * pick<C>(low[i], places);
      }
    }
  }
  auto finish = [&](auto&& save) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) {
      V v = sum[i] * set.scale + set.shift;
      if (p.residual) v = v + load_first<N>(p.residual + (row + i) * p.residual_row, set.outputs);
      save(p.out + (row + i) * p.out_row, prelu(v, set.slope));
    }
  };
  if (set.outputs == N) return finish([](C* to, V v) { store<N>(to, v); });
  finish([&](C* to, V v) { store_first<N>(to, v, set.outputs); });
}

template <class C, bool Two>
void multiply_set(const MatrixProduct<C>& p, const PickedSet<C>& set, int64_t depth) {
  constexpr int P = 8;
  int64_t row = 0;
  for (; row + P <= p.rows; row += P) multiply_picked<C, P, Two>(p, set, depth, row);
  for (; row < p.rows; ++row) multiply_picked<C, 1, Two>(p, set, depth, row);
}

template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  for (int64_t set = 0; set < n.sets(); ++set) {
    for (int64_t j = 0; j < n.in; ++j) {
      for (int64_t lane = 0; lane < N; ++lane) {
        const int64_t group = set * n.together + lane / n.out;
        *to++ =
            lane < n.together * n.out && group < n.groups ? n.weight(weight, transposed, group, lane % n.out, j) : C(0);
      }
    }
  }
  Index<C>* places = reinterpret_cast<Index<C>*>(to);
  for (int64_t j = 0; j < n.in; ++j) {
    for (int64_t lane = 0; lane < N; ++lane) {
      *places++ = static_cast<Index<C>>(lane < n.together * n.out ? lane / n.out * n.in + j : 0);
    }
  }
}

template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole) {
  constexpr int N = kLanes<C>;
  const Index<C>* places = reinterpret_cast<const Index<C>*>(whole.b + n.sets() * n.in * N);
  for (int64_t s = 0; s < n.sets(); ++s) {
    const int64_t groups = least(n.together, n.groups - s * n.together), channel = s * n.together * n.out;
    MatrixProduct<C> p = whole;
    p.a += s * n.together * n.in;
    p.out += channel;
    if (p.scale) p.scale += channel;
    if (p.shift) p.shift += channel;
    if (p.slope) p.slope += channel;
    if (p.residual) p.residual += channel;
    const PickedSet<C> set(p, whole.b + s * n.in * N, places, groups * n.in, groups * n.out);
    if (set.inputs > N) {
      multiply_set<C, true>(p, set, n.in);
    } else {
      multiply_set<C, false>(p, set, n.in);
    }
  }
}

}  // namespace espk::ESPK_ISA
