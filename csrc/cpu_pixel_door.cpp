// Where torch ends on the CPU for what inference does to the pixels of a map: affine and PReLU, layout, the largest channel.
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
  m.impl("resized_argmax", TORCH_BOX(&resized_argmax));
}
