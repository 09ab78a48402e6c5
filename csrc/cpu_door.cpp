// Where torch ends on the CPU: tensors become plain structs, checked once, and run on torch's own threads.
//
// The checks here keep memory safe whoever calls; the public functions in espkernels/ops.py have said the same, in
// better sentences, before.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace {

using espk::Layout;
using espk::Type;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
}

bool dense(const Tensor& t, const int (&order)[4]) {
  int64_t expected = 1;
  for (int i : order) {
    if (t.size(i) != 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

bool is_contiguous(const Tensor& t) { return t.numel() == 0 || dense(t, {3, 2, 1, 0}); }
bool is_channels_last(const Tensor& t) { return t.numel() == 0 || dense(t, {1, 3, 2, 0}); }

// espkernels.ops.layout_of gives the fake tensors the same answer.
Layout layout_of(const Tensor& t) {
  if (is_contiguous(t)) return Layout::contiguous;
  if (is_channels_last(t)) return Layout::channels_last;
  return t.size(1) > 1 && t.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

MemoryFormat format_of(Layout layout) {
  return layout == Layout::channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The map itself where it is dense in `layout`, else a dense copy.
Tensor dense_map(const Tensor& t, Layout layout) {
  const bool already = layout == Layout::channels_last ? is_channels_last(t) : is_contiguous(t);
  return already ? t : torch::stable::contiguous(t, format_of(layout));
}

// A weight or a vector, contiguous.
Tensor dense_weight(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty_map(std::vector<int64_t> sizes, const Tensor& like, Layout layout) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(layout));
}

void check_map(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4, name, ": expected a CPU tensor with 4 dimensions");
}

void check_same_type(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.is_cpu() && b.is_cpu(), "expected CPU tensors of one dtype");
}

// Runs a kernel: weights are prepared here, or come `prepared` in a pack; units of work go to torch's threads, each
// with enough to do that waking it pays (a thread costs about as much as 100 000 multiply-adds).
template <class Problem>
void launch(const espk::Kernel<Problem>& kernel, const Problem& problem, void* prepared = nullptr) {
  void* shared = prepared ? prepared : espk::scratch(espk::Slot::shared, kernel.shared_bytes(problem));
  if (!prepared) kernel.before(problem, shared);
  const int64_t units = kernel.units(problem);
  constexpr int64_t kWorthAThread = 100'000;
  const int64_t threads_worth = problem.multiply_adds() / kWorthAThread + 1;
  const int64_t grain = (units + threads_worth - 1) / threads_worth;
  if (units > 0) {
    torch::stable::parallel_for(0, units, grain > 0 ? grain : 1,
                                [&](int64_t begin, int64_t end) { kernel.run(problem, shared, begin, end); });
  }
  if (kernel.after) kernel.after(problem, shared);
}

// What a pack was made for; it stands in front of the prepared weights and takes one cache line of them.
struct alignas(64) PackLabel {
  const espk::Kernels* kernels;  // one table an instruction set, and none of another process
  int64_t type, layout, bytes, sizes[4];

  bool operator==(const PackLabel&) const = default;
};
static_assert(sizeof(PackLabel) == 64);

PackLabel label_of(const espk::GroupPointwise& p, int64_t bytes) {
  return {&espk::kernels(), int64_t(p.type), int64_t(p.layout), bytes, {p.groups, p.in_channels, p.out_channels, 0}};
}

PackLabel label_of(const espk::PyramidPointwise& p, int64_t bytes) {
  return {&espk::kernels(),
          int64_t(p.type),
          int64_t(p.layout),
          bytes,
          {p.groups, p.branches, p.channels, p.pointwise_channels}};
}

template <class Problem>
Tensor pack(const espk::Kernel<Problem>& kernel, const Problem& problem, const Tensor& like) {
  const int64_t bytes = kernel.shared_bytes(problem);
  Tensor packed = torch::stable::empty(std::vector<int64_t>{int64_t(sizeof(PackLabel)) + bytes}, ScalarType::Byte,
                                       std::nullopt, like.device());
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  const PackLabel label = label_of(problem, bytes);
  __builtin_memcpy(data, &label, sizeof label);
  kernel.before(problem, data + sizeof label);
  return packed;
}

// The prepared weights in a pack, or null where it does not fit this call.
template <class Problem>
void* prepared_in(const std::optional<Tensor>& packed, const espk::Kernel<Problem>& kernel, const Problem& problem) {
  if (!packed || !packed->is_cpu() || packed->scalar_type() != ScalarType::Byte || !packed->is_contiguous()) {
    return nullptr;
  }
  const int64_t bytes = kernel.shared_bytes(problem);
  char* data = static_cast<char*>(packed->data_ptr());
  if (packed->numel() != int64_t(sizeof(PackLabel)) + bytes || reinterpret_cast<uintptr_t>(data) % 64 != 0) {
    return nullptr;
  }
  PackLabel label;
  __builtin_memcpy(&label, data, sizeof label);
  return label == label_of(problem, bytes) ? data + sizeof label : nullptr;
}

// Everything of a pyramid but its pointers, from the sizes of its input.
void describe(espk::Pyramid& p, const Tensor& typed, Layout layout, std::vector<int64_t> sizes,
              const std::vector<int64_t>& dilations, int64_t stride, bool hff) {
  const int64_t branches = static_cast<int64_t>(dilations.size());
  STD_TORCH_CHECK(branches >= 1 && branches <= espk::kMaxBranches, "dilations: expected 1 to 8 of them");
  STD_TORCH_CHECK(stride >= 1, "stride: expected at least 1");
  p.type = type_of(typed);
  p.layout = layout;
  p.batch = sizes[0];
  p.channels = sizes[1];
  p.height = sizes[2];
  p.width = sizes[3];
  STD_TORCH_CHECK(p.channels >= 1 && p.height >= 1 && p.width >= 1, "expected at least one channel, row and column");
  p.out_height = (p.height - 1) / stride + 1;
  p.out_width = (p.width - 1) / stride + 1;
  p.branches = branches;
  // A step beyond the map leaves one output, whatever its length; tiles grow with it.
  const int64_t longest = p.height > p.width ? p.height : p.width;
  p.stride = stride < longest ? stride : longest;
  for (int64_t k = 0; k < branches; ++k) {
    STD_TORCH_CHECK(dilations[k] >= 1, "dilations: expected each at least 1");
    p.dilations[k] = dilations[k];
  }
  p.hff = hff;
}

void check_branch_weight(const Tensor& weight, const espk::Pyramid& p) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == p.branches && weight.size(1) == p.channels &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected [K, d, 3, 3] with K dilations and d channels");
}

void check_pyramid_grad(const Tensor& grad, const espk::Pyramid& p) {
  STD_TORCH_CHECK(grad.size(0) == p.batch && grad.size(1) == p.out_channels() && grad.size(2) == p.out_height &&
                      grad.size(3) == p.out_width,
                  "grad: expected [B, K*d, H', W'] of the pyramid's result");
}

Tensor spatial_pyramid(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations, int64_t stride,
                       bool hff) {
  check_map(x, "x");
  check_same_type(x, weight);
  espk::SpatialPyramid p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  const Tensor map = dense_map(x, p.layout), branches = dense_weight(weight);
  Tensor out = empty_map({p.batch, p.out_channels(), p.out_height, p.out_width}, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch(espk::kernels().spatial_pyramid, p);
  return out;
}

Tensor spatial_pyramid_backward_input(const Tensor& grad, const Tensor& weight, std::vector<int64_t> dilations,
                                      int64_t stride, bool hff, int64_t height, int64_t width) {
  check_map(grad, "grad");
  check_same_type(grad, weight);
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [K, d, 3, 3]");
  espk::SpatialPyramidBackwardInput p{};
  describe(p, grad, layout_of(grad), {grad.size(0), weight.size(1), height, width}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(grad, p.layout), branches = dense_weight(weight);
  Tensor grad_x = empty_map({p.batch, p.channels, p.height, p.width}, grad, p.layout);
  p.grad = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  launch(espk::kernels().spatial_pyramid_backward_input, p);
  return grad_x;
}

Tensor spatial_pyramid_backward_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> dilations,
                                       int64_t stride, bool hff) {
  check_map(grad, "grad");
  check_map(x, "x");
  check_same_type(grad, x);
  espk::SpatialPyramidBackwardWeight p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_pyramid_grad(grad, p);
  const Tensor map = dense_map(x, p.layout), grad_map = dense_map(grad, p.layout);
  Tensor grad_weight = empty_map({p.branches, p.channels, 3, 3}, x, Layout::contiguous);
  p.grad = grad_map.const_data_ptr();
  p.x = map.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  launch(espk::kernels().spatial_pyramid_backward_weight, p);
  return grad_weight;
}

// The tensors that an epilogue's pointers point into.
struct EpilogueTensors {
  std::optional<Tensor> scale, shift, residual, slope;
};

// Checks the four optional tensors and makes them dense. Vectors have one number a channel, in the compute type.
EpilogueTensors dense_epilogue(const Tensor& x, Layout layout, const std::vector<int64_t>& out_sizes,
                               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                               const std::optional<Tensor>& residual, const std::optional<Tensor>& slope) {
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  auto vector = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == out_sizes[1] && t->scalar_type() == compute,
                    "scale, shift, slope: expected one number a channel, float64 beside float64, else float32");
    return dense_weight(*t);
  };
  EpilogueTensors tensors{vector(scale), vector(shift), std::nullopt, vector(slope)};
  if (residual) {
    check_map(*residual, "residual");
    check_same_type(*residual, x);
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(residual->size(i) == out_sizes[i], "residual: expected the sizes of the result");
    }
    tensors.residual = dense_map(*residual, layout);
  }
  return tensors;
}

