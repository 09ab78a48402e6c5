// The gradient through the last PReLU of a unit, which is the residual's too, with the sums of the batch norm in front of
// it, or the sums alone. Bytes: 2*C read (+ C of the residual) + C written a pixel, and 4 numbers a channel for each part.
#include "pixel_rows.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T *grad, *x, *residual;
  T* grad_x;
  PartSums<Compute<T>>* parts;
  Normalised<T> normalise;
  const double* mean;
  PixelRows rows;
};

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) normalised_output_backward_kernel(const Params<T> p) {
  using C = Compute<T>;
  C* shared = reinterpret_cast<C*>(shared_memory());  // [sum][thread][N]
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t block = blockIdx.x; block < p.rows.blocks; block += gridDim.x) {
    const RowPlace place(p.rows, block, N);
    GradientSums<C> sums[N];
    if (place.there) {
      const auto normalise = p.normalise.template channels<N>(place.channel);
      C mean[N];
#pragma unroll
      for (int v = 0; v < N; ++v) mean[v] = static_cast<C>(p.mean[place.channel + v]);
      for (int64_t pixel = place.first; pixel < place.end; pixel += kPixelsTogether * p.rows.rows) {
        C grad[kPixelsTogether][N], map[kPixelsTogether][N], residual[kPixelsTogether][N] = {};
#pragma unroll
        for (int i = 0; i < kPixelsTogether; ++i) {
          const int64_t at = (pixel + i * p.rows.rows) * p.rows.channels + place.channel;
          if (pixel + i * p.rows.rows >= place.end) continue;
          load<N>(grad[i], p.grad + at);
          load<N>(map[i], p.x + at);
          if (p.residual) load<N>(residual[i], p.residual + at);
        }
#pragma unroll
        for (int i = 0; i < kPixelsTogether; ++i) {
          if (pixel + i * p.rows.rows >= place.end) continue;
#pragma unroll
          for (int v = 0; v < N; ++v) {
            const C before = normalise.before_prelu(v, map[i][v]) + residual[i][v];
            grad[i][v] = sums[v].add(grad[i][v], before, map[i][v], normalise.slope[v], mean[v]);
          }
          if (p.grad_x) store<N>(p.grad_x + (pixel + i * p.rows.rows) * p.rows.channels + place.channel, grad[i]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < N; ++v) {
#pragma unroll
      for (int i = 0; i < GradientSums<C>::count; ++i) shared[(i * kRowThreads + thread) * N + v] = sums[v].at[i];
    }
    __syncthreads();
    for (int i = thread; i < p.rows.vectors * N; i += kRowThreads) {
      const int64_t channel = block % p.rows.slices * p.rows.vectors * N + i;
      if (channel >= p.rows.channels) continue;
      PartSums<C> part{};
      for (int row = 0; row < p.rows.rows; ++row) {
#pragma unroll
        for (int sum = 0; sum < GradientSums<C>::count; ++sum) {
          part.at[sum] += shared[(sum * kRowThreads + row * p.rows.vectors) * N + i];
        }
      }
      p.parts[block / p.rows.slices * p.rows.channels + channel] = part;
    }
  }
}

// Calls f(element type, channels a thread).
template <class F>
auto with_variant(const NormalisedOutputBackward& p, F&& f) {
  return with_row_vector(p.type, p.channels, f, p.grad, p.x, p.residual, p.grad_x);
}

int64_t scratch_bytes(const NormalisedOutputBackward& p) {
  return with_variant(p, [&](auto* type, auto vector) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return part_bytes<C>(pixel_rows(p.pixels, p.channels, decltype(vector)::value).parts, p.channels);
  });
}

Outcome run(const NormalisedOutputBackward& p, void* scratch, void* stream) {
  return with_variant(p, [&](auto* type, auto vector) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    constexpr int N = decltype(vector)::value;
    const Params<T> params{static_cast<const T*>(p.grad),
                           static_cast<const T*>(p.x),
                           static_cast<const T*>(p.residual),
                           static_cast<T*>(p.grad_x),
                           static_cast<PartSums<C>*>(scratch),
                           normalised_by<T>(p.front),
                           p.front->mean,
                           pixel_rows(p.pixels, p.channels, N)};
    const Outcome outcome =
        launch("normalised_output_backward", normalised_output_backward_kernel<T, N>, params.rows.blocks, kRowThreads,
               GradientSums<C>::count * kRowThreads * N * int64_t{sizeof(C)}, stream, params);
    return outcome.failed() ? outcome : take_gradients(*p.front, scratch, params.rows.parts, stream);
  });
}

}  // namespace

extern const Kernel<NormalisedOutputBackward> normalised_output_backward = {scratch_bytes, run};

}  // namespace espk::cuda
