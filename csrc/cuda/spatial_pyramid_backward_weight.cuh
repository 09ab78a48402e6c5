// Gradient of the spatial pyramid's weight. A block takes rectangles of the map that the shape alone decides: it brings
// a window of the input into shared memory, adds the gradients from the last branch to the first in registers, and sums
// their products with the nine taps. A second stage adds the blocks' sums in order: no atomics.
// Bytes: (K + 1)*d read a pixel (and the halo again), and [K, d, 9] written and read for every part; multiply-adds:
// 9*K*d a pixel.
#pragma once

#include "ordered_sum.cuh"
#include "pyramid.cuh"

namespace espk::cuda {

template <class T, class OfGrad, class OfInput>
struct PyramidWeightParams {
  const T* grad;
  const T* x;
  Compute<T>* partial;  // [parts][K][d][9]
  PyramidShape shape;
  Window window;
  int64_t rectangles, rectangles_a_part, blocks;
  bool vector_fill;
  OfGrad of_grad;
  OfInput of_x;
};

// From thread to thread of their products: odd, so that the threads of a warp write to 32 banks.
template <class Traits>
constexpr int kProductPitch = 9 * Traits::channels | 1;

template <class T, class Traits, class OfGrad, class OfInput>
__global__ void __launch_bounds__(Traits::threads, 1)
    spatial_pyramid_backward_weight_kernel(const PyramidWeightParams<T, OfGrad, OfInput> p) {
  using C = Compute<T>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels, kTaps = 9 * kVector;
  constexpr int kPitch = kProductPitch<Traits>;
  const PyramidShape& s = p.shape;
  const int sums_a_branch = 9 * s.cut.channels;
  C* sums = reinterpret_cast<C*>(shared_memory());  // [K][channels][9]
  C* products = sums + round_up(s.branches * sums_a_branch, 4);  // [threads][kPitch], a thread's [channels][9] first
  T* window = reinterpret_cast<T*>(products + Traits::threads * kPitch);
  const int thread = static_cast<int>(threadIdx.x);

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t part = block / s.cut.slices;
    // Each sum has one thread, which is the only one that touches it.
    for (int i = thread; i < sums_a_branch; i += Traits::threads) {
      for (int k = 0; k < s.branches; ++k) sums[k * sums_a_branch + i] = 0;
    }
    const int64_t end = least((part + 1) * p.rectangles_a_part, p.rectangles);
    for (int64_t rectangle = part * p.rectangles_a_part; rectangle < end; ++rectangle) {
      const Place place(s.cut, rectangle * s.cut.slices + block % s.cut.slices);
      const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
      const T* image = p.x + place.image * s.in.image + place.channel * s.in.channel;
      if constexpr (Traits::staged) {
        const MapView<T> map{image, s.in, s.height, s.width, channels};
        __syncthreads();
        fill_window<Fill::replace>(window, p.window, map, place.row * s.stride - s.halo_rows,
                                   place.column * s.stride - s.halo_columns, p.vector_fill, p.of_x, place.channel);
      }
      __syncthreads();
      const Items items(s.cut, kRows, kVector, s.channels_last);
      const int rounds = (items.count + Traits::threads - 1) / Traits::threads;
      for (int round = 0; round < rounds; ++round) {
        const int first = round * Traits::threads;
        const bool busy = first + thread < items.count;
        const Item at = items[busy ? first + thread : 0];
        C gradients[kRows][kVector] = {};
        for (int k = s.branches - 1; k >= 0; --k) {
          const int64_t dilation = s.dilations[k];
          const T* grad =
              p.grad + place.image * s.out.image + (k * s.channels + place.channel + at.channel) * s.out.channel;
          C taps[kVector][9] = {};
          if (busy && at.channel < channels) {
            const auto of_grad = p.of_grad.template channels<kVector>(k * s.channels + place.channel + at.channel);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int64_t y = place.row + at.row + r * items.row_groups, x = place.column + at.column;
              C values[kVector] = {};
              if (y < s.out_height && x < s.out_width) {
                load_through<kVector>(values, grad + y * s.out.row + x * s.out.column, of_grad);
              }
#pragma unroll
              for (int v = 0; v < kVector; ++v) gradients[r][v] = s.hff ? gradients[r][v] + values[v] : values[v];
            }
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
              const int i = tap / 3 - 1, j = tap % 3 - 1;
              if ((i != 0 && dilation >= s.height) || (j != 0 && dilation >= s.width)) continue;
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                const int row = at.row + r * items.row_groups;
                C values[kVector] = {};
                if constexpr (Traits::staged) {
                  const int d = static_cast<int>(dilation), stride = static_cast<int>(s.stride);
                  load<kVector>(values, window + (row * stride + s.halo_rows + i * d) * p.window.row_step +
                                            (at.column * stride + s.halo_columns + j * d) * p.window.column_step +
                                            at.channel * p.window.channel_step);
                } else {
                  const int64_t y = (place.row + row) * s.stride + i * dilation;
                  const int64_t x = (place.column + at.column) * s.stride + j * dilation;
                  if (y >= 0 && y < s.height && x >= 0 && x < s.width) {
                    const T* from = image + y * s.in.row + x * s.in.column + at.channel * s.in.channel;
                    load_through<kVector>(values, from, p.of_x.template channels<kVector>(place.channel + at.channel));
                  }
                }
#pragma unroll
                for (int v = 0; v < kVector; ++v) taps[v][tap] += gradients[r][v] * values[v];
              }
            }
          }
#pragma unroll
          for (int e = 0; e < kTaps; ++e) products[thread * kPitch + e] = taps[e / 9][e % 9];
          __syncthreads();
          for (int i = thread; i < sums_a_branch; i += Traits::threads) {
            const int vector = i / kTaps;
            C sum = 0;
            for (int outer = 0; outer < items.row_groups; ++outer) {
              for (int column = 0; column < items.columns; ++column) {
                const int slot = items.index(outer, column, vector) - first;
                if (slot >= 0 && slot < Traits::threads) sum += products[slot * kPitch + i % kTaps];
              }
            }
            sums[k * sums_a_branch + i] += sum;
          }
          __syncthreads();
        }
      }
    }
    C* partial = p.partial + part * s.branches * s.channels * 9;
    const int64_t channel = block % s.cut.slices * s.cut.channels;
    const int64_t there = least(s.cut.channels, s.channels - channel) * 9;
    for (int i = thread; i < there; i += Traits::threads) {
      for (int k = 0; k < s.branches; ++k) {
        partial[(k * s.channels + channel) * 9 + i] = sums[k * sums_a_branch + i];
      }
    }
  }
}

