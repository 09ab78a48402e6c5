// Runs every CPU kernel of one instruction set without torch, for the sanitizers and for emulated machines.
//
// Inputs are small whole numbers, so every product and sum is exact in float and the result must equal the plain loops
// below bit for bit (half types: the exact value rounded once to nearest even). Every buffer is allocated with exactly
// the bytes that its owner asked for and starts as NaN, so a read too far, or of what was never written, shows.
// Prints the number of problems checked; exits 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace espk {

namespace ESPK_ISA { extern const Kernels kernels; }

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory nan_bytes(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) std::abort();
  std::memset(p, 0xff, static_cast<size_t>(bytes));
  return Memory(p);
}

}  // namespace

void* scratch(Slot slot, int64_t bytes) {
  static Memory blocks[5];
  Memory& block = blocks[static_cast<int>(slot)];
  block = nan_bytes(bytes);
  return block.get();
}

namespace {

// --- numbers of a stored type, written down apart from the kernels' own conversions ---------------------------------

struct Format {
  Type type;
  const char* name;
  int64_t bytes;
  int precision;  // bits of the significand; 0: double or float, converted by the compiler
};

const Format kFormats[] = {
    {Type::float32, "float32", 4, 0},
    {Type::float64, "float64", 8, 0},
    {Type::bfloat16, "bfloat16", 2, 8},
    {Type::float16, "float16", 2, 11},
};

// To nearest, ties to even, for numbers in the normal range.
double rounded(const Format& format, double value) {
  if (format.type == Type::float64 || value == 0) return value;
  if (format.type == Type::float32) return static_cast<double>(static_cast<float>(value));
  int exponent = 0;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1.0, exponent - format.precision);
  return std::nearbyint(value / unit) * unit;
}

void write(const Format& format, void* memory, int64_t i, double value) {
  if (format.type == Type::float64) {
    static_cast<double*>(memory)[i] = value;
  } else if (format.type == Type::float32) {
    static_cast<float*>(memory)[i] = static_cast<float>(value);
  } else {
    int exponent = 0;
    const double fraction = std::frexp(std::fabs(value), &exponent);
    const int bias = format.type == Type::float16 ? 15 : 127;
    const int stored = format.precision - 1;
    const auto significand = static_cast<unsigned>(std::ldexp(fraction, format.precision));
    unsigned bits =
        value == 0 ? 0 : (static_cast<unsigned>(exponent - 1 + bias) << stored) + significand - (1u << stored);
    if (value < 0) bits |= 0x8000u;
    static_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(bits);
  }
}

double read(const Format& format, const void* memory, int64_t i) {
  if (format.type == Type::float64) return static_cast<const double*>(memory)[i];
  if (format.type == Type::float32) return static_cast<double>(static_cast<const float*>(memory)[i]);
  const unsigned bits = static_cast<const uint16_t*>(memory)[i];
  const int stored = format.precision - 1, bias = format.type == Type::float16 ? 15 : 127;
  const unsigned exponent = (bits & 0x7fffu) >> stored, significand = bits & ((1u << stored) - 1u);
  if (exponent == (0x7fffu >> stored)) return NAN;
  if (exponent == 0) return 0;
  const double value =
      std::ldexp(static_cast<double>(significand + (1u << stored)), static_cast<int>(exponent) - bias - stored);
  return bits & 0x8000u ? -value : value;
}

// --- maps and weights ------------------------------------------------------------------------------------------------

unsigned state = 1;

int random_integer(int low, int high) {
  state = state * 1664525u + 1013904223u;
  return low + static_cast<int>((state >> 8) % static_cast<unsigned>(high - low + 1));
}

// Values in the order [B][C][H][W] whatever the layout in memory.
struct Map {
  int64_t batch, channels, height, width;
  std::vector<double> values;

  Map(int64_t b, int64_t c, int64_t h, int64_t w)
      : batch(b), channels(c), height(h), width(w), values(static_cast<size_t>(b * c * h * w), 0.0) {}

