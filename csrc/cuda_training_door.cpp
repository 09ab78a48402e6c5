// Where torch ends on CUDA for whole units in training: two operators of a sequence of kernels each, whose batch norms
// never leave the device. Kept for the backward pass: as on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_launch.h"
#include "training_unit.h"

namespace espk {
namespace {

// What both operators take, and the dense tensors that the problem's pointers point into.
struct Unit : TrainingUnit {
  Tensor map, norm_weight, norm_bias, slope;

  Unit(cuda::UnitInTraining& p, const Tensor& x, const Tensor& reduce, int64_t reduce_groups, const Tensor& branches,
       const std::vector<int64_t>& dilations, const Tensor& expand, int64_t groups, const Tensor& norm_weights,
       const Tensor& norm_biases, const Tensor& slopes, const std::vector<double>& eps,
       const std::vector<bool>& batch_statistics, int64_t stride, bool hff, bool residual)
      : TrainingUnit(x, reduce, reduce_groups, branches, dilations, expand, groups, eps, batch_statistics, stride, hff,
                     residual),
        map(dense_map(x, Layout::channels_last)),
        norm_weight(dense_weight(norm_weights)),
        norm_bias(dense_weight(norm_biases)),
        slope(dense_weight(slopes)) {
    p.has_prelu = ends_in_prelu(slopes);
    check_numbers(norm_weights, norm_channels(), compute_type(x), "norm_weight");
    check_numbers(norm_biases, norm_channels(), compute_type(x), "norm_bias");
    check_numbers(slopes, p.has_prelu ? norm_channels() : inner_channels(), compute_type(x), "slope");
    static_cast<Pyramid&>(p) = pyramid;
    p.in_channels = in_channels;
    p.pointwise_channels = out_channels;
    p.reduce_groups = reduce_groups;
    p.groups = groups;
    p.x = map.const_data_ptr();
    p.reduce_weight = reduce_weight.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.expand_weight = expand_weight.const_data_ptr();
    p.norm_weight = norm_weight.const_data_ptr();
    p.norm_bias = norm_bias.const_data_ptr();
    p.slope = slope.const_data_ptr();
    for (size_t i = 0; i < 3; ++i) {
      p.eps[i] = eps[i];
      p.batch_statistics[i] = batch_statistics[i];
    }
    p.residual = residual;
    p.tf32 = tf32_allowed;
  }
};

// Where a result goes, or null where it is [0]: not wanted.
void* place(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward eesp_training(const Tensor& x, const Tensor& reduce_weight, int64_t reduce_groups, const Tensor& weight,
                      std::vector<int64_t> dilations, const Tensor& expand_weight, int64_t groups,
                      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& slope,
                      std::optional<Tensor> running_mean, std::optional<Tensor> running_variance,
                      std::vector<double> eps, std::vector<bool> batch_statistics, int64_t stride, bool hff,
                      bool residual, bool save_concatenated) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  cuda::EespTraining p{};
  const Unit u(p, x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias,
               slope, eps, batch_statistics, stride, hff, residual);
  std::optional<Tensor> mean, variance;
  if (running_mean && running_variance) {
    check_numbers(*running_mean, u.norm_channels(), ScalarType::Double, "running_mean");
    check_numbers(*running_variance, u.norm_channels(), ScalarType::Double, "running_variance");
    mean = dense_weight(*running_mean);
    variance = dense_weight(*running_variance);
    p.running_mean = static_cast<const double*>(mean->const_data_ptr());
    p.running_variance = static_cast<const double*>(variance->const_data_ptr());
  } else {
    for (bool batch : batch_statistics) STD_TORCH_CHECK(batch, "running_mean, running_variance: expected both");
  }
  Tensor result = u.out_map(u.out_channels, x), reduced = u.in_map(u.pyramid.channels, x);
  Tensor concatenated = save_concatenated ? u.out_map(u.pyramid.out_channels(), x) : nothing(x);
  Tensor expanded = u.out_map(u.out_channels, x);
  Tensor statistics =
      torch::stable::empty(std::vector<int64_t>{2, u.norm_channels()}, ScalarType::Double, std::nullopt, x.device());
  p.result = result.mutable_data_ptr();
  p.reduced = reduced.mutable_data_ptr();
  p.concatenated = place(concatenated);
  p.expanded = expanded.mutable_data_ptr();
  p.statistics = static_cast<double*>(statistics.mutable_data_ptr());
  launch(cuda::eesp_training, p, x);
  return {result, reduced, concatenated, expanded, statistics};
}

Backward eesp_training_backward(const Tensor& grad, const Tensor& x, const Tensor& reduced, const Tensor& concatenated,
                                const Tensor& expanded, const Tensor& statistics, const Tensor& reduce_weight,
                                int64_t reduce_groups, const Tensor& weight, std::vector<int64_t> dilations,
                                const Tensor& expand_weight, int64_t groups, const Tensor& norm_weight,
                                const Tensor& norm_bias, const Tensor& slope, std::vector<double> eps,
                                std::vector<bool> batch_statistics, int64_t stride, bool hff, bool residual,
                                std::vector<bool> wanted) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  cuda::EespTrainingBackward p{};
  const Unit u(p, x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias,
               slope, eps, batch_statistics, stride, hff, residual);
  STD_TORCH_CHECK(wanted.size() == 7, "wanted: expected 7 flags");
  u.check_kept(grad, u.out_channels, true, "grad");
  u.check_kept(reduced, u.pyramid.channels, false, "reduced");
  u.check_kept(expanded, u.out_channels, true, "expanded");
  const bool saved = concatenated.numel() > 0;
  if (saved) u.check_kept(concatenated, u.pyramid.out_channels(), true, "concatenated");
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2, "statistics: expected [2, channels]");
  const Tensor moments = torch::stable::flatten(statistics);
  check_numbers(moments, 2 * u.norm_channels(), ScalarType::Double, "statistics");
  const Tensor dense_moments = dense_weight(moments);

