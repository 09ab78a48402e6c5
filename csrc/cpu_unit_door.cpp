// Where torch ends on the CPU for whole units in inference.
#include <torch/csrc/stable/library.h>

#include "cpu_launch.h"

namespace espk {
namespace {

// The weights of an EESP unit with its batch norms folded, as every operator of whole units takes them.
struct Unit {
  const Tensor& reduce_weight;
  int64_t reduce_groups;
  const Tensor &reduce_shift, &reduce_slope, &weight;
  const std::vector<int64_t>& dilations;
  const Tensor &pyramid_scale, &pyramid_shift, &pyramid_slope, &expand_weight;
  int64_t groups;
  const Tensor& shift;
  const std::optional<Tensor>& packed;  // of the reduction and the rest
};

// An image's reduced map of more bytes has left every second-level cache when the pyramid comes to read it.
constexpr int64_t kNearReducedBytes = 2 * 1024 * 1024;

// Runs the unit on `x`; residual and slope may be absent. With `into`, a channels_last map, the result goes to its
// channels from `channel` on, with `shortcut` added.
// The reduced map is written and read once, then see csrc/cpu/pyramid_pointwise.cpp. Where it would leave the cache, its
// rows are made as they are read (csrc/cpu/eesp.cpp), but not beside a residual: a replay stores the result in its place.
Tensor run_unit(const Tensor& x, const Unit& u, int64_t stride, bool hff, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& slope, const std::optional<Tensor>& into, int64_t channel,
                const ImageShortcut& shortcut) {
  check_map(x, "x");
  for (const Tensor* weight : {&u.reduce_weight, &u.weight, &u.expand_weight}) check_same_type(x, *weight);
  check_pointwise_weight(u.reduce_weight, x.size(1), u.reduce_groups);
  // A map of one pixel or column may be dense both ways.
  const Layout layout = into ? Layout::channels_last : layout_of(x);
  const Tensor map = dense_map(x, layout), reduce = dense_weight(u.reduce_weight), branches = dense_weight(u.weight),
               expand = dense_weight(u.expand_weight);

  Eesp p{};
  p.bfloat16 = kernels().bfloat16;
  const std::vector<int64_t> reduced_sizes{x.size(0), reduce.size(0), x.size(2), x.size(3)};
  describe(p, x, layout, reduced_sizes, u.dilations, stride, hff);
  check_branch_weight(branches, p);
  check_pointwise_weight(expand, p.out_channels(), u.groups);
  p.groups = u.groups;
  p.pointwise_channels = expand.size(0);
  const std::vector<int64_t> concatenated{p.batch, p.out_channels(), p.out_height, p.out_width};
  const std::vector<int64_t> sizes{p.batch, p.pointwise_channels, p.out_height, p.out_width};
  const EpilogueTensors reduce_epilogue =
      dense_epilogue(x, layout, reduced_sizes, std::nullopt, u.reduce_shift, std::nullopt, u.reduce_slope);
  const EpilogueTensors first =
      dense_epilogue(x, layout, concatenated, u.pyramid_scale, u.pyramid_shift, std::nullopt, u.pyramid_slope);
  const EpilogueTensors second = dense_epilogue(x, layout, sizes, std::nullopt, u.shift, residual, slope);
  Tensor out = into ? *into : result_map(sizes, x, layout);
  p.x = map.const_data_ptr();
  p.in_channels = x.size(1);
  p.reduce_groups = u.reduce_groups;
  p.reduce_weight = reduce.const_data_ptr();
  p.reduce_epilogue = pointers(reduce_epilogue);
  p.weight = branches.const_data_ptr();
  p.pointwise_weight = expand.const_data_ptr();
  p.pyramid_epilogue = pointers(first);
  p.epilogue = pointers(second);
  p.out_pixel = out.size(1);
  p.out = static_cast<char*>(out.mutable_data_ptr()) + channel * bytes_of(p.type);
  p.shortcut = shortcut;

  const int64_t reduced_bytes = p.channels * p.height * p.width * bytes_of(p.type);
  if (layout == Layout::channels_last && !residual && reduced_bytes > kNearReducedBytes) {
    launch("reduce, pyramid and expand", kernels().eesp, p);
    return out;
  }
  Tensor reduced = result_map(reduced_sizes, x, layout);
  GroupPointwise reduction = p.reduction();
  reduction.out = reduced.mutable_data_ptr();
  PyramidPointwise rest = p;
  rest.x = reduced.const_data_ptr();
  Packs packs(u.packed);
  launch("reduce", kernels().group_pointwise, reduction, packs.next(kernels().group_pointwise, reduction));
  launch("pyramid and expand", kernels().pyramid_pointwise, rest, packs.next(kernels().pyramid_pointwise, rest));
  return out;
}

Tensor eesp(const Tensor& x, const Tensor& reduce_weight, int64_t reduce_groups, const Tensor& reduce_shift,
            const Tensor& reduce_slope, const Tensor& weight, std::vector<int64_t> dilations,
            const Tensor& pyramid_scale, const Tensor& pyramid_shift, const Tensor& pyramid_slope,
            const Tensor& expand_weight, int64_t groups, const Tensor& shift, std::optional<Tensor> residual,
            std::optional<Tensor> slope, int64_t stride, bool hff, std::optional<Tensor> packed) {
  const Unit unit{reduce_weight, reduce_groups, reduce_shift,  reduce_slope, weight, dilations, pyramid_scale,
                  pyramid_shift, pyramid_slope, expand_weight, groups,       shift,  packed};
  return run_unit(x, unit, stride, hff, residual, slope, std::nullopt, 0, {});
}

// The part of a shortcut that belongs to the channels from `first` on.
ImageShortcut of_channels(ImageShortcut shortcut, Type type, int64_t first) {
  if (!shortcut.image) return shortcut;
  shortcut.weight = static_cast<const char*>(shortcut.weight) + first * shortcut.channels * bytes_of(type);
  shortcut.shift = static_cast<const char*>(shortcut.shift) + first * (type == Type::float64 ? 8 : 4);
  return shortcut;
}

// Both halves write to their channels of the result, with their part of the shortcut.
Tensor down_sampler(const Tensor& x, std::optional<Tensor> image, const Tensor& reduce_weight, int64_t reduce_groups,
                    const Tensor& reduce_shift, const Tensor& reduce_slope, const Tensor& weight,
                    std::vector<int64_t> dilations, const Tensor& pyramid_scale, const Tensor& pyramid_shift,
                    const Tensor& pyramid_slope, const Tensor& expand_weight, int64_t groups, const Tensor& shift,
                    std::optional<Tensor> shortcut_weight, std::optional<Tensor> shortcut_shift, const Tensor& slope,
                    bool hff, std::optional<Tensor> packed) {
  check_map(x, "x");
  STD_TORCH_CHECK(image.has_value() == shortcut_weight.has_value() && image.has_value() == shortcut_shift.has_value(),
                  "image, shortcut_weight, shortcut_shift: expected all three or none");
  STD_TORCH_CHECK(expand_weight.dim() == 2 && slope.dim() == 1,
                  "expand_weight, slope: expected [N, K*d/groups], [M+N]");
  AveragePool a = describe_pool(x);
  const int64_t pooled_channels = a.channels, unit_channels = expand_weight.size(0);
  const int64_t channels = pooled_channels + unit_channels;
  STD_TORCH_CHECK(slope.size(0) == channels, "slope: expected one number a channel of the result");
  const Tensor map = dense_map(x, Layout::channels_last);
  const int64_t height = a.out_height, width = a.out_width;
  const std::vector<int64_t> sizes{x.size(0), channels, height, width};
  Tensor out = result_map(sizes, x, Layout::channels_last);

  std::optional<Tensor> pixels, shortcut_rows;
  EpilogueTensors shortcut_epilogue;
  ImageShortcut shortcut{};
  if (image) {
    check_map(*image, "image");
    check_same_type(*image, x);
    check_same_type(*shortcut_weight, x);
    check_pointwise_weight(*shortcut_weight, image->size(1), 1);
    STD_TORCH_CHECK(image->size(0) == x.size(0) && image->size(2) == height && image->size(3) == width &&
                        shortcut_weight->size(0) == channels,
                    "image: expected the height and width of the result, a weight row for each of its channels");
    pixels = dense_map(*image, Layout::channels_last);
    shortcut_rows = dense_weight(*shortcut_weight);
    shortcut_epilogue =
        dense_epilogue(x, Layout::channels_last, sizes, std::nullopt, shortcut_shift, std::nullopt, std::nullopt);
    shortcut = {pixels->const_data_ptr(), shortcut_rows->const_data_ptr(), pointers(shortcut_epilogue).shift,
                image->size(1)};
  }

  const Tensor slopes = dense_weight(slope);
  const std::optional<Tensor> pooled_slope = slice(slopes, 0, pooled_channels);
  const std::optional<Tensor> unit_slope = slice(slopes, pooled_channels, unit_channels);
  const EpilogueTensors pooled_epilogue =
      dense_epilogue(x, Layout::channels_last, {x.size(0), pooled_channels, height, width}, std::nullopt, std::nullopt,
                     std::nullopt, pooled_slope);
  a.layout = Layout::channels_last;
  a.x = map.const_data_ptr();
  a.slope = pointers(pooled_epilogue).slope;
  a.out_pixel = channels;
  a.out = out.mutable_data_ptr();
  a.shortcut = shortcut;
  launch("average_pool", kernels().average_pool, a);

  const Unit unit{reduce_weight, reduce_groups, reduce_shift,  reduce_slope, weight, dilations, pyramid_scale,
                  pyramid_shift, pyramid_slope, expand_weight, groups,       shift,  packed};
  return run_unit(map, unit, 2, hff, std::nullopt, unit_slope, out, pooled_channels,
                  of_channels(shortcut, type_of(x), pooled_channels));
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("eesp", TORCH_BOX(&eesp));
  m.impl("down_sampler", TORCH_BOX(&down_sampler));
}
