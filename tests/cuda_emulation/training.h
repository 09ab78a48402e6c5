// Whole units in training from their definition, in double and nested loops, rounded where the kernels keep a map in its
// type; and the cases that the emulation runs them over.
#pragma once

#include <functional>

#include "cases.h"

struct UnitCase {
  Case s;  // its pyramid and expansion
  int64_t inputs, reduce_groups;
  bool residual, has_prelu, saves_concatenated;
  bool batch_statistics[3];
  double mean;  // of x
};

inline const UnitCase kUnits[] = {
    {{"residual", 2, 4, 5, 7, {1, 2, 3, 4}, 1, true, 4, 16}, 16, 4, true, true, true, {true, true, true}, 0},
    {{"recomputed", 2, 4, 5, 7, {1, 2, 3, 4}, 1, true, 4, 16}, 16, 4, true, true, false, {true, true, true}, 0},
    {{"strided, no prelu", 2, 4, 9, 6, {1, 2, 3, 4}, 2, true, 4, 12}, 6, 2, false, false, false, {true, true, true}, 0},
    {{"residual, no prelu", 1, 2, 4, 5, {1, 2}, 1, true, 2, 4}, 4, 2, true, false, true, {true, true, true}, 0},
    {{"odd channels, no hff", 2, 5, 4, 5, {1, 2, 1}, 1, false, 1, 7}, 3, 1, false, true, true, {true, true, true}, 0},
    {{"running statistics", 1, 4, 5, 4, {1, 2}, 1, true, 2, 8}, 8, 2, true, true, true, {false, false, false}, 0},
    {{"some running", 2, 3, 6, 3, {1, 2, 3}, 2, true, 3, 9}, 4, 1, false, true, false, {true, false, true}, 0},
    {{"one pixel", 9, 4, 1, 1, {1, 2, 3, 4}, 1, true, 4, 16}, 16, 4, true, true, true, {true, true, true}, 0},
    {{"eight branches", 1, 8, 9, 6, {1, 2, 3, 4, 1, 5, 9, 2}, 1, true, 8, 16},
     8,
     1,
     false,
     true,
     true,
     {true, true, true},
     0},
    {{"wide groups", 1, 35, 3, 5, {1, 2}, 1, true, 1, 70}, 70, 1, true, true, true, {true, true, true}, 0},
    {{"stride 3", 2, 20, 10, 7, {1, 1, 2}, 3, true, 3, 33}, 8, 4, false, true, true, {true, true, true}, 0},
    {{"several blocks", 1, 8, 21, 35, {1, 2, 3, 4}, 1, true, 4, 32}, 32, 4, true, true, true, {true, true, true}, 0},
    {{"several blocks, strided", 2, 8, 35, 18, {1, 2}, 2, true, 2, 16},
     8,
     2,
     false,
     true,
     false,
     {true, true, true},
     0},
    {{"far from zero", 2, 4, 9, 8, {1, 2, 3, 4}, 1, true, 4, 16}, 16, 4, false, true, true, {true, true, true}, 1e4},
};

// One batch norm with its PReLU: of what it takes, mean and variance; of its gradients, those of its parameters.
struct NormReference {
  std::vector<double> weight, bias, slope, mean, variance;
  std::vector<double> grad_weight, grad_bias, grad_slope;
  double eps;
  bool batch_statistics, has_prelu;

  static void each(const Tensor& map, const std::function<void(int64_t, int64_t, int64_t, int64_t, size_t)>& f) {
    for (int64_t b = 0; b < map.sizes[0]; ++b)
      for (int64_t c = 0; c < map.sizes[1]; ++c)
        for (int64_t y = 0; y < map.sizes[2]; ++y)
          for (int64_t z = 0; z < map.sizes[3]; ++z) f(b, c, y, z, static_cast<size_t>(c));
  }

  void take(const Tensor& map) {
    if (!batch_statistics) return;
    const double count = static_cast<double>(map.sizes[0] * map.sizes[2] * map.sizes[3]);
    mean.assign(weight.size(), 0);
    variance = mean;
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) { mean[i] += map.at(b, c, y, z) / count; });
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) {
      variance[i] += (map.at(b, c, y, z) - mean[i]) * (map.at(b, c, y, z) - mean[i]) / count;
    });
  }

  double normal(double value, size_t i) const { return (value - mean[i]) / std::sqrt(variance[i] + eps); }

  Tensor before_prelu(const Tensor& map, const Tensor* residual = nullptr) const {
    Tensor result = map;
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) {
      result.at(b, c, y, z) = normal(map.at(b, c, y, z), i) * weight[i] + bias[i];
      if (residual) result.at(b, c, y, z) += residual->at(b, c, y, z);
    });
    return result;
  }

  Tensor operator()(const Tensor& map, const Tensor* residual = nullptr) const {
    Tensor result = before_prelu(map, residual);
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) {
      double& value = result.at(b, c, y, z);
      if (has_prelu && value <= 0) value *= slope[i];
    });
    return result;
  }

  // The gradient between norm and PReLU from the one behind both; those of the parameters.
  Tensor in_front_of_prelu(const Tensor& grad, const Tensor& map, const Tensor* residual = nullptr) {
    const Tensor before = before_prelu(map, residual);
    Tensor result = grad;
    grad_weight.assign(weight.size(), 0);
    grad_bias = grad_slope = grad_weight;
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) {
      double& g = result.at(b, c, y, z);
      const double input = before.at(b, c, y, z);
      if (has_prelu && input <= 0) {
        grad_slope[i] += g * input;
        g *= slope[i];
      }
      grad_bias[i] += g;
      grad_weight[i] += g * normal(map.at(b, c, y, z), i);
    });
    return result;
  }

  // The gradient in front of the norm from the one behind it, whose sums are known.
  Tensor in_front(const Tensor& grad, const Tensor& map) const {
    const double count = static_cast<double>(map.sizes[0] * map.sizes[2] * map.sizes[3]);
    Tensor result = grad;
    each(map, [&](auto b, auto c, auto y, auto z, size_t i) {
      double& g = result.at(b, c, y, z);
      if (batch_statistics) g -= (grad_bias[i] + normal(map.at(b, c, y, z), i) * grad_weight[i]) / count;
      g *= weight[i] / std::sqrt(variance[i] + eps);
    });
    return result;
  }
};

