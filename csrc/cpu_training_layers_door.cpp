// Where torch ends on the CPU for what training does around the units: a batch norm with its PReLU, the buffers of batch
// norms, the gradients of averaging, resizing and grouped convolutions, and the end of a down-sampler. Traffic in maps: a
// norm 3 forward and 5 backward, and 1 kept; the end 2, 3 and 1 (eager, concatenation and shortcut included, about 12, 15
// and 2).
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
    norm.count = pixels(x);
    norm.batch_statistics = batch_statistics;
    norm.eps = eps;
    norm.weight = weight.data();
    norm.bias = bias.data();
    norm.slope = slope.data();
    norm.mean = moments.data();
    norm.variance = moments.data() + norm.channels;
  }

  static int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }
};

Tensor map_like(const Tensor& x) {
  return empty_map({x.size(0), x.size(1), x.size(2), x.size(3)}, x, Layout::channels_last);
}

void check_like(const Tensor& grad, const Tensor& x, int64_t channels, const char* name) {
  check_same_type(x, grad);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  name, ": expected a map of the result's shape");
}

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

// All but pointers of the gradient of a map [B, C, height, width] from that of the map that is made of it.
ResamplingBackward resampling(const Tensor& grad, int64_t height, int64_t width) {
  check_map(grad, "grad");
  ResamplingBackward p{};
  p.type = type_of(grad);
  p.batch = grad.size(0);
  p.channels = grad.size(1);
  p.height = height;
  p.width = width;
  p.out_height = grad.size(2);
  p.out_width = grad.size(3);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && p.out_height >= 1 && p.out_width >= 1,
                  "grad, height, width: expected at least one row and column");
  return p;
}

Tensor resampled_gradient(const Kernel<ResamplingBackward>& kernel, const Tensor& grad, int64_t height, int64_t width) {
  ResamplingBackward p = resampling(grad, height, width);
  const Tensor behind = dense_map(grad, Layout::channels_last);
  Tensor grad_x = empty_map({p.batch, p.channels, height, width}, grad, Layout::channels_last);
  p.grad = behind.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  run_kernel(kernel, p);
  return grad_x;
}

void check_halved(const Tensor& grad, int64_t height, int64_t width) {
  check_map(grad, "grad");
  STD_TORCH_CHECK((height - 1) / 2 + 1 == grad.size(2) && (width - 1) / 2 + 1 == grad.size(3),
                  "grad: expected half as many rows and columns as height and width, rounded up");
}

Tensor average_pool_backward(const Tensor& grad, int64_t height, int64_t width) {
  check_halved(grad, height, width);
  return resampled_gradient(kernels().average_pool_backward, grad, height, width);
}

void add_average_pool_backward(const Tensor& map, const Tensor& grad) {
  check_map(map, "map");
  check_halved(grad, map.size(2), map.size(3));
  check_same_type(map, grad);
  STD_TORCH_CHECK(map.size(0) == grad.size(0) && map.size(1) == grad.size(1) && is_channels_last(map),
                  "map: expected the batch and channels of grad, in channels_last");
  ResamplingBackward p = resampling(grad, map.size(2), map.size(3));
  const Tensor behind = dense_map(grad, Layout::channels_last);
  p.grad = behind.const_data_ptr();
  p.grad_x = map.mutable_data_ptr();
  p.add = true;
  run_kernel(kernels().average_pool_backward, p);
}

Tensor adaptive_average_backward(const Tensor& grad, int64_t height, int64_t width) {
  return resampled_gradient(kernels().adaptive_average_backward, grad, height, width);
}

Tensor resize_backward(const Tensor& grad, int64_t height, int64_t width) {
  return resampled_gradient(kernels().resize_backward, grad, height, width);
}

