// The operators from their definitions, in double and nested loops: what the kernels are compared with.
#pragma once

#include <optional>

#include "buffer.h"

struct Case {
  const char* name;
  int64_t batch, channels, height, width;
  std::vector<int64_t> dilations;
  int64_t stride;
  bool hff;
  int64_t groups, outputs;  // of the pointwise convolution behind the concatenated map

  int64_t branches() const { return static_cast<int64_t>(dilations.size()); }
  int64_t concatenated() const { return branches() * channels; }
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
};

// Calls f(b, k, c, row, column, tap row, tap column, input row, input column) for every product of the pyramid.
template <class F>
void each_product(const Case& s, F&& f) {
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t k = 0; k < s.branches(); ++k)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t y = 0; y < s.out_height(); ++y)
          for (int64_t x = 0; x < s.out_width(); ++x)
            for (int64_t i = 0; i < 3; ++i)
              for (int64_t j = 0; j < 3; ++j) {
                const int64_t row = y * s.stride + (i - 1) * s.dilations[static_cast<size_t>(k)];
                const int64_t column = x * s.stride + (j - 1) * s.dilations[static_cast<size_t>(k)];
                if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
                f(b, k, c, y, x, i, j, row, column);
              }
}

inline Tensor spatial_pyramid(const Case& s, const Tensor& x, const Tensor& weight) {
  Tensor out({s.batch, s.concatenated(), s.out_height(), s.out_width()});
  each_product(s,
               [&](int64_t b, int64_t k, int64_t c, int64_t y, int64_t z, int64_t i, int64_t j, int64_t r, int64_t q) {
                 for (int64_t n = k; n < (s.hff ? s.branches() : k + 1); ++n) {
                   out.at(b, n * s.channels + c, y, z) += weight.at(k, c, i, j) * x.at(b, c, r, q);
                 }
               });
  return out;
}

// The gradient that branch k gets: of every output that it is a part of.
inline double branch_gradient(const Case& s, const Tensor& grad, int64_t b, int64_t k, int64_t c, int64_t y,
                              int64_t z) {
  double sum = 0;
  for (int64_t n = k; n < (s.hff ? s.branches() : k + 1); ++n) sum += grad.at(b, n * s.channels + c, y, z);
  return sum;
}

inline Tensor pyramid_gradient_of_input(const Case& s, const Tensor& grad, const Tensor& weight) {
  Tensor out({s.batch, s.channels, s.height, s.width});
  each_product(s,
               [&](int64_t b, int64_t k, int64_t c, int64_t y, int64_t z, int64_t i, int64_t j, int64_t r, int64_t q) {
                 out.at(b, c, r, q) += weight.at(k, c, i, j) * branch_gradient(s, grad, b, k, c, y, z);
               });
  return out;
}

inline Tensor pyramid_gradient_of_weight(const Case& s, const Tensor& grad, const Tensor& x) {
  Tensor out({s.branches(), s.channels, 3, 3});
  each_product(s, [&](int64_t b, int64_t k, int64_t c, int64_t y, int64_t z, int64_t i, int64_t j, int64_t r,
                      int64_t q) { out.at(k, c, i, j) += x.at(b, c, r, q) * branch_gradient(s, grad, b, k, c, y, z); });
  return out;
}

// Calls f(b, output channel, input channel, its index in the group, row, column) for every product.
template <class F>
void each_pointwise_product(const Case& s, F&& f) {
  const int64_t inputs = s.concatenated() / s.groups, outputs = s.outputs / s.groups;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t n = 0; n < s.outputs; ++n)
      for (int64_t m = 0; m < inputs; ++m)
        for (int64_t y = 0; y < s.out_height(); ++y)
          for (int64_t x = 0; x < s.out_width(); ++x) f(b, n, n / outputs * inputs + m, m, y, x);
}