// What the operators take and give.
struct UnitReference {
  Tensor x, reduce_weight, weight, expand_weight, grad;
  NormReference norms[3];

  Tensor reduced, concatenated, expanded, result;
  Tensor grad_x, grad_reduce, grad_weight, grad_expand;

  // `kept` rounds to the type of maps, `factor` to what a product takes of a number.
  template <class Kept, class Factor>
  void run(const UnitCase& u, Kept kept, Factor factor) {
    const Case& s = u.s;
    // A pyramid of one branch has the sizes that the pointwise functions read.
    const Case reduction{s.name, s.batch, u.inputs, s.height, s.width, {1}, 1, true, u.reduce_groups, s.channels};
    const Tensor* residual = u.residual ? &x : nullptr;
    reduced = kept(group_pointwise(reduction, factor(x), factor(reduce_weight)));
    norms[0].take(reduced);
    const Tensor r = kept(norms[0](reduced));
    concatenated = kept(spatial_pyramid(s, r, weight));
    norms[1].take(concatenated);
    const Tensor z = factor(norms[1](concatenated));
    expanded = kept(group_pointwise(s, z, factor(expand_weight)));
    norms[2].take(expanded);
    result = kept(norms[2](expanded, residual));

    const Tensor front = kept(norms[2].in_front_of_prelu(grad, expanded, residual));
    const Tensor in_front_of_expanded = factor(norms[2].in_front(front, expanded));
    grad_expand = pointwise_gradient_of_weight(s, in_front_of_expanded, z);
    const Tensor behind = pointwise_gradient_of_input(s, in_front_of_expanded, factor(expand_weight));
    const Tensor grad_concatenated =
        norms[1].in_front(kept(norms[1].in_front_of_prelu(behind, concatenated)), concatenated);
    grad_weight = pyramid_gradient_of_weight(s, grad_concatenated, r);
    const Tensor grad_reduced =
        kept(norms[0].in_front_of_prelu(pyramid_gradient_of_input(s, grad_concatenated, weight), reduced));
    const Tensor in_front_of_reduced = factor(norms[0].in_front(grad_reduced, reduced));
    grad_reduce = pointwise_gradient_of_weight(reduction, in_front_of_reduced, factor(x));
    grad_x = pointwise_gradient_of_input(reduction, in_front_of_reduced, factor(reduce_weight));
    if (residual) {
      for (size_t i = 0; i < front.values.size(); ++i) grad_x.values[i] += front.values[i];
    }
  }
};

inline UnitReference drawn(const UnitCase& u, double mean) {
  Draw draw;
  const Case& s = u.s;
  auto numbers = [&](std::vector<int64_t> sizes, std::vector<double> choices) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    Tensor t = draw.one_of(std::move(choices), count);
    t.sizes = std::move(sizes);
    return t;
  };
  const std::vector<double> values{-2, -1.5, -1.25, -1, -0.5, -0.25, 0.25, 0.5, 0.75, 1.25, 1.5, 2};
  const std::vector<double> weights{-1, -0.75, -0.5, -0.25, 0.125, 0.5, 0.75, 1};
  UnitReference r;
  r.x = numbers({s.batch, u.inputs, s.height, s.width}, values);
  for (double& value : r.x.values) value += mean;
  r.reduce_weight = numbers({s.channels, u.inputs / u.reduce_groups}, weights);
  r.weight = numbers({s.branches(), s.channels, 3, 3}, weights);
  r.expand_weight = numbers({s.outputs, s.concatenated() / s.groups}, weights);
  r.grad = numbers({s.batch, s.outputs, s.out_height(), s.out_width()}, values);
  const int64_t channels[3] = {s.channels, s.concatenated(), s.outputs};
  for (int i = 0; i < 3; ++i) {
    NormReference& norm = r.norms[i];
    norm.weight = draw.one_of({0.5, 0.75, 1, 1.5, -1}, channels[i]).values;
    norm.bias = draw.one_of({-0.5, -0.25, 0, 0.25, 0.5}, channels[i]).values;
    norm.slope = draw.one_of({0.25, 0.5, -0.25, 1.5}, channels[i]).values;
    norm.mean = draw.one_of({-0.5, 0, 0.25}, channels[i]).values;
    norm.variance = draw.one_of({0.5, 1, 2}, channels[i]).values;
    norm.eps = 1e-3 * (i + 1);
    norm.batch_statistics = u.batch_statistics[i];
    norm.has_prelu = i < 2 || u.has_prelu;
  }
  return r;
}
