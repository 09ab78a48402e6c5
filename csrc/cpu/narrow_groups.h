// Pixels times weights where the outputs of a group fill no vector, as in the first reductions, in one of two ways.
// Picked (picked_groups.h), where one instruction takes any lanes of two vectors: a vector of results spans several groups.
// Turned (turned_groups.h): some pixels become planes, which fill vectors however few the outputs are.
// No number meets a weight of another group, so an infinity stays in its group.
#pragma once

#include "matrix_product.h"

namespace espk::ESPK_ISA {

#if defined(__AVX512F__)
constexpr bool kPicked = true;
#else
constexpr bool kPicked = false;
#endif

// Of those picked, `together` groups fill at most two vectors of inputs and one of outputs.
template <class C>
struct NarrowGroups {
  static constexpr int N = kLanes<C>;
  int64_t groups, in, out, together;

  NarrowGroups(int64_t groups, int64_t in, int64_t out)
      : groups(groups), in(in), out(out), together(least(groups, least(2 * N / most(in, 1), N / most(out, 1)))) {}

  // Whether this is the better way: outputs that fill half a vector have instructions of that width, and with fewer groups
  // together a group alone fills as many lanes.
  bool pays() const {
    return kPicked ? together > 1 && 2 * out < N : groups > 1 && out < N && out != vector_lanes<C>(out);
  }

  // The weight from input i to output o of a group, of [groups * out, in] or, transposed, [groups * in, out].
  template <class T>
  C weight(const T* all, bool transposed, int64_t group, int64_t o, int64_t i) const {
    return load_one(all + group * in * out + (transposed ? i * out + o : o * in + i));
  }

  int64_t sets() const { return ceil_div(groups, together); }
  // Numbers of packed weights. Picked: for each set and step one weight a lane, then for each step the lane's place among the
  // inputs. Turned: [groups * out, in].
  int64_t packed_size() const { return kPicked ? (sets() + 1) * in * N : groups * in * out; }
};

// The weights of all groups.
template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed);

// All groups of the product's rows; a, out and the epilogue are those of the first group, b the packed weights.
template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole);

}  // namespace espk::ESPK_ISA
