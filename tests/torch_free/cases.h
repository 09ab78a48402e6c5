// The shapes, numbers and problems that the programmes of every device run over. Whole numbers make every sum exact, so
// that each result is the naive one rounded once.
#pragma once

#include <memory>
#include <type_traits>

#include "naive.h"

inline const Case kCases[] = {
    {"one pixel", 1, 4, 1, 1, {1, 2, 3, 4}, 1, true, 4, 8},
    {"one row", 2, 3, 1, 35, {1, 2, 3, 4}, 1, true, 4, 8},
    {"one column", 1, 3, 19, 1, {1, 2, 3, 4}, 1, true, 3, 3},
    {"map smaller than the dilation", 2, 5, 3, 2, {1, 3, 5, 9}, 1, true, 5, 10},
    {"dilation far above the size", 1, 2, 2, 5, {1, 100000, 2}, 1, true, 1, 5},
    {"dilation of 63 bits", 1, 2, 4, 5, {1, int64_t{1} << 62, 2}, 1, true, 1, 5},
    {"dilation equals the size", 1, 4, 4, 4, {4, 4}, 1, true, 2, 6},
    {"width 16", 1, 2, 3, 16, {1, 2, 3, 4}, 1, true, 2, 32},
    {"width 17", 2, 3, 4, 17, {1, 1, 2, 3}, 1, true, 4, 36},
    {"width 33", 1, 1, 5, 33, {2, 1}, 1, false, 1, 1},
    {"width 70", 1, 2, 4, 70, {9, 1, 4, 2}, 1, true, 2, 34},
    {"width 90", 1, 17, 3, 90, {1, 2}, 1, true, 17, 17},
    {"channels 17", 1, 17, 5, 6, {1, 1, 2, 3}, 1, true, 4, 20},
    {"channels 33", 2, 33, 3, 4, {1, 2}, 1, true, 3, 51},
    {"channels 65", 1, 65, 3, 3, {1}, 1, true, 5, 10},
    {"eight branches", 1, 5, 7, 9, {1, 3, 2, 4, 1, 5, 9, 2}, 1, true, 8, 16},
    {"seven branches without hff", 1, 3, 6, 8, {1, 2, 3, 4, 5, 6, 7}, 1, false, 7, 7},
    {"stride 2 even", 2, 4, 8, 18, {1, 2, 3, 4}, 2, true, 4, 12},
    {"stride 2 odd", 1, 19, 9, 35, {1, 2, 3}, 2, true, 3, 57},
    {"stride 2 one pixel", 1, 1, 1, 1, {3}, 2, true, 1, 2},
    {"stride 3 without hff", 2, 5, 10, 40, {1, 2, 3, 4}, 3, false, 2, 6},
    {"stride above the size", 1, 6, 3, 4, {1, 2}, 7, true, 1, 9},
    {"one input a group", 1, 4, 3, 7, {1, 2}, 1, true, 8, 24},
    {"many outputs", 1, 2, 2, 3, {1, 2}, 1, true, 1, 130},
    {"many inputs", 1, 130, 2, 3, {1, 2}, 1, true, 2, 6},
    {"several blocks", 1, 9, 21, 37, {1, 2, 3, 4}, 1, true, 3, 33},
    {"several blocks, stride 2", 1, 8, 22, 36, {1, 2, 3, 4}, 2, true, 4, 32},
    {"five vectors of outputs a group", 1, 64, 6, 6, {1, 2, 3, 4}, 1, true, 4, 80},
    {"a vector of channels and a rest", 1, 20, 7, 7, {1, 1, 1, 2}, 1, true, 4, 48},
    {"two vectors of columns and one", 1, 35, 4, 33, {1, 2}, 1, true, 7, 21},
    {"several strips, stride 2", 1, 8, 40, 37, {1, 2, 3, 4}, 2, true, 4, 36},
    {"no window fits in shared memory", 1, 4, 60, 70, {1, 50}, 1, true, 2, 4},
    {"result outgrows the cache", 1, 20, 52, 61, {1, 2, 3, 4}, 1, true, 4, 8},
    {"narrow groups", 1, 8, 3, 7, {1, 2, 3, 4}, 1, true, 4, 8},
    {"narrow groups, 6 to 2", 2, 6, 3, 5, {1, 2, 3}, 1, true, 3, 6},
    {"narrow groups, 8 to 6", 1, 8, 3, 17, {1, 2, 3, 4}, 1, true, 4, 24},
    {"narrow groups, 8 to 7", 1, 8, 2, 5, {1, 2, 3, 4}, 1, true, 4, 28},
    {"narrow groups, 8 to 2 in 5", 1, 10, 3, 3, {1, 2, 3, 4}, 1, true, 5, 10},
    {"few pixels, many outputs", 2, 3, 1, 1, {1, 2}, 1, true, 1, 83},
    {"batch 0", 0, 4, 5, 6, {1, 2}, 1, true, 2, 4},
};

