// The kernels that only training has, from their definitions. Scales and slopes are powers of two, so that sums stay exact.
#pragma once

#include "decoder.h"

// The numbers of one batch norm and PReLU as the kernels take them, in vectors without a byte to spare.
struct Norm {
  Steps steps;
  std::vector<double> mean, of_grad, of_map, constant;
  std::vector<double> sum, sum_centred, sum_slope;

  Norm(Draw& draw, int64_t channels)
      : steps(draw.steps(channels, {})),
        mean(draw.integers({channels}).values),
        of_grad(draw.one_of({0.5, 1, -1}, channels).values),
        of_map(draw.one_of({0.5, 1, -0.5}, channels).values),
        constant(draw.integers({channels}).values),
        sum(mean.size()),
        sum_centred(mean.size()),
        sum_slope(mean.size()) {}

  espk::Normalise normalise() const {
    return {steps.scale.values.data(), steps.shift.values.data(), steps.slope.values.data()};
  }
  espk::NormGradient gradient() const { return {of_grad.data(), of_map.data(), constant.data()}; }
  espk::NormSums sums() { return {mean.data(), sum.data(), sum_centred.data(), sum_slope.data()}; }
};

template <class F>
Tensor each_value(Tensor x, F&& f) {
  for (int64_t b = 0; b < x.sizes[0]; ++b)
    for (int64_t c = 0; c < x.sizes[1]; ++c)
      for (int64_t y = 0; y < x.sizes[2]; ++y)
        for (int64_t z = 0; z < x.sizes[3]; ++z)
          x.at(b, c, y, z) = f(x.at(b, c, y, z), b, static_cast<size_t>(c), y, z);
  return x;
}

inline Tensor in_front_of_norm(const Norm& norm, const Tensor& grad, const Tensor& map) {
  return each_value(grad, [&](double g, int64_t b, size_t c, int64_t y, int64_t z) {
    return g * norm.of_grad[c] + map.at(b, static_cast<int64_t>(c), y, z) * norm.of_map[c] + norm.constant[c];
  });
}

// The gradient between norm and PReLU from the one behind; adds up the three sums that belong to it.
inline Tensor in_front_of_prelu(const Norm& norm, const Tensor& behind, const Tensor& map, const Tensor* residual,
                                std::vector<double> (&sums)[3]) {
  Steps affine{norm.steps.scale, norm.steps.shift, {}, residual ? *residual : Tensor{}};
  const Tensor before = epilogue(map, affine);
  for (auto& sum : sums) sum.assign(norm.mean.size(), 0.0);
  return each_value(behind, [&](double g, int64_t b, size_t c, int64_t y, int64_t z) {
    const int64_t channel = static_cast<int64_t>(c);
    const double input = before.at(b, channel, y, z);
    if (input <= 0) sums[2][c] += g * input;
    if (input <= 0) g *= norm.steps.slope.values[c];
    sums[0][c] += g;
    sums[1][c] += g * (map.at(b, channel, y, z) - norm.mean[c]);
    return g;
  });
}

inline void check_numbers(const char* what, const Case& s, const std::vector<double>& actual,
                          const std::vector<double>& expected, double tolerance) {
  ++checks;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::fabs(actual[i] - expected[i]) <= tolerance * std::fabs(expected[i])) continue;
    ++failures;
    std::printf("FAIL %s, %s: number %zu is %g and not %g\n", what, s.name, i, actual[i], expected[i]);
    return;
  }
}

// Divisions alone round: in float64, a few times.
inline void check_moments(const char* what, const Case& s, Type type, const Tensor& map,
                          const std::vector<double>& mean, const std::vector<double>& variance) {
  const Tensor stored = rounded(type, map);
  const double count = static_cast<double>(map.sizes[0] * map.sizes[2] * map.sizes[3]);
  std::vector<double> sum(mean.size()), squares(mean.size());
  each_value(stored, [&](double v, int64_t, size_t c, int64_t, int64_t) { return sum[c] += v / count, v; });
  each_value(stored, [&](double v, int64_t, size_t c, int64_t, int64_t) {
    return squares[c] += (v - sum[c]) * (v - sum[c]) / count, v;
  });
  for (size_t c = 0; c < mean.size(); ++c) {
    // Relative to the numbers summed, which may cancel.
    sum[c] += 1000;
    squares[c] += 1000;
  }
  std::vector<double> shifted_mean(mean), shifted_variance(variance);
  for (double& v : shifted_mean) v += 1000;
  for (double& v : shifted_variance) v += 1000;
  check_numbers(what, s, shifted_mean, sum, 1e-12);
  check_numbers(what, s, shifted_variance, squares, 1e-5);  // squares of up to 64 numbers are summed in float32
}

