// What every door asks of its tensors: dtype, layout, sizes, dense memory; and how they become the structs of shapes.h.
//
// The checks here keep memory safe whoever calls; the public functions in espkernels/ops.py have said the same, in
// better sentences, before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "huge_pages.h"
#include "shapes.h"

namespace espk {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
}

inline bool dense(const Tensor& t, const int (&order)[4]) {
  int64_t expected = 1;
  for (int i : order) {
    if (t.size(i) != 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

inline bool is_contiguous(const Tensor& t) { return t.numel() == 0 || dense(t, {3, 2, 1, 0}); }
inline bool is_channels_last(const Tensor& t) { return t.numel() == 0 || dense(t, {1, 3, 2, 0}); }

// espkernels.ops.layout_of gives the fake tensors the same answer.
inline Layout layout_of(const Tensor& t) {
  if (is_contiguous(t)) return Layout::contiguous;
  if (is_channels_last(t)) return Layout::channels_last;
  return t.size(1) > 1 && t.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

inline MemoryFormat format_of(Layout layout) {
  return layout == Layout::channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The map itself where it is dense in `layout`, else a dense copy.
inline Tensor dense_map(const Tensor& t, Layout layout) {
  const bool already = layout == Layout::channels_last ? is_channels_last(t) : is_contiguous(t);
  return already ? t : torch::stable::contiguous(t, format_of(layout));
}

// A weight or a vector, contiguous.
inline Tensor dense_weight(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor empty_map(std::vector<int64_t> sizes, const Tensor& like, Layout layout) {
  Tensor map =
      torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(layout));
  if (map.is_cpu()) prefer_huge_pages(map.mutable_data_ptr(), map.numel() * bytes_of(type_of(map)));
  return map;
}

// Each library has one device and defines these for it: whether a kernel that it starts now may touch the tensor's memory,
// and the device's name.
bool is_here(const Tensor& t);
extern const char* const device_name;

inline void check_map(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_here(t) && t.dim() == 4, name, ": expected a ", device_name, " tensor with 4 dimensions");
}

inline void check_same_type(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && is_here(a) && is_here(b), "expected ", device_name,
                  " tensors of one dtype");
}

// Everything of a pyramid but its pointers, from the sizes of its input.
inline void describe(Pyramid& p, const Tensor& typed, Layout layout, std::vector<int64_t> sizes,
                     const std::vector<int64_t>& dilations, int64_t stride, bool hff) {
  const int64_t branches = static_cast<int64_t>(dilations.size());
  STD_TORCH_CHECK(branches >= 1 && branches <= kMaxBranches, "dilations: expected 1 to 8 of them");
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

// Rows or columns of a convolution's result, checked against overflow by the sizes of the tensors it reads.
inline int64_t filtered(int64_t size, int64_t filter, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(padding <= int64_t{1} << 31, "padding: expected at most 2^31");
  STD_TORCH_CHECK(size + 2 * padding >= filter, "x: is smaller, padding included, than the filter");
  return (size + 2 * padding - filter) / stride + 1;
}

// Everything of a dense convolution of the map x but its pointers; `filter` is its rows and columns.
inline void describe(Convolution& p, const Tensor& x, Layout layout, int64_t out_channels, const int64_t (&filter)[2],
                     int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(stride >= 1 && padding >= 0 && filter[0] >= 1 && filter[1] >= 1,
                  "stride, padding, filter: too small");
  p.type = type_of(x);
  p.layout = layout;
  p.batch = x.size(0);
  p.in_channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_channels = out_channels;
  p.filter_height = filter[0];
  p.filter_width = filter[1];
  p.padding_rows = p.padding_columns = padding;
  p.out_height = filtered(p.height, p.filter_height, stride, padding);
  p.out_width = filtered(p.width, p.filter_width, stride, padding);
  const int64_t longest = (p.height > p.width ? p.height : p.width) + 2 * padding;
  p.stride = stride < longest ? stride : longest;  // as in a pyramid
  // Four rows of the result read a strip of the padded map, which has to have a size in bytes.
  int64_t rows, bytes;
  const bool overflows = __builtin_mul_overflow(4, p.stride, &rows) ||
                         __builtin_mul_overflow(rows + p.filter_height, longest + p.filter_width, &bytes) ||
                         __builtin_mul_overflow(bytes, 8 * p.in_channels, &bytes);
  STD_TORCH_CHECK(!overflows, "stride, padding: too large for the filter");
}

inline void check_branch_weight(const Tensor& weight, const Pyramid& p) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == p.branches && weight.size(1) == p.channels &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected [K, d, 3, 3] with K dilations and d channels");
}

inline void check_pyramid_grad(const Tensor& grad, const Pyramid& p) {
  STD_TORCH_CHECK(grad.size(0) == p.batch && grad.size(1) == p.out_channels() && grad.size(2) == p.out_height &&
                      grad.size(3) == p.out_width,
                  "grad: expected [B, K*d, H', W'] of the pyramid's result");
}

// The tensors that an epilogue's pointers point into.
struct EpilogueTensors {
  std::optional<Tensor> scale, shift, residual, slope;
};

// Checks the four optional tensors and makes them dense. Vectors have one number a channel, in the compute type.
inline EpilogueTensors dense_epilogue(const Tensor& x, Layout layout, const std::vector<int64_t>& out_sizes,
                                      const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                      const std::optional<Tensor>& residual, const std::optional<Tensor>& slope) {
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  auto vector = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(is_here(*t) && t->dim() == 1 && t->size(0) == out_sizes[1] && t->scalar_type() == compute,
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

inline Epilogue pointers(const EpilogueTensors& t) {
  auto pointer = [](const std::optional<Tensor>& tensor) -> const void* {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  return {pointer(t.scale), pointer(t.shift), pointer(t.slope), pointer(t.residual)};
}

inline void check_pointwise_weight(const Tensor& weight, int64_t in_channels, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 2 && groups >= 1 && in_channels >= groups && in_channels % groups == 0 &&
                      weight.size(0) >= groups && weight.size(0) % groups == 0 &&
                      weight.size(1) == in_channels / groups,
                  "pointwise weight: expected [N, M/groups] with groups dividing N and M");
}

// Some numbers of a vector, where they lie.
inline Tensor slice(const Tensor& vector, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(vector), 0, first, count);
}

}  // namespace espk