  double& at(int64_t b, int64_t c, int64_t y, int64_t x) {
    return values[static_cast<size_t>(((b * channels + c) * height + y) * width + x)];
  }
  double inside(int64_t b, int64_t c, int64_t y, int64_t x) {
    return y < 0 || y >= height || x < 0 || x >= width ? 0.0 : at(b, c, y, x);
  }
  int64_t size() const { return static_cast<int64_t>(values.size()); }
};

Map random_map(int64_t b, int64_t c, int64_t h, int64_t w, int low, int high) {
  Map map(b, c, h, w);
  for (double& value : map.values) value = random_integer(low, high);
  return map;
}

int64_t place(const Map& map, Layout layout, int64_t i) {
  if (layout == Layout::contiguous) return i;
  const int64_t x = i % map.width, y = i / map.width % map.height, c = i / map.width / map.height % map.channels;
  const int64_t b = i / map.width / map.height / map.channels;
  return ((b * map.height + y) * map.width + x) * map.channels + c;
}

Memory stored(const Format& format, const Map& map, Layout layout) {
  Memory memory = nan_bytes(map.size() * format.bytes);
  for (int64_t i = 0; i < map.size(); ++i) {
    write(format, memory.get(), place(map, layout, i), map.values[static_cast<size_t>(i)]);
  }
  return memory;
}

int64_t checked = 0;

void compare(const char* what, const Format& format, Layout layout, const void* memory, Map& expected) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double wanted = rounded(format, expected.values[static_cast<size_t>(i)]);
    const double got = read(format, memory, place(expected, layout, i));
    if (!(got == wanted)) {
      std::printf("%s %s %s [%lld %lld %lld %lld]: element %lld is %g, expected %g\n", what, format.name,
                  layout == Layout::contiguous ? "contiguous" : "channels_last", (long long)expected.batch,
                  (long long)expected.channels, (long long)expected.height, (long long)expected.width, (long long)i,
                  got, wanted);
      std::exit(1);
    }
  }
  ++checked;
}

// One unit at a time and from the last to the first: no result may depend on the split.
template <class Problem>
void launch(const Kernel<Problem>& kernel, const Problem& problem) {
  Memory shared = nan_bytes(kernel.shared_bytes(problem));
  kernel.before(problem, shared.get());
  for (int64_t unit = kernel.units(problem); unit > 0; --unit) kernel.run(problem, shared.get(), unit - 1, unit);
  if (kernel.after) kernel.after(problem, shared.get());
}

// --- the plain loops ---------------------------------------------------------------------------------------------------

struct Case {
  int64_t batch, channels, height, width, stride;
  bool hff;
  std::vector<int64_t> dilations;
  int64_t groups, pointwise_channels;
};

// Calls f(out row, out column, in row, in column, tap) for the taps of a branch, those outside the map included.
void for_taps(const Case& c, int64_t dilation,
              const std::function<void(int64_t, int64_t, int64_t, int64_t, int64_t)>& f) {
  for (int64_t y = 0; y * c.stride < c.height; ++y) {
    for (int64_t x = 0; x * c.stride < c.width; ++x) {
      for (int64_t t = 0; t < 9; ++t) {
        f(y, x, y * c.stride + (t / 3 - 1) * dilation, x * c.stride + (t % 3 - 1) * dilation, t);
      }
    }
  }
}

int64_t branches(const Case& c) { return static_cast<int64_t>(c.dilations.size()); }
int64_t out_height(const Case& c) { return (c.height - 1) / c.stride + 1; }
int64_t out_width(const Case& c) { return (c.width - 1) / c.stride + 1; }

Map pyramid(const Case& c, Map& x, Map& weight) {
  Map out(c.batch, branches(c) * c.channels, out_height(c), out_width(c));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t k = 0; k < branches(c); ++k) {
      for (int64_t j = c.hff ? 0 : k; j <= k; ++j) {
        for (int64_t ch = 0; ch < c.channels; ++ch) {
          for_taps(c, c.dilations[static_cast<size_t>(j)],
                   [&](int64_t y, int64_t xx, int64_t iy, int64_t ix, int64_t t) {
                     out.at(b, k * c.channels + ch, y, xx) += weight.at(j, ch, t / 3, t % 3) * x.inside(b, ch, iy, ix);
                   });
        }
      }
    }
  }
  return out;
}