inline Tensor group_pointwise(const Case& s, const Tensor& x, const Tensor& weight) {
  Tensor out({s.batch, s.outputs, s.out_height(), s.out_width()});
  each_pointwise_product(s, [&](int64_t b, int64_t n, int64_t c, int64_t m, int64_t y, int64_t z) {
    out.at(b, n, y, z) += weight.at(n, m) * x.at(b, c, y, z);
  });
  return out;
}

inline Tensor pointwise_gradient_of_input(const Case& s, const Tensor& grad, const Tensor& weight) {
  Tensor out({s.batch, s.concatenated(), s.out_height(), s.out_width()});
  each_pointwise_product(s, [&](int64_t b, int64_t n, int64_t c, int64_t m, int64_t y, int64_t z) {
    out.at(b, c, y, z) += weight.at(n, m) * grad.at(b, n, y, z);
  });
  return out;
}

inline Tensor pointwise_gradient_of_weight(const Case& s, const Tensor& grad, const Tensor& x) {
  Tensor out({s.outputs, s.concatenated() / s.groups});
  each_pointwise_product(s, [&](int64_t b, int64_t n, int64_t c, int64_t m, int64_t y, int64_t z) {
    out.at(n, m) += grad.at(b, n, y, z) * x.at(b, c, y, z);
  });
  return out;
}

// 3x3 means in steps of 2; the padding counts.
inline Tensor average_pool(const Tensor& x) {
  const int64_t height = (x.sizes[2] - 1) / 2 + 1, width = (x.sizes[3] - 1) / 2 + 1;
  Tensor out({x.sizes[0], x.sizes[1], height, width});
  for (int64_t b = 0; b < x.sizes[0]; ++b)
    for (int64_t c = 0; c < x.sizes[1]; ++c)
      for (int64_t y = 0; y < x.sizes[2]; ++y)
        for (int64_t z = 0; z < x.sizes[3]; ++z)
          for (int64_t i = y / 2; i <= (y + 1) / 2 && i < height; ++i)
            for (int64_t j = z / 2; j <= (z + 1) / 2 && j < width; ++j) out.at(b, c, i, j) += x.at(b, c, y, z) / 9;
  return out;
}

// Channels of `a`, then those of `b`.
inline Tensor concatenated(const Tensor& a, const Tensor& b) {
  Tensor out({a.sizes[0], a.sizes[1] + b.sizes[1], a.sizes[2], a.sizes[3]});
  for (int64_t n = 0; n < out.sizes[0]; ++n)
    for (int64_t c = 0; c < out.sizes[1]; ++c)
      for (int64_t y = 0; y < out.sizes[2]; ++y)
        for (int64_t z = 0; z < out.sizes[3]; ++z)
          out.at(n, c, y, z) = c < a.sizes[1] ? a.at(n, c, y, z) : b.at(n, c - a.sizes[1], y, z);
  return out;
}

// Every value rounded to `type`, as a kernel keeps it between two products.
inline Tensor rounded(Type type, Tensor x) {
  for (double& value : x.values) value = rounded(type, value);
  return x;
}

// One number a channel each, and a map like the result; an empty one leaves its step out.
struct Steps {
  Tensor scale, shift, slope, residual;
};

inline Tensor epilogue(Tensor x, const Steps& steps) {
  for (int64_t b = 0; b < x.sizes[0]; ++b)
    for (int64_t c = 0; c < x.sizes[1]; ++c)
      for (int64_t y = 0; y < x.sizes[2]; ++y)
        for (int64_t z = 0; z < x.sizes[3]; ++z) {
          double& value = x.at(b, c, y, z);
          const size_t channel = static_cast<size_t>(c);
          if (steps.scale.count()) value *= steps.scale.values[channel];
          if (steps.shift.count()) value += steps.shift.values[channel];
          if (steps.residual.count()) value += steps.residual.at(b, c, y, z);
          if (steps.slope.count() && value <= 0) value *= steps.slope.values[channel];
        }
  return x;
}
