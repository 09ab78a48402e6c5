// The kernels that only the decoder of segmentation needs: resizing, means, grouped convolutions, pyramid pooling.
#pragma once

#include "inference.h"

// Sizes whose means are of 1, 2 or 4 numbers a side, and whose mixes have halves and quarters for weights, stay exact.
inline Tensor averaged_pairs(const Tensor& x) {
  Tensor out({x.sizes[0], x.sizes[1], x.sizes[2] / 2, x.sizes[3] / 2});
  for (int64_t b = 0; b < out.sizes[0]; ++b)
    for (int64_t c = 0; c < out.sizes[1]; ++c)
      for (int64_t y = 0; y < out.sizes[2]; ++y)
        for (int64_t z = 0; z < out.sizes[3]; ++z)
          out.at(b, c, y, z) = (x.at(b, c, 2 * y, 2 * z) + x.at(b, c, 2 * y, 2 * z + 1) + x.at(b, c, 2 * y + 1, 2 * z) +
                                x.at(b, c, 2 * y + 1, 2 * z + 1)) /
                               4;
  return out;
}

// Twice the rows less one: every second one is the mean of its neighbours.
inline Tensor resized(const Tensor& x) {
  Tensor out({x.sizes[0], x.sizes[1], 2 * x.sizes[2] - 1, 2 * x.sizes[3] - 1});
  for (int64_t b = 0; b < out.sizes[0]; ++b)
    for (int64_t c = 0; c < out.sizes[1]; ++c)
      for (int64_t y = 0; y < out.sizes[2]; ++y)
        for (int64_t z = 0; z < out.sizes[3]; ++z)
          out.at(b, c, y, z) = (x.at(b, c, y / 2, z / 2) + x.at(b, c, (y + 1) / 2, z / 2) +
                                x.at(b, c, y / 2, (z + 1) / 2) + x.at(b, c, (y + 1) / 2, (z + 1) / 2)) /
                               4;
  return out;
}

// A group of `in` inputs, channels g * in + j, and some outputs.
inline Tensor grouped(const Tensor& x, const Tensor& weight, int64_t groups) {
  const int64_t in = x.sizes[1] / groups, out_of_group = weight.sizes[0] / groups;
  Tensor out({x.sizes[0], weight.sizes[0], x.sizes[2], x.sizes[3]});
  for (int64_t n = 0; n < weight.sizes[0]; ++n) {
    Tensor filter({1, in, 3, 3});
    for (int64_t i = 0; i < 9 * in; ++i)
      filter.values[static_cast<size_t>(i)] = weight.values[static_cast<size_t>(n * 9 * in + i)];
    out = with_channels(out, convolution(channels_of(x, n / out_of_group * in, in), filter, 1, 1), n);
  }
  return out;
}

inline void check_resampling(const Case& s, Type type, const Tensor& x, const Steps& steps,
                             const EpilogueBuffers& buffers) {
  Draw draw;
  const Buffer map(type, Layout::channels_last, x);
  espk::Resize resize{};
  resize.type = type;
  resize.batch = s.batch;
  resize.channels = resize.out_pixel = s.channels;
  resize.height = s.height;
  resize.width = s.width;
  resize.out_height = 2 * s.height - 1;
  resize.out_width = 2 * s.width - 1;
  resize.x = map.data();
  resize.epilogue = buffers.epilogue;
  check("resize", s, kernels.resize, resize, &espk::Resize::out, epilogue(resized(x), steps),
        Target{Layout::channels_last});

  const Tensor large = draw.integers({s.batch, s.channels, 2 * s.height, 2 * s.width});
  const Buffer large_buffer(type, Layout::channels_last, large);
  espk::AdaptiveAverage average{};
  average.type = type;
  average.batch = s.batch;
  average.channels = average.out_pixel = s.channels;
  average.height = 2 * s.height;
  average.width = 2 * s.width;
  average.out_height = s.height;
  average.out_width = s.width;
  average.x = large_buffer.data();
  average.epilogue = buffers.epilogue;
  check("adaptive_average", s, kernels.adaptive_average, average, &espk::AdaptiveAverage::out,
        epilogue(averaged_pairs(large), steps), Target{Layout::channels_last});
}

// A map [batch, channels, height, width] whose channels are one number everywhere, so that mixes are exact whatever their
// weights.
inline Tensor level(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Tensor map({batch, channels, height, width});
  for (int64_t i = 0; i < map.count(); ++i)
    map.values[static_cast<size_t>(i)] = static_cast<double>(i / (height * width) % 5 - 2);
  return map;
}

// Of a group: powers of two are read another way than 3, and one output is written another way than two.
inline int64_t inputs_of_group(const Case& s) {
  return std::vector<int64_t>{8, 2, 4, 3}[static_cast<size_t>(s.channels % 4)];
}

inline int64_t outputs_of_group(const Case& s) { return 1 + s.channels / 4 % 2; }

inline void describe_groups(espk::GroupedConvolution& p, const Case& s, Type type, int64_t in, int64_t out_of_group) {
  p.type = type;
  p.batch = s.batch;
  p.height = s.height;
  p.width = s.width;
  p.groups = s.channels;
  p.in = in;
  p.out_of_group = out_of_group;
}

