// Where torch ends on the CPU for whole units in training: four kernels forward and four backward, with the few numbers
// of their batch norms in between. Traffic of a stride-1 unit in maps of N channels: forward 7.5, backward 14 (eager about
// 20 and 45); kept for the backward pass 3.25, or 2.25 where the concatenated map is made again (eager 6.75).
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "training_norms.h"
#include "training_tensors.h"

namespace espk {
namespace {

// What both operators take, with the three norms in place.
struct Unit : TrainingUnit {
  bool has_prelu;
  std::vector<double> norm_weight, norm_bias, slope, moments;
  std::array<TrainingNorm, 3> norms{};

  Unit(const Tensor& x, const Tensor& reduce, int64_t reduce_groups, const Tensor& branches,
       const std::vector<int64_t>& dilations, const Tensor& expand, int64_t groups, const Tensor& norm_weights,
       const Tensor& norm_biases, const Tensor& slopes, const std::vector<double>& eps,
       const std::vector<bool>& batch_statistics, int64_t stride, bool hff, bool residual)
      : TrainingUnit(x, reduce, reduce_groups, branches, dilations, expand, groups, eps, batch_statistics, stride, hff,
                     residual),
        has_prelu(ends_in_prelu(slopes)) {
    const int64_t channels[3] = {pyramid.channels, pyramid.out_channels(), out_channels};
    const int64_t all = norm_channels();
    norm_weight = numbers(norm_weights, all, compute_type(x), "norm_weight");
    norm_bias = numbers(norm_biases, all, compute_type(x), "norm_bias");
    slope = numbers(slopes, has_prelu ? all : inner_channels(), compute_type(x), "slope");
    moments.assign(static_cast<size_t>(2 * all), 0.0);
    int64_t first = 0;
    for (int i = 0; i < 3; first += channels[i++]) {
      norms[i].channels = channels[i];
      norms[i].count = i == 0 ? in_pixels() : out_pixels();
      norms[i].batch_statistics = batch_statistics[static_cast<size_t>(i)];
      norms[i].eps = eps[static_cast<size_t>(i)];
      norms[i].weight = norm_weight.data() + first;
      norms[i].bias = norm_bias.data() + first;
      norms[i].slope = i < 2 || has_prelu ? slope.data() + first : nullptr;
      norms[i].mean = moments.data() + first;
      norms[i].variance = moments.data() + all + first;
    }
  }

