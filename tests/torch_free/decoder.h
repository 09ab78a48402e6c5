// The kernels that only the decoder of segmentation needs: resizing, means, grouped convolutions, enlarged branches.
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

  // Each channel is one number everywhere, so that mixes are exact whatever their weights.
  Tensor level({s.batch, s.channels, s.height, s.width}), doubled({s.batch, s.channels, 2 * s.height, 2 * s.width});
  for (int64_t i = 0; i < level.count(); ++i)
    level.values[static_cast<size_t>(i)] = static_cast<double>(i / (s.height * s.width) % 5 - 2);
  for (int64_t i = 0; i < doubled.count(); ++i)
    doubled.values[static_cast<size_t>(i)] = static_cast<double>(i / (4 * s.height * s.width) % 5 - 2);
  const Tensor weight = draw.integers({s.channels, 1, 3, 3});
  const Buffer level_buffer(type, Layout::channels_last, level), weight_buffer(type, Layout::contiguous, weight);
  espk::EnlargedBranch branch{};
  branch.type = type;
  branch.batch = s.batch;
  branch.channels = branch.out_pixel = s.channels;
  branch.height = s.height;
  branch.width = s.width;
  branch.inner_height = 2 * s.height;
  branch.inner_width = 2 * s.width;
  branch.x = level_buffer.data();
  branch.weight = weight_buffer.data();
  branch.epilogue = buffers.epilogue;
  check("enlarged_branch", s, kernels.enlarged_branch, branch, &espk::EnlargedBranch::out,
        epilogue(averaged_pairs(grouped(doubled, weight, s.channels)), steps), Target{Layout::channels_last});
}

inline void check_decoder(const Case& s, Type type, Layout) {
  Draw draw;
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  Steps steps = draw.steps(s.channels, x.sizes);
  steps.residual = {};
  check_resampling(s, type, x, steps, EpilogueBuffers(type, Layout::channels_last, steps));

  // Of a group: powers of two are read another way than 3, and one output is written another way than two.
  const int64_t inputs_of_group = std::vector<int64_t>{8, 2, 4, 3}[static_cast<size_t>(s.channels % 4)];
  const int64_t outputs_of_group = 1 + s.channels / 4 % 2;
  const Tensor inputs = draw.integers({s.batch, inputs_of_group * s.channels, s.height, s.width});
  const Tensor weight = draw.integers({outputs_of_group * s.channels, inputs_of_group, 3, 3});
  Steps shifted = draw.steps(outputs_of_group * s.channels, {});
  shifted.scale = {};
  shifted.residual = {};
  const EpilogueBuffers buffers(type, Layout::channels_last, shifted);
  const Buffer weight_buffer(type, Layout::contiguous, weight);
  const Tensor expected = epilogue(grouped(inputs, weight, s.channels), shifted);
  // The same inputs, as one map and as several behind one another.
  Tensor separate({inputs_of_group * s.batch, s.channels, s.height, s.width});
  for (int64_t j = 0; j < inputs_of_group; ++j)
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t y = 0; y < s.height; ++y)
          for (int64_t z = 0; z < s.width; ++z)
            separate.at(j * s.batch + b, c, y, z) = inputs.at(b, c * inputs_of_group + j, y, z);
  for (const bool apart : {false, true}) {
    const Buffer map(type, Layout::channels_last, apart ? separate : inputs);
    espk::GroupedConvolution p{};
    p.type = type;
    p.batch = s.batch;
    p.height = s.height;
    p.width = s.width;
    p.groups = s.channels;
    p.in = inputs_of_group;
    p.out_of_group = outputs_of_group;
    p.separate = apart;
    p.x = map.data();
    p.weight = weight_buffer.data();
    p.epilogue = buffers.epilogue;
    check("grouped_convolution", s, kernels.grouped_convolution, p, &espk::GroupedConvolution::out, expected,
          Target{Layout::channels_last});
  }
}
