// The kernels that only inference has, and how the units of inference use the others.
#pragma once

#include "check.h"

inline Tensor convolution(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  const int64_t rows = weight.sizes[2], columns = weight.sizes[3];
  Tensor out({x.sizes[0], weight.sizes[0], (x.sizes[2] + 2 * padding - rows) / stride + 1,
              (x.sizes[3] + 2 * padding - columns) / stride + 1});
  for (int64_t b = 0; b < out.sizes[0]; ++b)
    for (int64_t n = 0; n < out.sizes[1]; ++n)
      for (int64_t y = 0; y < out.sizes[2]; ++y)
        for (int64_t z = 0; z < out.sizes[3]; ++z)
          for (int64_t c = 0; c < x.sizes[1]; ++c)
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t j = 0; j < columns; ++j) {
                const int64_t r = y * stride + i - padding, q = z * stride + j - padding;
                if (r < 0 || r >= x.sizes[2] || q < 0 || q >= x.sizes[3]) continue;
                out.at(b, n, y, z) += weight.at(n, c, i, j) * x.at(b, c, r, q);
              }
  return out;
}

// Rounded to the type that the kernel divides in, from which it rounds to its own.
inline Tensor global_average(Type type, const Tensor& x) {
  Tensor out({x.sizes[0], x.sizes[1], 1, 1});
  for (int64_t b = 0; b < x.sizes[0]; ++b)
    for (int64_t c = 0; c < x.sizes[1]; ++c) {
      double sum = 0;
      for (int64_t y = 0; y < x.sizes[2]; ++y)
        for (int64_t z = 0; z < x.sizes[3]; ++z) sum += x.at(b, c, y, z);
      out.at(b, c, 0, 0) =
          rounded(type == Type::float64 ? type : Type::float32, sum / static_cast<double>(x.sizes[2] * x.sizes[3]));
    }
  return out;
}

// `map` with `part` in the place of its channels from `first` on.
inline Tensor with_channels(Tensor map, const Tensor& part, int64_t first) {
  for (int64_t b = 0; b < part.sizes[0]; ++b)
    for (int64_t c = 0; c < part.sizes[1]; ++c)
      for (int64_t y = 0; y < part.sizes[2]; ++y)
        for (int64_t z = 0; z < part.sizes[3]; ++z) map.at(b, first + c, y, z) = part.at(b, c, y, z);
  return map;
}

inline Tensor channels_of(const Tensor& map, int64_t first, int64_t count) {
  Tensor part({map.sizes[0], count, map.sizes[2], map.sizes[3]});
  for (int64_t b = 0; b < map.sizes[0]; ++b)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t y = 0; y < map.sizes[2]; ++y)
        for (int64_t z = 0; z < map.sizes[3]; ++z) part.at(b, c, y, z) = map.at(b, first + c, y, z);
  return part;
}

// All but pointers of a dense convolution with filters of `rows` x `columns`.
inline void describe_convolution(espk::Convolution& p, const Case& s, Type type, Layout layout, int64_t outputs,
                                 int64_t rows, int64_t columns, int64_t padding) {
  p.type = type;
  p.layout = layout;
  p.batch = s.batch;
  p.in_channels = s.channels;
  p.height = s.height;
  p.width = s.width;
  p.out_channels = outputs;
  p.out_height = (s.height + 2 * padding - rows) / s.stride + 1;
  p.out_width = (s.width + 2 * padding - columns) / s.stride + 1;
  p.filter_height = rows;
  p.filter_width = columns;
  p.stride = s.stride;
  p.padding_rows = p.padding_columns = padding;
}

inline void check_convolution(const Case& s, Type type, Layout layout, const Tensor& x, const Tensor& weight,
                              int64_t padding, const Steps& steps) {
  const Tensor expected = epilogue(convolution(x, weight, s.stride, padding), steps);
  Buffer x_buffer(type, layout, x), weight_buffer(type, Layout::contiguous, weight);
  const EpilogueBuffers buffers(type, layout, steps);
  espk::Convolution p{};
  describe_convolution(p, s, type, layout, weight.sizes[0], weight.sizes[2], weight.sizes[3], padding);
  p.x = x_buffer.data();
  p.weight = weight_buffer.data();
  p.epilogue = buffers.epilogue;
  check("convolution", s, kernels.convolution, p, &espk::Convolution::out, expected, Target{Layout::channels_last});
}

