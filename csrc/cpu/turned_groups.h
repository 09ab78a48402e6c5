// Narrow groups by turning: some pixels become planes, sums of each group's planes make planes of results, and those become
// pixels. In AVX2's registers that is 3 shuffles for 8 numbers turned, where picking takes 3 for each vector of
// multiply-adds.
#pragma once

#include "affine_prelu.h"
#include "kernels.h"
#include "narrow_groups.h"
#include "turn.h"

namespace espk::ESPK_ISA {

// The weights of a step lie side by side: [groups][in][out].
template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed) {
  for (int64_t group = 0; group < n.groups; ++group) {
    for (int64_t i = 0; i < n.in; ++i) {
      for (int64_t o = 0; o < n.out; ++o) *to++ = n.weight(weight, transposed, group, o, i);
    }
  }
}

// Planes of so many pixels are turned together.
template <class C>
constexpr int64_t kTurnedPixels = 6 * kLanes<C>;

// One group of planes; the residual may be null.
template <class C>
struct TurnedGroup {
  int64_t in, pixels;
  const C *x, *weights, *scale, *shift, *slope, *residual;
  C* out;
};

// All `Out` outputs of a group at once: depths of a few inputs are over before a block of sums has paid for its call.
template <class C, int Out>
void multiply_planes(const TurnedGroup<C>& given) {
  constexpr int N = kLanes<C>, J = 2 * Out + 3 <= kRegisters ? 2 : 1;  // vectors of pixels beside each other
  using V = Vector<C, N>;
  const TurnedGroup<C> g = given;  // a copy that no store can alias
  for (int64_t first = 0; first < g.pixels; first += J * N) {
    V sum[Out][J];
#pragma GCC unroll 8
    for (int o = 0; o < Out; ++o) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) sum[o][j] = V{};
    }
    const C *x = g.x + first, *weights = g.weights;
    for (int64_t i = 0; i < g.in; ++i, x += kTurnedPixels<C>, weights += Out) {
      V v[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) v[j] = load<N>(x + j * N);
#pragma GCC unroll 8
      for (int o = 0; o < Out; ++o) {
        const V w = broadcast<C, N>(weights[o]);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) sum[o][j] += w * v[j];
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < Out; ++o) {
      const V scale = broadcast<C, N>(g.scale[o]), shift = broadcast<C, N>(g.shift[o]);
      const V slope = broadcast<C, N>(g.slope[o]);
      const int64_t at = o * kTurnedPixels<C> + first;
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) {
        V v = sum[o][j] * scale + shift;
        if (g.residual) v = v + load<N>(g.residual + at + j * N);
        store<N>(g.out + at + j * N, prelu(v, slope));
      }
    }
  }
}

// Calls multiply_planes for `out` outputs, of which there are fewer than lanes.
template <class C, int Out = kLanes<C> - 1>
void multiply_turned(const TurnedGroup<C>& group, int64_t out) {
  if constexpr (Out > 1) {
    if (out < Out) return multiply_turned<C, Out - 1>(group, out);
  }
  multiply_planes<C, Out>(group);
}

template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole) {
  constexpr int64_t kPixels = kTurnedPixels<C>;
  const int64_t inputs = n.groups * n.in, outputs = n.groups * n.out;
  const int64_t numbers = (inputs + 2 * outputs) * kPixels + 3 * outputs;
  C* x = static_cast<C*>(scratch(Slot::turned, numbers * static_cast<int64_t>(sizeof(C))));
  C *results = x + inputs * kPixels, *residual = results + outputs * kPixels, *scale = residual + outputs * kPixels;
  C *shift = scale + outputs, *slope = shift + outputs;
  for (int64_t o = 0; o < outputs; ++o) {
    scale[o] = whole.scale ? whole.scale[o] : C(1);
    shift[o] = whole.shift ? whole.shift[o] : C(0);
    slope[o] = whole.slope ? whole.slope[o] : C(1);
  }
  for (int64_t row = 0; row < whole.rows; row += kPixels) {
    const int64_t pixels = least(kPixels, whole.rows - row);
    turn(x, kPixels, whole.a + row * whole.a_row, whole.a_row, pixels, inputs);
    if (whole.residual) {
      turn(residual, kPixels, whole.residual + row * whole.residual_row, whole.residual_row, pixels, outputs);
    }
    for (int64_t group = 0; group < n.groups; ++group) {
      const int64_t channel = group * n.out;
      const TurnedGroup<C> planes{n.in,
                                  pixels,
                                  x + group * n.in * kPixels,
                                  whole.b + channel * n.in,
                                  scale + channel,
                                  shift + channel,
                                  slope + channel,
                                  whole.residual ? residual + channel * kPixels : nullptr,
                                  results + channel * kPixels};
      multiply_turned(planes, n.out);
    }
    turn(whole.out + row * whole.out_row, whole.out_row, results, kPixels, outputs, pixels);
  }
}

}  // namespace espk::ESPK_ISA
