// Means over windows that share a map out evenly: output i of n takes the inputs from floor(i * size / n) to
// ceil((i + 1) * size / n). Sums are taken as in global_average.cpp. Bytes: the input, read once or, where windows overlap,
// twice; the result, written once.
#include "affine_prelu.h"
#include "channel_sums.h"
#include "kernels.h"

namespace espk::ESPK_ISA {
namespace {

int64_t shared_bytes(const AdaptiveAverage&) { return 0; }

void before(const AdaptiveAverage&, void*) {}

// A unit is a row of the result.
int64_t units(const AdaptiveAverage& p) { return p.batch * p.out_height; }

template <class T>
void run_type(const AdaptiveAverage& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const AffinePrelu<C> finish(p.epilogue);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.out_height;
    const AdaptiveWindow rows(unit % p.out_height, p.height, p.out_height);
    const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
    T* out = static_cast<T*>(p.out) + unit * p.out_width * p.out_pixel;
    for (int64_t column = 0; column < p.out_width; ++column, out += p.out_pixel) {
      const AdaptiveWindow columns(column, p.width, p.out_width);
      const int64_t count = rows.count() * columns.count(), rows_summed = most(kSummed / columns.count(), 1);
      for (int64_t c = 0; c < p.channels; c += N) {
        const int64_t valid = least(N, p.channels - c);
        auto sum_of = [&](int64_t y, int64_t end) {
          Vector<C, N> sum{};
          for (; y < end; ++y) {
            const T* from = x + (y * p.width + columns.first) * p.channels + c;
            for (int64_t i = 0; i < columns.count(); ++i, from += p.channels) sum += load_first<N>(from, valid);
          }
          return sum;
        };
        Vector<C, N> mean;
        if (count <= kSummed) {
          mean = sum_of(rows.first, rows.end) / broadcast<C, N>(static_cast<C>(count));
        } else {
          double total[N] = {};
          for (int64_t y = rows.first; y < rows.end; y += rows_summed) {
            add_to<C, N>(total, sum_of(y, least(y + rows_summed, rows.end)));
          }
          mean = mean_of<C, N>(total, count);
        }
        store_first<N>(out + c, finish.template operator()<N>(mean, c, valid), valid);
      }
    }
  }
}

void run(const AdaptiveAverage& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace

extern const Kernel<AdaptiveAverage> adaptive_average = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
