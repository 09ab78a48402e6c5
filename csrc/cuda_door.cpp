// Where torch ends on CUDA for the differentiable operators: tensors become plain structs, and kernels start on the stream that torch is using.
//
// The operators have the schemas of ops.cpp in a namespace of their own: espkernels decides per call which library's
// kernel a CUDA tensor gets. Nothing here waits for the device or asks it for memory but through torch, so that calls
// can be captured in a graph.
#include <torch/csrc/stable/library.h>

#include "cuda_launch.h"

namespace espk {

bool is_here(const Tensor& t) {
  return t.is_cuda() && t.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
}
const char* const device_name = "CUDA";
std::atomic<bool> tf32_allowed{false};

namespace {

Tensor spatial_pyramid(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations, int64_t stride,
                       bool hff) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  check_same_type(x, weight);
  SpatialPyramid p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  const Tensor map = dense_map(x, p.layout), branches = dense_weight(weight);
  Tensor out = empty_map({p.batch, p.out_channels(), p.out_height, p.out_width}, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(cuda::spatial_pyramid, p, x);
  return out;
}

Tensor spatial_pyramid_backward_input(const Tensor& grad, const Tensor& weight, std::vector<int64_t> dilations,
                                      int64_t stride, bool hff, int64_t height, int64_t width) {
  const DeviceGuard guard(grad.get_device_index());
  check_map(grad, "grad");
  check_same_type(grad, weight);
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [K, d, 3, 3]");
  SpatialPyramidBackwardInput p{};
  describe(p, grad, layout_of(grad), {grad.size(0), weight.size(1), height, width}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(grad, p.layout), branches = dense_weight(weight);
  Tensor grad_x = empty_map({p.batch, p.channels, p.height, p.width}, grad, p.layout);
  p.grad = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  launch(cuda::spatial_pyramid_backward_input, p, grad);
  return grad_x;
}

Tensor spatial_pyramid_backward_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> dilations,
                                       int64_t stride, bool hff) {
  const DeviceGuard guard(grad.get_device_index());
  check_map(grad, "grad");
  check_map(x, "x");
  check_same_type(grad, x);
  SpatialPyramidBackwardWeight p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(x, p.layout), grad_map = dense_map(grad, p.layout);
  Tensor grad_weight = empty_map({p.branches, p.channels, 3, 3}, x, Layout::contiguous);
  p.grad = grad_map.const_data_ptr();
  p.x = map.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  launch(cuda::spatial_pyramid_backward_weight, p, x);
  return grad_weight;
}

Tensor group_pointwise(const Tensor& x, const Tensor& weight, int64_t groups, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, std::optional<Tensor> residual, std::optional<Tensor> slope,
                       std::optional<Tensor>) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  check_same_type(x, weight);
  check_pointwise_weight(weight, x.size(1), groups);
  GroupPointwise p{};
  p.type = type_of(x);
  const Layout layout = layout_of(x);
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  // Maps of one pixel lie the same in both layouts; as pixels, all images are one product that reads the weights once.
  p.layout = p.pixels == 1 ? Layout::channels_last : layout;
  p.in_channels = x.size(1);
  p.out_channels = weight.size(0);
  p.groups = groups;
  const std::vector<int64_t> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  const Tensor map = dense_map(x, layout), dense = dense_weight(weight);
  const EpilogueTensors epilogue = dense_epilogue(x, layout, sizes, scale, shift, residual, slope);
  Tensor out = empty_map(sizes, x, layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.epilogue = pointers(epilogue);
  p.tf32 = tf32_allowed;
  launch(cuda::group_pointwise, p, x);
  return out;
}

Tensor group_pointwise_backward_input(const Tensor& grad, const Tensor& weight, int64_t groups) {
  const DeviceGuard guard(grad.get_device_index());
  check_map(grad, "grad");
  check_same_type(grad, weight);
  check_pointwise_weight(weight, weight.size(1) * groups, groups);
  STD_TORCH_CHECK(grad.size(1) == weight.size(0), "grad [B, N, H, W] and weight [N, M/groups] disagree");
  GroupPointwise p{};
  p.type = type_of(grad);
  p.layout = layout_of(grad);
  p.batch = grad.size(0);
  p.pixels = grad.size(2) * grad.size(3);
  p.in_channels = grad.size(1);
  p.out_channels = weight.size(1) * groups;
  p.groups = groups;
  p.weight_transposed = true;
  const Tensor map = dense_map(grad, p.layout), dense = dense_weight(weight);
  Tensor grad_x = empty_map({grad.size(0), p.out_channels, grad.size(2), grad.size(3)}, grad, p.layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = grad_x.mutable_data_ptr();
  p.tf32 = tf32_allowed;
  launch(cuda::group_pointwise, p, grad);
  return grad_x;
}

Tensor group_pointwise_backward_weight(const Tensor& grad, const Tensor& x, int64_t groups) {
  const DeviceGuard guard(grad.get_device_index());
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
  p.tf32 = tf32_allowed;
  launch(cuda::group_pointwise_backward_weight, p, x);
  return grad_weight;
}

void allow_tf32(bool allowed) { tf32_allowed = allowed; }

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_FRAGMENT(espkernels_cuda, m) { m.def("allow_tf32(bool allowed) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(espkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&espk::allow_tf32));
}

STABLE_TORCH_LIBRARY_IMPL(espkernels_cuda, CUDA, m) {
  using namespace espk;
  m.impl("spatial_pyramid", TORCH_BOX(&spatial_pyramid));
  m.impl("spatial_pyramid_backward_input", TORCH_BOX(&spatial_pyramid_backward_input));
  m.impl("spatial_pyramid_backward_weight", TORCH_BOX(&spatial_pyramid_backward_weight));
  m.impl("group_pointwise", TORCH_BOX(&group_pointwise));
  m.impl("group_pointwise_backward_input", TORCH_BOX(&group_pointwise_backward_input));
  m.impl("group_pointwise_backward_weight", TORCH_BOX(&group_pointwise_backward_weight));
}
