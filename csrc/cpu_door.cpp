// Where torch ends on the CPU for the differentiable operators: tensors become plain structs and run on torch's threads.
#include <torch/csrc/stable/library.h>

#include "cpu_launch.h"
#include "door.h"

namespace espk {

bool is_here(const Tensor& t) { return t.is_cpu(); }
const char* const device_name = "CPU";

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

namespace {

Tensor spatial_pyramid(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations, int64_t stride,
                       bool hff) {
  check_map(x, "x");
  check_same_type(x, weight);
  SpatialPyramid p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  const Tensor map = dense_map(x, p.layout), branches = dense_weight(weight);
  Tensor out = result_map({p.batch, p.out_channels(), p.out_height, p.out_width}, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.out_pixel = p.out_channels();
  p.out = out.mutable_data_ptr();
  launch("spatial_pyramid", kernels().spatial_pyramid, p);
  return out;
}

Tensor spatial_pyramid_backward_input(const Tensor& grad, const Tensor& weight, std::vector<int64_t> dilations,
                                      int64_t stride, bool hff, int64_t height, int64_t width) {
  check_map(grad, "grad");
  check_same_type(grad, weight);
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [K, d, 3, 3]");
  SpatialPyramidBackwardInput p{};
  describe(p, grad, layout_of(grad), {grad.size(0), weight.size(1), height, width}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(grad, p.layout), branches = dense_weight(weight);
  Tensor grad_x = result_map({p.batch, p.channels, p.height, p.width}, grad, p.layout);
  p.grad = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  launch("spatial_pyramid_backward_input", kernels().spatial_pyramid_backward_input, p);
  return grad_x;
}

Tensor spatial_pyramid_backward_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> dilations,
                                       int64_t stride, bool hff) {
  check_map(grad, "grad");
  check_map(x, "x");
  check_same_type(grad, x);
  SpatialPyramidBackwardWeight p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(x, p.layout), grad_map = dense_map(grad, p.layout);
  Tensor grad_weight = result_map({p.branches, p.channels, 3, 3}, x, Layout::contiguous);
  p.grad = grad_map.const_data_ptr();
  p.x = map.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  launch("spatial_pyramid_backward_weight", kernels().spatial_pyramid_backward_weight, p);
  return grad_weight;
}

Tensor group_pointwise(const Tensor& x, const Tensor& weight, int64_t groups, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, std::optional<Tensor> residual, std::optional<Tensor> slope,
                       std::optional<Tensor> packed) {
  check_map(x, "x");
  check_same_type(x, weight);
  check_pointwise_weight(weight, x.size(1), groups);
  GroupPointwise p{};
  p.bfloat16 = kernels().bfloat16;
  p.type = type_of(x);
  const Layout layout = layout_of(x);
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  // Maps of one pixel, as a classifier has, lie the same in both layouts; read as pixels, their outputs fill vectors.
  p.layout = p.pixels == 1 ? Layout::channels_last : layout;
  p.in_channels = x.size(1);
  p.out_channels = weight.size(0);
  p.groups = groups;
  const std::vector<int64_t> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  const Tensor map = dense_map(x, layout), dense = dense_weight(weight);
  const EpilogueTensors epilogue = dense_epilogue(x, layout, sizes, scale, shift, residual, slope);
  Tensor out = result_map(sizes, x, layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.epilogue = pointers(epilogue);
  const auto& kernel = kernels().group_pointwise;
  launch("group_pointwise", kernel, p, Packs(packed).next(kernel, p));
  return out;
}

Tensor group_pointwise_backward_input(const Tensor& grad, const Tensor& weight, int64_t groups) {
  check_map(grad, "grad");
  check_same_type(grad, weight);
  STD_TORCH_CHECK(weight.dim() == 2 && groups >= 1 && weight.size(1) >= 1 && grad.size(1) == weight.size(0) &&
                      weight.size(0) >= groups && weight.size(0) % groups == 0,
                  "grad [B, N, H, W] and weight [N, M/groups] disagree");
  GroupPointwise p{};
  p.bfloat16 = kernels().bfloat16;
  p.type = type_of(grad);
  p.layout = layout_of(grad);
  p.batch = grad.size(0);
  p.pixels = grad.size(2) * grad.size(3);
  p.in_channels = grad.size(1);
  p.out_channels = weight.size(1) * groups;
  p.groups = groups;
  p.weight_transposed = true;
  const Tensor map = dense_map(grad, p.layout), dense = dense_weight(weight);
  Tensor grad_x = result_map({grad.size(0), p.out_channels, grad.size(2), grad.size(3)}, grad, p.layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = grad_x.mutable_data_ptr();
  launch("group_pointwise", kernels().group_pointwise, p);
  return grad_x;
}

Tensor group_pointwise_backward_weight(const Tensor& grad, const Tensor& x, int64_t groups) {
  check_map(grad, "grad");
  check_map(x, "x");
  check_same_type(grad, x);
  STD_TORCH_CHECK(groups >= 1 && grad.size(1) % groups == 0 && x.size(1) % groups == 0 && grad.size(1) >= groups &&
                      x.size(1) >= groups && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "grad [B, N, H, W] and x [B, M, H, W] disagree");
  GroupPointwiseBackwardWeight p{};
  p.type = type_of(x);
  p.layout = layout_of(x);
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  p.in_channels = x.size(1);
  p.out_channels = grad.size(1);
  p.groups = groups;
  const Tensor map = dense_map(x, p.layout), grad_map = dense_map(grad, p.layout);
  Tensor grad_weight = torch::stable::empty(std::vector<int64_t>{p.out_channels, p.in_channels / groups},
                                            x.scalar_type(), std::nullopt, x.device());
  p.grad = grad_map.const_data_ptr();
  p.x = map.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  launch("group_pointwise_backward_weight", kernels().group_pointwise_backward_weight, p);
  return grad_weight;
}

Tensor pyramid_pointwise(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations,
                         const Tensor& pointwise_weight, int64_t groups, std::optional<Tensor> pyramid_scale,
                         std::optional<Tensor> pyramid_shift, std::optional<Tensor> pyramid_slope,
                         std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                         std::optional<Tensor> slope, int64_t stride, bool hff, std::optional<Tensor> packed) {
  check_map(x, "x");
  check_same_type(x, weight);
  check_same_type(x, pointwise_weight);
  PyramidPointwise p{};
  p.bfloat16 = kernels().bfloat16;
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pointwise_weight(pointwise_weight, p.out_channels(), groups);
  p.groups = groups;
  p.pointwise_channels = pointwise_weight.size(0);
  const Tensor map = dense_map(x, p.layout), branches = dense_weight(weight), dense = dense_weight(pointwise_weight);
  const std::vector<int64_t> concatenated{p.batch, p.out_channels(), p.out_height, p.out_width};
  const std::vector<int64_t> sizes{p.batch, p.pointwise_channels, p.out_height, p.out_width};
  const EpilogueTensors first =
      dense_epilogue(x, p.layout, concatenated, pyramid_scale, pyramid_shift, std::nullopt, pyramid_slope);
  const EpilogueTensors second = dense_epilogue(x, p.layout, sizes, scale, shift, residual, slope);
  Tensor out = result_map(sizes, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.pointwise_weight = dense.const_data_ptr();
  p.pyramid_epilogue = pointers(first);
  p.epilogue = pointers(second);
  p.out = out.mutable_data_ptr();
  p.out_pixel = p.pointwise_channels;
  const auto& kernel = kernels().pyramid_pointwise;
  launch("pyramid_pointwise", kernel, p, Packs(packed).next(kernel, p));
  return out;
}

Layout named_layout(bool channels_last) { return channels_last ? Layout::channels_last : Layout::contiguous; }

Tensor pack_group_pointwise(const Tensor& weight, int64_t groups, bool channels_last) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && groups >= 1, "weight: expected a CPU tensor [N, M/groups]");
  check_pointwise_weight(weight, weight.size(1) * groups, groups);
  GroupPointwise p{};
  p.bfloat16 = kernels().bfloat16;
  p.type = type_of(weight);
  p.layout = named_layout(channels_last);
  p.in_channels = weight.size(1) * groups;
  p.out_channels = weight.size(0);
  p.groups = groups;
  const Tensor dense = dense_weight(weight);
  p.weight = dense.const_data_ptr();
  return pack(kernels().group_pointwise, p, weight);
}

Tensor pack_pyramid_pointwise(const Tensor& weight, const Tensor& pointwise_weight, int64_t groups,
                              std::optional<Tensor> pyramid_scale, std::optional<Tensor> pyramid_shift,
                              std::optional<Tensor> pyramid_slope, bool channels_last) {
  check_same_type(weight, pointwise_weight);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(0) <= kMaxBranches,
                  "weight: expected [K, d, 3, 3]");
  PyramidPointwise p{};
  p.bfloat16 = kernels().bfloat16;
  const std::vector<int64_t> dilations(static_cast<size_t>(weight.size(0)), 1);
  describe(p, weight, named_layout(channels_last), {1, weight.size(1), 1, 1}, dilations, 1, true);
  check_branch_weight(weight, p);
  check_pointwise_weight(pointwise_weight, p.out_channels(), groups);
  p.groups = groups;
  p.pointwise_channels = pointwise_weight.size(0);
  const Tensor branches = dense_weight(weight), dense = dense_weight(pointwise_weight);
  const EpilogueTensors epilogue = dense_epilogue(weight, p.layout, {1, p.out_channels(), 1, 1}, pyramid_scale,
                                                  pyramid_shift, std::nullopt, pyramid_slope);
  p.weight = branches.const_data_ptr();
  p.pointwise_weight = dense.const_data_ptr();
  p.pyramid_epilogue = pointers(epilogue);
  return pack(kernels().pyramid_pointwise, p, weight);
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("spatial_pyramid", TORCH_BOX(&spatial_pyramid));
  m.impl("spatial_pyramid_backward_input", TORCH_BOX(&spatial_pyramid_backward_input));
  m.impl("spatial_pyramid_backward_weight", TORCH_BOX(&spatial_pyramid_backward_weight));
  m.impl("group_pointwise", TORCH_BOX(&group_pointwise));
  m.impl("group_pointwise_backward_input", TORCH_BOX(&group_pointwise_backward_input));
  m.impl("group_pointwise_backward_weight", TORCH_BOX(&group_pointwise_backward_weight));
  m.impl("pyramid_pointwise", TORCH_BOX(&pyramid_pointwise));
  m.impl("pack_group_pointwise", TORCH_BOX(&pack_group_pointwise));
  m.impl("pack_pyramid_pointwise", TORCH_BOX(&pack_pyramid_pointwise));
}