// Branches of every kind: above the size of the map, in it, a map of that size and one of another.
inline void check_pyramid_pooling(const Case& s, Type type) {
  Draw draw;
  const int64_t branches = 4, half = (s.height + 1) / 2, third = (s.width + 2) / 3;
  const Tensor same = level(s.batch, s.channels, s.height, s.width);
  const Tensor weights[] = {draw.integers({s.channels, 1, 3, 3}), draw.integers({s.channels, 1, 3, 3})};
  const Tensor map = draw.integers(same.sizes), small = level(s.batch, s.channels, half, third);
  const Tensor made[] = {
      averaged_pairs(grouped(level(s.batch, s.channels, 2 * s.height, 2 * s.width), weights[0], s.channels)),
      grouped(same, weights[1], s.channels), map, same};
  const Buffer maps[] = {
      {type, Layout::channels_last, same}, {type, Layout::channels_last, map}, {type, Layout::channels_last, small}};
  const Buffer filters[] = {{type, Layout::contiguous, weights[0]}, {type, Layout::contiguous, weights[1]}};
  const int64_t heights[] = {2 * s.height, s.height, s.height, half}, widths[] = {2 * s.width, s.width, s.width, third};
  const void* read[] = {maps[0].data(), maps[0].data(), maps[1].data(), maps[2].data()};

  espk::PyramidPooling p{};
  p.threads = 3;
  describe_groups(p, s, type, branches, 1);
  Tensor shuffled({s.batch, branches * s.channels, s.height, s.width});
  std::vector<EpilogueBuffers> epilogues;
  for (int64_t k = 0; k < branches; ++k) {
    const auto at = static_cast<size_t>(k);
    const Steps steps = draw.steps(s.channels, {});
    epilogues.emplace_back(type, Layout::channels_last, steps);
    p.branch[k] = {
        k < 2, heights[at], widths[at], read[at], k < 2 ? filters[at].data() : nullptr, epilogues.back().epilogue};
    const Tensor branch = epilogue(made[at], steps);
    for (int64_t c = 0; c < s.channels; ++c)
      shuffled = with_channels(shuffled, channels_of(branch, c, 1), c * branches + k);
  }
  const Tensor weight = draw.integers({s.channels, branches, 3, 3});
  const Steps steps = draw.steps(s.channels, {});
  const Buffer weight_buffer(type, Layout::contiguous, weight);
  const EpilogueBuffers buffers(type, Layout::channels_last, steps);
  p.weight = weight_buffer.data();
  p.epilogue = buffers.epilogue;
  // The shares of resized columns are rounded into weights, which then do not add up to the last bit. Every right number is
  // a whole multiple of 1/256, since a mean has quarters, and each of two epilogues halves and then quarters.
  Target target{Layout::channels_last};
  target.error = 1.0 / 512;
  check<espk::PyramidPooling>("pyramid_pooling", s, kernels.pyramid_pooling, p, &espk::PyramidPooling::out,
                              epilogue(grouped(shuffled, weight, s.channels), steps), target);
}

inline void check_depthwise(const Case& s, Type type, const Tensor& x, const Steps& steps,
                            const EpilogueBuffers& buffers) {
  Draw draw;
  const Tensor weight = draw.integers({s.channels, 1, 3, 3});
  const Buffer map(type, Layout::channels_last, x), filter(type, Layout::contiguous, weight);
  auto p = described<espk::SpatialPyramid>(s, type, Layout::channels_last);
  p.branches = p.stride = p.dilations[0] = 1;
  p.out_height = s.height;
  p.out_width = s.width;
  p.out_pixel = s.channels;
  p.x = map.data();
  p.weight = filter.data();
  p.epilogue = buffers.epilogue;
  check("depthwise", s, kernels.depthwise, p, &espk::SpatialPyramid::out,
        epilogue(grouped(x, weight, s.channels), steps));
}

inline void check_decoder(const Case& s, Type type, Layout) {
  Draw draw;
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  Steps steps = draw.steps(s.channels, x.sizes);
  steps.residual = {};
  const EpilogueBuffers after(type, Layout::channels_last, steps);
  check_resampling(s, type, x, steps, after);
  check_depthwise(s, type, x, steps, after);

  espk::GroupedConvolution p{};
  describe_groups(p, s, type, inputs_of_group(s), outputs_of_group(s));
  const Tensor inputs = draw.integers({s.batch, p.in_channels(), s.height, s.width});
  const Tensor weight = draw.integers({p.out_channels(), p.in, 3, 3});
  Steps shifted = draw.steps(p.out_channels(), {});
  shifted.scale = {};
  shifted.residual = {};
  const EpilogueBuffers buffers(type, Layout::channels_last, shifted);
  const Buffer weight_buffer(type, Layout::contiguous, weight);
  const Tensor expected = epilogue(grouped(inputs, weight, s.channels), shifted);
  const Buffer map(type, Layout::channels_last, inputs);
  p.x = map.data();
  p.weight = weight_buffer.data();
  p.epilogue = buffers.epilogue;
  check("grouped_convolution", s, kernels.grouped_convolution, p, &espk::GroupedConvolution::out, expected,
        Target{Layout::channels_last});
  check_pyramid_pooling(s, type);
}
