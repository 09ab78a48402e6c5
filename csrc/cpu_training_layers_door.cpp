// Where torch ends on the CPU for what training does around the units: the gradients of averaging, resizing and grouped
// convolutions, and the end of a down-sampler, whose traffic in maps is 2 forward and 3 backward, and 1 kept (eager,
// concatenation and shortcut included, about 12, 15 and 2).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "training_tensors.h"

namespace espk {
namespace {

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
    p.pixels = pixels_of(pooled_map);
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
  m.impl("convolution_backward_weight", TORCH_BOX(&convolution_backward_weight));
  m.impl("grouped_convolution_backward_weight", TORCH_BOX(&grouped_convolution_backward_weight));
  m.impl("average_pool_backward", TORCH_BOX(&average_pool_backward));
  m.impl("add_average_pool_backward", TORCH_BOX(&add_average_pool_backward));
  m.impl("adaptive_average_backward", TORCH_BOX(&adaptive_average_backward));
  m.impl("resize_backward", TORCH_BOX(&resize_backward));
  m.impl("long_range_shortcut", TORCH_BOX(&long_range_shortcut));
  m.impl("long_range_shortcut_backward", TORCH_BOX(&long_range_shortcut_backward));
}
