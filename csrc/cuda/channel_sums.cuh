// Sums over pixels, one a channel, in two stages: parts of the batch that the shape alone decides are summed in the
// compute type, and a second stage adds them in order in float64 and makes of them what the kernels around the norm need.
#pragma once

#include "normalise.cuh"

namespace espk::cuda {

// What a part leaves for a channel. Moments: its pixels, one of its numbers, and the sum and the sum of squares around
// that number, which is one of the sample: however far the mean lies from zero, squares cancel only as much as the part's
// own spread. Gradients: those of GradientSums, and a number without a meaning. Stored at [part][channel].
template <class C>
using PartSums = Pack<C, 4>;

template <class C>
struct MomentSums {
  static constexpr int count = 2;
  C at[count] = {};

  __device__ __forceinline__ void add(C difference) {
    at[0] += difference;
    at[1] += difference * difference;
  }
};

// The sums over pixels of the gradient g between a norm and its PReLU, of g * (map - mean), and of the gradient behind the
// PReLU times its input where that is not positive.
template <class C>
struct GradientSums {
  static constexpr int count = 3;
  C at[count] = {};

  // `behind` is the gradient behind the PReLU, `before` what is in front of the PReLU, and `map` of the norm. Returns g.
  __device__ __forceinline__ C add(C behind, C before, C map, C slope, C mean) {
    const C between = before > 0 ? behind : behind * slope;
    at[0] += between;
    at[1] += between * (map - mean);
    at[2] += before > 0 ? C(0) : behind * before;
    return between;
  }
};

// Parts of whole tiles, four for each block that fills the device where there are as many.
inline int64_t tiles_a_part(int64_t tiles, int64_t slices) {
  return most(1, ceil_div(tiles * slices, 4 * enough_blocks()));
}

template <class C>
int64_t part_bytes(int64_t parts, int64_t channels) {
  return parts * channels * int64_t{sizeof(PartSums<C>)};
}

// Second stages. Bytes: 4 numbers for each part and channel. The first takes the moments of `parts` parts, or those that
// the norm knows where it does not take the batch's or there are no parts, and leaves scale, shift and prelu; the other
// leaves of_grad, of_map, constant and the gradients of the norm's parameters.
Outcome take_moments(const BatchNorm&, const void* parts_sums, int64_t parts, void* stream);
Outcome take_gradients(const BatchNorm&, const void* parts_sums, int64_t parts, void* stream);

}  // namespace espk::cuda
