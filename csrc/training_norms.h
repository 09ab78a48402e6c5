// The arithmetic of the batch norms of a unit between its kernels: a few numbers a channel, in float64.
#pragma once

#include <cmath>
#include <vector>

#include "training.h"

namespace espk {

// One batch norm with its PReLU. Pointers point to numbers of its channels.
struct TrainingNorm {
  int64_t channels, count;  // count: pixels of the batch
  bool batch_statistics;
  double eps;
  const double *weight, *bias, *slope;  // slope may be null
  double *mean, *variance;

  std::vector<double> scale, shift;                 // from the moments
  std::vector<double> of_grad, of_map, constant;    // from the sums
  std::vector<double> grad, grad_centred, grad_slope;

  double deviation(int64_t i) const { return std::sqrt(variance[i] + eps); }

  // Where the kernel that makes the map shall leave its moments.
  Moments moments() { return batch_statistics ? Moments{mean, variance} : Moments{}; }

  // Once mean and variance are known.
  Normalise normalise() {
    scale.resize(static_cast<size_t>(channels));
    shift = scale;
    for (int64_t i = 0; i < channels; ++i) {
      const size_t at = static_cast<size_t>(i);
      scale[at] = weight[i] / deviation(i);
      shift[at] = bias[i] - mean[i] * scale[at];
    }
    return {scale.data(), shift.data(), slope};
  }

  // Where the kernel that makes the gradient behind the norm shall leave its sums.
  NormSums sums() {
    for (auto* vector : {&grad, &grad_centred, &grad_slope}) vector->assign(static_cast<size_t>(channels), 0.0);
    return {mean, grad.data(), grad_centred.data(), grad_slope.data()};
  }

  // Once the sums are known. Moments that do not come from the batch have no gradient.
  NormGradient gradient() {
    of_grad.assign(static_cast<size_t>(channels), 0.0);
    of_map = constant = of_grad;
    for (int64_t i = 0; i < channels; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double n = static_cast<double>(count);
      of_grad[at] = weight[i] / deviation(i);
      of_map[at] = -of_grad[at] * grad_centred[at] / (n * (variance[i] + eps));
      constant[at] = -of_grad[at] * grad[at] / n - of_map[at] * mean[i];
    }
    if (!batch_statistics) return {of_grad.data(), nullptr, nullptr};
    return {of_grad.data(), of_map.data(), constant.data()};
  }
};

}  // namespace espk
