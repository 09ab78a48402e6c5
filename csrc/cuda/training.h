// The problems of training whole units on a device. Maps are channels_last. Vectors of channels are in the compute type
// (float, or double for float64), moments in float64, and all of them stay on the device.
#pragma once

#include "../shapes.h"

namespace espk::cuda {

// One batch norm with its PReLU, as the kernels in front of and behind it share it.
struct BatchNorm {
  Type type;  // of the maps
  int64_t channels, count;  // count: pixels of the batch
  bool batch_statistics;
  double eps;
  const void *weight, *bias, *slope;  // slope: null where no PReLU follows
  const double *mean, *variance;  // those that are taken, known or not yet
  Moments found;  // where the forward pass leaves them: null in the backward pass

  // What the norm comes to: prelu(map * scale + shift, prelu), all of them there, aligned to 16 bytes.
  void *scale, *shift, *prelu;
  // The gradient in front of the norm: grad * of_grad + map * of_map + constant; the last two are not written and not
  // read without batch_statistics, when nothing of the map may reach the gradient.
  void *of_grad, *of_map, *constant;
  void *grad_weight, *grad_bias, *grad_slope;  // null: not wanted
};

// In the following `front` is the norm of x, null where x is read as it is, and `behind` that of the result.

// out [pixels, N] = group pointwise convolution of front(x [pixels, M]), and the numbers of `behind`.
struct NormalisedPointwise {
  Type type;
  int64_t pixels, in_channels, out_channels, groups;
  const void* x;
  const BatchNorm* front;
  const void* weight;  // [N, M / groups]
  void* out;
  const BatchNorm* behind;
  bool tf32;
};

// Both gradients of NormalisedPointwise, from the gradient behind the norm of `out`.
struct NormalisedPointwiseBackward {
  Type type;
  int64_t pixels, in_channels, out_channels, groups;
  const void *grad, *out;
  const BatchNorm* behind;
  const void* x;
  const BatchNorm* front;
  const void* weight;
  const void* residual;  // without `front`: added to grad_x, or null; may be grad_x itself
  void* grad_weight;  // null: not wanted
  void* grad_x;  // between norm and PReLU of `front`, whose gradient numbers follow; or of x; null: not wanted
  bool tf32;
};

// out [B, H', W', K*d] = pyramid of front(x [B, H, W, d]), and the numbers of `behind`, where there is one.
struct NormalisedPyramid : Pyramid {
  const void* x;
  const BatchNorm* front;
  const void* weight;
  void* out;
  const BatchNorm* behind;
};

// Both gradients of NormalisedPyramid.
struct NormalisedPyramidBackward : Pyramid {
  const void *grad, *out;
  const BatchNorm* behind;
  const void* x;
  const BatchNorm* front;
  const void* weight;
  void* grad_weight;
  void* grad_x;
};

// out [pixels, C] = prelu(x * scale + shift + residual) of `front`.
struct NormalisedOutput {
  Type type;
  int64_t pixels, channels;
  const void* x;
  const BatchNorm* front;
  const void* residual;  // or null
  void* out;
};

// The gradient in front of NormalisedOutput's PReLU, which is also the residual's, and the gradient numbers of `front`.
struct NormalisedOutputBackward {
  Type type;
  int64_t pixels, channels;
  const void *grad, *x;
  const BatchNorm* front;
  const void* residual;
  void* grad_x;  // null: only the numbers are wanted
};

// One EESP unit with its three batch norms, whose vectors lie behind one another: [d + K*d + N].
struct UnitInTraining : Pyramid {
  int64_t in_channels, pointwise_channels, reduce_groups, groups;
  const void *x, *reduce_weight, *weight, *expand_weight;
  const void *norm_weight, *norm_bias, *slope;
  double eps[3];
  bool batch_statistics[3];
  bool has_prelu;  // at its end; slope has no last N without
  bool residual, tf32;

  int64_t norm_channels() const { return channels + out_channels() + pointwise_channels; }
};

struct EespTraining : UnitInTraining {
  const double *running_mean, *running_variance;  // null where all norms take the batch's
  void *result, *reduced, *concatenated, *expanded;
  double* statistics;  // [2, d + K*d + N]
};

struct EespTrainingBackward : UnitInTraining {
  const void *grad, *reduced, *concatenated, *expanded;  // concatenated is made again where it is null
  const double* statistics;
  void *grad_x, *grad_reduce, *grad_weight, *grad_expand;  // null: not wanted
  void *grad_norm_weight, *grad_norm_bias, *grad_slope;
};

}  // namespace espk::cuda
