// Gradient of the spatial pyramid's input. Branch k is a part of the outputs k..K, so a window of the gradient in shared
// memory becomes the sum of more and more branches, from the last to the first, and each pixel gathers its taps from it.
// Bytes: K*d read (and the halo again) + d written a pixel; multiply-adds: 9*K*d a pixel of the result.
#include "pyramid.cuh"

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

// The first multiple of `stride` that is not below `value`, divided by it.
__host__ __device__ inline int64_t first_multiple(int64_t value, int64_t stride) {
  return value > 0 ? ceil_div(value, stride) : -(-value / stride);
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, 1) spatial_pyramid_backward_input_kernel(const Params<T> p) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const PyramidShape& s = p.shape;
  C* weights = reinterpret_cast<C*>(shared_memory());
  C* window = weights + round_up(9 * s.branches * s.cut.channels, 4);
  const int stride = static_cast<int>(s.stride);

  for (int64_t block = blockIdx.x; block < s.blocks; block += gridDim.x) {
    const Place place(s.cut, block);
    const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
    const int64_t top = first_multiple(place.row - s.halo_rows, s.stride);
    const int64_t left = first_multiple(place.column - s.halo_columns, s.stride);
    // Pixel (0, 0) of this block in units of the window's rows and columns, times the stride.
    const int row_offset = static_cast<int>(place.row - top * s.stride);
    const int column_offset = static_cast<int>(place.column - left * s.stride);
    __syncthreads();
    load_branch_weights(weights, p.weight, s, place.channel, channels);

    const Items items(s.cut, kRows, kVector, s.channels_last);
    const int rounds = (items.count + Traits::threads - 1) / Traits::threads;
    for (int round = 0; round < rounds; ++round) {
      const int index = round * Traits::threads + static_cast<int>(threadIdx.x);
      const bool busy = index < items.count;
      const Item at = items[busy ? index : 0];
      C sums[kRows][kVector] = {};
      for (int k = s.branches - 1; k >= 0; --k) {
        const T* grad = p.grad + place.image * s.out.image + (k * s.channels + place.channel) * s.out.channel;
        if constexpr (Traits::staged) {
          const MapView<T> map{grad, s.out, s.out_height, s.out_width, channels};
          __syncthreads();
          if (s.hff && k < s.branches - 1) {
            fill_window<Fill::add>(window, p.window, map, top, left, p.vector_fill);
          } else {
            fill_window<Fill::replace>(window, p.window, map, top, left, p.vector_fill);
          }
        }
        __syncthreads();
        if (!busy) continue;
        const int64_t dilation = s.dilations[k];
        C w[9][kVector];
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) w[tap][v] = weights[(k * 9 + tap) * s.cut.channels + at.channel + v];
        }
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          const int i = tap / 3 - 1, j = tap % 3 - 1;
          if ((i != 0 && dilation >= s.height) || (j != 0 && dilation >= s.width)) continue;
          const int d = static_cast<int>(dilation);
          int column = at.column + column_offset - j * d;
          if (column % stride != 0) continue;
          column /= stride;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            int row = at.row + r * items.row_groups + row_offset - i * d;
            if (row % stride != 0) continue;
            row /= stride;
            C values[kVector] = {};
            if constexpr (Traits::staged) {
              load<kVector>(values, window + row * p.window.row_step + column * p.window.column_step +
                                        at.channel * p.window.channel_step);
            } else {
              const int64_t y = top + row, x = left + column;
              if (y < 0 || y >= s.out_height || x < 0 || x >= s.out_width || at.channel >= channels) continue;
              const T* from = grad + y * s.out.row + x * s.out.column + at.channel * s.out.channel;
              for (int n = k; n < (s.hff ? s.branches : k + 1); ++n) {
                values[0] += widen(*from);
                from += s.channels * s.out.channel;
              }
            }
#pragma unroll
            for (int v = 0; v < kVector; ++v) sums[r][v] += w[tap][v] * values[v];
          }
        }
      }
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

// The window of the gradient that a cut of the input needs, in the type of the sums.
PyramidPlan backward_plan(const SpatialPyramidBackwardInput& p, const Cut& cut) {
  PyramidPlan plan = pyramid_plan(p, cut);
  plan.window = window_of(p.layout, (cut.rows - 1 + 2 * int64_t{plan.shape.halo_rows}) / p.stride + 1,
                          (cut.columns - 1 + 2 * int64_t{plan.shape.halo_columns}) / p.stride + 1, cut.channels);
  plan.window_bytes = (p.type == Type::float64 ? 8 : 4) * plan.window.count();
  plan.shared_bytes = branch_weight_bytes(p, cut) + plan.window_bytes;
  return plan;
}

int64_t no_scratch(const SpatialPyramidBackwardInput&) { return 0; }

Outcome run(const SpatialPyramidBackwardInput& p, void*, void* stream) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_pyramid_traits<T>(
        p, p.height, p.width, sizeof(Compute<T>), aligned(p.grad_x, 4 * bytes_of(p.type)),
        [&](const Cut& cut, auto) { return backward_plan(p, cut); },
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
