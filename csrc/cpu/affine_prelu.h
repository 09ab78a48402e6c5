// The epilogue of maps of pixels that no product makes: an affine and PReLU a channel, for one vector of channels.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

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
    if (slope) v = v > Vector<C, N>{} ? v : v * load_first<N>(slope + channel, valid);
    return v;
  }
};

}  // namespace espk::ESPK_ISA
