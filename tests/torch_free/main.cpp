// Runs every kernel of one instruction set over edge shapes, without torch: for sanitizers and for other machines.
// Whole numbers make every sum exact, so that each result is the naive one rounded once.
#include <sys/mman.h>

#include "check.h"
#include "decoder.h"
#include "inference.h"
#include "pixels.h"
#include "recurrence.h"
#include "training.h"

namespace espk {

// A fresh block of exactly the bytes asked for, its memory NaN: reads past its end or of what it held before show.
void* scratch(Slot slot, int64_t bytes) {
  struct Block {
    void* data = nullptr;
    ~Block() { std::free(data); }
  };
  thread_local std::map<Slot, Block> blocks;
  Block& block = blocks[slot];
  std::free(block.data);
  if (posix_memalign(&block.data, 64, static_cast<size_t>(bytes > 0 ? bytes : 1))) std::abort();
  std::memset(block.data, 0xff, static_cast<size_t>(bytes));
  return block.data;
}

}  // namespace espk

namespace {

void check_all(const Case& s, Type type, Layout layout) {
  Draw draw;
  const int64_t height = s.out_height(), width = s.out_width();
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Tensor weight = draw.integers({s.branches(), s.channels, 3, 3});
  const Tensor map = draw.integers({s.batch, s.concatenated(), height, width});
  const Tensor pointwise = draw.integers({s.outputs, s.concatenated() / s.groups});
  const Tensor grad = draw.integers({s.batch, s.outputs, height, width});
  const Steps steps = draw.steps(s.outputs, grad.sizes), pyramid_steps = draw.steps(s.concatenated(), {});
  Buffer x_buffer(type, layout, x), map_buffer(type, layout, map), grad_buffer(type, layout, grad);
  Buffer weight_buffer(type, Layout::contiguous, weight), pointwise_buffer(type, Layout::contiguous, pointwise);

  auto pyramid = described<espk::SpatialPyramid>(s, type, layout);
  pyramid.x = x_buffer.data();
  pyramid.weight = weight_buffer.data();
  check("spatial_pyramid", s, kernels.spatial_pyramid, pyramid, &espk::SpatialPyramid::out,
        spatial_pyramid(s, x, weight));

  auto to_input = described<espk::SpatialPyramidBackwardInput>(s, type, layout);
  to_input.grad = map_buffer.data();
  to_input.weight = weight_buffer.data();
  check("spatial_pyramid_backward_input", s, kernels.spatial_pyramid_backward_input, to_input,
        &espk::SpatialPyramidBackwardInput::grad_x, pyramid_gradient_of_input(s, map, weight));

  auto to_weight = described<espk::SpatialPyramidBackwardWeight>(s, type, layout);
  to_weight.grad = map_buffer.data();
  to_weight.x = x_buffer.data();
  Tensor grad_weight = pyramid_gradient_of_weight(s, map, x);
  grad_weight.sizes = {grad_weight.count()};  // contiguous in either layout
  check("spatial_pyramid_backward_weight", s, kernels.spatial_pyramid_backward_weight, to_weight,
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
    check("group_pointwise", s, kernels.group_pointwise, forward, &espk::GroupPointwise::out, epilogue(product, some));
  }

  auto transposed = described<espk::GroupPointwise>(s, type, layout);
  std::swap(transposed.in_channels, transposed.out_channels);
  transposed.weight_transposed = true;
  transposed.x = grad_buffer.data();
  transposed.weight = pointwise_buffer.data();
  check("group_pointwise, transposed", s, kernels.group_pointwise, transposed, &espk::GroupPointwise::out,
        pointwise_gradient_of_input(s, grad, pointwise));

  auto pointwise_to_weight = described<espk::GroupPointwiseBackwardWeight>(s, type, layout);
  pointwise_to_weight.grad = grad_buffer.data();
  pointwise_to_weight.x = map_buffer.data();
  check("group_pointwise_backward_weight", s, kernels.group_pointwise_backward_weight, pointwise_to_weight,
        &espk::GroupPointwiseBackwardWeight::grad_weight, pointwise_gradient_of_weight(s, grad, map));

  for (const auto& [inner, outer] : {std::pair{Steps{}, Steps{}}, {pyramid_steps, steps}}) {
    const EpilogueBuffers inner_buffers(type, layout, inner), outer_buffers(type, layout, outer);
    auto unit = described<espk::PyramidPointwise>(s, type, layout);
    unit.x = x_buffer.data();
    unit.weight = weight_buffer.data();
    unit.pyramid_epilogue = inner_buffers.epilogue;
    unit.pointwise_weight = pointwise_buffer.data();
    unit.epilogue = outer_buffers.epilogue;
    const Tensor z = epilogue(spatial_pyramid(s, x, weight), inner);
    check("pyramid_pointwise", s, kernels.pyramid_pointwise, unit, &espk::PyramidPointwise::out,
          epilogue(group_pointwise(s, z, pointwise), outer));
  }
}

// Memory that is only there where it is touched, so that a map may have more elements than 32 bits count.
class Reserved {
 public:
  explicit Reserved(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reserved() {
    if (there()) munmap(data_, bytes_);
  }
  Reserved(const Reserved&) = delete;
  bool there() const { return data_ != MAP_FAILED; }
  unsigned char* data() const { return static_cast<unsigned char*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// The last image of a batch of more than 2^31 elements gives the bits that it gives alone. Only the units of work at the
// end run, as many as one image has and a few more.
template <class Problem>
void check_last_image(const char* what, const espk::Kernel<Problem>& kernel, Problem problem,
                      const void* Problem::* input, void* Problem::* result, int64_t in_image, int64_t out_image) {
  const int64_t size = espk::bytes_of(problem.type), batch = problem.batch;
  const Reserved x(batch * in_image * size), out(batch * out_image * size);
  if (!x.there() || !out.there()) {
    std::printf("SKIP %s above 2^31 elements: no address space\n", what);
    return;
  }
  unsigned char* last = x.data() + (batch - 1) * in_image * size;
  for (int64_t i = 0; i < in_image; ++i) write(problem.type, last + i * size, static_cast<double>(i % 7) - 3);

  problem.batch = 1;
  std::vector<unsigned char> alone(static_cast<size_t>(out_image * size));
  problem.*input = last;
  problem.*result = alone.data();
  auto shared = aligned(kernel.shared_bytes(problem));
  kernel.before(problem, shared.get());
  const int64_t units_of_one = kernel.units(problem);
  kernel.run(problem, shared.get(), 0, units_of_one);

  problem.batch = batch;
  problem.*input = x.data();
  problem.*result = out.data();
  shared = aligned(kernel.shared_bytes(problem));
  kernel.before(problem, shared.get());
  const int64_t units = kernel.units(problem);
  kernel.run(problem, shared.get(), units - std::min(units, units_of_one + 2), units);
  ++checks;
  if (std::memcmp(out.data() + (batch - 1) * out_image * size, alone.data(), alone.size()) != 0) {
    ++failures;
    std::printf("FAIL %s: the last of %lld images of a huge batch differs\n", what, static_cast<long long>(batch));
  }
}

void check_huge(Layout layout) {
  constexpr Type type = Type::bfloat16;
  const Case s{"huge", (int64_t{1} << 31) / (4 * 32 * 32) + 3, 4, 32, 32, {1, 2, 3, 4}, 1, true, 4, 16};
  Draw draw;
  Buffer weight(type, Layout::contiguous, draw.integers({4, 4, 3, 3}));
  Buffer pointwise(type, Layout::contiguous, draw.integers({16, 4}));
  const int64_t narrow = 4 * 32 * 32, wide = 16 * 32 * 32;

  auto forward = described<espk::SpatialPyramid>(s, type, layout);
  forward.weight = weight.data();
  check_last_image("spatial_pyramid", kernels.spatial_pyramid, forward, &espk::SpatialPyramid::x,
                   &espk::SpatialPyramid::out, narrow, wide);
  auto backward = described<espk::SpatialPyramidBackwardInput>(s, type, layout);
  backward.weight = weight.data();
  check_last_image("spatial_pyramid_backward_input", kernels.spatial_pyramid_backward_input, backward,
                   &espk::SpatialPyramidBackwardInput::grad, &espk::SpatialPyramidBackwardInput::grad_x, wide, narrow);
  auto product = described<espk::GroupPointwise>(s, type, layout);
  product.weight = pointwise.data();
  check_last_image("group_pointwise", kernels.group_pointwise, product, &espk::GroupPointwise::x,
                   &espk::GroupPointwise::out, wide, wide);
  auto unit = described<espk::PyramidPointwise>(s, type, layout);
  unit.weight = weight.data();
  unit.pointwise_weight = pointwise.data();
  check_last_image("pyramid_pointwise", kernels.pyramid_pointwise, unit, &espk::PyramidPointwise::x,
                   &espk::PyramidPointwise::out, narrow, wide);
}

}  // namespace

int main(int, char** argv) {
  const bool huge = argv[1] && std::string(argv[1]) == "--huge";
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
    for (Type type : {Type::float32, Type::float64, Type::bfloat16, Type::float16}) {
      for (const Case& s : kCases) {
        // Stores past the cache want whole lines: every other case, those of several strips among them.
        Buffer::aligned = (&s - kCases) % 2 ? 0 : 64;
        check_all(s, type, layout);
        check_inference(s, type, layout);
        check_pixels(s, type, layout);
        check_decoder(s, type, layout);
        if (layout == Layout::channels_last) check_training(s, type);
      }
    }
    if (huge) check_huge(layout);
  }
  for (Type type : {Type::float32, Type::float64, Type::bfloat16, Type::float16}) {
    for (const RecurrentCase& s : kRecurrentCases) check_recurrence(type, s);
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}
