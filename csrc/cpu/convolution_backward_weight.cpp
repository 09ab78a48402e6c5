// Gradient of the dense convolution of few input channels for its weights: for each row of the filter, the inputs under it
// times the gradients of a row of the result is one matrix product over the pixels of that row, and reads the inputs where
// they lie in a zero-bordered strip. Two stages: runs of strips leave their own sums, and these are added in order.
// Bytes: M + N read a pixel; multiply-adds: those of the forward pass.
#include "compute_rows.h"
#include "input_strip.h"
#include "kernels.h"
#include "matrix_product.h"
#include "ordered_sum.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = ConvolutionBackwardWeight;

int64_t strips_of_image(const Problem& p) { return ceil_div(p.out_height, strip_rows(p)); }
int64_t strips(const Problem& p) { return p.batch * strips_of_image(p); }

// Sums of one run: [rows of the filter][numbers under a row][N].
int64_t sum_count(const Problem& p) { return p.depth() * p.out_channels; }

int64_t units(const Problem& p) {
  constexpr int64_t kMostSums = 1 << 21;
  return least(least(strips(p), 64), most(kMostSums / sum_count(p), 1));
}

// The sums of every run, and behind them room for their sum.
int64_t shared_bytes(const Problem& p) { return (units(p) + 1) * sum_count(p) * (p.type == Type::float64 ? 8 : 4); }

void before(const Problem&, void*) {}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t rows = strip_rows(p), under_row = p.filter_width * p.in_channels, row = p.out_width * p.out_channels;
  const InputStrip strip(p, rows);
  C* tile = static_cast<C*>(scratch(Slot::tile, strip.size(p) * static_cast<int64_t>(sizeof(C))));
  for (int64_t run = begin; run < end; ++run) {
    C* sums = static_cast<C*>(shared) + run * sum_count(p);
    fill_zero(sums, sum_count(p));
    for (int64_t at = run * strips(p) / units(p); at < (run + 1) * strips(p) / units(p); ++at) {
      const int64_t image = at / strips_of_image(p), first = at % strips_of_image(p) * rows;
      strip.fill<T>(p, tile, image, first * p.stride - p.padding_rows);
      for (int64_t y = first; y < least(first + rows, p.out_height); ++y) {
        const T* grad = static_cast<const T*>(p.grad) + (image * p.out_height + y) * row;
        Ahead ahead;
        if (y + 1 < p.out_height) ahead.add(grad + row, row);
        ahead.over(row * p.depth());
        const C* gradient = rows_of(grad, row, 1, row, 0, 1, Slot::map).data;
        for (int64_t i = 0; i < p.filter_height; ++i) {
          const Matrix<C> inputs{tile + ((y - first) * p.stride + i) * strip.pitch, 1, p.stride * strip.pixel};
          auto product = weight_gradient(sums + i * under_row * p.out_channels, under_row, p.out_channels, p.out_width,
                                         inputs, gradient, p.out_channels);
          product.ahead = &ahead;
          multiply(product);
        }
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
    C* sums = static_cast<C*>(shared) + units(p) * sum_count(p);
    sum_in_order(sums, static_cast<const C*>(shared), units(p), sum_count(p));
    T* to = static_cast<T*>(p.grad_weight);
    const int64_t taps = p.filter_height * p.filter_width;
    for (int64_t n = 0; n < p.out_channels; ++n) {
      for (int64_t c = 0; c < p.in_channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) store_one(to++, sums[(tap * p.in_channels + c) * p.out_channels + n]);
      }
    }
  });
}

}  // namespace

extern const Kernel<Problem> convolution_backward_weight = {shared_bytes, before, units, run, after};

}  // namespace espk::ESPK_ISA
