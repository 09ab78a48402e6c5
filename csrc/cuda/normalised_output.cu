// The end of a unit in training: the last batch norm, the residual and the PReLU of a map whose moments are known.
// Bytes: C read (+ C of the residual) + C written a pixel.
#include "pixel_rows.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T *x, *residual;
  T* out;
  Normalised<T> normalise;
  PixelRows rows;
};

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) normalised_output_kernel(const Params<T> p) {
  using C = Compute<T>;
  for (int64_t block = blockIdx.x; block < p.rows.blocks; block += gridDim.x) {
    const RowPlace place(p.rows, block, N);
    if (!place.there) continue;
    const auto normalise = p.normalise.template channels<N>(place.channel);
    for (int64_t pixel = place.first; pixel < place.end; pixel += kPixelsTogether * p.rows.rows) {
      C values[kPixelsTogether][N], residual[kPixelsTogether][N] = {};
#pragma unroll
      for (int i = 0; i < kPixelsTogether; ++i) {
        const int64_t at = (pixel + i * p.rows.rows) * p.rows.channels + place.channel;
        if (pixel + i * p.rows.rows >= place.end) continue;
        load<N>(values[i], p.x + at);
        if (p.residual) load<N>(residual[i], p.residual + at);
      }
#pragma unroll
      for (int i = 0; i < kPixelsTogether; ++i) {
        if (pixel + i * p.rows.rows >= place.end) continue;
#pragma unroll
        for (int v = 0; v < N; ++v) {
          values[i][v] = normalise.prelu(v, normalise.before_prelu(v, values[i][v]) + residual[i][v]);
        }
        store<N>(p.out + (pixel + i * p.rows.rows) * p.rows.channels + place.channel, values[i]);
      }
    }
  }
}

int64_t no_scratch(const NormalisedOutput&) { return 0; }

Outcome run(const NormalisedOutput& p, void*, void* stream) {
  return with_row_vector(
      p.type, p.channels,
      [&](auto* type, auto vector) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int N = decltype(vector)::value;
        const Params<T> params{static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<T*>(p.out),
                               normalised_by<T>(p.front), pixel_rows(p.pixels, p.channels, N)};
        return launch("normalised_output", normalised_output_kernel<T, N>, params.rows.blocks, kRowThreads, 0, stream,
                      params);
      },
      p.x, p.residual, p.out);
}

}  // namespace

extern const Kernel<NormalisedOutput> normalised_output = {no_scratch, run};

}  // namespace espk::cuda
