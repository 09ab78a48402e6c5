// Where torch ends on CUDA for the operators of inference: the pointwise half of a unit, whole units, down-samplers.
#include <torch/csrc/stable/library.h>

#include "cuda_launch.h"

namespace espk {
namespace {

// The pyramid and the pointwise convolution behind it, and the dense tensors that its pointers point into.
struct UnitTensors {
  Tensor weight, expand;
  EpilogueTensors pyramid, epilogue;
};

UnitTensors describe_unit(PyramidPointwise& p, const Tensor& x, Layout layout, int64_t channels, const Tensor& weight,
                          const std::vector<int64_t>& dilations, const Tensor& expand, int64_t groups,
                          const EpilogueTensors& pyramid, const EpilogueTensors& epilogue, int64_t stride, bool hff) {
  check_same_type(x, weight);
  check_same_type(x, expand);
  describe(p, x, layout, {x.size(0), channels, x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pointwise_weight(expand, p.out_channels(), groups);
  p.groups = groups;
  p.pointwise_channels = expand.size(0);
  const std::vector<int64_t> concatenated{p.batch, p.out_channels(), p.out_height, p.out_width};
  const std::vector<int64_t> sizes{p.batch, p.pointwise_channels, p.out_height, p.out_width};
  UnitTensors t{dense_weight(weight), dense_weight(expand),
                dense_epilogue(x, layout, concatenated, pyramid.scale, pyramid.shift, std::nullopt, pyramid.slope),
                dense_epilogue(x, layout, sizes, epilogue.scale, epilogue.shift, epilogue.residual, epilogue.slope)};
  p.weight = t.weight.const_data_ptr();
  p.pointwise_weight = t.expand.const_data_ptr();
  p.pyramid_epilogue = pointers(t.pyramid);
  p.epilogue = pointers(t.epilogue);
  p.tf32 = tf32_allowed;
  return t;
}

struct ReductionTensors {
  Tensor weight;
  EpilogueTensors epilogue;
};

ReductionTensors describe_reduction(Eesp& p, const Tensor& x, Layout layout, const Tensor& weight, int64_t groups,
                                    const Tensor& shift, const Tensor& slope) {
  check_same_type(x, weight);
  check_pointwise_weight(weight, x.size(1), groups);
  const std::vector<int64_t> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  ReductionTensors t{dense_weight(weight), dense_epilogue(x, layout, sizes, std::nullopt, shift, std::nullopt, slope)};
  p.in_channels = x.size(1);
  p.reduce_groups = groups;
  p.reduce_weight = t.weight.const_data_ptr();
  p.reduce_epilogue = pointers(t.epilogue);
  return t;
}

Tensor pyramid_pointwise(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations,
                         const Tensor& pointwise_weight, int64_t groups, std::optional<Tensor> pyramid_scale,
                         std::optional<Tensor> pyramid_shift, std::optional<Tensor> pyramid_slope,
                         std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                         std::optional<Tensor> slope, int64_t stride, bool hff, std::optional<Tensor>) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  const Layout layout = layout_of(x);
  PyramidPointwise p{};
  const UnitTensors tensors = describe_unit(p, x, layout, x.size(1), weight, dilations, pointwise_weight, groups,
                                            {pyramid_scale, pyramid_shift, std::nullopt, pyramid_slope},
                                            {scale, shift, residual, slope}, stride, hff);
  const Tensor map = dense_map(x, layout);
  Tensor out = empty_map({p.batch, p.pointwise_channels, p.out_height, p.out_width}, x, layout);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(cuda::pyramid_pointwise, p, x);
  return out;
}

Tensor eesp(const Tensor& x, const Tensor& reduce_weight, int64_t reduce_groups, const Tensor& reduce_shift,
            const Tensor& reduce_slope, const Tensor& weight, std::vector<int64_t> dilations,
            const Tensor& pyramid_scale, const Tensor& pyramid_shift, const Tensor& pyramid_slope,
            const Tensor& expand_weight, int64_t groups, const Tensor& shift, std::optional<Tensor> residual,
            std::optional<Tensor> slope, int64_t stride, bool hff, std::optional<Tensor>) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  const Layout layout = layout_of(x);
  Eesp p{};
  const ReductionTensors reduction =
      describe_reduction(p, x, layout, reduce_weight, reduce_groups, reduce_shift, reduce_slope);
  const UnitTensors tensors = describe_unit(p, x, layout, reduce_weight.size(0), weight, dilations, expand_weight,
                                            groups, {pyramid_scale, pyramid_shift, std::nullopt, pyramid_slope},
                                            {std::nullopt, shift, residual, slope}, stride, hff);
  const Tensor map = dense_map(x, layout);
  Tensor out = empty_map({p.batch, p.pointwise_channels, p.out_height, p.out_width}, x, layout);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(cuda::eesp, p, x);
  return out;
}

// The result is channels_last whatever x is, as the fake tensors say.
Tensor down_sampler(const Tensor& x, std::optional<Tensor> image, const Tensor& reduce_weight, int64_t reduce_groups,
                    const Tensor& reduce_shift, const Tensor& reduce_slope, const Tensor& weight,
                    std::vector<int64_t> dilations, const Tensor& pyramid_scale, const Tensor& pyramid_shift,
                    const Tensor& pyramid_slope, const Tensor& expand_weight, int64_t groups, const Tensor& shift,
                    std::optional<Tensor> shortcut_weight, std::optional<Tensor> shortcut_shift, const Tensor& slope,
                    bool hff, std::optional<Tensor>) {
  const DeviceGuard guard(x.get_device_index());
  check_map(x, "x");
  STD_TORCH_CHECK(image.has_value() == shortcut_weight.has_value() && image.has_value() == shortcut_shift.has_value(),
                  "image, shortcut_weight, shortcut_shift: expected all three or none");
  constexpr Layout layout = Layout::channels_last;
  DownSampler p{};
  const ReductionTensors reduction =
      describe_reduction(p, x, layout, reduce_weight, reduce_groups, reduce_shift, reduce_slope);
  const UnitTensors tensors = describe_unit(p, x, layout, reduce_weight.size(0), weight, dilations, expand_weight,
                                            groups, {pyramid_scale, pyramid_shift, std::nullopt, pyramid_slope},
                                            {std::nullopt, shift, std::nullopt, std::nullopt}, 2, hff);
  // describe() shortens a step beyond the map; the means keep theirs, and of one row and column there is one either way.
  const std::vector<int64_t> sizes{p.batch, p.in_channels + p.pointwise_channels, p.out_height, p.out_width};
  const EpilogueTensors last = dense_epilogue(x, layout, sizes, std::nullopt, shortcut_shift, std::nullopt, slope);
  std::optional<Tensor> pixels, shortcut;
  if (image) {
    check_map(*image, "image");
    check_same_type(*image, x);
    check_same_type(*shortcut_weight, x);
    check_pointwise_weight(*shortcut_weight, image->size(1), 1);
    STD_TORCH_CHECK(image->size(0) == p.batch && image->size(2) == p.out_height && image->size(3) == p.out_width &&
                        shortcut_weight->size(0) == sizes[1],
                    "image: expected the height and width of the result, a weight row for each of its channels");
    pixels = dense_map(*image, layout);
    shortcut = dense_weight(*shortcut_weight);
    p.shortcut = {pixels->const_data_ptr(), shortcut->const_data_ptr(), pointers(last).shift, image->size(1)};
  }
  p.slope = pointers(last).slope;
  const Tensor map = dense_map(x, layout);
  Tensor out = empty_map(sizes, x, layout);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(cuda::down_sampler, p, x);
  return out;
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels_cuda, CUDA, m) {
  using namespace espk;
  m.impl("pyramid_pointwise", TORCH_BOX(&pyramid_pointwise));
  m.impl("eesp", TORCH_BOX(&eesp));
  m.impl("down_sampler", TORCH_BOX(&down_sampler));
}
