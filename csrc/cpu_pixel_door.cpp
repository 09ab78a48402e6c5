// Where torch ends on the CPU for what inference does to the pixels of a map: affine and PReLU, layout, concatenation, the
// largest channel.
#include <torch/csrc/stable/library.h>

#include "cpu_launch.h"

namespace espk {
namespace {

Tensor affine(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
              std::optional<Tensor> slope) {
  check_map(x, "x");
  Affine p{};
  p.type = type_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.pixels = x.size(2) * x.size(3);
  const std::vector<int64_t> sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
  const Tensor map = dense_map(x, Layout::channels_last);
  const EpilogueTensors epilogue = dense_epilogue(x, Layout::channels_last, sizes, scale, shift, residual, slope);
  Tensor out = result_map(sizes, x, Layout::channels_last);
  p.x = map.const_data_ptr();
  p.epilogue = pointers(epilogue);
  p.out = out.mutable_data_ptr();
  launch("affine", kernels().affine, p);
  return out;
}

Tensor change_layout(const Tensor& x, bool channels_last) {
  check_map(x, "x");
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  ChangeLayout p{};
  p.type = type_of(x);
  p.batch = x.size(0);
  p.rows = channels_last ? channels : pixels;
  p.columns = channels_last ? pixels : channels;
  const Tensor map = dense_map(x, channels_last ? Layout::contiguous : Layout::channels_last);
  Tensor out = result_map({x.size(0), channels, x.size(2), x.size(3)}, x,
                          channels_last ? Layout::channels_last : Layout::contiguous);
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch("change_layout", kernels().change_layout, p);
  return out;
}

Tensor concatenate(const std::vector<Tensor>& maps, int64_t dim) {
  STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one");
  const Tensor& first = maps[0];
  const int64_t dims = first.dim();
  STD_TORCH_CHECK(dim >= 0 && dim < dims, "dim: expected one of the maps' ", dims);
  const bool pixels = dims == 4 && dim == 1;
  std::vector<int64_t> sizes(first.sizes().begin(), first.sizes().end());
  sizes[dim] = 0;
  for (const Tensor& map : maps) {
    check_same_type(first, map);
    STD_TORCH_CHECK(map.dim() == dims, "maps: expected one number of dimensions");
    for (int64_t i = 0; i < dims; ++i) {
      STD_TORCH_CHECK(i == dim || map.size(i) == sizes[i], "maps: expected equal sizes but in dimension ", dim);
    }
    sizes[dim] += map.size(dim);
  }
  // A row is what lies together of one map: the channels of a pixel, or all dimensions from `dim` on.
  int64_t rows = 1, inner = 1;
  for (int64_t i = 0; i < dims; ++i) {
    if (i != dim) (pixels || i < dim ? rows : inner) *= sizes[i];
  }
  const MemoryFormat format = format_of(pixels ? Layout::channels_last : Layout::contiguous);
  Tensor out = torch::stable::empty(sizes, first.scalar_type(), std::nullopt, first.device(), std::nullopt, format);
  Concatenate p{};
  p.type = type_of(first);
  p.rows = rows;
  p.out_row = sizes[dim] * inner;
  record_output(out, out.numel() * bytes_of(p.type));
  char* begin = static_cast<char*>(out.mutable_data_ptr());
  for (const Tensor& map : maps) {
    const Tensor dense = pixels ? dense_map(map, Layout::channels_last) : dense_weight(map);
    p.row = map.size(dim) * inner;
    p.x = dense.const_data_ptr();
    p.out = begin;
    launch("concatenate", kernels().concatenate, p);
    begin += p.row * bytes_of(p.type);
  }
  return out;
}

Tensor resized_argmax(const Tensor& x, int64_t height, int64_t width, bool wide) {
  check_map(x, "x");
  STD_TORCH_CHECK(height >= 1 && width >= 1, "height, width: expected at least 1");
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, "x: expected one channel, row and column");
  STD_TORCH_CHECK(x.size(1) < int64_t{1} << 31, "x: expected fewer than 2^31 channels");
  ResizedArgmax p{};
  p.type = type_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_height = height;
  p.out_width = width;
  p.wide = wide || p.channels > 256;
  const Tensor map = dense_map(x, Layout::channels_last);
  Tensor out = torch::stable::empty(std::vector<int64_t>{p.batch, height, width},
                                    p.wide ? ScalarType::Long : ScalarType::Byte, std::nullopt, x.device());
  record_output(out, p.out_bytes());
  p.x = map.const_data_ptr();
  p.out = out.mutable_data_ptr();
  launch("resized_argmax", kernels().resized_argmax, p);
  return out;
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("affine", TORCH_BOX(&affine));
  m.impl("change_layout", TORCH_BOX(&change_layout));
  m.impl("concatenate", TORCH_BOX(&concatenate));
  m.impl("resized_argmax", TORCH_BOX(&resized_argmax));
}
