// Bilinear resizing, and the merge of a decoder: skip connection weighted a channel, affine, PReLU, in one pass. Two rows are
// mixed once, and every pixel of the result mixes two numbers of the mixed row.
// Bytes: the input, read twice at most, + 1 written (+ 1 of the skip connection) for each number of the result.
#include <cmath>

#include "affine_prelu.h"
#include "bilinear.h"
#include "kernels.h"
#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kRows = 4;  // of a unit

int64_t shared_bytes(const Resize& p) { return columns_bytes(p.out_width); }

void before(const Resize& p, void* shared) { place_columns(p.type, shared, p.width, p.out_width); }

int64_t units(const Resize& p) { return p.batch * ceil_div(p.out_height, kRows); }

template <class T>
void run_type(const Resize& p, const Between<Compute<T>>* columns, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const int64_t row = p.width * p.channels, strips = ceil_div(p.out_height, kRows);
  C* mixed = static_cast<C*>(scratch(Slot::rows, (row + p.channels) * static_cast<int64_t>(sizeof(C))));
  C* gate = mixed + row;
  const AffinePrelu<C> finish(p.epilogue);
  const bool plain = !p.skip && p.epilogue.empty();
  int64_t gated = -1;  // the image whose gate is in memory
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips, first = unit % strips * kRows;
    if (p.gate && image != gated) {
      gated = image;
      const T* logits = static_cast<const T*>(p.gate) + image * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) gate[c] = 1 / (1 + std::exp(-load_one(logits + c)));
    }
    for (int64_t y = first; y < least(first + kRows, p.out_height); ++y) {
      mix_rows(mixed, static_cast<const T*>(p.x) + image * p.height * row, Between<C>(y, p.height, p.out_height), row);
      const int64_t pixel = (image * p.out_height + y) * p.out_width;
      T* out = static_cast<T*>(p.out) + pixel * p.out_pixel;
      auto make_row = [&](auto&& last) {
        for (int64_t x = 0; x < p.out_width; ++x, out += p.out_pixel) {
          const C *left = mixed + columns[x].first * p.channels, *right = mixed + columns[x].second * p.channels;
          for_whole_vectors<N>(p.channels, [&](int64_t c, int64_t valid) {
            const Vector<C, N> a = load_first<N>(left + c, valid), b = load_first<N>(right + c, valid);
            store_first<N>(out + c, last(columns[x].mix(a, b), x, c, valid), valid);
          });
        }
      };
      if (plain && p.channels == 1) {  // a plane, which has nothing for a vector to run over
        for (int64_t x = 0; x < p.out_width; ++x, out += p.out_pixel) {
          store_one(out, columns[x].mix(mixed[columns[x].first], mixed[columns[x].second]));
        }
        continue;
      }
      if (plain) {
        make_row([](Vector<C, N> v, int64_t, int64_t, int64_t) { return v; });
        continue;
      }
      const T* skip = p.skip ? static_cast<const T*>(p.skip) + pixel * p.channels : nullptr;
      make_row([&](Vector<C, N> v, int64_t x, int64_t c, int64_t valid) {
        if (skip) {
          const Vector<C, N> s = load_first<N>(skip + x * p.channels + c, valid);
          v += p.gate ? s * load_first<N>(gate + c, valid) : s;
        }
        return finish.template operator()<N>(v, c, valid);
      });
    }
  }
}

void run(const Resize& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_type<T>(p, static_cast<const Between<Compute<T>>*>(shared), begin, end);
  });
}

}  // namespace

extern const Kernel<Resize> resize = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
