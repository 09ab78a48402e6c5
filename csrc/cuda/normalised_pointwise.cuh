// A group pointwise convolution between two batch norms, or the gradient of its input: what is read goes through a
// prologue, and what is made leaves sums over its pixels, one a channel.
//
// A block takes a part of the pixels, tile by tile, for each of its groups; a lane takes a column of each patch, so that
// it stays with its channels. 16 lanes write 16 channels of a pixel, whole sectors of 32 bytes in every type.
#pragma once

#include "channel_sums.cuh"
#include "group_pointwise.cuh"

namespace espk::cuda {

// What becomes of a product. The result as it is stored, and its moments where `parts` is there.
template <class T>
struct LeavesMoments {
  using C = Compute<T>;
  using Sums = MomentSums<C>;
  static constexpr bool around_first = true;

  T* out;
  PartSums<C>* parts;

  struct Channel {
    C around;
  };
  __device__ __forceinline__ Channel channel(int64_t, C around) const { return {around}; }
  __device__ __forceinline__ C beside(int64_t) const { return 0; }
  __device__ __forceinline__ void take(Sums& sums, const Channel& channel, int64_t at, C value, C) const {
    const T stored = narrow<T>(value);
    out[at] = stored;
    sums.add(widen(stored) - channel.around);
  }
  __device__ __forceinline__ PartSums<C> part(const C (&total)[Sums::count], C around, int64_t pixels) const {
    return {{static_cast<C>(pixels), around, total[0], total[1]}};
  }
};

// The gradient behind a PReLU becomes the one in front of it, and leaves the sums of the norm there; or, where x is not
// normalised, it is the gradient of x, and the residual is added.
template <class T>
struct LeavesGradients {
  using C = Compute<T>;
  using Sums = GradientSums<C>;
  static constexpr bool around_first = false;

  T* out;
  PartSums<C>* parts;
  const T *x, *residual;
  Normalised<T> normalise;
  const double* mean;

  struct Channel : Normalised<T>::template Channels<1> {
    C mean;
  };
  __device__ __forceinline__ Channel channel(int64_t i, C) const {
    return {normalise.template channels<1>(i), normalise.scale ? static_cast<C>(mean[i]) : C(0)};
  }
  __device__ __forceinline__ C beside(int64_t at) const {
    if (normalise.scale) return widen(x[at]);
    return residual ? widen(residual[at]) : C(0);
  }
  __device__ __forceinline__ void take(Sums& sums, const Channel& channel, int64_t at, C value, C beside) const {
    value = channel.given ? sums.add(value, channel.before_prelu(0, beside), beside, channel.slope[0], channel.mean)
                          : value + beside;
    out[at] = narrow<T>(value);
  }
  __device__ __forceinline__ PartSums<C> part(const C (&total)[Sums::count], C, int64_t) const {
    return {{total[0], total[1], total[2], C(0)}};
  }
};

template <class T, class Prologue, class Finish>
struct NormalisedPointwiseParams : PointwiseProduct<T> {
  Prologue prologue;
  Finish finish;
  int64_t tiles_a_part, parts;
};

template <class T, class Variant, class Prologue, class Finish>
__global__ void __launch_bounds__(Variant::threads, 1)
    normalised_pointwise_kernel(const NormalisedPointwiseParams<T, Prologue, Finish> p) {
  using C = Compute<T>;
  using Sums = typename Finish::Sums;
  constexpr int kColumns = Variant::columns, kTogether = 8;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  C* patches = patches_of<T, Variant>(warp);
  C* totals = reinterpret_cast<C*>(shared_memory());  // in the place of the patches: [sum][warp][output], and [output]
  const int64_t channels = p.groups * p.outputs;

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t slice = block % p.slices, part = block / p.slices;
    const int64_t first_tile = part * p.tiles_a_part, last_tile = least(first_tile + p.tiles_a_part, p.pixel_blocks);
    const int64_t first_group = slice / p.output_blocks * p.groups_a_block;
    const int64_t first_output = slice % p.output_blocks * Variant::outputs;
    const int outputs = static_cast<int>(least(Variant::outputs, p.outputs - first_output));
    for (int64_t group = first_group; group < least(first_group + p.groups_a_block, p.groups); ++group) {
      const int64_t first_channel = group * p.outputs + first_output;
      Sums sums[kColumns];
      C around[kColumns] = {};
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t first_pixel = tile * Variant::pixels;
        const int pixels = static_cast<int>(least(Variant::pixels, p.pixels - first_pixel));
        multiply_tile<T, Variant>(p, {0, group, first_pixel, first_output, pixels, outputs}, patches, p.prologue);
        if (Finish::around_first && tile == first_tile) {
          __syncthreads();
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            around[c] = widen(narrow<T>(patches_of<T, Variant>(0)[c * kPatchElements + lane % 16]));
          }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = c * 16 + lane % 16;
          if (column >= outputs) continue;
          const auto channel = p.finish.channel(first_channel + column, around[c]);
#pragma unroll 1
          for (int r = 0; r < Variant::rows; ++r) {
            const C* patch = patches + (r * kColumns + c) * kPatchElements + lane / 16 * kPatchPitch + lane % 16;
            const int row = (warp * Variant::rows + r) * 16 + lane / 16;
            const int64_t at = (first_pixel + row) * channels + first_channel + column;
            C beside[kTogether] = {};
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              if (row + 2 * i < pixels) beside[i] = p.finish.beside(at + 2 * i * channels);
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              if (row + 2 * i >= pixels) continue;
              p.finish.take(sums[c], channel, at + 2 * i * channels, patch[2 * i * kPatchPitch], beside[i]);
            }
          }
        }
      }
      if (!p.finish.parts) continue;
      constexpr int kOutputs = Variant::outputs, kAround = Sums::count * Variant::warps * kOutputs;
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        for (int i = 0; i < Sums::count; ++i) {
          const C sum = sums[c].at[i] + __shfl_xor_sync(0xffffffffu, sums[c].at[i], 16);
          if (lane < 16) totals[(i * Variant::warps + warp) * kOutputs + c * 16 + lane] = sum;
        }
        if (thread < 16) totals[kAround + c * 16 + lane] = around[c];
      }
      __syncthreads();
      if (thread < outputs) {
        C total[Sums::count] = {};
        for (int i = 0; i < Sums::count; ++i) {
          for (int w = 0; w < Variant::warps; ++w) total[i] += totals[(i * Variant::warps + w) * kOutputs + thread];
        }
        const int64_t pixels = least(last_tile * Variant::pixels, p.pixels) - first_tile * Variant::pixels;
        p.finish.parts[part * channels + first_channel + thread] =
            p.finish.part(total, totals[kAround + thread], pixels);
      }
    }
  }
}

