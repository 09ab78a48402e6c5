// An affine and PReLU a channel: of one vector of numbers, and as the epilogue of maps of pixels that no product makes.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

template <class V>
inline V prelu(V v, V slope) {
  return v > V{} ? v : v * slope;
}

template <class C, int N>
struct AffinePreluLanes {
  using V = Vector<C, N>;
  V scale, shift, slope;

  V affine(V v) const { return v * scale + shift; }
  V operator()(V v) const { return prelu(affine(v), slope); }
};

template <class C>
struct AffinePrelu {
  const C *scale, *shift, *slope;

  explicit AffinePrelu(const Epilogue& e)
      : scale(static_cast<const C*>(e.scale)),
        shift(static_cast<const C*>(e.shift)),
        slope(static_cast<const C*>(e.slope)) {}

  // `v` holds the channels from `channel` on, `valid` of them, and so do the numbers of `residual`, which may be null.
  template <int N, class T = C>
  Vector<C, N> operator()(Vector<C, N> v, int64_t channel, int64_t valid, const T* residual = nullptr) const {
    if (scale) v = v * load_first<N>(scale + channel, valid);
    if (shift) v = v + load_first<N>(shift + channel, valid);
    if (residual) v = v + load_first<N>(residual, valid);
    if (slope) v = prelu(v, load_first<N>(slope + channel, valid));
    return v;
  }
};

}  // namespace espk::ESPK_ISA