template <class Problem>
void describe_pointwise(Problem& p, const Case& s, Type type) {
  p.type = type;
  p.pixels = s.batch * s.out_height() * s.out_width();
  p.in_channels = s.concatenated();
  p.out_channels = s.outputs;
  p.groups = s.groups;
}

// The one call of a kernel whose result is not a map.
template <class Problem>
void run_whole(const espk::Kernel<Problem>& kernel, const Problem& problem) {
  const auto shared = aligned(kernel.shared_bytes(problem));
  kernel.before(problem, shared.get());
  kernel.run(problem, shared.get(), 0, kernel.units(problem));
  kernel.after(problem, shared.get());
}

// The end of a down-sampler joins `pooled` and `expanded` with an image of two channels.
inline void check_shortcut(const Case& s, Type type, const Tensor& pooled, const Tensor& expanded, Draw& draw) {
  constexpr Layout last = Layout::channels_last;
  constexpr int64_t images = 2;
  const int64_t of_pooled = pooled.sizes[1], channels = of_pooled + expanded.sizes[1];
  const Tensor image = draw.integers({s.batch, images, pooled.sizes[2], pooled.sizes[3]});
  const Tensor weight = draw.integers({images, channels});
  const Tensor grad = draw.integers({s.batch, channels, pooled.sizes[2], pooled.sizes[3]});
  const Steps steps = draw.steps(channels, {});
  const Buffer pooled_buffer(type, last, pooled), expanded_buffer(type, last, expanded),
      image_buffer(type, last, image);
  const Buffer grad_buffer(type, last, grad);
  const Tensor before = each_value(grad, [&](double, int64_t b, size_t c, int64_t y, int64_t z) {
    const int64_t channel = static_cast<int64_t>(c);
    double v = channel < of_pooled ? pooled.at(b, channel, y, z) : expanded.at(b, channel - of_pooled, y, z);
    for (int64_t k = 0; k < images; ++k) v += weight.at(k, channel) * image.at(b, k, y, z);
    return v + steps.shift.values[c];
  });

  espk::LongRangeShortcut forward{};
  espk::LongRangeShortcutBackward backward{};
  for (espk::JoinedMaps* p : {static_cast<espk::JoinedMaps*>(&forward), static_cast<espk::JoinedMaps*>(&backward)}) {
    p->type = type;
    p->pixels = s.batch * pooled.sizes[2] * pooled.sizes[3];
    p->pooled_channels = of_pooled;
    p->expanded_channels = expanded.sizes[1];
    p->image_channels = images;
    p->pooled = pooled_buffer.data();
    p->expanded = expanded_buffer.data();
    p->image = image_buffer.data();
    p->weight = weight.values.data();
    p->shift = steps.shift.values.data();
    p->slope = steps.slope.values.data();
  }
  check("long_range_shortcut", s, kernels.long_range_shortcut, forward, &espk::LongRangeShortcut::out,
        epilogue(before, Steps{{}, {}, steps.slope, {}}), Target{last});

  std::vector<double> of_weight(weight.values.size()), of_shift(steps.shift.values.size()), of_slope(of_shift);
  std::vector<double> sums[3] = {of_weight, of_shift, of_slope};
  Tensor grad_image = image, grad_pooled = pooled, grad_expanded = expanded;
  std::fill(grad_image.values.begin(), grad_image.values.end(), 0.0);
  each_value(grad, [&](double g, int64_t b, size_t c, int64_t y, int64_t z) {
    const int64_t channel = static_cast<int64_t>(c);
    const double v = before.at(b, channel, y, z);
    if (v <= 0) sums[2][c] += g * v;
    if (v <= 0) g *= steps.slope.values[c];
    sums[1][c] += g;
    for (int64_t k = 0; k < images; ++k) {
      sums[0][static_cast<size_t>(k * channels) + c] += g * image.at(b, k, y, z);
      grad_image.at(b, k, y, z) += g * weight.at(k, channel);
    }
    (channel < of_pooled ? grad_pooled.at(b, channel, y, z) : grad_expanded.at(b, channel - of_pooled, y, z)) = g;
    return g;
  });
  using Backward = espk::LongRangeShortcutBackward;
  backward.grad = grad_buffer.data();
  backward.grad_weight = of_weight.data();
  backward.grad_shift = of_shift.data();
  backward.grad_slope = of_slope.data();
  const auto& kernel = kernels.long_range_shortcut_backward;
  check("long_range_shortcut_backward, pooled", s, kernel, backward, &Backward::grad_pooled, grad_pooled, Target{last});
  check("long_range_shortcut_backward, expanded", s, kernel, backward, &Backward::grad_expanded, grad_expanded,
        Target{last});
  check("long_range_shortcut_backward, image", s, kernel, backward, &Backward::grad_image, grad_image, Target{last});
  check_numbers("long_range_shortcut_backward", s, of_weight, sums[0], 0);
  check_numbers("long_range_shortcut_backward", s, of_shift, sums[1], 0);
  check_numbers("long_range_shortcut_backward", s, of_slope, sums[2], 0);
}

