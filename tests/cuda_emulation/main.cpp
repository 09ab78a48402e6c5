// Runs every CUDA kernel over edge shapes on the CPU: each variant, aligned memory and not, threads in either order.
#include <string>

#include "cases.h"
#include "cuda/kernels.h"
#include "cuda_runtime.h"
#include "training.h"

namespace {

namespace kernels = espk::cuda;

int failures = 0, checks = 0;

// Whether float32 is multiplied as tf32.
bool tf32 = false;

// What a product takes of numbers that are kept as `type` before it.
Tensor factor(Type type, const Tensor& x) {
  Tensor result = rounded(type, x);
  if (!tf32) return result;
  for (double& value : result.values) {
    int exponent;
    std::frexp(value, &exponent);
    const double step = std::ldexp(1.0, exponent - 11);
    value = std::round(value / step) * step;
  }
  return result;
}

// What makes kernels take another way through the same problem; none may change a result.
struct Setting {
  const char* name;
  bool aligned, backwards;
  int64_t enough_blocks;
  int shared_memory;  // of a block, in bytes
};

constexpr int kKiB = 1024;
const Setting kSettings[] = {
    {"sm_80, large blocks", true, false, 1, 163 * kKiB},
    {"sm_90, small blocks, unaligned", false, true, 1 << 30, 227 * kKiB},
    {"little shared memory", true, true, 1 << 30, 40 * kKiB},
};

struct Scratch {
  void* data = nullptr;
  explicit Scratch(int64_t bytes) {
    if (posix_memalign(&data, 256, static_cast<size_t>(bytes > 0 ? bytes : 1))) std::abort();
    std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

// `result` is the problem's pointer to its result, or that of the problem it extends.
template <class Problem, class Holder>
void check(const char* what, const Case& s, const Setting& setting, const espk::cuda::Kernel<Problem>& kernel,
           Problem problem, void* Holder::* result, const Tensor& expected) {
  Buffer out(problem.type, problem.layout, expected.sizes);
  problem.*result = out.data();
  const Scratch scratch(kernel.scratch_bytes(problem));
  const espk::cuda::Outcome outcome = kernel.run(problem, scratch.data, nullptr);

  ++checks;
  std::string wrong;
  if (outcome.failed()) wrong = std::string(outcome.kernel) + ": " + outcome.reason;
  for (int64_t i = 0; i < expected.count() && wrong.empty(); ++i) {
    const double right = rounded(problem.type, expected.values[static_cast<size_t>(i)]);
    if (out.get(i) != right) {
      wrong = "value " + std::to_string(i) + " is " + std::to_string(out.get(i)) + " and not " + std::to_string(right);
    }
  }
  if (!out.guards_intact()) wrong = "memory beside the result was written";
  if (!wrong.empty()) {
    ++failures;
    std::printf("FAIL %s, %s, type %d, %s, %s: %s\n", what, s.name, static_cast<int>(problem.type),
                problem.layout == Layout::contiguous ? "contiguous" : "channels_last", setting.name, wrong.c_str());
  }
}

void check_all(const Case& s, Type type, Layout layout, const Setting& setting) {
  Draw draw;
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor map = draw.integers({s.batch, s.concatenated(), s.out_height(), s.out_width()});
  const Tensor pointwise = draw.integers({s.outputs, s.concatenated() / s.groups});
  const Tensor grad = draw.integers({s.batch, s.outputs, s.out_height(), s.out_width()});
  const Steps steps = draw.steps(s.outputs, grad.sizes), pyramid_steps = draw.steps(s.concatenated(), {});
  Buffer x_buffer(type, layout, x), map_buffer(type, layout, map), grad_buffer(type, layout, grad);
  Buffer weight_buffer(type, Layout::contiguous, weight), pointwise_buffer(type, Layout::contiguous, pointwise);

  auto pyramid = described<espk::SpatialPyramid>(s, type, layout);
  pyramid.x = x_buffer.data();
  pyramid.weight = weight_buffer.data();
  check("spatial_pyramid", s, setting, kernels::spatial_pyramid, pyramid, &espk::SpatialPyramid::out,
        spatial_pyramid(s, x, weight));

  auto to_input = described<espk::SpatialPyramidBackwardInput>(s, type, layout);
  to_input.grad = map_buffer.data();
  to_input.weight = weight_buffer.data();
  check("spatial_pyramid_backward_input", s, setting, kernels::spatial_pyramid_backward_input, to_input,
        &espk::SpatialPyramidBackwardInput::grad_x, pyramid_gradient_of_input(s, map, weight));

  auto to_weight = described<espk::SpatialPyramidBackwardWeight>(s, type, layout);
  to_weight.grad = map_buffer.data();
  to_weight.x = x_buffer.data();
  Tensor grad_weight = pyramid_gradient_of_weight(s, map, x);
  grad_weight.sizes = {grad_weight.count()};  // contiguous in either layout
  check("spatial_pyramid_backward_weight", s, setting, kernels::spatial_pyramid_backward_weight, to_weight,
        &espk::SpatialPyramidBackwardWeight::grad_weight, grad_weight);

  // Every step of an epilogue alone, all, and none.
  const Tensor product = group_pointwise(s, map, pointwise);
  for (const Steps& some : {Steps{}, Steps{steps.scale, {}, {}, {}}, Steps{{}, steps.shift, {}, {}},
                            Steps{{}, {}, steps.slope, {}}, Steps{{}, {}, {}, steps.residual}, steps}) {
    const EpilogueBuffers buffers(type, layout, some);
    auto forward = described<espk::GroupPointwise>(s, type, layout);
    forward.x = map_buffer.data();
    forward.weight = pointwise_buffer.data();
    forward.epilogue = buffers.epilogue;
    forward.tf32 = tf32;
    check("group_pointwise", s, setting, kernels::group_pointwise, forward, &espk::GroupPointwise::out,
          epilogue(product, some));
  }

  auto transposed = described<espk::GroupPointwise>(s, type, layout);
  std::swap(transposed.in_channels, transposed.out_channels);
  transposed.weight_transposed = true;
  transposed.tf32 = tf32;
  transposed.x = grad_buffer.data();
  transposed.weight = pointwise_buffer.data();
  check("group_pointwise, transposed", s, setting, kernels::group_pointwise, transposed, &espk::GroupPointwise::out,
        pointwise_gradient_of_input(s, grad, pointwise));

  auto pointwise_to_weight = described<espk::GroupPointwiseBackwardWeight>(s, type, layout);
  pointwise_to_weight.grad = grad_buffer.data();
  pointwise_to_weight.x = map_buffer.data();
  pointwise_to_weight.tf32 = tf32;
  check("group_pointwise_backward_weight", s, setting, kernels::group_pointwise_backward_weight, pointwise_to_weight,
        &espk::GroupPointwiseBackwardWeight::grad_weight, pointwise_gradient_of_weight(s, grad, map));

  // Between its products a unit keeps numbers of the element type, as tensor cores take them; of tf32 they take less.
  for (const auto& [inner, outer] : {std::pair{Steps{}, Steps{}}, {pyramid_steps, steps}}) {
    const EpilogueBuffers inner_buffers(type, layout, inner), outer_buffers(type, layout, outer);
    auto unit = described<espk::PyramidPointwise>(s, type, layout);
    unit.x = x_buffer.data();
    unit.weight = weight_buffer.data();
    unit.pyramid_epilogue = inner_buffers.epilogue;
    unit.pointwise_channels = s.outputs;
    unit.groups = s.groups;
    unit.pointwise_weight = pointwise_buffer.data();
    unit.epilogue = outer_buffers.epilogue;
    unit.tf32 = tf32;
    const Tensor z = factor(type, epilogue(spatial_pyramid(s, x, weight), inner));
    check("pyramid_pointwise", s, setting, kernels::pyramid_pointwise, unit, &espk::PyramidPointwise::out,
          epilogue(group_pointwise(s, z, pointwise), outer));
  }
}

// The pointwise convolution of `inputs` channels to `outputs` as a case of its own: a pyramid of one branch gives the
// sizes that group_pointwise of naive.h reads.
Case reduction(const Case& s, int64_t inputs, int64_t groups) {
  return {s.name, s.batch, inputs, s.height, s.width, {1}, 1, true, groups, s.channels};
}

void check_units(const Case& s, Type type, Layout layout, const Setting& setting) {
  Draw draw;
  const int64_t reduce_groups = s.channels % 2 ? 1 : 2, inputs = 6 * reduce_groups;
  const Case reduce = reduction(s, inputs, reduce_groups);
  // Multiples of nine, whose means are whole.
  Tensor x = draw.integers({s.batch, inputs, s.height, s.width});
  for (double& value : x.values) value *= 9;
  const Tensor reduce_weight = draw.one_of({0, 0, 1, -1, 0.5}, s.channels * 6);
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor expand = draw.integers({s.outputs, s.concatenated() / s.groups});
  const Steps reduce_steps{{}, draw.integers({s.channels}), draw.one_of({0.5, 0}, s.channels), {}};
  const Steps pyramid_steps = draw.steps(s.concatenated(), {});
  Steps steps = draw.steps(s.outputs, {s.batch, s.outputs, s.out_height(), s.out_width()});
  steps.scale = {};
  Tensor matrix = reduce_weight;
  matrix.sizes = {s.channels, 6};

  const Buffer x_buffer(type, layout, x), reduce_buffer(type, Layout::contiguous, matrix);
  const Buffer weight_buffer(type, Layout::contiguous, weight), expand_buffer(type, Layout::contiguous, expand);
  const EpilogueBuffers reduce_buffers(type, layout, reduce_steps), pyramid_buffers(type, layout, pyramid_steps);
  const EpilogueBuffers buffers(type, layout, steps);
  auto fill = [&](espk::Eesp& unit) {
    unit.x = x_buffer.data();
    unit.in_channels = inputs;
    unit.reduce_groups = reduce_groups;
    unit.reduce_weight = reduce_buffer.data();
    unit.reduce_epilogue = reduce_buffers.epilogue;
    unit.weight = weight_buffer.data();
    unit.pyramid_epilogue = pyramid_buffers.epilogue;
    unit.pointwise_channels = s.outputs;
    unit.groups = s.groups;
    unit.pointwise_weight = expand_buffer.data();
    unit.tf32 = tf32;
  };
  const Tensor r = rounded(type, epilogue(group_pointwise(reduce, x, matrix), reduce_steps));
  const Tensor z = factor(type, epilogue(spatial_pyramid(s, r, weight), pyramid_steps));
  const Tensor product = group_pointwise(s, z, expand);

  auto unit = described<espk::Eesp>(s, type, layout);
  fill(unit);
  unit.epilogue = buffers.epilogue;
  check("eesp", s, setting, kernels::eesp, unit, &espk::Eesp::out, epilogue(product, steps));

  if (s.stride != 2) return;
  const int64_t channels = inputs + s.outputs;
  const Tensor image = draw.integers({s.batch, 3, s.out_height(), s.out_width()});
  const Tensor shortcut = draw.integers({channels, 3});
  const Steps shifted{{}, draw.integers({channels}), {}, {}}, sloped{{}, {}, draw.one_of({0.5, -0.5}, channels), {}};
  const Case small{s.name, s.batch, 3, s.out_height(), s.out_width(), {1}, 1, true, 1, channels};
  const Buffer image_buffer(type, layout, image), shortcut_buffer(type, Layout::contiguous, shortcut);
  const EpilogueBuffers shift_buffers(type, layout, shifted), slope_buffers(type, layout, sloped);
  const Steps shift_alone{{}, steps.shift, {}, {}};
  const Tensor both = concatenated(average_pool(x), epilogue(product, shift_alone));
  for (const bool with_image : {false, true}) {
    auto sampler = described<espk::DownSampler>(s, type, layout);
    fill(sampler);
    sampler.epilogue.shift = buffers.epilogue.shift;
    sampler.slope = slope_buffers.epilogue.slope;
    Steps last = sloped;
    if (with_image) {
      sampler.shortcut = {image_buffer.data(), shortcut_buffer.data(), shift_buffers.epilogue.shift, 3};
      last.residual = epilogue(group_pointwise(small, image, shortcut), shifted);
    }
    check("down_sampler", s, setting, kernels::down_sampler, sampler, &espk::DownSampler::out, epilogue(both, last));
  }
}

// How far results may be from the reference, which rounds where the kernels do, relative to a tensor's norm. Sums of up
// to 2000 numbers err by their square root times half a unit of the compute type; where that turns the rounding of a
// number that is kept, it is off by one unit of its type, a few in a hundred of them.
double tolerance(Type type) {
  switch (type) {
    case Type::float64: return 1e-12;
    case Type::float32: return tf32 ? 1e-3 : 2e-5;
    case Type::float16: return 1e-3;
    default: return 8e-3;
  }
}

std::string differs(const char* what, const std::vector<double>& found, const std::vector<double>& expected,
                    double tolerance) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  // A NaN compares with nothing.
  if (error <= tolerance * tolerance * size) return "";
  return std::string(what) + " is off by " + std::to_string(std::sqrt(error / size) / tolerance) + " tolerances; ";
}

// A vector of the unit's channels in memory.
Buffer vector_of(Type type, const std::vector<double>& values) {
  Tensor t({static_cast<int64_t>(values.size())});
  t.values = values;
  return Buffer(type, Layout::contiguous, t);
}

std::vector<double> numbers_in(const Buffer& buffer, int64_t first, int64_t count) {
  std::vector<double> numbers;
  for (int64_t i = first; i < first + count; ++i) numbers.push_back(buffer.get(i));
  return numbers;
}

void check_training(const UnitCase& u, Type type, const Setting& setting) {
  constexpr Layout last = Layout::channels_last;
  const Type compute = type == Type::float64 ? Type::float64 : Type::float32;
  const Case& s = u.s;
  // Far from zero, but where the type holds the numbers' differences.
  const bool holds = type == Type::float64 || (type == Type::float32 && !tf32);
  UnitReference r = drawn(u, holds ? u.mean : std::fmin(u.mean, 8));
  // There a number of a map is off by a unit of 1e4, beside a deviation of about one.
  const bool far = u.mean > 8 && holds;
  const double close = !far ? tolerance(type) : type == Type::float64 ? 1e-10 : 2e-3;
  std::vector<double> weights, biases, slopes, means, variances;
  for (const NormReference& norm : r.norms) {
    weights.insert(weights.end(), norm.weight.begin(), norm.weight.end());
    biases.insert(biases.end(), norm.bias.begin(), norm.bias.end());
    if (norm.has_prelu) slopes.insert(slopes.end(), norm.slope.begin(), norm.slope.end());
    means.insert(means.end(), norm.mean.begin(), norm.mean.end());
    variances.insert(variances.end(), norm.variance.begin(), norm.variance.end());
  }
  r.run(u, [&](Tensor t) { return rounded(type, std::move(t)); }, [&](const Tensor& t) { return factor(type, t); });

  const Buffer x(type, last, r.x), grad(type, last, r.grad);
  auto dense = [&](const Tensor& t) { return Buffer(type, Layout::contiguous, t); };
  const Buffer reduce_weight = dense(r.reduce_weight), weight = dense(r.weight), expand_weight = dense(r.expand_weight);
  const Buffer norm_weight = vector_of(compute, weights), norm_bias = vector_of(compute, biases);
  const Buffer slope = vector_of(compute, slopes);
  const Buffer running_mean = vector_of(Type::float64, means), running_variance = vector_of(Type::float64, variances);
  auto fill = [&](auto& p) {
    p.in_channels = u.inputs;
    p.pointwise_channels = s.outputs;
    p.reduce_groups = u.reduce_groups;
    p.groups = s.groups;
    p.x = x.data();
    p.reduce_weight = reduce_weight.data();
    p.weight = weight.data();
    p.expand_weight = expand_weight.data();
    p.norm_weight = norm_weight.data();
    p.norm_bias = norm_bias.data();
    p.slope = slope.data();
    for (int i = 0; i < 3; ++i) {
      p.eps[i] = r.norms[i].eps;
      p.batch_statistics[i] = r.norms[i].batch_statistics;
    }
    p.has_prelu = u.has_prelu;
    p.residual = u.residual;
    p.tf32 = tf32;
  };
  const int64_t channels = static_cast<int64_t>(weights.size());
  Buffer result(type, last, r.result.sizes), reduced(type, last, r.reduced.sizes);
  Buffer concatenated(type, last, r.concatenated.sizes), expanded(type, last, r.expanded.sizes);
  Buffer statistics(Type::float64, Layout::contiguous, {2, channels});
  std::string wrong;
  auto run = [&](const auto& kernel, const auto& problem) {
    const Scratch scratch(kernel.scratch_bytes(problem));
    const espk::cuda::Outcome outcome = kernel.run(problem, scratch.data, nullptr);
    if (outcome.failed()) wrong += std::string(outcome.kernel) + ": " + outcome.reason + "; ";
  };
  auto compare = [&](const char* what, const Buffer& found, const Tensor& expected) {
    wrong += differs(what, numbers_in(found, 0, expected.count()), expected.values, close);
    if (!found.guards_intact()) wrong += std::string("memory beside ") + what + " was written; ";
  };

  auto forward = described<kernels::EespTraining>(s, type, last);
  fill(forward);
  forward.running_mean = static_cast<const double*>(running_mean.data());
  forward.running_variance = static_cast<const double*>(running_variance.data());
  forward.result = result.data();
  forward.reduced = reduced.data();
  forward.concatenated = u.saves_concatenated ? concatenated.data() : nullptr;
  forward.expanded = expanded.data();
  forward.statistics = static_cast<double*>(statistics.data());
  run(kernels::eesp_training, forward);
  compare("result", result, r.result);
  compare("reduced", reduced, r.reduced);
  if (u.saves_concatenated) compare("concatenated", concatenated, r.concatenated);
  compare("expanded", expanded, r.expanded);

  // The moments of the map that was kept, whatever it is: one by one, however far they are from zero.
  int64_t first = 0;
  for (int i = 0; i < 3; ++i) {
    NormReference norm = r.norms[i];
    const Buffer& map = i == 0 ? reduced : i == 1 ? concatenated : expanded;
    Tensor kept = i == 0 ? r.reduced : i == 1 ? r.concatenated : r.expanded;
    if (i != 1 || u.saves_concatenated) kept.values = numbers_in(map, 0, kept.count());
    norm.take(kept);
    for (size_t c = 0; c < norm.weight.size(); ++c, ++first) {
      const double mean = statistics.get(first), variance = statistics.get(channels + first);
      const double few = i == 1 && !u.saves_concatenated ? close : 1e-5;
      const bool fine =
          std::fabs(mean - norm.mean[c]) <= few * (std::fabs(norm.mean[c]) + std::sqrt(norm.variance[c])) &&
          std::fabs(variance - norm.variance[c]) <= few * norm.variance[c];
      if (!fine) wrong += "moments of channel " + std::to_string(first) + "; ";
    }
  }

  // All gradients, and in one setting each alone: what is not wanted must not be missed by what is.
  for (int wanted = -1; wanted < (setting.backwards ? 0 : 5); ++wanted) {
    auto wants = [&](int i) { return wanted < 0 || wanted == i; };
    Buffer grad_x(type, last, r.grad_x.sizes), grad_reduce(type, Layout::contiguous, r.reduce_weight.sizes);
    Buffer grad_weight(type, Layout::contiguous, r.weight.sizes);
    Buffer grad_expand(type, Layout::contiguous, r.expand_weight.sizes);
    Buffer grad_norm_weight(compute, Layout::contiguous, {channels});
    Buffer grad_norm_bias(compute, Layout::contiguous, {channels});
    Buffer grad_slope(compute, Layout::contiguous, {static_cast<int64_t>(slopes.size())});
    auto backward = described<kernels::EespTrainingBackward>(s, type, last);
    fill(backward);
    backward.grad = grad.data();
    backward.reduced = reduced.data();
    backward.concatenated = forward.concatenated;
    backward.expanded = expanded.data();
    backward.statistics = forward.statistics;
    backward.grad_x = wants(0) ? grad_x.data() : nullptr;
    backward.grad_reduce = wants(1) ? grad_reduce.data() : nullptr;
    backward.grad_weight = wants(2) ? grad_weight.data() : nullptr;
    backward.grad_expand = wants(3) ? grad_expand.data() : nullptr;
    backward.grad_norm_weight = wants(4) ? grad_norm_weight.data() : nullptr;
    backward.grad_norm_bias = wants(4) ? grad_norm_bias.data() : nullptr;
    backward.grad_slope = wants(4) ? grad_slope.data() : nullptr;
    run(kernels::eesp_training_backward, backward);
    if (wants(0)) compare("grad_x", grad_x, r.grad_x);
    // Far from zero it is a sum of gradients, which is zero, times 1e4: nothing but rounding.
    if (wants(1) && !far) compare("grad_reduce", grad_reduce, r.grad_reduce);
    if (wants(2)) compare("grad_weight", grad_weight, r.grad_weight);
    if (wants(3)) compare("grad_expand", grad_expand, r.grad_expand);
    int64_t at = 0;
    for (const NormReference& norm : r.norms) {
      const int64_t count = static_cast<int64_t>(norm.weight.size());
      if (wants(4)) {
        wrong += differs("grad_norm_weight", numbers_in(grad_norm_weight, at, count), norm.grad_weight, close);
        wrong += differs("grad_norm_bias", numbers_in(grad_norm_bias, at, count), norm.grad_bias, close);
        if (norm.has_prelu) {
          wrong += differs("grad_slope", numbers_in(grad_slope, at, count), norm.grad_slope, close);
        }
      }
      at += count;
    }
  }
  ++checks;
  if (wrong.empty()) return;
  ++failures;
  std::printf("FAIL unit in training, %s, type %d, %s: %s\n", s.name, static_cast<int>(type), setting.name,
              wrong.c_str());
}

}  // namespace

// The type to run, as its number in espk::Type, or 4 for float32 in tf32, so that several programmes share the machine's
// cores.
int main(int, char** argv) {
  const int number = argv[1][0] - '0';
  tf32 = number == 4;
  const Type type = tf32 ? Type::float32 : static_cast<Type>(number);
  // float64 and float16 go the ways of float32 and bfloat16: each of their cases runs in one of the settings, by turns.
  const bool by_turns = type == Type::float64 || type == Type::float16;
  const std::ptrdiff_t settings = std::end(kSettings) - std::begin(kSettings);
  for (const Setting& setting : kSettings) {
    auto is_due = [&](std::ptrdiff_t place) { return !by_turns || place % settings == &setting - kSettings; };
    Buffer::aligned = setting.aligned ? 16 : 0;
    emulation::backwards = setting.backwards;
    emulation::enough_blocks = setting.enough_blocks;
    emulation::shared_memory_of_architecture = setting.shared_memory;
    emulation::shared_memory_allowed.clear();
    for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
      for (const Case& s : kCases) {
        // That one is for the caches of a CPU, and long here.
        if (s.concatenated() * s.height * s.width > 100'000 || !is_due(&s - kCases)) continue;
        check_all(s, type, layout, setting);
        check_units(s, type, layout, setting);
      }
    }
    for (const UnitCase& u : kUnits) {
      if (is_due(&u - kUnits)) check_training(u, type, setting);
    }
  }
  std::printf("%lld launches, %d checks, %d failures\n", static_cast<long long>(emulation::launches), checks, failures);
  return failures ? 1 : 0;
}