espk::Epilogue pointers(const EpilogueTensors& t) {
  auto pointer = [](const std::optional<Tensor>& tensor) -> const void* {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  return {pointer(t.scale), pointer(t.shift), pointer(t.slope), pointer(t.residual)};
}

void check_pointwise_weight(const Tensor& weight, int64_t in_channels, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 2 && groups >= 1 && in_channels >= groups && in_channels % groups == 0 &&
                      weight.size(0) >= groups && weight.size(0) % groups == 0 &&
                      weight.size(1) == in_channels / groups,
                  "pointwise weight: expected [N, M/groups] with groups dividing N and M");
}

Tensor group_pointwise(const Tensor& x, const Tensor& weight, int64_t groups, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, std::optional<Tensor> residual, std::optional<Tensor> slope,
                       std::optional<Tensor> packed) {
  check_map(x, "x");
  check_same_type(x, weight);
  check_pointwise_weight(weight, x.size(1), groups);
  espk::GroupPointwise p{};
  p.type = type_of(x);
  p.layout = layout_of(x);
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  p.in_channels = x.size(1);
  p.out_channels = weight.size(0);
  p.groups = groups;
  const std::vector<int64_t> sizes{x.size(0), weight.size(0), x.size(2), x.size(3)};
  const Tensor map = dense_map(x, p.layout), dense = dense_weight(weight);
  const EpilogueTensors epilogue = dense_epilogue(x, p.layout, sizes, scale, shift, residual, slope);
  Tensor out = empty_map(sizes, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.epilogue = pointers(epilogue);
  const auto& kernel = espk::kernels().group_pointwise;
  launch(kernel, p, prepared_in(packed, kernel, p));
  return out;
}

Tensor group_pointwise_backward_input(const Tensor& grad, const Tensor& weight, int64_t groups) {
  check_map(grad, "grad");
  check_same_type(grad, weight);
  STD_TORCH_CHECK(weight.dim() == 2 && groups >= 1 && weight.size(1) >= 1 && grad.size(1) == weight.size(0) &&
                      weight.size(0) >= groups && weight.size(0) % groups == 0,
                  "grad [B, N, H, W] and weight [N, M/groups] disagree");
  espk::GroupPointwise p{};
  p.type = type_of(grad);
  p.layout = layout_of(grad);
  p.batch = grad.size(0);
  p.pixels = grad.size(2) * grad.size(3);
  p.in_channels = grad.size(1);
  p.out_channels = weight.size(1) * groups;
  p.groups = groups;
  p.weight_transposed = true;
  const Tensor map = dense_map(grad, p.layout), dense = dense_weight(weight);
  Tensor grad_x = empty_map({grad.size(0), p.out_channels, grad.size(2), grad.size(3)}, grad, p.layout);
  p.x = map.const_data_ptr();
  p.weight = dense.const_data_ptr();
  p.out = grad_x.mutable_data_ptr();
  launch(espk::kernels().group_pointwise, p);
  return grad_x;
}

Tensor group_pointwise_backward_weight(const Tensor& grad, const Tensor& x, int64_t groups) {
  check_map(grad, "grad");
  check_map(x, "x");
  check_same_type(grad, x);
  STD_TORCH_CHECK(groups >= 1 && grad.size(1) % groups == 0 && x.size(1) % groups == 0 && grad.size(1) >= groups &&
                      x.size(1) >= groups && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "grad [B, N, H, W] and x [B, M, H, W] disagree");
  espk::GroupPointwiseBackwardWeight p{};
  p.type = type_of(x);
  p.layout = layout_of(x);
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  p.in_channels = x.size(1);
  p.out_channels = grad.size(1);
  p.groups = groups;
  const Tensor map = dense_map(x, p.layout), grad_map = dense_map(grad, p.layout);
  Tensor grad_weight = torch::stable::empty(std::vector<int64_t>{p.out_channels, p.in_channels / groups},
                                            x.scalar_type(), std::nullopt, x.device());
  p.grad = grad_map.const_data_ptr();
  p.x = map.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  launch(espk::kernels().group_pointwise_backward_weight, p);
  return grad_weight;
}

Tensor pyramid_pointwise(const Tensor& x, const Tensor& weight, std::vector<int64_t> dilations,
                         const Tensor& pointwise_weight, int64_t groups, std::optional<Tensor> pyramid_scale,
                         std::optional<Tensor> pyramid_shift, std::optional<Tensor> pyramid_slope,
                         std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                         std::optional<Tensor> slope, int64_t stride, bool hff, std::optional<Tensor> packed) {
  check_map(x, "x");
  check_same_type(x, weight);
  check_same_type(x, pointwise_weight);
  espk::PyramidPointwise p{};
  describe(p, x, layout_of(x), {x.size(0), x.size(1), x.size(2), x.size(3)}, dilations, stride, hff);
  check_branch_weight(weight, p);
  check_pointwise_weight(pointwise_weight, p.out_channels(), groups);
  p.groups = groups;
  p.pointwise_channels = pointwise_weight.size(0);
  const Tensor map = dense_map(x, p.layout), branches = dense_weight(weight), dense = dense_weight(pointwise_weight);
  const std::vector<int64_t> concatenated{p.batch, p.out_channels(), p.out_height, p.out_width};
  const std::vector<int64_t> sizes{p.batch, p.pointwise_channels, p.out_height, p.out_width};
  const EpilogueTensors first =
      dense_epilogue(x, p.layout, concatenated, pyramid_scale, pyramid_shift, std::nullopt, pyramid_slope);
  const EpilogueTensors second = dense_epilogue(x, p.layout, sizes, scale, shift, residual, slope);
  Tensor out = empty_map(sizes, x, p.layout);
  p.x = map.const_data_ptr();
  p.weight = branches.const_data_ptr();
  p.pointwise_weight = dense.const_data_ptr();
  p.pyramid_epilogue = pointers(first);
  p.epilogue = pointers(second);
  p.out = out.mutable_data_ptr();
  const auto& kernel = espk::kernels().pyramid_pointwise;
  launch(kernel, p, prepared_in(packed, kernel, p));
  return out;
}

Layout named_layout(bool channels_last) { return channels_last ? Layout::channels_last : Layout::contiguous; }

Tensor pack_group_pointwise(const Tensor& weight, int64_t groups, bool channels_last) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && groups >= 1, "weight: expected a CPU tensor [N, M/groups]");
  check_pointwise_weight(weight, weight.size(1) * groups, groups);
  espk::GroupPointwise p{};
  p.type = type_of(weight);
  p.layout = named_layout(channels_last);
  p.in_channels = weight.size(1) * groups;
  p.out_channels = weight.size(0);
  p.groups = groups;
  const Tensor dense = dense_weight(weight);
  p.weight = dense.const_data_ptr();
  return pack(espk::kernels().group_pointwise, p, weight);
}