// Gradients for the input and the weight, straight from the definition of the forward pass.
void pyramid_gradients(const Case& c, Map& x, Map& weight, Map& grad, Map& grad_x, Map& grad_weight) {
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t k = 0; k < branches(c); ++k) {
      for (int64_t j = c.hff ? 0 : k; j <= k; ++j) {
        for (int64_t ch = 0; ch < c.channels; ++ch) {
          for_taps(c, c.dilations[static_cast<size_t>(j)],
                   [&](int64_t y, int64_t xx, int64_t iy, int64_t ix, int64_t t) {
                     if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) return;
                     const double g = grad.at(b, k * c.channels + ch, y, xx);
                     grad_x.at(b, ch, iy, ix) += weight.at(j, ch, t / 3, t % 3) * g;
                     grad_weight.at(j, ch, t / 3, t % 3) += x.at(b, ch, iy, ix) * g;
                   });
        }
      }
    }
  }
}

Map pointwise(int64_t groups, Map& x, Map& weight) {
  const int64_t out = weight.batch / groups, in = weight.channels;
  Map result(x.batch, weight.batch, x.height, x.width);
  for (int64_t i = 0; i < result.size(); ++i) {
    const int64_t xx = i % x.width, y = i / x.width % x.height, n = i / x.width / x.height % weight.batch;
    const int64_t b = i / x.width / x.height / weight.batch;
    for (int64_t m = 0; m < in; ++m) {
      result.values[static_cast<size_t>(i)] += weight.at(n, m, 0, 0) * x.at(b, n / out * in + m, y, xx);
    }
  }
  return result;
}

struct Vectors {
  std::vector<double> scale, shift, slope;

  explicit Vectors(int64_t channels) {
    for (int64_t i = 0; i < channels; ++i) {
      scale.push_back(random_integer(1, 2));
      shift.push_back(random_integer(-2, 2));
      slope.push_back(random_integer(0, 1) * 0.5);
    }
  }

  void apply(Map& map, Map* residual) const {
    for (int64_t i = 0; i < map.size(); ++i) {
      const auto c = static_cast<size_t>(i / map.width / map.height % map.channels);
      double& value = map.values[static_cast<size_t>(i)];
      value = value * scale[c] + shift[c] + (residual ? residual->values[static_cast<size_t>(i)] : 0.0);
      if (!(value > 0)) value *= slope[c];
    }
  }
};

// The three vectors in the compute type.
struct StoredVectors {
  Memory scale, shift, slope;

  StoredVectors(const Format& format, const Vectors& v)
      : scale(one(format, v.scale)), shift(one(format, v.shift)), slope(one(format, v.slope)) {}

  static Memory one(const Format& format, const std::vector<double>& values) {
    const Format& compute = kFormats[format.type == Type::float64 ? 1 : 0];
    Memory memory = nan_bytes(static_cast<int64_t>(values.size()) * compute.bytes);
    for (size_t i = 0; i < values.size(); ++i) write(compute, memory.get(), static_cast<int64_t>(i), values[i]);
    return memory;
  }

  Epilogue with(const void* residual) const { return {scale.get(), shift.get(), slope.get(), residual}; }
};

// --- one case through every kernel ------------------------------------------------------------------------------------

void describe(Pyramid& p, const Case& c, const Format& format, Layout layout) {
  p.type = format.type;
  p.layout = layout;
  p.batch = c.batch;
  p.channels = c.channels;
  p.height = c.height;
  p.width = c.width;
  p.out_height = out_height(c);
  p.out_width = out_width(c);
  p.branches = branches(c);
  p.stride = c.stride;
  for (int64_t k = 0; k < p.branches; ++k) p.dilations[k] = c.dilations[static_cast<size_t>(k)];
  p.hff = c.hff;
}

