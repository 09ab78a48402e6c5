// Gradient of the group pointwise convolution's weight: per group a matrix product whose depth is all pixels. Blocks
// take stretches of pixels that the shape alone decides, and a second stage adds their sums in order: no atomics.
// Bytes: M + N read a pixel (each once for every 64 of the other's channels in a group), and a partial result written
// and read for each stretch; multiply-adds: M*N/groups a pixel.
#pragma once

#include "matrix_product.cuh"
#include "ordered_sum.cuh"

namespace espk::cuda {

template <class T, class OfGrad, class OfInput>
struct PointwiseWeightParams {
  Factor<T> grad, x;  // of image 0 and group 0; rows are channels, the depth is pixels
  Compute<T>* partial;  // [stretches][N][M/groups]
  int64_t grad_image, x_image, grad_group, x_group;
  int64_t pixels, inputs, outputs, groups;
  int64_t steps_an_image, steps, steps_a_stretch;  // a step is kDepth pixels of one image
  int64_t blocks, output_blocks, input_blocks;
  bool vector_grad, vector_x;
  OfGrad of_grad;
  OfInput of_x;
};

// Of four warps, `Tall` stand side by side over a group's outputs, and the others take another part of each step's
// pixels. A group with few outputs would leave warps idle otherwise.
template <int Tall>
struct PointwiseWeightTraits {
  static constexpr int warps = 4, threads = 32 * warps, tall = Tall, deep = warps / Tall;
  static constexpr int outputs = 16 * Tall, columns = 4, inputs = 16 * columns;
};

// A step must give each of `deep` warps whole fragments, 16 or 8 deep on tensor cores and 4 else.
template <class T, class Variant>
constexpr int kWeightStep = kDepth<T> / Variant::deep < (sizeof(T) == 2 ? 16 : 4) ? 16 * Variant::deep : kDepth<T>;

template <class T, class Variant, class OfGrad, class OfInput>
__global__ void __launch_bounds__(Variant::threads, 1)
    group_pointwise_backward_weight_kernel(const PointwiseWeightParams<T, OfGrad, OfInput> p) {
  using C = Compute<T>;
  constexpr int kPixels = kWeightStep<T, Variant>, kPitch = kPixels + kPad<T>, kShare = kPixels / Variant::deep;
  T* grad = reinterpret_cast<T*>(shared_memory());
  T* x = grad + Variant::outputs * kPitch;
  C* patches = reinterpret_cast<C*>(shared_memory());  // in the place of the factors
  const int warp = static_cast<int>(threadIdx.x) / 32, tall = warp % Variant::tall, deep = warp / Variant::tall;

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t first_input = block % p.input_blocks * Variant::inputs;
    const int64_t first_output = block / p.input_blocks % p.output_blocks * Variant::outputs;
    const int64_t group = block / p.input_blocks / p.output_blocks % p.groups;
    const int64_t stretch = block / p.input_blocks / p.output_blocks / p.groups;
    const int64_t outputs = least(Variant::outputs, p.outputs - first_output);
    const int64_t inputs = least(Variant::inputs, p.inputs - first_input);
    WarpProduct<T, 1, Variant::columns> product;
    const int64_t end = least((stretch + 1) * p.steps_a_stretch, p.steps);
    for (int64_t step = stretch * p.steps_a_stretch; step < end; ++step) {
      const int64_t image = step / p.steps_an_image, pixel = step % p.steps_an_image * kPixels;
      const int64_t there = least(kPixels, p.pixels - pixel);
      Factor<T> left = p.grad, right = p.x;
      left.first +=
          image * p.grad_image + group * p.grad_group + first_output * left.row_stride + pixel * left.depth_stride;
      right.first +=
          image * p.x_image + group * p.x_group + first_input * right.row_stride + pixel * right.depth_stride;
      __syncthreads();
      stage<false>(grad, kPitch, Variant::outputs, kPixels, left, outputs, there, p.vector_grad, p.of_grad,
                   group * p.outputs + first_output);
      stage<false>(x, kPitch, Variant::inputs, kPixels, right, inputs, there, p.vector_x, p.of_x,
                   group * p.inputs + first_input);
      __syncthreads();
      product.add(grad + tall * 16 * kPitch + deep * kShare, kPitch, x + deep * kShare, kPitch, kShare);
    }
    C* partial = p.partial + (stretch * p.groups + group) * p.outputs * p.inputs;
    __syncthreads();
    product.store_all(patches + warp * Variant::columns * kPatchElements);
    __syncthreads();
    for (int i = threadIdx.x; i < Variant::outputs * Variant::inputs; i += Variant::threads) {
      const int row = i / Variant::inputs, column = i % Variant::inputs;
      if (row >= outputs || column >= inputs) continue;
      C sum = 0;
#pragma unroll
      for (int w = 0; w < Variant::deep; ++w) {
        const int patch = (w * Variant::tall + row / 16) * Variant::columns + column / 16;
        sum += patches[patch * kPatchElements + row % 16 * kPatchPitch + column % 16];
      }
      partial[(first_output + row) * p.inputs + first_input + column] = sum;
    }
    __syncthreads();
  }
}