// The shortcut of a small image to `channels` channels of a map of `sizes`, and what it adds.
struct Shortcut {
  Tensor image, weight;
  Steps shift;
  Buffer image_buffer, weight_buffer;
  EpilogueBuffers shift_buffers;

  Shortcut(Type type, int64_t channels, const std::vector<int64_t>& sizes, Draw& draw)
      : image(draw.integers({sizes[0], 3, sizes[2], sizes[3]})),
        weight(draw.integers({channels, 3, 1, 1})),
        shift{{}, draw.integers({channels}), {}, {}},
        image_buffer(type, Layout::channels_last, image),
        weight_buffer(type, Layout::contiguous, weight),
        shift_buffers(type, Layout::channels_last, shift) {}

  espk::ImageShortcut given() { return {image_buffer.data(), weight_buffer.data(), shift_buffers.epilogue.shift, 3}; }
  Tensor added() const { return epilogue(convolution(image, weight, 1, 0), shift); }
};

// Alone, with its PReLU, in a wider map, and with a down-sampler's shortcut.
inline void check_average_pool(const Case& s, Type type, Layout layout, Draw& draw) {
  Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  for (double& value : x.values) value *= 9;  // so that all means are whole
  const Tensor means = average_pool(x);
  Steps steps = draw.steps(s.channels, {});
  steps.scale = steps.shift = Tensor{};
  Buffer x_buffer(type, layout, x);
  espk::AveragePool p{};
  p.type = type;
  p.layout = layout;
  p.batch = s.batch;
  p.channels = p.out_pixel = s.channels;
  p.height = s.height;
  p.width = s.width;
  p.out_height = means.sizes[2];
  p.out_width = means.sizes[3];
  p.x = x_buffer.data();
  check("average_pool", s, kernels.average_pool, p, &espk::AveragePool::out, means);

  const EpilogueBuffers buffers(type, layout, steps);
  p.slope = buffers.epilogue.slope;
  check("average_pool, slope", s, kernels.average_pool, p, &espk::AveragePool::out, epilogue(means, steps));

  const int64_t first = layout == Layout::channels_last ? 3 : 0;
  const Tensor before = draw.integers({s.batch, s.channels + 2 * first, means.sizes[2], means.sizes[3]});
  p.out_pixel = before.sizes[1];
  check("average_pool, wider map", s, kernels.average_pool, p, &espk::AveragePool::out,
        with_channels(before, epilogue(means, steps), first), Target{layout, &before, first});

  if (layout == Layout::contiguous) return;
  Shortcut shortcut(type, s.channels, means.sizes, draw);
  p.shortcut = shortcut.given();
  p.out_pixel = s.channels;
  steps.residual = shortcut.added();
  check("average_pool, shortcut", s, kernels.average_pool, p, &espk::AveragePool::out, epilogue(means, steps));
}

// The unit that reduces rows as its pyramid needs them, from three inputs to each group, in three strips.
inline void check_eesp(const Case& s, Type type, Draw& draw) {
  const int64_t groups = s.channels % 2 == 0 ? 2 : 1;
  Case reduction = s;
  reduction.channels = 3 * groups;
  reduction.dilations = {1};
  reduction.stride = 1;
  reduction.groups = groups;
  reduction.outputs = s.channels;
  const Tensor x = draw.integers({s.batch, reduction.channels, s.height, s.width});
  const Tensor reduce_weight = draw.integers({s.channels, 3});
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor expand_weight = draw.integers({s.outputs, s.concatenated() / s.groups});
  Steps reduce_steps = draw.steps(s.channels, {});
  reduce_steps.scale = Tensor{};
  const Steps steps = draw.steps(s.outputs, {}), pyramid_steps = draw.steps(s.concatenated(), {});
  const Tensor reduced = epilogue(group_pointwise(reduction, x, reduce_weight), reduce_steps);
  const Tensor z = epilogue(spatial_pyramid(s, reduced, weight), pyramid_steps);
  const EpilogueBuffers first(type, Layout::channels_last, reduce_steps);
  const EpilogueBuffers inner(type, Layout::channels_last, pyramid_steps), outer(type, Layout::channels_last, steps);
  Buffer x_buffer(type, Layout::channels_last, x), weight_buffer(type, Layout::contiguous, weight);
  Buffer reduce_buffer(type, Layout::contiguous, reduce_weight), expand_buffer(type, Layout::contiguous, expand_weight);
  espk::Eesp unit{};
  static_cast<espk::PyramidPointwise&>(unit) = described<espk::PyramidPointwise>(s, type, Layout::channels_last);
  unit.threads = 3;
  unit.x = x_buffer.data();
  unit.in_channels = reduction.channels;
  unit.reduce_groups = groups;
  unit.reduce_weight = reduce_buffer.data();
  unit.reduce_epilogue = first.epilogue;
  unit.weight = weight_buffer.data();
  unit.pointwise_weight = expand_buffer.data();
  unit.pyramid_epilogue = inner.epilogue;
  unit.epilogue = outer.epilogue;
  void* espk::Eesp::* const out = &espk::Eesp::out;  // a member of what it derives from, else
  check("eesp", s, kernels.eesp, unit, out, epilogue(group_pointwise(s, z, expand_weight), steps));
}

