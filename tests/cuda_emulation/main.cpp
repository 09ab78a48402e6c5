// Runs every CUDA kernel over edge shapes on the CPU: each variant, aligned memory and not, threads in either order.
#include <string>

#include "cases.h"
#include "cuda/kernels.h"
#include "cuda_runtime.h"

namespace {

namespace kernels = espk::cuda;

int failures = 0, checks = 0;

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

template <class Problem>
void check(const char* what, const Case& s, const Setting& setting, const espk::cuda::Kernel<Problem>& kernel,
           Problem problem, void* Problem::* result, const Tensor& expected) {
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
    check("group_pointwise", s, setting, kernels::group_pointwise, forward, &espk::GroupPointwise::out,
          epilogue(product, some));
  }

  auto transposed = described<espk::GroupPointwise>(s, type, layout);
  std::swap(transposed.in_channels, transposed.out_channels);
  transposed.weight_transposed = true;
  transposed.x = grad_buffer.data();
  transposed.weight = pointwise_buffer.data();
  check("group_pointwise, transposed", s, setting, kernels::group_pointwise, transposed, &espk::GroupPointwise::out,
        pointwise_gradient_of_input(s, grad, pointwise));

  auto pointwise_to_weight = described<espk::GroupPointwiseBackwardWeight>(s, type, layout);
  pointwise_to_weight.grad = grad_buffer.data();
  pointwise_to_weight.x = map_buffer.data();
  check("group_pointwise_backward_weight", s, setting, kernels::group_pointwise_backward_weight, pointwise_to_weight,
        &espk::GroupPointwiseBackwardWeight::grad_weight, pointwise_gradient_of_weight(s, grad, map));
}

}  // namespace

// The type to run, as its number in espk::Type, so that several programmes share the machine's cores.
int main(int, char** argv) {
  const Type type = static_cast<Type>(argv[1][0] - '0');
  for (const Setting& setting : kSettings) {
    Buffer::aligned = setting.aligned;
    emulation::backwards = setting.backwards;
    emulation::enough_blocks = setting.enough_blocks;
    emulation::shared_memory_of_architecture = setting.shared_memory;
    emulation::shared_memory_allowed.clear();
    for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
      for (const Case& s : kCases) check_all(s, type, layout, setting);
    }
  }
  std::printf("%lld launches, %d checks, %d failures\n", static_cast<long long>(emulation::launches), checks, failures);
  return failures ? 1 : 0;
}
