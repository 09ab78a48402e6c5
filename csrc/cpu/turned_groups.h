// Narrow groups by turning: some pixels become planes, a product of each group's weights with them makes planes of results,
// and those become pixels. In AVX2's registers that is 3 shuffles for 8 numbers turned, where picking takes 3 for each
// vector of multiply-adds.
#pragma once

#include "kernels.h"
#include "narrow_groups.h"
#include "turn.h"

namespace espk::ESPK_ISA {

template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed) {
  for (int64_t channel = 0; channel < n.groups * n.out; ++channel) {
    for (int64_t i = 0; i < n.in; ++i) *to++ = n.weight(weight, transposed, channel / n.out, channel % n.out, i);
  }
}

template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole) {
  constexpr int64_t kPixels = 6 * kLanes<C>;  // two blocks of a product's columns
  const int64_t inputs = n.groups * n.in, outputs = n.groups * n.out;
  C* x = static_cast<C*>(scratch(Slot::turned, (inputs + 2 * outputs) * kPixels * static_cast<int64_t>(sizeof(C))));
  C *results = x + inputs * kPixels, *residual = results + outputs * kPixels;
  MatrixProduct<C> product{};
  product.rows = n.out;
  product.depth = n.in;
  product.a_row = n.in;
  product.a_depth = 1;
  product.b_depth = product.out_row = product.residual_row = kPixels;
  product.epilogue_of_columns = false;
  for (int64_t row = 0; row < whole.rows; row += kPixels) {
    const int64_t pixels = least(kPixels, whole.rows - row);
    turn(x, kPixels, whole.a + row * whole.a_row, whole.a_row, pixels, inputs);
    if (whole.residual) {
      turn(residual, kPixels, whole.residual + row * whole.residual_row, whole.residual_row, pixels, outputs);
    }
    product.columns = pixels;
    for (int64_t channel = 0; channel < outputs; channel += n.out) {
      auto of_group = [&](const C* values) { return values ? values + channel : nullptr; };
      product.a = whole.b + channel * n.in;
      product.b = x + channel / n.out * n.in * kPixels;
      product.out = results + channel * kPixels;
      product.residual = whole.residual ? residual + channel * kPixels : nullptr;
      product.scale = of_group(whole.scale);
      product.shift = of_group(whole.shift);
      product.slope = of_group(whole.slope);
      multiply(product);
    }
    turn(whole.out + row * whole.out_row, whole.out_row, results, kPixels, outputs, pixels);
  }
}

}  // namespace espk::ESPK_ISA
