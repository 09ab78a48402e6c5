// Gradient of the group pointwise convolution for its weights: grad^T x over all pixels, in two stages. Runs of pixels
// that depend on the shape alone leave their own sums, and these are added in order: the result does not depend on the
// number of threads. Bytes: M + N read a pixel; multiply-adds: those of the forward pass.
#include "compute_rows.h"
#include "kernels.h"
#include "matrix_product.h"
#include "ordered_sum.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupPointwiseBackwardWeight;

constexpr int64_t kChunk = 256;  // pixels multiplied at a time
constexpr int64_t kParts = 16;   // images whose chunks are multiplied at a time

struct Runs {
  int64_t images, pixels;          // channels_last: the batch is one long image
  int64_t chunks, chunks_of_image;  // of kChunk pixels
  int64_t count;                   // runs of chunks, each with sums of its own

  explicit Runs(const Problem& p) {
    const bool last = p.layout == Layout::channels_last;
    images = last ? 1 : p.batch;
    pixels = last ? p.batch * p.pixels : p.pixels;
    chunks = images * ceil_div(pixels, kChunk);
    // Every run writes and reads its sums once more: at least 512 pixels share them, and all take 8 MiB in float at most.
    const int64_t affordable = (int64_t{1} << 21) / most(p.out_channels * (p.in_channels / p.groups), 1);
    const int64_t worthwhile = least(images * pixels / 512, ceil_div(64, p.groups));
    count = most(least(least(chunks, worthwhile), affordable), 1);
  }
};

int64_t weight_size(const Problem& p) { return p.out_channels * (p.in_channels / p.groups); }

int64_t shared_bytes(const Problem& p) { return Runs(p).count * weight_size(p) * (p.type == Type::float64 ? 8 : 4); }

void before(const Problem&, void*) {}

int64_t units(const Problem& p) { return Runs(p).count * p.groups; }

// Adds to the weights of one group, [out][in], the products of pixels that lie one behind the other.
template <class T>
struct GroupSums {
  using C = Compute<T>;
  static constexpr int64_t kTurned = 16;  // channels of a group, of both maps

  int64_t out, in;
  C* sums;

  // channels_last: both maps are matrices [pixels][channels].
  void add_pixels(const T* grad, int64_t grad_pixel, const T* x, int64_t x_pixel, int64_t pixels) const {
    const Rows<C> g = rows_of(grad, grad_pixel, pixels, out, 0, 1, Slot::map);
    const Rows<C> v = rows_of(x, x_pixel, pixels, in, 0, 1, Slot::tile);
    multiply(weight_gradient(sums, out, in, pixels, Matrix<C>{g.data, 1, g.row}, v.data, v.row));
  }

  // contiguous: both are matrices [channels][pixels] of `parts` images. x is turned where each number of it meets enough
  // others; dot products end in a sum across each vector, which is most of their time where an image has few pixels.
  void add_images(const T* grad, int64_t grad_image, const T* x, int64_t x_image, int64_t channel, int64_t pixels,
                  int64_t parts) const {
    const Rows<C> g = rows_of(grad, channel, out, pixels, grad_image, parts, Slot::map);
    if (least(in, out) < kTurned) {
      const Rows<C> v = rows_of(x, channel, in, pixels, x_image, parts, Slot::tile);
      add_dots(DotProducts<C>{out, in, pixels, parts, g.data, g.row, g.part, v.data, v.row, v.part, sums, in});
      return;
    }
    const int64_t bytes = packed_columns_size<C>(pixels, in) * static_cast<int64_t>(sizeof(C));
    C* turned = static_cast<C*>(scratch(Slot::tile, bytes));
    for (int64_t part = 0; part < parts; ++part) {
      pack_columns(turned, Matrix<T>{x + part * x_image, 1, channel}, pixels, in);
      const Matrix<C> gradient{g.data + part * g.part, g.row, 1};
      MatrixProduct<C> product = weight_gradient<C>(sums, out, in, pixels, gradient, turned, in);
      product.b_packed = true;
      multiply(product);
    }
  }
};

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Runs runs(p);
  const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
  const T* grad = static_cast<const T*>(p.grad);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % p.groups, run = unit / p.groups;
    const GroupSums<T> group_sums{out, in, static_cast<C*>(shared) + run * weight_size(p) + group * out * in};
    fill_zero(group_sums.sums, out * in);
    const int64_t end_chunk = (run + 1) * runs.chunks / runs.count;
    for (int64_t chunk = run * runs.chunks / runs.count; chunk < end_chunk;) {
      // The same pixels of one image after another, so that images of few pixels share their sums.
      const int64_t image = chunk % runs.images, first = chunk / runs.images * kChunk;
      const int64_t parts = least(least(runs.images - image, end_chunk - chunk), kParts);
      const int64_t count = least(kChunk, runs.pixels - first);
      chunk += parts;
      if (p.layout == Layout::channels_last) {
        group_sums.add_pixels(grad + first * p.out_channels + group * out, p.out_channels,
                              x + first * p.in_channels + group * in, p.in_channels, count);
      } else {
        group_sums.add_images(grad + (image * p.out_channels + group * out) * runs.pixels + first,
                              p.out_channels * runs.pixels,
                              x + (image * p.in_channels + group * in) * runs.pixels + first,
                              p.in_channels * runs.pixels, runs.pixels, count, parts);
      }
    }
  }
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

void after(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    sum_in_order(static_cast<T*>(p.grad_weight), static_cast<const C*>(shared), Runs(p).count, weight_size(p));
  });
}

}  // namespace

extern const Kernel<Problem> group_pointwise_backward_weight = {shared_bytes, before, units, run, after};

}  // namespace espk::ESPK_ISA