// Calls f(variant, params) with the pixels of the problem shared out.
template <class T, class Prologue, class Finish, class F>
auto with_parts(const GroupPointwise& p, const Prologue& prologue, const Finish& finish, F f) {
  NormalisedPointwiseParams<T, Prologue, Finish> whole{pointwise_product<T>(p), prologue, finish, 0, 0};
  return with_pointwise_traits<T>(whole, 1, [&](auto variant, auto params) {
    params.tiles_a_part = tiles_a_part(params.pixel_blocks, params.slices);
    params.parts = ceil_div(params.pixel_blocks, params.tiles_a_part);
    params.blocks = params.parts * params.slices;
    return f(variant, params);
  });
}

// The product of a problem of training, whose pixels are those of the whole batch.
template <class Problem>
GroupPointwise product_of_pixels(const Problem& p, const void* x, int64_t inputs, int64_t outputs) {
  GroupPointwise g{};
  g.type = p.type;
  g.layout = Layout::channels_last;
  g.batch = 1;
  g.pixels = p.pixels;
  g.in_channels = inputs;
  g.out_channels = outputs;
  g.groups = p.groups;
  g.x = x;
  g.weight = p.weight;
  g.tf32 = p.tf32;
  return g;
}

// Room for the sums of all parts.
inline int64_t pointwise_part_bytes(const GroupPointwise& p) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_parts<T>(p, Normalised<T>{}, LeavesMoments<T>{}, [&](auto, const auto& params) {
      return part_bytes<Compute<T>>(params.parts, p.out_channels);
    });
  });
}

// Starts the kernel, and then second(parts) for the sums.
template <class T, class Prologue, class Finish, class Second>
Outcome run_with_parts(const char* name, const GroupPointwise& p, const Prologue& prologue, const Finish& finish,
                       void* stream, Second second) {
  return with_parts<T>(p, prologue, finish, [&](auto variant, auto params) {
    using Variant = decltype(variant);
    params.vector_x &= prologue.vectors();
    const Outcome outcome = launch(name, normalised_pointwise_kernel<T, Variant, Prologue, Finish>, params.blocks,
                                   Variant::threads, pointwise_shared_bytes<T, Variant>(), stream, params);
    return outcome.failed() ? outcome : second(params.parts);
  });
}

}  // namespace espk::cuda
