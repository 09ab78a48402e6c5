// Gradient of the spatial pyramid's input. Branch k is a part of the outputs k..K, so a window of the gradient in shared
// memory becomes the sum of more and more branches, from the last to the first, and each pixel gathers its taps from it.
// Bytes: K*d read (and the halo again) + d written a pixel; multiply-adds: 9*K*d a pixel of the result.
#include "spatial_pyramid_backward_input.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T* grad;
  const T* weight;
  T* grad_x;
  PyramidShape shape;
  Window window;
  bool vector_fill;
};

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, 1) spatial_pyramid_backward_input_kernel(const Params<T> p) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const PyramidShape& s = p.shape;
  C* weights = reinterpret_cast<C*>(shared_memory());
  C* window = weights + round_up(9 * s.branches * s.cut.channels, 4);

  for (int64_t block = blockIdx.x; block < s.blocks; block += gridDim.x) {
    const Place place(s.cut, block);
    const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
    __syncthreads();
    load_branch_weights(weights, p.weight, s, place.channel, channels);

    const Items items(s.cut, kRows, kVector, s.channels_last);
    const int rounds = (items.count + Traits::threads - 1) / Traits::threads;
    for (int round = 0; round < rounds; ++round) {
      const int index = round * Traits::threads + static_cast<int>(threadIdx.x);
      const bool busy = index < items.count;
      const Item at = items[busy ? index : 0];
      C sums[kRows][kVector] = {};
      gather_branches<Traits>(sums, s, p.grad, weights, p.window, window, p.vector_fill, place, channels, at, busy,
                              items.row_groups, AsItIs{});
      if (!busy || at.channel >= channels) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t y = place.row + at.row + r * items.row_groups, x = place.column + at.column;
        if (y >= s.height || x >= s.width) continue;
        store<kVector>(p.grad_x + place.image * s.in.image + (place.channel + at.channel) * s.in.channel +
                           y * s.in.row + x * s.in.column,
                       sums[r]);
      }
    }
  }
}

int64_t no_scratch(const SpatialPyramidBackwardInput&) { return 0; }

Outcome run(const SpatialPyramidBackwardInput& p, void*, void* stream) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_pyramid_traits<T>(
        p, p.height, p.width, sizeof(Compute<T>), aligned(p.grad_x, 4 * bytes_of(p.type)),
        [&](const Cut& cut, auto) { return backward_plan(p, cut, 0); },
        [&](auto traits, const PyramidPlan& plan) {
          using Traits = decltype(traits);
          Params<T> params{};
          params.grad = static_cast<const T*>(p.grad);
          params.weight = static_cast<const T*>(p.weight);
          params.grad_x = static_cast<T*>(p.grad_x);
          params.shape = plan.shape;
          params.window = plan.window;
          params.vector_fill = aligned(p.grad, 16) && plan.vector_fill;
          return launch("spatial_pyramid_backward_input", spatial_pyramid_backward_input_kernel<T, Traits>,
                        plan.shape.blocks, Traits::threads, plan.shared_bytes, stream, params);
        });
  });
}

}  // namespace

extern const Kernel<SpatialPyramidBackwardInput> spatial_pyramid_backward_input = {no_scratch, run};

}  // namespace espk::cuda