template <class Params>
int64_t stretches(const Params& p) {
  return ceil_div(p.steps, p.steps_a_stretch);
}

template <class T, class Variant, class OfGrad = AsItIs, class OfInput = AsItIs>
PointwiseWeightParams<T, OfGrad, OfInput> described(const GroupPointwiseBackwardWeight& p, Variant,
                                                    const OfGrad& of_grad = {}, const OfInput& of_x = {}) {
  const bool last = p.layout == Layout::channels_last;
  PointwiseWeightParams<T, OfGrad, OfInput> params{};
  params.of_grad = of_grad;
  params.of_x = of_x;
  params.inputs = p.in_channels / p.groups;
  params.outputs = p.out_channels / p.groups;
  params.groups = p.groups;
  const int64_t images = last ? 1 : p.batch;
  params.pixels = last ? p.batch * p.pixels : p.pixels;
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  params.grad = last ? Factor<T>{grad, 1, p.out_channels} : Factor<T>{grad, p.pixels, 1};
  params.x = last ? Factor<T>{x, 1, p.in_channels} : Factor<T>{x, p.pixels, 1};
  params.grad_image = p.out_channels * p.pixels;
  params.x_image = p.in_channels * p.pixels;
  params.grad_group = last ? params.outputs : params.outputs * p.pixels;
  params.x_group = last ? params.inputs : params.inputs * p.pixels;
  params.vector_grad = params.grad.vectors();
  params.vector_x = params.x.vectors();
  params.steps_an_image = ceil_div(params.pixels, kWeightStep<T, Variant>);
  params.steps = images * params.steps_an_image;
  params.output_blocks = ceil_div(params.outputs, Variant::outputs);
  params.input_blocks = ceil_div(params.inputs, Variant::inputs);
  const int64_t tiles = params.output_blocks * params.input_blocks * params.groups;
  // Four times the blocks that fill a device, and no stretch so short that its partial result costs more than its maps.
  params.steps_a_stretch = most(4, ceil_div(params.steps * tiles, 4 * enough_blocks()));
  params.blocks = tiles * stretches(params);
  return params;
}

// Calls f with the variant for the problem.
template <class F>
auto with_weight_traits(const GroupPointwiseBackwardWeight& p, F&& f) {
  return p.out_channels / p.groups <= 16 ? f(PointwiseWeightTraits<1>{}) : f(PointwiseWeightTraits<4>{});
}

inline int64_t pointwise_weight_scratch_bytes(const GroupPointwiseBackwardWeight& p) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_weight_traits(p, [&](auto variant) {
      const int64_t count = p.out_channels * (p.in_channels / p.groups);
      return stretches(described<T>(p, variant)) * count * int64_t{sizeof(Compute<T>)};
    });
  });
}

// Both maps go through a prologue (normalise.cuh) on their way in.
template <class T, class OfGrad, class OfInput>
Outcome run_pointwise_weight(const GroupPointwiseBackwardWeight& p, const OfGrad& of_grad, const OfInput& of_x,
                             void* scratch, void* stream) {
  return with_weight_traits(p, [&](auto variant) {
    using Variant = decltype(variant);
    auto params = described<T>(p, variant, of_grad, of_x);
    params.partial = static_cast<Compute<T>*>(scratch);
    constexpr int64_t kBytes =
        most((Variant::outputs + Variant::inputs) * (kWeightStep<T, Variant> + kPad<T>)*int64_t{sizeof(T)},
             Variant::warps * Variant::columns * kPatchElements * int64_t{sizeof(Compute<T>)});
    const Outcome outcome =
        launch("group_pointwise_backward_weight", group_pointwise_backward_weight_kernel<T, Variant, OfGrad, OfInput>,
               params.blocks, Variant::threads, kBytes, stream, params);
    if (outcome.failed()) return outcome;
    return ordered_sum<Stored<T>>(params.partial, static_cast<Stored<T>*>(p.grad_weight), stretches(params),
                                  p.out_channels * params.inputs, stream);
  });
}

}  // namespace espk::cuda