inline void check_inference(const Case& s, Type type, Layout layout) {
  Draw draw;
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor pointwise = draw.integers({s.outputs, s.concatenated() / s.groups});
  const Steps steps = draw.steps(s.outputs, {}), pyramid_steps = draw.steps(s.concatenated(), {});
  Buffer x_buffer(type, layout, x), weight_buffer(type, Layout::contiguous, weight);
  Buffer pointwise_buffer(type, Layout::contiguous, pointwise);
  const EpilogueBuffers inner(type, layout, pyramid_steps), outer(type, layout, steps);
  const Tensor z = epilogue(spatial_pyramid(s, x, weight), pyramid_steps);

  auto pyramid = described<espk::SpatialPyramid>(s, type, layout);
  pyramid.x = x_buffer.data();
  pyramid.weight = weight_buffer.data();
  pyramid.epilogue = inner.epilogue;
  check("spatial_pyramid, epilogue", s, kernels.spatial_pyramid, pyramid, &espk::SpatialPyramid::out, z);

  const int64_t first = layout == Layout::channels_last ? 5 : 0;
  const Tensor before = draw.integers({s.batch, s.outputs + first, s.out_height(), s.out_width()});
  Steps in_place = steps;
  in_place.residual = channels_of(before, first, s.outputs);
  auto unit = described<espk::PyramidPointwise>(s, type, layout);
  unit.x = x_buffer.data();
  unit.weight = weight_buffer.data();
  unit.pointwise_weight = pointwise_buffer.data();
  unit.pyramid_epilogue = inner.epilogue;
  unit.epilogue = outer.epilogue;
  unit.out_pixel = before.sizes[1];
  unit.threads = 3;
  check("pyramid_pointwise, in place", s, kernels.pyramid_pointwise, unit, &espk::PyramidPointwise::out,
        with_channels(before, epilogue(group_pointwise(s, z, pointwise), in_place), first),
        Target{layout, &before, first});
  if (layout == Layout::channels_last) {
    const Tensor product = group_pointwise(s, z, pointwise);
    Shortcut shortcut(type, s.outputs, product.sizes, draw);
    unit.epilogue.residual = nullptr;
    unit.shortcut = shortcut.given();
    unit.out_pixel = s.outputs;
    in_place.residual = shortcut.added();
    check("pyramid_pointwise, shortcut", s, kernels.pyramid_pointwise, unit, &espk::PyramidPointwise::out,
          epilogue(product, in_place));
    check_eesp(s, type, draw);
  }

  Steps no_scale = steps;
  no_scale.scale = Tensor{};
  check_convolution(s, type, layout, x, draw.integers({s.outputs, s.channels, 3, 3}), 1, no_scale);
  check_convolution(s, type, layout, x, draw.integers({s.outputs, s.channels, 5, 2}), 2, {});
  check_average_pool(s, type, layout, draw);

  espk::GlobalAverage average{};
  average.type = type;
  average.layout = layout;
  average.batch = s.batch;
  average.channels = s.channels;
  average.pixels = s.height * s.width;
  average.x = x_buffer.data();
  check("global_average", s, kernels.global_average, average, &espk::GlobalAverage::out, global_average(type, x));
}
