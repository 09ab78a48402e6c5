// Group pointwise convolution, and with the weight transposed the gradient of its input: per group a matrix product of
// pixels by channels, with scale, shift, residual and PReLU in its epilogue.
// Bytes: M read + N written a pixel (+ N for a residual); multiply-adds: M*N/groups a pixel. Memory-bound on tensor
// cores at every width of ESPNetv2.
#include "group_pointwise.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params : PointwiseProduct<T> {
  Output<T> out;
};

template <class T, class Variant>
__global__ void __launch_bounds__(Variant::threads, 1) group_pointwise_kernel(const Params<T> p) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Compute<T>* patches = patches_of<T, Variant>(warp);

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t slice = block % p.slices, image = block / p.slices / p.pixel_blocks;
    const int64_t first_pixel = block / p.slices % p.pixel_blocks * Variant::pixels;
    const int64_t first_group = slice / p.output_blocks * p.groups_a_block;
    const int64_t first_output = slice % p.output_blocks * Variant::outputs;
    const int64_t outputs = least(Variant::outputs, p.outputs - first_output);
    const int64_t pixels = least(Variant::pixels, p.pixels - first_pixel);
    for (int64_t group = first_group; group < least(first_group + p.groups_a_block, p.groups); ++group) {
      multiply_tile<T, Variant>(p, {image, group, first_pixel, first_output, pixels, outputs}, patches, AsItIs{});
      for (int i = 0; i < Variant::rows * Variant::columns; ++i) {
        const int64_t row = (warp * Variant::rows + i / Variant::columns) * 16, column = i % Variant::columns * 16;
        write_patch(patches + i * kPatchElements, p.out, image, group * p.outputs + first_output + column,
                    outputs - column, [&](int r) { return row + r < pixels ? first_pixel + row + r : int64_t{-1}; });
      }
    }
  }
}

template <class T>
Outcome run_typed(const GroupPointwise& p, const Output<T>& out, void* stream) {
  const int64_t images = p.layout == Layout::channels_last ? 1 : p.batch;
  Params<T> params{pointwise_product<T>(p), out};
  params.out.vectors &= params.outputs % kWidest<T> == 0;
  return with_pointwise_traits<T>(params, images, [&](auto variant, const Params<T>& with) {
    using Variant = decltype(variant);
    return launch("group_pointwise", group_pointwise_kernel<T, Variant>, with.blocks, Variant::threads,
                  pointwise_shared_bytes<T, Variant>(), stream, with);
  });
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
