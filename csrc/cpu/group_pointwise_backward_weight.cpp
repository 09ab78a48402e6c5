// Gradient of the group pointwise convolution for its weights: grad^T x over all pixels, in two stages. Runs of pixels
// that depend on the shape alone leave their own sums, and these are added in order: the result does not depend on the
// number of threads. Bytes: M + N read a pixel; multiply-adds: those of the forward pass.
#include "kernels.h"
#include "matrix_product.h"
#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupPointwiseBackwardWeight;

constexpr int64_t kChunk = 256;  // pixels multiplied at a time

struct Runs {
  int64_t images, pixels;          // channels_last: the batch is one long image
  int64_t chunks, chunks_of_image;  // of kChunk pixels
  int64_t count;                   // runs of chunks, each with sums of its own

  explicit Runs(const Problem& p) {
    const bool last = p.layout == Layout::channels_last;
    images = last ? 1 : p.batch;
    pixels = last ? p.batch * p.pixels : p.pixels;
    chunks_of_image = ceil_div(pixels, kChunk);
    chunks = images * chunks_of_image;
    // At most 8 MiB of sums.
    const int64_t affordable = (int64_t{1} << 21) / most(p.out_channels * (p.in_channels / p.groups), 1);
    count = most(least(least(chunks, 16), affordable), 1);
  }
};

int64_t weight_size(const Problem& p) { return p.out_channels * (p.in_channels / p.groups); }

int64_t shared_bytes(const Problem& p) { return Runs(p).count * weight_size(p) * (p.type == Type::float64 ? 8 : 4); }

void before(const Problem&, void*) {}

int64_t units(const Problem& p) { return Runs(p).count * p.groups; }

// `rows` rows in the compute type: as they lie, or copied.
template <class T>
const Compute<T>* rows_of(const T* from, int64_t rows, int64_t columns, int64_t& row, Slot slot) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    return from;
  } else {
    C* copy = static_cast<C*>(scratch(slot, rows * columns * static_cast<int64_t>(sizeof(C))));
    for (int64_t i = 0; i < rows; ++i) copy_in(copy + i * columns, from + i * row, columns);
    row = columns;
    return copy;
  }
}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Runs runs(p);
  const bool last = p.layout == Layout::channels_last;
  const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % p.groups, run = unit / p.groups;
    C* sums = static_cast<C*>(shared) + run * weight_size(p) + group * out * in;
    fill_zero(sums, out * in);
    for (int64_t chunk = run * runs.chunks / runs.count; chunk < (run + 1) * runs.chunks / runs.count; ++chunk) {
      const int64_t image = chunk / runs.chunks_of_image, first = chunk % runs.chunks_of_image * kChunk;
      const int64_t count = least(kChunk, runs.pixels - first);
      const T* grad = static_cast<const T*>(p.grad);
      const T* x = static_cast<const T*>(p.x);
      if (last) {
        int64_t grad_row = p.out_channels, x_row = p.in_channels;
        const C* g = rows_of(grad + first * p.out_channels + group * out, count, out, grad_row, Slot::map);
        const C* v = rows_of(x + first * p.in_channels + group * in, count, in, x_row, Slot::tile);
        MatrixProduct<C> product{};
        product.rows = out;
        product.columns = in;
        product.depth = count;
        product.a = g;
        product.a_row = 1;
        product.a_depth = grad_row;
        product.b = v;
        product.b_depth = x_row;
        product.out = sums;
        product.out_row = in;
        product.add = true;
        multiply(product);
      } else {
        int64_t grad_row = runs.pixels, x_row = runs.pixels;
        const C* g = rows_of(grad + (image * p.out_channels + group * out) * runs.pixels + first, out, count, grad_row,
                             Slot::map);
        const C* v =
            rows_of(x + (image * p.in_channels + group * in) * runs.pixels + first, in, count, x_row, Slot::tile);
        add_dots(DotProducts<C>{out, in, count, g, grad_row, v, x_row, sums, in});
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
    constexpr int N = kLanes<C>;
    const int64_t size = weight_size(p), count = Runs(p).count;
    const C* all = static_cast<const C*>(shared);
    for (int64_t i = 0; i < size; i += N) {
      const int64_t valid = least(N, size - i);
      Vector<C, N> sum = load_first<N>(all + i, valid);
      for (int64_t run = 1; run < count; ++run) sum += load_first<N>(all + run * size + i, valid);
      store_first<N>(static_cast<T*>(p.grad_weight) + i, sum, valid);
    }
  });
}

}  // namespace

extern const Kernel<Problem> group_pointwise_backward_weight = {shared_bytes, before, units, run, after};

}  // namespace espk::ESPK_ISA