  const Tensor behind = dense_map(grad, Layout::channels_last), r_map = dense_map(reduced, Layout::channels_last);
  const Tensor e_map = dense_map(expanded, Layout::channels_last);
  const Tensor c_map = saved ? dense_map(concatenated, Layout::channels_last) : concatenated;
  p.grad = behind.const_data_ptr();
  p.reduced = r_map.const_data_ptr();
  p.concatenated = saved ? c_map.const_data_ptr() : nullptr;
  p.expanded = e_map.const_data_ptr();
  p.statistics = static_cast<const double*>(dense_moments.const_data_ptr());

  auto like_weight = [&](bool wants, std::vector<int64_t> sizes) {
    return wants ? torch::stable::new_empty(x, sizes) : nothing(x);
  };
  const bool vectors = wanted[4] || wanted[5] || wanted[6];
  auto like_vector = [&](const Tensor& vector) {
    return vectors ? torch::stable::new_empty(vector, std::vector<int64_t>{vector.size(0)}) : nothing(vector);
  };
  Tensor grad_x = wanted[0] ? u.in_map(u.in_channels, x) : nothing(x);
  Tensor grad_reduce = like_weight(wanted[1], {u.pyramid.channels, u.in_channels / reduce_groups});
  Tensor grad_weight = like_weight(wanted[2], {u.pyramid.branches, u.pyramid.channels, 3, 3});
  Tensor grad_expand = like_weight(wanted[3], {u.out_channels, u.pyramid.out_channels() / groups});
  Tensor grad_norm_weight = like_vector(norm_weight), grad_norm_bias = like_vector(norm_bias);
  Tensor grad_slope = like_vector(slope);
  p.grad_x = place(grad_x);
  p.grad_reduce = place(grad_reduce);
  p.grad_weight = place(grad_weight);
  p.grad_expand = place(grad_expand);
  p.grad_norm_weight = place(grad_norm_weight);
  p.grad_norm_bias = place(grad_norm_bias);
  p.grad_slope = place(grad_slope);
  launch(cuda::eesp_training_backward, p, x);
  return {grad_x, grad_reduce, grad_weight, grad_expand, grad_norm_weight, grad_norm_bias, grad_slope};
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels_cuda, CUDA, m) {
  using namespace espk;
  m.impl("eesp_training", TORCH_BOX(&eesp_training));
  m.impl("eesp_training_backward", TORCH_BOX(&eesp_training_backward));
}