// Small whole numbers, or powers of two, from a fixed sequence.
class Draw {
 public:
  Tensor integers(std::vector<int64_t> sizes) {
    Tensor t(std::move(sizes));
    for (double& value : t.values) value = static_cast<double>(next() % 5) - 2;
    return t;
  }
  Tensor one_of(std::vector<double> choices, int64_t count) {
    Tensor t({count});
    for (double& value : t.values) value = choices[next() % choices.size()];
    return t;
  }
  Steps steps(int64_t channels, std::vector<int64_t> residual_sizes) {
    Steps steps{one_of({0.5, 1, 2, -1}, channels), integers({channels}), one_of({0.25, 0.5, -0.5, 0}, channels), {}};
    if (!residual_sizes.empty()) steps.residual = integers(std::move(residual_sizes));
    return steps;
  }

 private:
  uint64_t state_ = 1;
  uint64_t next() { return (state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 33; }
};

// Vectors of the compute type that an Epilogue points into.
class EpilogueBuffers {
 public:
  EpilogueBuffers(Type type, Layout layout, const Steps& steps) {
    const Type compute = type == Type::float64 ? Type::float64 : Type::float32;
    epilogue.scale = keep(compute, layout, steps.scale);
    epilogue.shift = keep(compute, layout, steps.shift);
    epilogue.slope = keep(compute, layout, steps.slope);
    epilogue.residual = keep(type, layout, steps.residual);
  }
  espk::Epilogue epilogue;

 private:
  std::vector<std::unique_ptr<Buffer>> buffers_;

  const void* keep(Type type, Layout layout, const Tensor& tensor) {
    if (!tensor.count()) return nullptr;
    buffers_.push_back(std::make_unique<Buffer>(type, layout, tensor));
    return buffers_.back()->data();
  }
};

template <class Problem>
Problem described(const Case& s, Type type, Layout layout) {
  Problem p{};
  p.type = type;
  p.layout = layout;
  p.batch = s.batch;
  if constexpr (std::is_base_of_v<espk::Pyramid, Problem>) {
    p.channels = s.channels;
    p.height = s.height;
    p.width = s.width;
    p.out_height = s.out_height();
    p.out_width = s.out_width();
    p.branches = s.branches();
    p.stride = s.stride;
    p.hff = s.hff;
    for (size_t k = 0; k < s.dilations.size(); ++k) p.dilations[k] = s.dilations[k];
    if constexpr (requires { p.out_pixel; }) p.out_pixel = s.concatenated();
    if constexpr (std::is_same_v<espk::PyramidPointwise, Problem>) {
      p.pointwise_channels = p.out_pixel = s.outputs;
      p.groups = s.groups;
    }
  } else {
    p.pixels = s.out_height() * s.out_width();
    p.in_channels = s.concatenated();
    p.out_channels = s.outputs;
    p.groups = s.groups;
  }
  return p;
}
