// Where torch ends on the CPU for the layers around the units in a network for inference; units are in cpu_unit_door.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu_launch.h"

namespace espk {

namespace {

Tensor average_pool(const Tensor& x) {
  check_map(x, "x");
  AveragePool p = describe_pool(x);
  p.layout = layout_of(x);
  p.out_pixel = p.channels;
  const Tensor map = dense_map(x, p.layout);
  Tensor out = result_map({p.batch, p.channels, p.out_height, p.out_width}, x, p.layout);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch("average_pool", kernels().average_pool, p);
  return out;
}

Tensor global_average(const Tensor& x) {
  check_map(x, "x");
  GlobalAverage p{};
  p.type = type_of(x);
  p.layout = layout_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(p.pixels >= 1, "x: expected at least one row and column");
  const Tensor map = dense_map(x, p.layout);
  Tensor out = result_map({p.batch, p.channels, 1, 1}, x, Layout::contiguous);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch("global_average", kernels().global_average, p);
  return out;
}

void describe_groups(GroupedConvolution& p, const Tensor& x, const Tensor& weight, int64_t groups) {
  p.type = type_of(x);
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.groups = groups;
  p.in = weight.size(1);
  p.out_of_group = weight.size(0) / groups;
}

Tensor grouped_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& shift,
                           const std::optional<Tensor>& slope, int64_t groups) {
  GroupedConvolution p{};
  describe_groups(p, x, weight, groups);
  STD_TORCH_CHECK(p.in >= 1 && p.in <= kMaxBranches && p.height >= 1 && p.width >= 1,
                  "x: expected 1 to 8 inputs a group");
  const Tensor map = dense_map(x, Layout::channels_last), dense = dense_weight(weight);
  const std::vector<int64_t> sizes{p.batch, p.out_channels(), p.height, p.width};
  const EpilogueTensors epilogue =
      dense_epilogue(x, Layout::channels_last, sizes, std::nullopt, shift, std::nullopt, slope);
  Tensor out = result_map(sizes, x, Layout::channels_last);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.epilogue = pointers(epilogue);
  p.out = out.mutable_data_ptr();
  launch("grouped_convolution", kernels().grouped_convolution, p);
  return out;
}

// Runs a kernel that takes the map `x` to the numbers from `first` on of `into`; `p` holds what only this kernel has.
template <class Problem>
void run_into(const char* name, const Kernel<Problem>& kernel, Problem p, const Tensor& x,
              const EpilogueTensors& epilogue, const Tensor& into, int64_t first) {
  p.type = type_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  if constexpr (requires { p.out_height; }) {
    p.out_height = into.size(2);
    p.out_width = into.size(3);
  }
  p.x = x.const_data_ptr();
  p.epilogue = pointers(epilogue);
  p.out_pixel = into.size(1);
  p.out = static_cast<char*>(into.data_ptr()) + first * bytes_of(p.type);
  launch(name, kernel, p);
}

void run_resize(const Tensor& x, const EpilogueTensors& epilogue, const Tensor& into, int64_t first,
                const std::optional<Tensor>& skip = std::nullopt, const std::optional<Tensor>& gate = std::nullopt) {
  Resize p{};
  if (skip) p.skip = skip->const_data_ptr();
  if (gate) p.gate = gate->const_data_ptr();
  run_into("resize", kernels().resize, p, x, epilogue, into, first);
}

void run_adaptive_average(const Tensor& x, const EpilogueTensors& epilogue, const Tensor& into, int64_t first) {
  run_into("adaptive_average", kernels().adaptive_average, AdaptiveAverage{}, x, epilogue, into, first);
}

void check_size(int64_t height, int64_t width) {
  STD_TORCH_CHECK(height >= 1 && width >= 1, "height, width: expected at least 1");
}

Tensor resize(const Tensor& x, int64_t height, int64_t width, std::optional<Tensor> skip, std::optional<Tensor> gate,
              std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> slope) {
  check_map(x, "x");
  check_size(height, width);
  STD_TORCH_CHECK(x.size(2) >= 1 && x.size(3) >= 1, "x: expected at least one row and column");
  const std::vector<int64_t> sizes{x.size(0), x.size(1), height, width};
  const Tensor map = dense_map(x, Layout::channels_last);
  EpilogueTensors epilogue = dense_epilogue(x, Layout::channels_last, sizes, scale, shift, skip, slope);
  const std::optional<Tensor> dense_skip = epilogue.residual;
  epilogue.residual = std::nullopt;
  if (gate) {
    check_map(*gate, "gate");
    check_same_type(*gate, x);
    STD_TORCH_CHECK(
        gate->size(0) == x.size(0) && gate->size(1) == x.size(1) && gate->size(2) == 1 && gate->size(3) == 1,
        "gate: expected [B, C, 1, 1]");
    gate = dense_map(*gate, Layout::contiguous);
  }
  Tensor out = result_map(sizes, x, Layout::channels_last);
  run_resize(map, epilogue, out, 0, dense_skip, gate);
  return out;
}

Tensor adaptive_average(const Tensor& x, int64_t height, int64_t width) {
  check_map(x, "x");
  check_size(height, width);
  STD_TORCH_CHECK(x.size(2) >= 1 && x.size(3) >= 1, "x: expected at least one row and column");
  const Tensor map = dense_map(x, Layout::channels_last);
  Tensor out = result_map({x.size(0), x.size(1), height, width}, x, Layout::channels_last);
  run_adaptive_average(map, EpilogueTensors{}, out, 0);
  return out;
}

// A map of pixels convolved depthwise 3x3.
Tensor filter_depthwise(const Tensor& map, const void* weight, int64_t dilation, int64_t stride,
                        const EpilogueTensors& epilogue) {
  SpatialPyramid p{};
  const int64_t channels = map.size(1);
  describe(p, map, Layout::channels_last, {map.size(0), channels, map.size(2), map.size(3)}, {dilation}, stride, true);
  Tensor out = result_map({p.batch, channels, p.out_height, p.out_width}, map, Layout::channels_last);
  p.x = map.const_data_ptr();
  p.weight = weight;
  p.epilogue = pointers(epilogue);
  p.out_pixel = channels;
  p.out = out.mutable_data_ptr();
  launch("depthwise", kernels().depthwise, p);
  return out;
}

// Branches below the size of the map, and those whose averages are not all of 2x2, are maps that the last kernel reads; it
// makes all others where it reads them. Concatenation and channel shuffle are the order in which it does.
Tensor pyramid_pooling(const Tensor& x, const Tensor& weight, std::vector<int64_t> sizes, int64_t enlarged,
                       const Tensor& scale, const Tensor& shift, const Tensor& slope, const Tensor& merge_weight,
                       const Tensor& merge_shift, const Tensor& merge_slope) {
  check_map(x, "x");
  check_same_type(x, weight);
  check_same_type(x, merge_weight);
  const int64_t branches = weight.dim() == 4 ? weight.size(0) : 0, channels = x.size(1);
  STD_TORCH_CHECK(branches >= 1 && branches <= kMaxBranches && weight.size(1) == channels && weight.size(2) == 3 &&
                      weight.size(3) == 3 && int64_t(sizes.size()) == 2 * branches,
                  "weight, sizes: expected [S, p, 3, 3] and a height and width for each of 1 to 8 branches");
  STD_TORCH_CHECK(merge_weight.dim() == 4 && merge_weight.size(0) == channels && merge_weight.size(1) == branches &&
                      merge_weight.size(2) == 3 && merge_weight.size(3) == 3,
                  "merge_weight: expected [p, S, 3, 3]");
  const int64_t height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(channels >= 1 && height >= 1 && width >= 1, "x: expected at least one channel, row and column");
  const Tensor map = dense_map(x, Layout::channels_last), filters = dense_weight(weight);
  const std::vector<int64_t> concatenated{x.size(0), branches * channels, height, width};
  const EpilogueTensors whole =
      dense_epilogue(x, Layout::channels_last, concatenated, scale, shift, std::nullopt, slope);
  STD_TORCH_CHECK(whole.scale && whole.shift && whole.slope, "scale, shift, slope: expected all three");
  const Tensor merge = dense_weight(merge_weight);
  const std::vector<int64_t> result{x.size(0), channels, height, width};
  const EpilogueTensors merged =
      dense_epilogue(x, Layout::channels_last, result, std::nullopt, merge_shift, std::nullopt, merge_slope);
  PyramidPooling p{};
  describe_groups(p, x, merge, channels);
  std::vector<Tensor> alive;  // maps of branches, until the kernel has read them
  for (int64_t k = 0; k < branches; ++k) {
    const int64_t h = sizes[size_t(2 * k)], w = sizes[size_t(2 * k + 1)], channel = k * channels;
    check_size(h, w);
    const EpilogueTensors epilogue{slice(*whole.scale, channel, channels), slice(*whole.shift, channel, channels),
                                   std::nullopt, slice(*whole.slope, channel, channels)};
    const bool same = h == height && w == width, larger = k < enlarged;
    const void* filter = static_cast<const char*>(filters.const_data_ptr()) + channel * 9 * bytes_of(type_of(x));
    PooledBranch& branch = p.branch[k];
    branch.filtered = same || (larger && averages_pairs(height, h) && averages_pairs(width, w));
    branch.height = h;
    branch.width = w;
    branch.weight = filter;
    Tensor read = map;
    if (!branch.filtered) {
      read = result_map({x.size(0), channels, h, w}, x, Layout::channels_last);
      if (larger) {
        run_resize(map, EpilogueTensors{}, read, 0);
      } else {
        run_adaptive_average(map, EpilogueTensors{}, read, 0);
      }
      read = filter_depthwise(read, filter, 1, 1, EpilogueTensors{});
    }
    if (!branch.filtered && larger) {
      const Tensor averaged = result_map(result, x, Layout::channels_last);
      run_adaptive_average(read, EpilogueTensors{}, averaged, 0);
      read = averaged;
      branch.height = height;
      branch.width = width;
    }
    branch.x = read.const_data_ptr();
    branch.epilogue = pointers(epilogue);
    alive.push_back(read);
  }
  Tensor out = result_map(result, x, Layout::channels_last);
  p.weight = merge.const_data_ptr();
  p.epilogue = pointers(merged);
  p.out = out.mutable_data_ptr();
  launch("pyramid_pooling", kernels().pyramid_pooling, p);
  return out;
}

// Neither depthwise nor in many groups, a convolution is one dense matrix product a row.
Tensor convolution(const Tensor& x, const Tensor& weight, std::optional<Tensor> shift, std::optional<Tensor> slope,
                   int64_t stride, int64_t padding, int64_t dilation, int64_t groups) {
  check_map(x, "x");
  check_same_type(x, weight);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, "weight: expected [N, M/groups, h, w], none of them 0");
  STD_TORCH_CHECK(stride >= 1 && padding >= 0 && dilation >= 1, "stride, padding, dilation: too small");
  const bool depthwise = groups == x.size(1) && weight.size(0) == groups && weight.size(1) == 1 &&
                         weight.size(2) == 3 && weight.size(3) == 3 && padding == dilation;
  const bool many = groups > 1 && !depthwise && x.size(1) % groups == 0 && weight.size(0) % groups == 0 &&
                    weight.size(1) == x.size(1) / groups && weight.size(1) <= kMaxBranches && weight.size(2) == 3 &&
                    weight.size(3) == 3 && padding == 1 && dilation == 1 && stride == 1;
  STD_TORCH_CHECK(
      depthwise || many || (groups == 1 && dilation == 1 && weight.size(1) == x.size(1)),
      "convolution: expected one group without dilation, a depthwise 3x3 one padded by its dilation, or a 3x3 one "
      "in groups of at most 8 inputs, padded by 1, without stride and dilation");
  const Tensor dense = dense_weight(weight);
  const int64_t channels = weight.size(0);
  if (depthwise) {
    const Tensor map = dense_map(x, Layout::channels_last);
    const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    auto filled = [&](double value) { return torch::stable::full({channels}, value, compute); };
    EpilogueTensors epilogue{};
    if (shift || slope) {
      const std::vector<int64_t> sizes{x.size(0), channels, x.size(2), x.size(3)};
      epilogue = dense_epilogue(x, Layout::channels_last, sizes, filled(1), shift ? *shift : filled(0), std::nullopt,
                                slope ? *slope : filled(1));
    }
    return filter_depthwise(map, dense.const_data_ptr(), dilation, stride, epilogue);
  }
  if (many) return grouped_convolution(x, weight, shift, slope, groups);
  Convolution p{};
  p.bfloat16 = kernels().bfloat16;
  describe(p, x, layout_of(x), weight.size(0), {weight.size(2), weight.size(3)}, stride, padding);
  const std::vector<int64_t> sizes{p.batch, channels, p.out_height, p.out_width};
  const Tensor map = dense_map(x, p.layout);
  const EpilogueTensors epilogue =
      dense_epilogue(x, Layout::channels_last, sizes, std::nullopt, shift, std::nullopt, slope);
  Tensor out = result_map(sizes, x, Layout::channels_last);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.epilogue = pointers(epilogue);
  p.out = out.mutable_data_ptr();
  launch("convolution", kernels().convolution, p);
  return out;
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("convolution", TORCH_BOX(&convolution));
  m.impl("average_pool", TORCH_BOX(&average_pool));
  m.impl("resize", TORCH_BOX(&resize));
  m.impl("adaptive_average", TORCH_BOX(&adaptive_average));
  m.impl("pyramid_pooling", TORCH_BOX(&pyramid_pooling));
  m.impl("global_average", TORCH_BOX(&global_average));
}
