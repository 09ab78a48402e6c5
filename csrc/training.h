// The problems of training whole units. A batch norm's sums are taken where its map is made, and a normalised map exists
// only in front of the kernel that reads it. Maps are channels_last; vectors of channels are float64 beside any type.
#pragma once

#include "shapes.h"

namespace espk {

// The gradient in front of a batch norm from the one behind it: grad * of_grad + map * of_map + constant. of_map and
// constant are null where the moments are not the batch's: nothing of the map may then reach the gradient, nor a NaN.
struct NormGradient {
  const double *of_grad, *of_map, *constant;
};

// What a batch norm and its PReLU need for their parameters, of the gradient g between the two: the sums over the pixels
// of g, of g * (map - mean), and of the gradient behind the PReLU times its input where that is not positive.
struct NormSums {
  const double* mean;
  double *grad, *grad_centred, *slope;
};

// out [pixels, N] = group pointwise convolution of normalise(x [pixels, M]); pixels are those of the whole batch.
struct NormalisedPointwise {
  Type type;
  int64_t pixels, in_channels, out_channels, groups;
  const void* x;
  Normalise normalise;
  const void* weight;  // [N, M / groups]
  void* out;
  Moments moments;

  int64_t multiply_adds() const { return pixels * in_channels * (out_channels / groups); }
};

// Both gradients of NormalisedPointwise, from the gradient behind the norm of `out`.
struct NormalisedPointwiseBackward {
  Type type;
  int64_t pixels, in_channels, out_channels, groups;
  const void *grad, *out;
  NormGradient norm;
  const void* x;
  Normalise normalise;
  const void* weight;
  const void* residual;  // added to grad_x, or null; may be grad_x itself
  void* grad_weight;  // null: not wanted
  void* grad_x;  // of normalise's map between norm and PReLU, or of x where that is read as it is; null: not wanted
  NormSums sums;  // where x is normalised

  int64_t multiply_adds() const { return 2 * pixels * in_channels * (out_channels / groups); }
};

// Both gradients of SpatialPyramid with its normalise, from the gradient behind the norm of `out`.
struct NormalisedPyramidBackward : Pyramid {
  const void *grad, *out;
  NormGradient norm;
  const void* x;
  Normalise normalise;
  const void* weight;
  void* grad_weight;
  void* grad_x;  // between norm and PReLU of x
  NormSums sums;

  int64_t multiply_adds() const { return 2 * Pyramid::multiply_adds(); }
};

// out [pixels, C] = prelu(x * scale + shift + residual, slope).
struct NormalisedOutput {
  Type type;
  int64_t pixels, channels;
  const void* x;
  Normalise normalise;
  const void* residual;  // or null
  void* out;

  int64_t multiply_adds() const { return 2 * pixels * channels; }
};

// The gradient in front of NormalisedOutput's PReLU, which is also the residual's, and the sums.
struct NormalisedOutputBackward {
  Type type;
  int64_t pixels, channels;
  const void *grad, *x;
  Normalise normalise;  // without a slope there is no PReLU
  const void* residual;
  void* grad_x;  // null: only the sums are wanted
  NormSums sums;

  int64_t multiply_adds() const { return 6 * pixels * channels; }
};

// The moments of x [pixels, C].
struct MapMoments {
  Type type;
  int64_t pixels, channels;
  const void* x;
  Moments moments;

  int64_t multiply_adds() const { return 2 * pixels * channels; }
};

// The gradient of x [pixels, C] through a batch norm and the PReLU behind it, from the gradient behind both.
struct BatchNormBackward {
  Type type;
  int64_t pixels, channels;
  const void *grad, *x;
  Normalise normalise;
  NormGradient norm;
  void* grad_x;

  int64_t multiply_adds() const { return 4 * pixels * channels; }
};

// grad_x [B, H, W, C] of AveragePool, AdaptiveAverage or Resize, without their epilogues, from grad [B, H', W', C].
struct ResamplingBackward {
  Type type;
  int64_t batch, channels, height, width, out_height, out_width;
  const void* grad;
  void* grad_x;
  bool add;  // to what grad_x holds; AveragePool's alone

  int64_t multiply_adds() const {
    const int64_t pixels = height * width, out_pixels = out_height * out_width;
    return 3 * batch * channels * (pixels > out_pixels ? pixels : out_pixels);
  }
};

// grad_weight [groups * out_of_group, in, 3, 3] of GroupedConvolution, without its weight, epilogue and out, from grad
// [B, H, W, groups * out_of_group].
struct GroupedConvolutionBackwardWeight : GroupedConvolution {
  const void* grad;
  void* grad_weight;
};

// grad_weight [N, M, h, w] of Convolution of pixels, without its weight, epilogue and out, from grad [B, H', W', N].
struct ConvolutionBackwardWeight : Convolution {
  const void* grad;
  void* grad_weight;
};

constexpr int64_t kMostImageChannels = 8;

// What the end of a down-sampler joins: [pooled, expanded] + image weight + shift, N = pooled + expanded channels a pixel.
struct JoinedMaps {
  Type type;
  int64_t pixels, pooled_channels, expanded_channels, image_channels;
  const void *pooled, *expanded, *image;  // [pixels, channels of each]; no image has no channels
  const double *weight, *shift, *slope;  // [image_channels, N], [N], [N]; shift may be null

  int64_t channels() const { return pooled_channels + expanded_channels; }
  int64_t multiply_adds() const { return pixels * channels() * (image_channels + 2); }
};

// out [pixels, N] = prelu(joined maps, slope).
struct LongRangeShortcut : JoinedMaps {
  void* out;
};

// Its gradients from grad [pixels, N]; those of maps are null where they are not wanted.
struct LongRangeShortcutBackward : JoinedMaps {
  const void* grad;
  void *grad_pooled, *grad_expanded, *grad_image;
  double *grad_weight, *grad_shift, *grad_slope;  // [image_channels, N], [N], [N]

  int64_t multiply_adds() const { return 3 * JoinedMaps::multiply_adds(); }
};

}  // namespace espk
