// Forward of the spatial pyramid. A block brings a window of the input with the halo of the largest dilation that
// touches the map into shared memory once and computes all K branches of it; the sums of hierarchical feature fusion
// stay in registers from branch to branch.
// Bytes: d read (and the halo again) + K*d written a pixel; multiply-adds: 9*K*d a pixel. Memory-bound on every device.
#include "spatial_pyramid.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T* x;
  const T* weight;
  T* out;
  PyramidShape shape;
  Epilogue epilogue;
  Window window;
  bool vector_fill;
};

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, 1) spatial_pyramid_kernel(const Params<T> p) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const PyramidShape& s = p.shape;
  C* weights = reinterpret_cast<C*>(shared_memory());
  T* window = reinterpret_cast<T*>(weights + round_up(9 * s.branches * s.cut.channels, 4));

  for (int64_t block = blockIdx.x; block < s.blocks; block += gridDim.x) {
    const Place place(s.cut, block);
    const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
    const T* image = p.x + place.image * s.in.image + place.channel * s.in.channel;
    const int64_t top = place.row * s.stride - s.halo_rows, left = place.column * s.stride - s.halo_columns;
    __syncthreads();
    load_branch_weights(weights, p.weight, s, place.channel, channels);
    if constexpr (Traits::staged) {
      const MapView<T> map{image, s.in, s.height, s.width, channels};
      fill_window<Fill::replace>(window, p.window, map, top, left, p.vector_fill);
    }
    __syncthreads();

    const Items items(s.cut, kRows, kVector, s.channels_last);
    for (int item = threadIdx.x; item < items.count; item += static_cast<int>(blockDim.x)) {
      const Item at = items[item];
      C sums[kRows][kVector] = {};
      for (int k = 0; k < s.branches; ++k) {
        add_branch<Traits>(sums, s, k, weights, p.window, window, image, place, channels, at, items.row_groups,
                           AsItIs{});
        const int64_t channel = k * s.channels + place.channel + at.channel;
        T* out = p.out + place.image * s.out.image + channel * s.out.channel;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t y = place.row + at.row + r * items.row_groups, x = place.column + at.column;
          if (y < s.out_height && x < s.out_width && at.channel < channels) {
            C results[kVector];
#pragma unroll
            for (int v = 0; v < kVector; ++v) results[v] = channel_epilogue(p.epilogue, channel + v, sums[r][v]);
            store<kVector>(out + y * s.out.row + x * s.out.column, results);
          }
          if (!s.hff) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) sums[r][v] = 0;
          }
        }
      }
    }
  }
}

template <class T, class Traits>
Outcome start(const SpatialPyramid& p, const PyramidPlan& plan, void* stream) {
  Params<T> params{};
  params.x = static_cast<const T*>(p.x);
  params.weight = static_cast<const T*>(p.weight);
  params.out = static_cast<T*>(p.out);
  params.shape = plan.shape;
  params.epilogue = p.epilogue;
  params.window = plan.window;
  params.vector_fill = aligned(p.x, 16) && plan.vector_fill;
  return launch("spatial_pyramid", spatial_pyramid_kernel<T, Traits>, plan.shape.blocks, Traits::threads,
                plan.shared_bytes, stream, params);
}

int64_t no_scratch(const SpatialPyramid&) { return 0; }

Outcome run(const SpatialPyramid& p, void*, void* stream) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_pyramid_traits<T>(
        p, p.out_height, p.out_width, bytes_of(p.type), aligned(p.out, 4 * bytes_of(p.type)),
        [&](const Cut& cut, auto) { return forward_plan(p, cut, 0); },
        [&](auto traits, const PyramidPlan& plan) { return start<T, decltype(traits)>(p, plan, stream); });
  });
}

}  // namespace

extern const Kernel<SpatialPyramid> spatial_pyramid = {no_scratch, run};

}  // namespace espk::cuda