Tensor convolution_backward_weight(const Tensor& grad, const Tensor& x, int64_t height, int64_t width, int64_t stride,
                                   int64_t padding) {
  check_map(x, "x");
  check_map(grad, "grad");
  check_same_type(x, grad);
  STD_TORCH_CHECK(x.size(1) >= 1 && grad.size(1) >= 1, "x, grad: expected at least one channel");
  ConvolutionBackwardWeight p{};
  describe(p, x, Layout::channels_last, grad.size(1), {height, width}, stride, padding);
  STD_TORCH_CHECK(grad.size(0) == p.batch && grad.size(2) == p.out_height && grad.size(3) == p.out_width,
                  "grad: expected the sizes of the convolution's result");
  const Tensor map = dense_map(x, Layout::channels_last), behind = dense_map(grad, Layout::channels_last);
  Tensor grad_weight = empty_map({p.out_channels, p.in_channels, height, width}, x, Layout::contiguous);
  p.x = map.const_data_ptr();
  p.grad = behind.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  run_kernel(kernels().convolution_backward_weight, p);
  return grad_weight;
}

Tensor grouped_convolution_backward_weight(const Tensor& grad, const Tensor& x, int64_t groups) {
  check_map(x, "x");
  STD_TORCH_CHECK(groups >= 1, "groups: expected at least 1");
  check_like(grad, x, grad.size(1), "grad");
  STD_TORCH_CHECK(x.size(1) % groups == 0 && grad.size(1) % groups == 0, "groups: expected a divisor of the channels");
  GroupedConvolutionBackwardWeight p{};
  p.type = type_of(x);
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.groups = groups;
  p.in = x.size(1) / groups;
  p.out_of_group = grad.size(1) / groups;
  STD_TORCH_CHECK(p.in >= 1 && p.in <= kMaxBranches && p.out_of_group >= 1 && p.out_of_group <= kMaxBranches &&
                      p.height >= 1 && p.width >= 1,
                  "x, grad: expected 1 to 8 channels a group, and at least one row and column");
  const Tensor map = dense_map(x, Layout::channels_last), behind = dense_map(grad, Layout::channels_last);
  Tensor grad_weight = empty_map({p.out_channels(), p.in, 3, 3}, x, Layout::contiguous);
  p.x = map.const_data_ptr();
  p.grad = behind.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  run_kernel(kernels().grouped_convolution_backward_weight, p);
  return grad_weight;
}

// What both operators of the end take, checked, dense and described.
struct Joined {
  Tensor pooled, expanded, image;
  std::vector<double> weight, shift, slope;

  Joined(JoinedMaps& p, const Tensor& pooled_map, const Tensor& expanded_map, const std::optional<Tensor>& image_map,
         const std::optional<Tensor>& weights, const std::optional<Tensor>& shifts, const Tensor& slopes) {
    check_map(pooled_map, "pooled");
    check_like(expanded_map, pooled_map, expanded_map.size(1), "expanded");
    STD_TORCH_CHECK(pooled_map.numel() > 0 && expanded_map.numel() > 0, "pooled, expanded: expected no empty map");
    STD_TORCH_CHECK(image_map.has_value() == weights.has_value() && image_map.has_value() == shifts.has_value(),
                    "image, weight, shift: expected all or none");
    p.type = type_of(pooled_map);
    p.pixels = Norm::pixels(pooled_map);
    p.pooled_channels = pooled_map.size(1);
    p.expanded_channels = expanded_map.size(1);
    const ScalarType type = compute_type(pooled_map);
    pooled = dense_map(pooled_map, Layout::channels_last);
    expanded = dense_map(expanded_map, Layout::channels_last);
    if (image_map) {
      p.image_channels = image_map->size(1);
      check_like(*image_map, pooled_map, p.image_channels, "image");
      STD_TORCH_CHECK(p.image_channels >= 1 && p.image_channels <= kMostImageChannels,
                      "image: expected from 1 to 8 channels");
      STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == p.channels() && weights->size(1) == p.image_channels,
                      "weight: expected [channels of the result, channels of the image]");
      image = dense_map(*image_map, Layout::channels_last);
      // [channels, image_channels] -> [image_channels, channels]
      const auto rows = numbers(torch::stable::flatten(*weights), p.channels() * p.image_channels, type, "weight");
      weight.resize(rows.size());
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto images = static_cast<size_t>(p.image_channels);
        weight[i % images * static_cast<size_t>(p.channels()) + i / images] = rows[i];
      }
      shift = numbers(*shifts, p.channels(), type, "shift");
      p.image = image.const_data_ptr();
      p.weight = weight.data();
      p.shift = shift.data();
    }
    slope = numbers(slopes, p.channels(), type, "slope");
    p.slope = slope.data();
    p.pooled = pooled.const_data_ptr();
    p.expanded = expanded.const_data_ptr();
  }
};