Tensor pack_pyramid_pointwise(const Tensor& weight, const Tensor& pointwise_weight, int64_t groups,
                              std::optional<Tensor> pyramid_scale, std::optional<Tensor> pyramid_shift,
                              std::optional<Tensor> pyramid_slope, bool channels_last) {
  check_same_type(weight, pointwise_weight);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(0) <= espk::kMaxBranches,
                  "weight: expected [K, d, 3, 3]");
  espk::PyramidPointwise p{};
  const std::vector<int64_t> dilations(static_cast<size_t>(weight.size(0)), 1);
  describe(p, weight, named_layout(channels_last), {1, weight.size(1), 1, 1}, dilations, 1, true);
  check_branch_weight(weight, p);
  check_pointwise_weight(pointwise_weight, p.out_channels(), groups);
  p.groups = groups;
  p.pointwise_channels = pointwise_weight.size(0);
  const Tensor branches = dense_weight(weight), dense = dense_weight(pointwise_weight);
  const EpilogueTensors epilogue = dense_epilogue(weight, p.layout, {1, p.out_channels(), 1, 1}, pyramid_scale,
                                                  pyramid_shift, std::nullopt, pyramid_slope);
  p.weight = branches.const_data_ptr();
  p.pointwise_weight = dense.const_data_ptr();
  p.pyramid_epilogue = pointers(epilogue);
  return pack(espk::kernels().pyramid_pointwise, p, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  m.impl("spatial_pyramid", TORCH_BOX(&spatial_pyramid));
  m.impl("spatial_pyramid_backward_input", TORCH_BOX(&spatial_pyramid_backward_input));
  m.impl("spatial_pyramid_backward_weight", TORCH_BOX(&spatial_pyramid_backward_weight));
  m.impl("group_pointwise", TORCH_BOX(&group_pointwise));
  m.impl("group_pointwise_backward_input", TORCH_BOX(&group_pointwise_backward_input));
  m.impl("group_pointwise_backward_weight", TORCH_BOX(&group_pointwise_backward_weight));
  m.impl("pyramid_pointwise", TORCH_BOX(&pyramid_pointwise));
  m.impl("pack_group_pointwise", TORCH_BOX(&pack_group_pointwise));
  m.impl("pack_pyramid_pointwise", TORCH_BOX(&pack_pyramid_pointwise));
}
