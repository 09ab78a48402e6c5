// Group pointwise convolution, and with the weight transposed the gradient of its input: per group a matrix product of
// pixels by channels, with scale, shift, residual and PReLU in its epilogue.
// Bytes: M read + N written a pixel (+ N for a residual); multiply-adds: M*N/groups a pixel. Memory-bound on tensor
// cores at every width of ESPNetv2.
#include "output.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  Factor<T> x, weight;  // of image 0 and group 0; rows are pixels and the group's outputs
  Output<T> out;
  int64_t x_image, x_group, weight_group;
  int64_t pixels, inputs, outputs;  // of one group
  int64_t blocks, pixel_blocks, slices, output_blocks;
  int groups, groups_a_block;
  bool vector_x, vector_weight;
};

// Four warps, each with 16 * Rows pixels and 16 * Columns outputs of a group.
template <int Rows, int Columns>
struct Traits {
  static constexpr int rows = Rows, columns = Columns, warps = 4, threads = 32 * warps;
  static constexpr int pixels = 16 * Rows * warps, outputs = 16 * Columns;
};

template <class T, class Variant>
__global__ void __launch_bounds__(Variant::threads, 1) group_pointwise_kernel(const Params<T> p) {
  constexpr int kPitch = kDepth<T> + kPad<T>;
  T* x = reinterpret_cast<T*>(shared_memory());
  T* weight = x + Variant::pixels * kPitch;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // The result takes the place of the factors.
  Compute<T>* patches =
      reinterpret_cast<Compute<T>*>(shared_memory()) + warp * Variant::rows * Variant::columns * kPatchElements;

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t slice = block % p.slices, image = block / p.slices / p.pixel_blocks;
    const int64_t first_pixel = block / p.slices % p.pixel_blocks * Variant::pixels;
    const int64_t first_group = slice / p.output_blocks * p.groups_a_block;
    const int64_t first_output = slice % p.output_blocks * Variant::outputs;
    const int64_t outputs = least(Variant::outputs, p.outputs - first_output);
    const int64_t pixels = least(Variant::pixels, p.pixels - first_pixel);
    for (int64_t group = first_group; group < least(first_group + p.groups_a_block, p.groups); ++group) {
      Factor<T> left = p.x, right = p.weight;
      left.first += image * p.x_image + group * p.x_group + first_pixel * left.row_stride;
      right.first += group * p.weight_group + first_output * right.row_stride;
      WarpProduct<T, Variant::rows, Variant::columns> product;
      for (int64_t d = 0; d < p.inputs; d += kDepth<T>) {
        const int64_t there = least(kDepth<T>, p.inputs - d);
        const int depth = static_cast<int>(round_up(there, 16));
        __syncthreads();
        stage(x, kPitch, Variant::pixels, depth, left, pixels, there, p.vector_x);
        stage(weight, kPitch, Variant::outputs, depth, right, outputs, there, p.vector_weight);
        __syncthreads();
        product.add(x + warp * 16 * Variant::rows * kPitch, kPitch, weight, kPitch, depth);
        left.first += kDepth<T> * left.depth_stride;
        right.first += kDepth<T> * right.depth_stride;
      }
      __syncthreads();
      product.store_all(patches);
      __syncwarp();
      for (int i = 0; i < Variant::rows * Variant::columns; ++i) {
        const int64_t row = (warp * Variant::rows + i / Variant::columns) * 16, column = i % Variant::columns * 16;
        write_patch(patches + i * kPatchElements, p.out, image, group * p.outputs + first_output + column,
                    outputs - column, [&](int r) { return row + r < pixels ? first_pixel + row + r : int64_t{-1}; });
      }
    }
  }
}

template <class T, class Variant>
int64_t shared_bytes() {
  return most((Variant::pixels + Variant::outputs) * (kDepth<T> + kPad<T>)*int64_t{sizeof(T)},
              Variant::warps * Variant::rows * Variant::columns * kPatchElements * int64_t{sizeof(Compute<T>)});
}

template <class T, class Variant>
Params<T> with_blocks(Params<T> params, int64_t images, Variant) {
  // A block takes groups until their inputs fill a sector or two, so that no sector is fetched by two blocks.
  params.groups_a_block = static_cast<int>(least(params.groups, ceil_div(64 / int64_t{sizeof(T)}, params.inputs)));
  params.pixel_blocks = ceil_div(params.pixels, Variant::pixels);
  params.output_blocks = ceil_div(params.outputs, Variant::outputs);
  params.slices = ceil_div(params.groups, params.groups_a_block) * params.output_blocks;
  params.blocks = images * params.pixel_blocks * params.slices;
  return params;
}

template <class T>
Outcome run_typed(const GroupPointwise& p, const Output<T>& out, void* stream) {
  const bool last = p.layout == Layout::channels_last;
  Params<T> params{};
  params.inputs = p.in_channels / p.groups;
  params.outputs = p.out_channels / p.groups;
  params.groups = static_cast<int>(p.groups);
  // Images follow each other without a seam in channels_last: their pixels are one long row.
  const int64_t images = last ? 1 : p.batch;
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
  params.out = out;
  params.out.vectors &= params.outputs % kWidest<T> == 0;

  auto start = [&](auto variant, const Params<T>& with) {
    using Variant = decltype(variant);
    return launch("group_pointwise", group_pointwise_kernel<T, Variant>, with.blocks, Variant::threads,
                  shared_bytes<T, Variant>(), stream, with);
  };
  // As many columns as a group has outputs; where large blocks are too few for the device, fewer pixels a block.
  if constexpr (std::is_same_v<T, double>) {
    return start(Traits<1, 2>{}, with_blocks(params, images, Traits<1, 2>{}));
  } else {
    if (params.outputs <= 16) return start(Traits<2, 1>{}, with_blocks(params, images, Traits<2, 1>{}));
    if (params.outputs <= 32) return start(Traits<2, 2>{}, with_blocks(params, images, Traits<2, 2>{}));
    const Params<T> large = with_blocks(params, images, Traits<2, 4>{});
    if (large.blocks >= enough_blocks()) return start(Traits<2, 4>{}, large);
    return start(Traits<1, 4>{}, with_blocks(params, images, Traits<1, 4>{}));
  }
}

int64_t no_scratch(const GroupPointwise&) { return 0; }

Outcome run(const GroupPointwise& p, void*, void* stream) {
  return run_group_pointwise(p, {}, p.out_channels, 0, stream);
}

}  // namespace

Outcome run_group_pointwise(const GroupPointwise& p, const Shortcut& shortcut, int64_t whole_channels,
                            int64_t first_channel, void* stream) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Output<T> out = output_of<T>(p.out, p.layout, p.epilogue, whole_channels, p.pixels, first_channel);
    out.shortcut = shortcut;
    return run_typed<T>(p, out, stream);
  });
}

extern const Kernel<GroupPointwise> group_pointwise = {no_scratch, run};

}  // namespace espk::cuda