void check(const Case& c, const Format& format, Layout layout) {
  const Kernels& kernels = ESPK_ISA::kernels;
  const int64_t concatenated = branches(c) * c.channels;
  Map x = random_map(c.batch, c.channels, c.height, c.width, -2, 2);
  Map weight = random_map(branches(c), c.channels, 3, 3, -1, 1);
  Map grad = random_map(c.batch, concatenated, out_height(c), out_width(c), -2, 2);
  const Memory x_memory = stored(format, x, layout), weight_memory = stored(format, weight, Layout::contiguous);
  const Memory grad_memory = stored(format, grad, layout);

  Map expected = pyramid(c, x, weight);
  SpatialPyramid forward{};
  describe(forward, c, format, layout);
  const Memory out = nan_bytes(expected.size() * format.bytes);
  forward.x = x_memory.get();
  forward.weight = weight_memory.get();
  forward.out = out.get();
  launch(kernels.spatial_pyramid, forward);
  compare("spatial_pyramid", format, layout, out.get(), expected);

  Map grad_x(c.batch, c.channels, c.height, c.width), grad_weight(branches(c), c.channels, 3, 3);
  pyramid_gradients(c, x, weight, grad, grad_x, grad_weight);
  SpatialPyramidBackwardInput backward{};
  describe(backward, c, format, layout);
  const Memory grad_x_memory = nan_bytes(grad_x.size() * format.bytes);
  backward.grad = grad_memory.get();
  backward.weight = weight_memory.get();
  backward.grad_x = grad_x_memory.get();
  launch(kernels.spatial_pyramid_backward_input, backward);
  compare("spatial_pyramid_backward_input", format, layout, grad_x_memory.get(), grad_x);

  SpatialPyramidBackwardWeight weights{};
  describe(weights, c, format, layout);
  const Memory grad_weight_memory = nan_bytes(grad_weight.size() * format.bytes);
  weights.grad = grad_memory.get();
  weights.x = x_memory.get();
  weights.grad_weight = grad_weight_memory.get();
  launch(kernels.spatial_pyramid_backward_weight, weights);
  compare("spatial_pyramid_backward_weight", format, Layout::contiguous, grad_weight_memory.get(), grad_weight);

  // group_pointwise of the gradient's map, which has the concatenated channels.
  Map pointwise_weight = random_map(c.pointwise_channels, concatenated / c.groups, 1, 1, -1, 1);
  const Memory pointwise_memory = stored(format, pointwise_weight, Layout::contiguous);
  Map residual = random_map(c.batch, c.pointwise_channels, out_height(c), out_width(c), -3, 3);
  const Memory residual_memory = stored(format, residual, layout);
  const Vectors vectors(c.pointwise_channels), pyramid_vectors(concatenated);
  const StoredVectors stored_vectors(format, vectors), stored_pyramid_vectors(format, pyramid_vectors);

  Map product = pointwise(c.groups, grad, pointwise_weight);
  GroupPointwise group{};
  group.type = format.type;
  group.layout = layout;
  group.batch = c.batch;
  group.pixels = out_height(c) * out_width(c);
  group.in_channels = concatenated;
  group.out_channels = c.pointwise_channels;
  group.groups = c.groups;
  group.x = grad_memory.get();
  group.weight = pointwise_memory.get();
  const Memory product_memory = nan_bytes(product.size() * format.bytes);
  group.out = product_memory.get();
  launch(kernels.group_pointwise, group);
  compare("group_pointwise", format, layout, product_memory.get(), product);

  vectors.apply(product, &residual);
  group.epilogue = stored_vectors.with(residual_memory.get());
  launch(kernels.group_pointwise, group);
  compare("group_pointwise with epilogue", format, layout, product_memory.get(), product);

  Map grad_in(c.batch, concatenated, out_height(c), out_width(c));
  Map grad_pointwise(c.pointwise_channels, concatenated / c.groups, 1, 1);
  const int64_t out_of_group = c.pointwise_channels / c.groups, in_of_group = concatenated / c.groups;
  for (int64_t i = 0; i < residual.size(); ++i) {  // the residual serves as the gradient of the result
    const int64_t xx = i % residual.width, y = i / residual.width % residual.height;
    const int64_t n = i / residual.width / residual.height % residual.channels;
    const int64_t b = i / residual.width / residual.height / residual.channels;
    for (int64_t m = 0; m < in_of_group; ++m) {
      const int64_t channel = n / out_of_group * in_of_group + m;
      const double g = residual.values[static_cast<size_t>(i)];
      grad_in.at(b, channel, y, xx) += g * pointwise_weight.at(n, m, 0, 0);
      grad_pointwise.at(n, m, 0, 0) += g * grad.at(b, channel, y, xx);
    }
  }
  GroupPointwise group_backward = group;
  group_backward.epilogue = {};
  group_backward.in_channels = c.pointwise_channels;
  group_backward.out_channels = concatenated;
  group_backward.weight_transposed = true;
  group_backward.x = residual_memory.get();
  const Memory grad_in_memory = nan_bytes(grad_in.size() * format.bytes);
  group_backward.out = grad_in_memory.get();
  launch(kernels.group_pointwise, group_backward);
  compare("group_pointwise_backward_input", format, layout, grad_in_memory.get(), grad_in);

  GroupPointwiseBackwardWeight group_weights{format.type,       layout,
                                             c.batch,           group.pixels,
                                             concatenated,      c.pointwise_channels,
                                             c.groups,          residual_memory.get(),
                                             grad_memory.get(), nullptr};
  const Memory grad_pointwise_memory = nan_bytes(grad_pointwise.size() * format.bytes);
  group_weights.grad_weight = grad_pointwise_memory.get();
  launch(kernels.group_pointwise_backward_weight, group_weights);
  compare("group_pointwise_backward_weight", format, Layout::contiguous, grad_pointwise_memory.get(), grad_pointwise);

  pyramid_vectors.apply(expected, nullptr);
  Map fused = pointwise(c.groups, expected, pointwise_weight);
  vectors.apply(fused, &residual);
  PyramidPointwise unit{};
  describe(unit, c, format, layout);
  unit.x = x_memory.get();
  unit.weight = weight_memory.get();
  unit.pyramid_epilogue = stored_pyramid_vectors.with(nullptr);
  unit.pointwise_channels = c.pointwise_channels;
  unit.groups = c.groups;
  unit.pointwise_weight = pointwise_memory.get();
  unit.epilogue = stored_vectors.with(residual_memory.get());
  const Memory fused_memory = nan_bytes(fused.size() * format.bytes);
  unit.out = fused_memory.get();
  launch(kernels.pyramid_pointwise, unit);
  compare("pyramid_pointwise", format, layout, fused_memory.get(), fused);
}

}  // namespace
}  // namespace espk

