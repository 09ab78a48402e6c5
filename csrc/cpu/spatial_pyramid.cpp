// Forward of the spatial pyramid: each strip of the input is read once into a zero-bordered tile, and all K branches of
// it are computed with the sums of hierarchical feature fusion carried in registers from branch to branch.
// In training the map is normalised on its way into the tile, and the moments of the result are taken while it is near.
// Bytes: d read + K*d written a pixel; multiply-adds: 9*K*d a pixel.
#include "pixel_patches.h"

namespace espk::ESPK_ISA {
namespace {

template <class T>
void run_planes(const SpatialPyramid& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const BranchWeights<C> weights(p, shared);
  const Strips strips = pyramid_strips<C>(p);
  const PyramidStrip<C> strip(p, strips.rows, p.out_width);
  const int64_t out_plane = p.out_height * p.out_width;
  C* tile = strip.zeroed_tiles();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / strips.count, first = unit % strips.count * strips.rows;
    const int64_t image = plane / p.channels, channel = plane % p.channels;
    const int64_t rows = least(strips.rows, p.out_height - first);
    if (rows <= 0) continue;
    fill_plane(strip.tile, tile, static_cast<const T*>(p.x) + plane * p.height * p.width, first * p.stride, p.height,
               {0, p.width}, strips.count > 1);
    Sweep<C> sweep = strip.sweep(tile, rows, weights.of_channel(channel));
    set_epilogue(sweep, p, channel);
    T* out = static_cast<T*>(p.out) + (image * p.out_channels() + channel) * out_plane + first * p.out_width;
    const int64_t branch = p.channels * out_plane;
    if constexpr (std::is_same_v<T, C>) {
      sweep.out = out;
      sweep.out_segment = branch;
      sweep.out_row = p.out_width;
      ESPK_ISA::sweep(sweep);
    } else {
      const int64_t pitch = rows * p.out_width;
      C* results = static_cast<C*>(scratch(Slot::map, p.branches * pitch * static_cast<int64_t>(sizeof(C))));
      sweep.out = results;
      sweep.out_segment = pitch;
      sweep.out_row = p.out_width;
      ESPK_ISA::sweep(sweep);
      for (int64_t k = 0; k < p.branches; ++k) copy_row(out + k * branch, results + k * pitch, pitch);
    }
  }
}

template <class T>
void run_pixels(const SpatialPyramid& p, void* memory, int64_t begin, int64_t end) {
  const PixelPatches<T> patches(p, memory);
  for (int64_t unit = begin; unit < end; ++unit) patches.run(unit);
}

void before(const SpatialPyramid& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const SharedPyramid<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    prepare_branch_weights(p, p.weight, shared.weights);
    if (p.normalise.scale) shared.normalise.fill(p.normalise, p.channels);
  });
}

int64_t units(const SpatialPyramid& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    if (p.layout == Layout::contiguous) return p.batch * p.channels * pyramid_strips<C>(p).count;
    const Patches cut = patches_of<C>(p);
    return p.batch * cut.of_image() * cut.turns();
  });
}

void run(const SpatialPyramid& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.layout == Layout::channels_last) {
      run_pixels<T>(p, shared, begin, end);
    } else {
      run_planes<T>(p, shared, begin, end);
    }
  });
}

void after(const SpatialPyramid& p, void* memory) {
  if (!p.moments.mean) return;
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const Patches cut = patches_of<C>(p);
    const SharedPyramid<C> shared(p, memory);
    shared.moments.merge(p.moments, p.batch * cut.of_image(), [&](int64_t number) {
      const Patch patch = cut.at(p, number);
      return patch.rows * patch.columns;
    });
  });
}

}  // namespace

extern const Kernel<SpatialPyramid> spatial_pyramid = {carved_bytes<SharedPyramid>, before, units, run, nullptr};
extern const Kernel<SpatialPyramid> normalised_pyramid = {carved_bytes<SharedPyramid>, before, units, run, after};

}  // namespace espk::ESPK_ISA
