// Where torch ends on the CPU for batch norms in training: one with the PReLU behind it, and the buffers of all. Traffic of
// a norm in maps: 3 forward and 5 backward, and 1 kept.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "training_norms.h"
#include "training_tensors.h"

namespace espk {
namespace {

// A batch norm of x and the PReLU behind it.
struct Norm {
  std::vector<double> weight, bias, slope, moments;
  TrainingNorm norm{};

  Norm(const Tensor& x, const Tensor& weights, const Tensor& biases, const Tensor& slopes, double eps,
       bool batch_statistics)
      : weight(numbers(weights, x.size(1), compute_type(x), "weight")),
        bias(numbers(biases, x.size(1), compute_type(x), "bias")),
        slope(numbers(slopes, x.size(1), compute_type(x), "slope")),
        moments(static_cast<size_t>(2 * x.size(1)), 0.0) {
    STD_TORCH_CHECK(x.numel() > 0, "x: expected at least one image, channel, row and column");
    norm.channels = x.size(1);
    norm.count = pixels_of(x);
    norm.batch_statistics = batch_statistics;
    norm.eps = eps;
    norm.weight = weight.data();
    norm.bias = bias.data();
    norm.slope = slope.data();
    norm.mean = moments.data();
    norm.variance = moments.data() + norm.channels;
  }
};

std::tuple<Tensor, Tensor> batch_norm_prelu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                            const Tensor& slope, std::optional<Tensor> running_mean,
                                            std::optional<Tensor> running_variance, double eps, bool batch_statistics) {
  check_map(x, "x");
  Norm n(x, weight, bias, slope, eps, batch_statistics);
  const Tensor map = dense_map(x, Layout::channels_last);
  if (batch_statistics) {
    MapMoments m{};
    m.type = type_of(x);
    m.pixels = n.norm.count;
    m.channels = n.norm.channels;
    m.x = map.const_data_ptr();
    m.moments = n.norm.moments();
    run_kernel(kernels().map_moments, m);
  } else {
    STD_TORCH_CHECK(running_mean && running_variance, "running_mean, running_variance: expected both");
    const auto means = numbers(*running_mean, n.norm.channels, ScalarType::Double, "running_mean");
    const auto variances = numbers(*running_variance, n.norm.channels, ScalarType::Double, "running_variance");
    std::copy(means.begin(), means.end(), n.norm.mean);
    std::copy(variances.begin(), variances.end(), n.norm.variance);
  }
  Tensor result = map_like(x);
  NormalisedOutput o{};
  o.type = type_of(x);
  o.pixels = n.norm.count;
  o.channels = n.norm.channels;
  o.x = map.const_data_ptr();
  o.normalise = n.norm.normalise();
  o.out = result.mutable_data_ptr();
  run_kernel(kernels().normalised_output, o);
  Tensor statistics =
      torch::stable::empty(std::vector<int64_t>{2, n.norm.channels}, ScalarType::Double, std::nullopt, x.device());
  std::copy(n.moments.begin(), n.moments.end(), static_cast<double*>(statistics.mutable_data_ptr()));
  return {result, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_prelu_backward(const Tensor& grad, const Tensor& x,
                                                                     const Tensor& statistics, const Tensor& weight,
                                                                     const Tensor& bias, const Tensor& slope,
                                                                     double eps, bool batch_statistics, bool wants_x) {
  check_map(x, "x");
  check_like(grad, x, x.size(1), "grad");
  Norm n(x, weight, bias, slope, eps, batch_statistics);
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2, "statistics: expected [2, channels]");
  n.moments = numbers(torch::stable::flatten(statistics), 2 * n.norm.channels, ScalarType::Double, "statistics");
  n.norm.mean = n.moments.data();
  n.norm.variance = n.norm.mean + n.norm.channels;
  const Tensor map = dense_map(x, Layout::channels_last), behind = dense_map(grad, Layout::channels_last);

  NormalisedOutputBackward o{};
  o.type = type_of(x);
  o.pixels = n.norm.count;
  o.channels = n.norm.channels;
  o.grad = behind.const_data_ptr();
  o.x = map.const_data_ptr();
  o.normalise = n.norm.normalise();
  o.sums = n.norm.sums();
  run_kernel(kernels().normalised_output_backward, o);

  Tensor grad_x = wants_x ? map_like(x) : nothing(x);
  if (wants_x) {
    BatchNormBackward b{};
    b.type = o.type;
    b.pixels = o.pixels;
    b.channels = o.channels;
    b.grad = o.grad;
    b.x = o.x;
    b.normalise = o.normalise;
    b.norm = n.norm.gradient();
    b.grad_x = grad_x.mutable_data_ptr();
    run_kernel(kernels().batch_norm_backward, b);
  }
  for (int64_t i = 0; i < n.norm.channels; ++i) n.norm.grad_centred[static_cast<size_t>(i)] /= n.norm.deviation(i);
  return {grad_x, vector_of({&n.norm.grad_centred}, weight), vector_of({&n.norm.grad}, weight),
          vector_of({&n.norm.grad_slope}, weight)};
}

// A buffer [channels] goes by `share` towards numbers * factor, in its own type; from either end, so that 0 and 1 are exact.
template <class T>
void approach(const Tensor& buffer, const double* numbers, double factor, double share) {
  T* at = static_cast<T*>(buffer.mutable_data_ptr());
  const T weight = static_cast<T>(share);
  for (int64_t i = 0, step = buffer.stride(0); i < buffer.size(0); ++i, at += step) {
    const T to = static_cast<T>(numbers[i] * factor);
    *at = std::abs(weight) < T(0.5) ? *at + weight * (to - *at) : to - (to - *at) * (T(1) - weight);
  }
}

void track_norms(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                 const std::vector<Tensor>& batches, const Tensor& moments, std::vector<double> shares,
                 std::vector<int64_t> counts) {
  const size_t norms = means.size();
  STD_TORCH_CHECK(
      variances.size() == norms && batches.size() == norms && shares.size() == norms && counts.size() == norms,
      "means, variances, batches, shares, counts: expected one of each a norm");
  int64_t channels = 0;
  for (size_t i = 0; i < norms; ++i) {
    for (const Tensor* buffer : {&means[i], &variances[i]}) {
      STD_TORCH_CHECK(buffer->dim() == 1 && buffer->size(0) == means[i].size(0) &&
                          (buffer->scalar_type() == ScalarType::Float || buffer->scalar_type() == ScalarType::Double),
                      "means, variances: expected vectors of one length, float32 or float64");
    }
    STD_TORCH_CHECK(batches[i].numel() == 1 && batches[i].scalar_type() == ScalarType::Long,
                    "batches: expected one int64 a norm");
    channels += means[i].size(0);
  }
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2, "moments: expected [2, channels]");
  const std::vector<double> found =
      numbers(torch::stable::flatten(moments), 2 * channels, ScalarType::Double, "moments");
  const double *mean = found.data(), *variance = mean + channels;
  for (size_t i = 0; i < norms; ++i) {
    const int64_t batch = ++*static_cast<int64_t*>(batches[i].mutable_data_ptr());
    const double share = std::isnan(shares[i]) ? 1.0 / static_cast<double>(batch) : shares[i];
    const double count = static_cast<double>(counts[i]), unbiased = count / std::max(count - 1, 1.0);
    auto go = [&](const Tensor& buffer, const double* from, double factor) {
      const bool wide = buffer.scalar_type() == ScalarType::Double;
      wide ? approach<double>(buffer, from, factor, share) : approach<float>(buffer, from, factor, share);
    };
    go(means[i], mean, 1);
    go(variances[i], variance, unbiased);
    mean += means[i].size(0);
    variance += means[i].size(0);
  }
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("batch_norm_prelu", TORCH_BOX(&batch_norm_prelu));
  m.impl("batch_norm_prelu_backward", TORCH_BOX(&batch_norm_prelu_backward));
  m.impl("track_norms", TORCH_BOX(&track_norms));
}