int main() {
  using espk::Case;
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, true, {1}, 1, 1},                         // the smallest problem
      {2, 4, 5, 6, 1, true, {1, 2, 3, 4}, 4, 8},                // half a vector of channels, dilations near the size
      {1, 20, 7, 7, 1, true, {1, 1, 1, 2}, 4, 48},              // a vector and a rest
      {1, 16, 7, 14, 2, true, {1, 1, 2, 3}, 4, 16},             // strided, whole vectors
      {2, 3, 3, 19, 1, false, {5, 1, 2}, 3, 6},                 // a dilation beyond the rows, no fusion
      {1, 5, 9, 8, 3, true, {9, 7, 6, 5, 4, 3, 2, 1}, 5, 10},   // stride 3, eight branches, some beyond the map
      {1, 35, 4, 33, 1, true, {1, 2}, 7, 21},                   // rows of two vectors and one number
      {1, 8, 40, 37, 2, true, {1, 2, 3, 4}, 4, 36},             // several strips
      {3, 9, 2, 65, 1, true, {1, 1}, 1, 17},                    // one group, odd everything
      {1, 64, 6, 6, 1, true, {1, 2, 3, 4}, 4, 80},              // five vectors a group
      {0, 4, 5, 5, 1, true, {1, 2}, 2, 4},                      // no image
  };
  for (const Case& c : cases) {
    for (const espk::Format& format : espk::kFormats) {
      for (espk::Layout layout : {espk::Layout::contiguous, espk::Layout::channels_last}) {
        espk::check(c, format, layout);
      }
    }
  }
  std::printf("%lld problems checked\n", static_cast<long long>(espk::checked));
  return 0;
}