template <class Traits>
PyramidPlan weight_plan(const SpatialPyramidBackwardWeight& p, const Cut& cut, Traits) {
  const int64_t compute = p.type == Type::float64 ? 8 : 4;
  PyramidPlan plan = pyramid_plan(p, cut);
  plan.window = input_window(p, plan.shape);
  plan.window_bytes = bytes_of(p.type) * plan.window.count();
  plan.shared_bytes =
      branch_weight_bytes(p, cut) + Traits::threads * kProductPitch<Traits> * compute + plan.window_bytes;
  return plan;
}

// Two rectangles a part at least, so that a part's sums are a small share of its bytes.
inline int64_t rectangles_a_part(const SpatialPyramidBackwardWeight& p, const Cut& cut) {
  return most(2, ceil_div(rectangles_of(p, cut) * cut.slices, 4 * enough_blocks()));
}
inline int64_t weight_parts(const SpatialPyramidBackwardWeight& p, const Cut& cut) {
  return ceil_div(rectangles_of(p, cut), rectangles_a_part(p, cut));
}

// Calls f(element type, traits, plan) with the variant for the problem.
template <class F>
auto with_pyramid_weight_traits(const SpatialPyramidBackwardWeight& p, bool vectors, F&& f) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_pyramid_traits<T>(
        p, p.out_height, p.out_width, sizeof(Compute<T>), vectors && aligned(p.grad, 4 * bytes_of(p.type)),
        [&](const Cut& cut, auto traits) { return weight_plan(p, cut, traits); },
        [&](auto traits, const PyramidPlan& plan) { return f(type, traits, plan); });
  });
}

// `vectors`: whether the prologues allow them.
inline int64_t pyramid_weight_scratch_bytes(const SpatialPyramidBackwardWeight& p, bool vectors) {
  return with_pyramid_weight_traits(p, vectors, [&](auto* type, auto, const PyramidPlan& plan) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return weight_parts(p, plan.shape.cut) * p.out_channels() * 9 * int64_t{sizeof(C)};
  });
}

// Calls of(type) for the two prologues (normalise.cuh) of that type, through which the maps go on their way in.
template <class OfGrad, class OfInput>
Outcome run_pyramid_weight(const SpatialPyramidBackwardWeight& p, bool vectors, OfGrad of_grad, OfInput of_x,
                           void* scratch, void* stream) {
  return with_pyramid_weight_traits(p, vectors, [&](auto* type, auto traits, const PyramidPlan& plan) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Traits = decltype(traits);
    using Params = PyramidWeightParams<T, decltype(of_grad(type)), decltype(of_x(type))>;
    const Cut& cut = plan.shape.cut;
    Params params{};
    params.of_grad = of_grad(type);
    params.of_x = of_x(type);
    params.grad = static_cast<const T*>(p.grad);
    params.x = static_cast<const T*>(p.x);
    params.partial = static_cast<Compute<T>*>(scratch);
    params.shape = plan.shape;
    params.window = plan.window;
    params.rectangles = rectangles_of(p, cut);
    params.rectangles_a_part = rectangles_a_part(p, cut);
    params.blocks = weight_parts(p, cut) * cut.slices;
    params.vector_fill = aligned(p.x, 16) && plan.vector_fill;
    const Outcome outcome =
        launch("spatial_pyramid_backward_weight",
               spatial_pyramid_backward_weight_kernel<T, Traits, decltype(params.of_grad), decltype(params.of_x)>,
               params.blocks, Traits::threads, plan.shared_bytes, stream, params);
    if (outcome.failed()) return outcome;
    return ordered_sum<T>(params.partial, static_cast<T*>(p.grad_weight), weight_parts(p, cut), p.out_channels() * 9,
                          stream);
  });
}

}  // namespace espk::cuda