Tensor long_range_shortcut(const Tensor& pooled, const Tensor& expanded, std::optional<Tensor> image,
                           std::optional<Tensor> weight, std::optional<Tensor> shift, const Tensor& slope) {
  LongRangeShortcut p{};
  const Joined joined(p, pooled, expanded, image, weight, shift, slope);
  Tensor out = empty_map({pooled.size(0), p.channels(), pooled.size(2), pooled.size(3)}, pooled, Layout::channels_last);
  p.out = out.mutable_data_ptr();
  run_kernel(kernels().long_range_shortcut, p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> long_range_shortcut_backward(
    const Tensor& grad, const Tensor& pooled, const Tensor& expanded, std::optional<Tensor> image,
    std::optional<Tensor> weight, std::optional<Tensor> shift, const Tensor& slope, std::vector<bool> wanted) {
  LongRangeShortcutBackward p{};
  const Joined joined(p, pooled, expanded, image, weight, shift, slope);
  check_like(grad, pooled, p.channels(), "grad");
  STD_TORCH_CHECK(wanted.size() == 3, "wanted: expected one flag a map");
  const Tensor behind = dense_map(grad, Layout::channels_last);
  Tensor grad_pooled = wanted[0] ? map_like(pooled) : nothing(pooled);
  Tensor grad_expanded = wanted[1] ? map_like(expanded) : nothing(pooled);
  Tensor grad_image = wanted[2] && image ? map_like(*image) : nothing(pooled);
  const auto channels = static_cast<size_t>(p.channels()), images = static_cast<size_t>(p.image_channels);
  std::vector<double> grad_weight(channels * images), grad_shift(channels), grad_slope(channels),
      rows(channels * images);
  p.grad = behind.const_data_ptr();
  p.grad_pooled = wanted[0] ? grad_pooled.mutable_data_ptr() : nullptr;
  p.grad_expanded = wanted[1] ? grad_expanded.mutable_data_ptr() : nullptr;
  p.grad_image = wanted[2] && image ? grad_image.mutable_data_ptr() : nullptr;
  p.grad_weight = grad_weight.data();
  p.grad_shift = grad_shift.data();
  p.grad_slope = grad_slope.data();
  run_kernel(kernels().long_range_shortcut_backward, p);
  if (!image)
    return {grad_pooled, grad_expanded, grad_image, nothing(slope), nothing(slope), vector_of({&grad_slope}, slope)};
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = grad_weight[i % images * channels + i / images];
  Tensor weights = torch::stable::reshape(vector_of({&rows}, slope), {p.channels(), p.image_channels});
  return {grad_pooled,
          grad_expanded,
          grad_image,
          weights,
          vector_of({&grad_shift}, slope),
          vector_of({&grad_slope}, slope)};
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("batch_norm_prelu", TORCH_BOX(&batch_norm_prelu));
  m.impl("batch_norm_prelu_backward", TORCH_BOX(&batch_norm_prelu_backward));
  m.impl("track_norms", TORCH_BOX(&track_norms));
  m.impl("convolution_backward_weight", TORCH_BOX(&convolution_backward_weight));
  m.impl("grouped_convolution_backward_weight", TORCH_BOX(&grouped_convolution_backward_weight));
  m.impl("average_pool_backward", TORCH_BOX(&average_pool_backward));
  m.impl("add_average_pool_backward", TORCH_BOX(&add_average_pool_backward));
  m.impl("adaptive_average_backward", TORCH_BOX(&adaptive_average_backward));
  m.impl("resize_backward", TORCH_BOX(&resize_backward));
  m.impl("long_range_shortcut", TORCH_BOX(&long_range_shortcut));
  m.impl("long_range_shortcut_backward", TORCH_BOX(&long_range_shortcut_backward));
}
