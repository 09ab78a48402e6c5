// The last step of every pointwise product: scale, shift, residual, long-range shortcut and PReLU, then memory.
#pragma once

#include "matrix_product.cuh"
#include "window.cuh"

namespace espk::cuda {

// The down-sampler's shortcut: a pointwise convolution of the small image, few channels, added before the PReLU.
struct Shortcut : ImageShortcut {
  Strides strides;  // of the image
};

// Where a result goes and what happens to it before. A pixel is its number in an image, row * width + column.
template <class T>
struct Output {
  T* out;
  int64_t image_stride, pixel_stride, channel_stride;
  Epilogue epilogue;  // its residual is like the result
  Shortcut shortcut;
  int64_t first_channel;   // of the shortcut and the slope, where the result is a part of a wider map
  bool vectors;            // 16 channels of a pixel can be written 16 bytes at a time
};

template <class T>
__device__ __forceinline__ Compute<T> finished(const Output<T>& o, int64_t image, int64_t pixel, int64_t channel,
                                               Compute<T> value, Compute<T> residual) {
  using C = Compute<T>;
  const Epilogue& e = o.epilogue;
  if (e.scale) value *= static_cast<const C*>(e.scale)[channel];
  if (e.shift) value += static_cast<const C*>(e.shift)[channel];
  value += residual;
  const int64_t whole = o.first_channel + channel;
  if (o.shortcut.image) {
    const Shortcut& s = o.shortcut;
    const T* from = static_cast<const T*>(s.image) + image * s.strides.image + pixel * s.strides.column;
    C sum = static_cast<const C*>(s.shift)[whole];
#pragma unroll 1
    for (int64_t c = 0; c < s.channels; ++c) {
      sum += widen(static_cast<const T*>(s.weight)[whole * s.channels + c]) * widen(from[c * s.strides.channel]);
    }
    value += sum;
  }
  if (e.slope && value <= 0) value *= static_cast<const C*>(e.slope)[whole];
  return value;
}

// One warp writes a patch: its rows are pixels, `pixel_of(row)` or -1 where there is none, its columns `channels`
// channels from `channel` on.
template <class T, class PixelOf>
__device__ void write_patch(const Compute<T>* patch, const Output<T>& o, int64_t image, int64_t channel,
                            int64_t channels, PixelOf pixel_of) {
  using C = Compute<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* residuals = static_cast<const T*>(o.epilogue.residual);
  const bool channels_last = o.channel_stride == 1;
  if (o.vectors && channels >= 16) {
    constexpr int kVector = kWidest<T> < 8 ? kWidest<T> : 8;
    const int row = lane / 2;
    const int64_t pixel = pixel_of(row);
    if (pixel < 0) return;
#pragma unroll
    for (int c = lane % 2 * 8; c < lane % 2 * 8 + 8; c += kVector) {
      const int64_t at = image * o.image_stride + pixel * o.pixel_stride + channel + c;
      C values[kVector], residual[kVector] = {};
      if (residuals) load<kVector>(residual, residuals + at);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        values[v] = finished(o, image, pixel, channel + c + v, patch[row * kPatchPitch + c + v], residual[v]);
      }
      store<kVector>(o.out + at, values);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < 256; i += 32) {
    const int row = channels_last ? i / 16 : i % 16, c = channels_last ? i % 16 : i / 16;
    const int64_t pixel = pixel_of(row);
    if (pixel < 0 || c >= channels) continue;
    const int64_t at = image * o.image_stride + pixel * o.pixel_stride + (channel + c) * o.channel_stride;
    const C residual = residuals ? widen(residuals[at]) : C(0);
    o.out[at] = narrow<T>(finished(o, image, pixel, channel + c, patch[row * kPatchPitch + c], residual));
  }
}

// `channels` is that of the whole map, of which the result is a part from `first_channel` on.
template <class T>
Output<T> output_of(void* out, Layout layout, const Epilogue& epilogue, int64_t channels, int64_t pixels,
                    int64_t first_channel = 0) {
  const Strides s = strides_of(layout, channels, 1, pixels);
  Output<T> o{static_cast<T*>(out) + first_channel * s.channel,
              s.image,
              s.column,
              s.channel,
              epilogue,
              {},
              first_channel,
              false};
  o.vectors = layout == Layout::channels_last && channels % kWidest<T> == 0 && aligned(o.out, 16) &&
              aligned(epilogue.residual, 16);
  return o;
}

// The pointwise kernel with a shortcut, its result a part of a wider map from `first_channel` on.
Outcome run_group_pointwise(const GroupPointwise&, const Shortcut&, int64_t whole_channels, int64_t first_channel,
                            void* stream);

}  // namespace espk::cuda
