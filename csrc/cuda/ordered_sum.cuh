// Second stage of every sum over pixels: partial sums are added in an order that the shape alone decides.
#pragma once

#include "elements.cuh"
#include "launch.cuh"

namespace espk::cuda {

template <class T>
struct OrderedSumParams {
  const Compute<T>* partial;  // [parts][count]
  T* out;                     // [count]
  int64_t parts, count;
};

// 32 neighbouring results a block; eight warps take every eighth part each and the first adds up what they have.
template <class T>
__global__ void __launch_bounds__(256) ordered_sum_kernel(const OrderedSumParams<T> p) {
  using C = Compute<T>;
  C* sums = reinterpret_cast<C*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t first = int64_t{blockIdx.x} * 32; first < p.count; first += int64_t{gridDim.x} * 32) {
    const int64_t i = first + lane;
    C sum = 0;
    if (i < p.count) {
      for (int64_t part = warp; part < p.parts; part += 8) sum += p.partial[part * p.count + i];
    }
    __syncthreads();
    sums[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && i < p.count) {
      for (int w = 1; w < 8; ++w) sum += sums[w * 32 + lane];
      p.out[i] = narrow<T>(sum);
    }
  }
}

// Bytes: `parts` times the result, in the type of the sums, read once.
template <class T>
Outcome ordered_sum(const Compute<T>* partial, T* out, int64_t parts, int64_t count, void* stream) {
  return launch("ordered_sum", ordered_sum_kernel<T>, ceil_div(count, 32), 256, 256 * sizeof(Compute<T>), stream,
                OrderedSumParams<T>{partial, out, parts, count});
}

}  // namespace espk::cuda