  // The concatenated map of the reduced one; its moments only where they are asked for.
  void concatenate(const Tensor& reduced, Tensor& out, const Moments& moments) {
    SpatialPyramid p{};
    static_cast<Pyramid&>(p) = pyramid;
    p.x = reduced.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.out_pixel = p.out_channels();
    p.out = out.mutable_data_ptr();
    p.normalise = norms[0].normalise();
    p.moments = moments;
    run_kernel(kernels().normalised_pyramid, p);
  }
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward eesp_training(const Tensor& x, const Tensor& reduce_weight, int64_t reduce_groups, const Tensor& weight,
                      std::vector<int64_t> dilations, const Tensor& expand_weight, int64_t groups,
                      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& slope,
                      std::optional<Tensor> running_mean, std::optional<Tensor> running_variance,
                      std::vector<double> eps, std::vector<bool> batch_statistics, int64_t stride, bool hff,
                      bool residual, bool save_concatenated) {
  check_map(x, "x");
  Unit u(x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias, slope, eps,
         batch_statistics, stride, hff, residual);
  const size_t all = static_cast<size_t>(u.norm_channels());
  if (running_mean && running_variance) {
    const std::vector<double> means = numbers(*running_mean, u.norm_channels(), ScalarType::Double, "running_mean");
    const std::vector<double> variances =
        numbers(*running_variance, u.norm_channels(), ScalarType::Double, "running_variance");
    std::copy(means.begin(), means.end(), u.moments.begin());
    std::copy(variances.begin(), variances.end(), u.moments.begin() + static_cast<std::ptrdiff_t>(all));
  } else {
    for (bool batch : batch_statistics) STD_TORCH_CHECK(batch, "running_mean, running_variance: expected both");
  }
  const Tensor map = dense_map(x, Layout::channels_last);
  Tensor reduced = u.in_map(u.pyramid.channels, x), concatenated = u.out_map(u.pyramid.out_channels(), x);
  Tensor expanded = u.out_map(u.out_channels, x), result = u.out_map(u.out_channels, x);

  NormalisedPointwise r{};
  r.type = u.pyramid.type;
  r.pixels = u.in_pixels();
  r.in_channels = u.in_channels;
  r.out_channels = u.pyramid.channels;
  r.groups = u.reduce_groups;
  r.x = map.const_data_ptr();
  r.weight = u.reduce_weight.const_data_ptr();
  r.out = reduced.mutable_data_ptr();
  r.moments = u.norms[0].moments();
  run_kernel(kernels().normalised_pointwise, r);

  u.concatenate(reduced, concatenated, u.norms[1].moments());

  NormalisedPointwise e{};
  e.type = u.pyramid.type;
  e.pixels = u.out_pixels();
  e.in_channels = u.pyramid.out_channels();
  e.out_channels = u.out_channels;
  e.groups = u.groups;
  e.x = concatenated.const_data_ptr();
  e.normalise = u.norms[1].normalise();
  e.weight = u.expand_weight.const_data_ptr();
  e.out = expanded.mutable_data_ptr();
  e.moments = u.norms[2].moments();
  run_kernel(kernels().normalised_pointwise, e);

  NormalisedOutput o{};
  o.type = u.pyramid.type;
  o.pixels = u.out_pixels();
  o.channels = u.out_channels;
  o.x = expanded.const_data_ptr();
  o.normalise = u.norms[2].normalise();
  o.residual = residual ? map.const_data_ptr() : nullptr;
  o.out = result.mutable_data_ptr();
  run_kernel(kernels().normalised_output, o);

  Tensor statistics =
      torch::stable::empty(std::vector<int64_t>{2, u.norm_channels()}, ScalarType::Double, std::nullopt, x.device());
  std::copy(u.moments.begin(), u.moments.end(), static_cast<double*>(statistics.mutable_data_ptr()));
  return {result, reduced, save_concatenated ? concatenated : nothing(x), expanded, statistics};
}

Backward eesp_training_backward(const Tensor& grad, const Tensor& x, const Tensor& reduced, const Tensor& concatenated,
                                const Tensor& expanded, const Tensor& statistics, const Tensor& reduce_weight,
                                int64_t reduce_groups, const Tensor& weight, std::vector<int64_t> dilations,
                                const Tensor& expand_weight, int64_t groups, const Tensor& norm_weight,
                                const Tensor& norm_bias, const Tensor& slope, std::vector<double> eps,
                                std::vector<bool> batch_statistics, int64_t stride, bool hff, bool residual,
                                std::vector<bool> wanted) {
  check_map(x, "x");
  Unit u(x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias, slope, eps,
         batch_statistics, stride, hff, residual);
  STD_TORCH_CHECK(wanted.size() == 7, "wanted: expected 7 flags");
  const int64_t concatenated_channels = u.pyramid.out_channels();
  u.check_kept(grad, u.out_channels, true, "grad");
  u.check_kept(reduced, u.pyramid.channels, false, "reduced");
  u.check_kept(expanded, u.out_channels, true, "expanded");
  const bool saved = concatenated.numel() > 0;
  if (saved) u.check_kept(concatenated, concatenated_channels, true, "concatenated");
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2, "statistics: expected [2, channels]");
  u.moments = numbers(torch::stable::flatten(statistics), 2 * u.norm_channels(), ScalarType::Double, "statistics");
  for (int i = 0, first = 0; i < 3; first += static_cast<int>(u.norms[i++].channels)) {
    u.norms[i].mean = u.moments.data() + first;
    u.norms[i].variance = u.norms[i].mean + u.norm_channels();
  }

  const bool vectors = wanted[4] || wanted[5] || wanted[6];
  const bool into_reduced = wanted[0] || wanted[1], into_pyramid = into_reduced || wanted[2] || vectors;
  const Tensor map = dense_map(x, Layout::channels_last), behind = dense_map(grad, Layout::channels_last);
  const Tensor u_map = dense_map(reduced, Layout::channels_last), e_map = dense_map(expanded, Layout::channels_last);
  Tensor grad_x = wanted[0] ? u.in_map(u.in_channels, x) : nothing(x);
  Tensor grad_reduce =
      wanted[1] ? torch::stable::new_empty(x, {u.pyramid.channels, u.in_channels / reduce_groups}) : nothing(x);
  Tensor grad_weight =
      wanted[2] ? torch::stable::new_empty(x, {u.pyramid.branches, u.pyramid.channels, 3, 3}) : nothing(x);
  Tensor grad_expand =
      wanted[3] ? torch::stable::new_empty(x, {u.out_channels, concatenated_channels / groups}) : nothing(x);
  auto [reduce_norm, pyramid_norm, expand_norm] = u.norms;

