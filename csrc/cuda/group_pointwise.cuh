// One tile of a group pointwise convolution: per group a matrix product of pixels by channels, of a map that may go through
// a prologue (normalise.cuh) on its way in; and how the product is cut.
#pragma once

#include "output.cuh"

namespace espk::cuda {

template <class T>
struct PointwiseProduct {
  Factor<T> x, weight;  // of image 0 and group 0; rows are pixels and the group's outputs
  int64_t x_image, x_group, weight_group;
  int64_t pixels, inputs, outputs;  // of one group
  int64_t blocks, pixel_blocks, slices, output_blocks;
  int groups, groups_a_block;
  bool vector_x, vector_weight;
};

// Four warps, each with 16 * Rows pixels and 16 * Columns outputs of a group.
template <int Rows, int Columns>
struct PointwiseTraits {
  static constexpr int rows = Rows, columns = Columns, warps = 4, threads = 32 * warps;
  static constexpr int pixels = 16 * Rows * warps, outputs = 16 * Columns;
};

// Where a tile begins, and how much of it there is.
struct PointwiseTile {
  int64_t image, group, first_pixel, first_output, pixels, outputs;
};

// The products of a tile, in patches of the warp's own that take the place of the factors.
template <class T, class Variant, class Prologue>
__device__ __forceinline__ void multiply_tile(const PointwiseProduct<T>& p, const PointwiseTile& tile,
                                              Compute<T>* patches, const Prologue& prologue) {
  constexpr int kPitch = kDepth<T> + kPad<T>;
  T* x = reinterpret_cast<T*>(shared_memory());
  T* weight = x + Variant::pixels * kPitch;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Factor<T> left = p.x, right = p.weight;
  left.first += tile.image * p.x_image + tile.group * p.x_group + tile.first_pixel * left.row_stride;
  right.first += tile.group * p.weight_group + tile.first_output * right.row_stride;
  WarpProduct<T, Variant::rows, Variant::columns> product;
  for (int64_t d = 0; d < p.inputs; d += kDepth<T>) {
    const int64_t there = least(kDepth<T>, p.inputs - d);
    const int depth = static_cast<int>(round_up(there, 16));
    __syncthreads();
    stage<true>(x, kPitch, Variant::pixels, depth, left, tile.pixels, there, p.vector_x, prologue,
                tile.group * p.inputs + d);
    stage(weight, kPitch, Variant::outputs, depth, right, tile.outputs, there, p.vector_weight);
    __syncthreads();
    product.add(x + warp * 16 * Variant::rows * kPitch, kPitch, weight, kPitch, depth);
    left.first += kDepth<T> * left.depth_stride;
    right.first += kDepth<T> * right.depth_stride;
  }
  __syncthreads();
  product.store_all(patches);
  __syncwarp();
}

// A warp's patches.
template <class T, class Variant>
__device__ __forceinline__ Compute<T>* patches_of(int warp) {
  return reinterpret_cast<Compute<T>*>(shared_memory()) + warp * Variant::rows * Variant::columns * kPatchElements;
}

template <class T, class Variant>
int64_t pointwise_shared_bytes() {
  return most((Variant::pixels + Variant::outputs) * (kDepth<T> + kPad<T>)*int64_t{sizeof(T)},
              Variant::warps * Variant::rows * Variant::columns * kPatchElements * int64_t{sizeof(Compute<T>)});
}

template <class Params, class Variant>
Params with_blocks(Params params, int64_t images, Variant) {
  // A block takes groups until their inputs fill a sector or two, so that no sector is fetched by two blocks.
  const int64_t element = sizeof(*params.x.first);
  params.groups_a_block = static_cast<int>(least(params.groups, ceil_div(64 / element, params.inputs)));
  params.pixel_blocks = ceil_div(params.pixels, Variant::pixels);
  params.output_blocks = ceil_div(params.outputs, Variant::outputs);
  params.slices = ceil_div(params.groups, params.groups_a_block) * params.output_blocks;
  params.blocks = images * params.pixel_blocks * params.slices;
  return params;
}

// The product of one problem, not yet cut. Images follow each other without a seam in channels_last: their pixels are one
// long row.
template <class T>
PointwiseProduct<T> pointwise_product(const GroupPointwise& p) {
  const bool last = p.layout == Layout::channels_last;
  PointwiseProduct<T> params{};
  params.inputs = p.in_channels / p.groups;
  params.outputs = p.out_channels / p.groups;
  params.groups = static_cast<int>(p.groups);
  params.pixels = last ? p.batch * p.pixels : p.pixels;
  const T* x = static_cast<const T*>(p.x);
  params.x = last ? Factor<T>{x, p.in_channels, 1} : Factor<T>{x, 1, p.pixels};
  params.x_image = p.in_channels * p.pixels;
  params.x_group = last ? params.inputs : params.inputs * p.pixels;
  const T* weight = static_cast<const T*>(p.weight);
  params.weight = p.weight_transposed ? Factor<T>{weight, 1, params.outputs} : Factor<T>{weight, params.inputs, 1};
  params.weight_group = params.inputs * params.outputs;
  params.vector_x = params.x.vectors() && params.inputs % kWidest<T> == 0;
  params.vector_weight = params.weight.vectors();
  return params;
}

// Calls start(variant, params): as many columns as a group has outputs; where large blocks are too few for the device,
// fewer pixels a block. `images` are those that do not follow each other.
template <class T, class Params, class Start>
auto with_pointwise_traits(const Params& params, int64_t images, Start start) {
  auto cut = [&](auto variant) { return start(variant, with_blocks(params, images, variant)); };
  if constexpr (std::is_same_v<T, double>) {
    return cut(PointwiseTraits<1, 2>{});
  } else {
    if (params.outputs <= 16) return cut(PointwiseTraits<2, 1>{});
    if (params.outputs <= 32) return cut(PointwiseTraits<2, 2>{});
    const PointwiseTraits<2, 4> large;
    if (with_blocks(params, images, large).blocks >= enough_blocks()) return cut(large);
    return cut(PointwiseTraits<1, 4>{});
  }
}

}  // namespace espk::cuda