// Each number of a mean of 2x2 gets a quarter of its gradient.
inline Tensor spread_over_pairs(const Tensor& grad) {
  Tensor out({grad.sizes[0], grad.sizes[1], 2 * grad.sizes[2], 2 * grad.sizes[3]});
  each_value(out, [&](double, int64_t b, size_t c, int64_t y, int64_t z) {
    const int64_t channel = static_cast<int64_t>(c);
    return out.at(b, channel, y, z) = grad.at(b, channel, y / 2, z / 2) / 4;
  });
  return out;
}

// Of twice the rows and columns less one, which lie on a number of the map or halfway between two.
inline Tensor gathered_from_larger(const Tensor& grad) {
  const int64_t height = grad.sizes[2], width = grad.sizes[3];
  Tensor out({grad.sizes[0], grad.sizes[1], (height + 1) / 2, (width + 1) / 2});
  each_value(out, [&](double, int64_t b, size_t c, int64_t y, int64_t z) {
    double sum = 0;
    for (int64_t v = std::max<int64_t>(2 * y - 1, 0); v < std::min(2 * y + 2, height); ++v)
      for (int64_t w = std::max<int64_t>(2 * z - 1, 0); w < std::min(2 * z + 2, width); ++w)
        sum += grad.at(b, static_cast<int64_t>(c), v, w) * (v == 2 * y ? 1 : 0.5) * (w == 2 * z ? 1 : 0.5);
    return out.at(b, static_cast<int64_t>(c), y, z) = sum;
  });
  return out;
}

// Groups as in check_decoder.
inline void check_groups_backward(const Case& s, Type type, Draw& draw) {
  espk::GroupedConvolutionBackwardWeight p{};
  describe_groups(p, s, type, inputs_of_group(s), outputs_of_group(s));
  const Tensor x = draw.integers({s.batch, p.in_channels(), s.height, s.width});
  const Tensor grad = draw.integers({s.batch, p.out_channels(), s.height, s.width});
  const Tensor expected =
      each_value(Tensor({p.out_channels(), p.in, 3, 3}), [&](double, int64_t n, size_t j, int64_t u, int64_t v) {
        const int64_t channel = n / p.out_of_group * p.in + static_cast<int64_t>(j);
        double sum = 0;
        for (int64_t b = 0; b < s.batch; ++b)
          for (int64_t y = std::max<int64_t>(1 - u, 0); y < std::min(s.height + 1 - u, s.height); ++y)
            for (int64_t z = std::max<int64_t>(1 - v, 0); z < std::min(s.width + 1 - v, s.width); ++z)
              sum += grad.at(b, n, y, z) * x.at(b, channel, y + u - 1, z + v - 1);
        return sum;
      });
  const Buffer x_buffer(type, Layout::channels_last, x), grad_buffer(type, Layout::channels_last, grad);
  p.x = x_buffer.data();
  p.grad = grad_buffer.data();
  check("grouped_convolution_backward_weight", s, kernels.grouped_convolution_backward_weight, p,
        &espk::GroupedConvolutionBackwardWeight::grad_weight, expected, Target{Layout::contiguous});
}