  // The gradient in front of the last PReLU waits in grad_x for the sum with the reduction's.
  Tensor front = !u.has_prelu ? behind : residual && wanted[0] ? grad_x : u.out_map(u.out_channels, x);
  NormalisedOutputBackward o{};
  o.type = u.pyramid.type;
  o.pixels = u.out_pixels();
  o.channels = u.out_channels;
  o.grad = behind.const_data_ptr();
  o.x = e_map.const_data_ptr();
  o.normalise = expand_norm.normalise();
  o.residual = residual ? map.const_data_ptr() : nullptr;
  o.grad_x = u.has_prelu ? front.mutable_data_ptr() : nullptr;
  o.sums = expand_norm.sums();
  run_kernel(kernels().normalised_output_backward, o);

  Tensor made = saved ? concatenated : u.out_map(concatenated_channels, x);
  if (!saved) u.concatenate(u_map, made, Moments{});
  const Tensor c_map = dense_map(made, Layout::channels_last);
  Tensor grad_concatenated = into_pyramid ? u.out_map(concatenated_channels, x) : nothing(x);
  NormalisedPointwiseBackward e{};
  e.type = u.pyramid.type;
  e.pixels = u.out_pixels();
  e.in_channels = concatenated_channels;
  e.out_channels = u.out_channels;
  e.groups = u.groups;
  e.grad = front.const_data_ptr();
  e.out = e_map.const_data_ptr();
  e.norm = expand_norm.gradient();
  e.x = c_map.const_data_ptr();
  e.normalise = pyramid_norm.normalise();
  e.weight = u.expand_weight.const_data_ptr();
  e.grad_weight = wanted[3] ? grad_expand.mutable_data_ptr() : nullptr;
  e.grad_x = into_pyramid ? grad_concatenated.mutable_data_ptr() : nullptr;
  e.sums = pyramid_norm.sums();
  run_kernel(kernels().normalised_pointwise_backward, e);

  reduce_norm.sums();
  if (into_pyramid) {
    Tensor grad_reduced = u.in_map(u.pyramid.channels, x);
    NormalisedPyramidBackward p{};
    static_cast<Pyramid&>(p) = u.pyramid;
    p.grad = grad_concatenated.const_data_ptr();
    p.out = c_map.const_data_ptr();
    p.norm = pyramid_norm.gradient();
    p.x = u_map.const_data_ptr();
    p.normalise = reduce_norm.normalise();
    p.weight = u.weight.const_data_ptr();
    p.grad_weight = wanted[2] ? grad_weight.mutable_data_ptr() : nullptr;
    p.grad_x = into_reduced || vectors ? grad_reduced.mutable_data_ptr() : nullptr;
    p.sums = reduce_norm.sums();
    run_kernel(kernels().normalised_pyramid_backward, p);

    if (into_reduced) {
      NormalisedPointwiseBackward r{};
      r.type = u.pyramid.type;
      r.pixels = u.in_pixels();
      r.in_channels = u.in_channels;
      r.out_channels = u.pyramid.channels;
      r.groups = u.reduce_groups;
      r.grad = grad_reduced.const_data_ptr();
      r.out = u_map.const_data_ptr();
      r.norm = reduce_norm.gradient();
      r.x = map.const_data_ptr();
      r.weight = u.reduce_weight.const_data_ptr();
      r.residual = residual ? front.const_data_ptr() : nullptr;
      r.grad_weight = wanted[1] ? grad_reduce.mutable_data_ptr() : nullptr;
      r.grad_x = wanted[0] ? grad_x.mutable_data_ptr() : nullptr;
      run_kernel(kernels().normalised_pointwise_backward, r);
    }
  }

  Tensor grad_norm_weight = nothing(norm_weight), grad_norm_bias = grad_norm_weight, grad_slope = grad_norm_weight;
  if (vectors) {
    for (TrainingNorm* norm : {&reduce_norm, &pyramid_norm, &expand_norm}) {
      for (int64_t i = 0; i < norm->channels; ++i) norm->grad_centred[static_cast<size_t>(i)] /= norm->deviation(i);
    }
    grad_norm_weight =
        vector_of({&reduce_norm.grad_centred, &pyramid_norm.grad_centred, &expand_norm.grad_centred}, norm_weight);
    grad_norm_bias = vector_of({&reduce_norm.grad, &pyramid_norm.grad, &expand_norm.grad}, norm_weight);
    std::vector<const std::vector<double>*> slopes{&reduce_norm.grad_slope, &pyramid_norm.grad_slope};
    if (u.has_prelu) slopes.push_back(&expand_norm.grad_slope);
    grad_slope = vector_of(slopes, norm_weight);
  }
  return {grad_x, grad_reduce, grad_weight, grad_expand, grad_norm_weight, grad_norm_bias, grad_slope};
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("eesp_training", TORCH_BOX(&eesp_training));
  m.impl("eesp_training_backward", TORCH_BOX(&eesp_training_backward));
}
