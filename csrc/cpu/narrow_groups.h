// Pixels times weights where a group has few outputs, as in the first reductions: a vector of results spans several groups,
// and each step picks, for every lane, one input of its own group out of the two vectors that hold the inputs of all of
// them. No number meets a weight of another group, so an infinity stays in its group.
#pragma once

#include "matrix_product.h"

namespace espk::ESPK_ISA {

// How groups are taken together: `together` of them fill at most two vectors of inputs and one of outputs.
template <class C>
struct NarrowGroups {
  static constexpr int N = kLanes<C>;
  int64_t groups, in, out, together;

  NarrowGroups(int64_t groups, int64_t in, int64_t out)
      : groups(groups), in(in), out(out), together(least(groups, least(2 * N / most(in, 1), N / most(out, 1)))) {}

  // Whether this is the better way: with fewer groups together a group alone fills as many lanes.
  bool pays() const { return kHasPick<C> && together > 1 && 2 * out < N; }

  int64_t sets() const { return ceil_div(groups, together); }
  // Numbers of packed weights: for each set and step one weight a lane, then for each step the lane's place among the inputs.
  int64_t packed_size() const { return (sets() + 1) * in * N; }
};

// The weights of all groups, [groups * out, in] or, transposed, [groups * in, out].
template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed);

// All groups of the product's rows; a, out and the epilogue are those of the first group, b the packed weights.
template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole);

}  // namespace espk::ESPK_ISA