inline void check_convolution_backward(const Case& s, Type type, Draw& draw, int64_t rows, int64_t columns,
                                       int64_t padding) {
  espk::ConvolutionBackwardWeight p{};
  describe_convolution(p, s, type, Layout::channels_last, s.outputs, rows, columns, padding);
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Tensor grad = draw.integers({s.batch, s.outputs, p.out_height, p.out_width});
  const Tensor expected = each_value(
      Tensor({s.outputs, s.channels, rows, columns}), [&](double, int64_t n, size_t c, int64_t u, int64_t v) {
        double sum = 0;
        for (int64_t b = 0; b < s.batch; ++b)
          for (int64_t y = 0; y < p.out_height; ++y)
            for (int64_t z = 0; z < p.out_width; ++z) {
              const int64_t row = y * s.stride + u - padding, column = z * s.stride + v - padding;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              sum += grad.at(b, n, y, z) * x.at(b, static_cast<int64_t>(c), row, column);
            }
        return sum;
      });
  const Buffer x_buffer(type, Layout::channels_last, x), grad_buffer(type, Layout::channels_last, grad);
  p.x = x_buffer.data();
  p.grad = grad_buffer.data();
  check("convolution_backward_weight", s, kernels.convolution_backward_weight, p,
        &espk::ConvolutionBackwardWeight::grad_weight, expected, Target{Layout::contiguous});
}

// `expected` has the sizes of the map whose gradient it is, which is added to the map `before` where there is one.
inline void check_resampling_backward(const char* what, const Case& s,
                                      const espk::Kernel<espk::ResamplingBackward>& kernel, Type type,
                                      const Tensor& grad, const Tensor& expected, const Tensor* before = nullptr) {
  const Buffer buffer(type, Layout::channels_last, grad);
  espk::ResamplingBackward p{};
  p.type = type;
  p.batch = s.batch;
  p.channels = s.channels;
  p.height = expected.sizes[2];
  p.width = expected.sizes[3];
  p.out_height = grad.sizes[2];
  p.out_width = grad.sizes[3];
  p.grad = buffer.data();
  p.add = before != nullptr;
  check(what, s, kernel, p, &espk::ResamplingBackward::grad_x, expected, Target{Layout::channels_last, before});
}

inline void check_training(const Case& s, Type type) {
  if (s.batch == 0) return;  // a batch norm has no moments of nothing
  constexpr Layout last = Layout::channels_last;
  const Target map_target{last}, weight_target{Layout::contiguous};
  Draw draw;
  const int64_t height = s.out_height(), width = s.out_width();
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor map = draw.integers({s.batch, s.concatenated(), height, width});
  const Tensor grad_map = draw.integers(map.sizes), residual = draw.integers(map.sizes);
  const Tensor pointwise = draw.integers({s.outputs, s.concatenated() / s.groups});
  const Tensor out = draw.integers({s.batch, s.outputs, height, width}), grad = draw.integers(out.sizes);
  Norm reduced(draw, s.channels), concatenated(draw, s.concatenated()), expanded(draw, s.outputs);
  Buffer x_buffer(type, last, x), map_buffer(type, last, map), out_buffer(type, last, out);
  Buffer grad_buffer(type, last, grad), grad_map_buffer(type, last, grad_map), residual_buffer(type, last, residual);
  Buffer weight_buffer(type, weight_target.layout, weight), pointwise_buffer(type, weight_target.layout, pointwise);
  std::vector<double> sums[3];
  auto check_sums = [&](const char* what, const Norm& norm) {
    check_numbers(what, s, norm.sum, sums[0], 0);
    check_numbers(what, s, norm.sum_centred, sums[1], 0);
    check_numbers(what, s, norm.sum_slope, sums[2], 0);
  };

  const Tensor z = epilogue(map, concatenated.steps);
  espk::NormalisedPointwise forward{};
  describe_pointwise(forward, s, type);
  forward.x = map_buffer.data();
  forward.normalise = concatenated.normalise();
  forward.weight = pointwise_buffer.data();
  forward.moments = {expanded.sum.data(), expanded.sum_slope.data()};
  const Tensor product = group_pointwise(s, z, pointwise);
  check("normalised_pointwise", s, kernels.normalised_pointwise, forward, &espk::NormalisedPointwise::out, product,
        map_target);
  check_moments("normalised_pointwise", s, type, product, expanded.sum, expanded.sum_slope);

  auto pyramid = described<espk::SpatialPyramid>(s, type, last);
  pyramid.x = x_buffer.data();
  pyramid.weight = weight_buffer.data();
  pyramid.normalise = reduced.normalise();
  pyramid.moments = {concatenated.sum.data(), concatenated.sum_slope.data()};
  const Tensor r = epilogue(x, reduced.steps), branches = spatial_pyramid(s, r, weight);
  check("normalised_pyramid", s, kernels.normalised_pyramid, pyramid, &espk::SpatialPyramid::out, branches, map_target);
  check_moments("normalised_pyramid", s, type, branches, concatenated.sum, concatenated.sum_slope);

  const Tensor front = in_front_of_norm(expanded, grad, out);
  const Tensor behind = pointwise_gradient_of_input(s, front, pointwise);
  Buffer side(type, last, std::vector<int64_t>{s.outputs * s.concatenated() + 9 * s.concatenated()});
  Buffer side_map(type, last, std::vector<int64_t>{s.batch * s.concatenated() * s.height * s.width});
  espk::NormalisedPointwiseBackward backward{};
  describe_pointwise(backward, s, type);
  backward.grad = grad_buffer.data();
  backward.out = out_buffer.data();
  backward.norm = expanded.gradient();
  backward.x = map_buffer.data();
  backward.weight = pointwise_buffer.data();
  backward.residual = residual_buffer.data();
  backward.grad_weight = side.data();
  check("normalised_pointwise_backward, residual", s, kernels.normalised_pointwise_backward, backward,
        &espk::NormalisedPointwiseBackward::grad_x, epilogue(behind, Steps{{}, {}, {}, residual}), map_target);
  backward.residual = nullptr;
  backward.normalise = concatenated.normalise();
  backward.sums = concatenated.sums();
  check("normalised_pointwise_backward", s, kernels.normalised_pointwise_backward, backward,
        &espk::NormalisedPointwiseBackward::grad_x, in_front_of_prelu(concatenated, behind, map, nullptr, sums),
        map_target);
  check_sums("normalised_pointwise_backward", concatenated);
  backward.grad_x = side_map.data();
  check("normalised_pointwise_backward, weight", s, kernels.normalised_pointwise_backward, backward,
        &espk::NormalisedPointwiseBackward::grad_weight, pointwise_gradient_of_weight(s, front, z), weight_target);

  const Tensor front_map = in_front_of_norm(concatenated, grad_map, map);
  auto to_both = described<espk::NormalisedPyramidBackward>(s, type, last);
  to_both.grad = grad_map_buffer.data();
  to_both.out = map_buffer.data();
  to_both.norm = concatenated.gradient();
  to_both.x = x_buffer.data();
  to_both.normalise = reduced.normalise();
  to_both.weight = weight_buffer.data();
  to_both.grad_weight = side.data();
  to_both.sums = reduced.sums();
  check("normalised_pyramid_backward", s, kernels.normalised_pyramid_backward, to_both,
        &espk::NormalisedPyramidBackward::grad_x,
        in_front_of_prelu(reduced, pyramid_gradient_of_input(s, front_map, weight), x, nullptr, sums), map_target);
  check_sums("normalised_pyramid_backward", reduced);
  to_both.grad_x = side_map.data();
  check("normalised_pyramid_backward, weight", s, kernels.normalised_pyramid_backward, to_both,
        &espk::NormalisedPyramidBackward::grad_weight, pyramid_gradient_of_weight(s, front_map, r), weight_target);

  espk::NormalisedOutput end{};
  end.type = type;
  end.pixels = s.batch * height * width;
  end.channels = s.concatenated();
  end.x = map_buffer.data();
  end.normalise = concatenated.normalise();
  end.residual = residual_buffer.data();
  Steps with_residual = concatenated.steps;
  with_residual.residual = residual;
  check("normalised_output", s, kernels.normalised_output, end, &espk::NormalisedOutput::out,
        epilogue(map, with_residual), map_target);

  espk::NormalisedOutputBackward end_backward{};
  end_backward.type = type;
  end_backward.pixels = end.pixels;
  end_backward.channels = end.channels;
  end_backward.grad = grad_map_buffer.data();
  end_backward.x = map_buffer.data();
  end_backward.normalise = concatenated.normalise();
  end_backward.residual = residual_buffer.data();
  end_backward.sums = concatenated.sums();
  check("normalised_output_backward", s, kernels.normalised_output_backward, end_backward,
        &espk::NormalisedOutputBackward::grad_x, in_front_of_prelu(concatenated, grad_map, map, &residual, sums),
        map_target);
  check_sums("normalised_output_backward", concatenated);

  espk::MapMoments moments{};
  moments.type = type;
  moments.pixels = end.pixels;
  moments.channels = end.channels;
  moments.x = map_buffer.data();
  moments.moments = {concatenated.sum.data(), concatenated.sum_slope.data()};
  run_whole(kernels.map_moments, moments);
  check_moments("map_moments", s, type, map, concatenated.sum, concatenated.sum_slope);

  espk::BatchNormBackward norm_backward{};
  norm_backward.type = type;
  norm_backward.pixels = end.pixels;
  norm_backward.channels = end.channels;
  norm_backward.grad = grad_map_buffer.data();
  norm_backward.x = map_buffer.data();
  norm_backward.normalise = concatenated.normalise();
  norm_backward.norm = concatenated.gradient();
  check("batch_norm_backward", s, kernels.batch_norm_backward, norm_backward, &espk::BatchNormBackward::grad_x,
        in_front_of_norm(concatenated, in_front_of_prelu(concatenated, grad_map, map, nullptr, sums), map), map_target);

  check_shortcut(s, type, map, out, draw);

  // The windows around every other pixel of a map of x's size, nines of whole numbers.
  const Tensor nines = each_value(draw.integers({s.batch, s.channels, (s.height + 1) / 2, (s.width + 1) / 2}),
                                  [](double v, auto...) { return 9 * v; });
  Tensor pooled = x;
  each_value(x, [&](double, int64_t b, size_t c, int64_t y, int64_t z) {
    const int64_t channel = static_cast<int64_t>(c);
    double sum = 0;
    for (int64_t v = 0; v < nines.sizes[2]; ++v)
      for (int64_t w = 0; w < nines.sizes[3]; ++w)
        if (std::abs(2 * v - y) <= 1 && std::abs(2 * w - z) <= 1) sum += nines.at(b, channel, v, w) / 9;
    return pooled.at(b, channel, y, z) = sum;
  });
  check_resampling_backward("average_pool_backward", s, kernels.average_pool_backward, type, nines, pooled);
  Tensor sum = pooled;
  for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += x.values[i];
  check_resampling_backward("average_pool_backward, added", s, kernels.average_pool_backward, type, nines, sum, &x);

  const Tensor means = draw.integers({s.batch, s.channels, s.height, s.width});
  check_resampling_backward("adaptive_average_backward", s, kernels.adaptive_average_backward, type, means,
                            spread_over_pairs(means));
  const Tensor larger = draw.integers({s.batch, s.channels, 2 * s.height - 1, 2 * s.width - 1});
  check_resampling_backward("resize_backward", s, kernels.resize_backward, type, larger, gathered_from_larger(larger));
  check_convolution_backward(s, type, draw, 3, 3, 1);
  check_convolution_backward(s, type, draw, 5, 2, 2);
  check_groups_backward(s, type, draw);
}
