// The class of every pixel: logits resized and compared without the resized map, which for 20 classes is 80 bytes a pixel.
// Bytes: the logits, read twice at most, + 1 written (8 where there are more than 256 classes) for each pixel.
#include "bilinear.h"
#include "kernels.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kRows = 4;  // of a unit

int64_t shared_bytes(const ResizedArgmax& p) { return columns_bytes(p.out_width); }

void before(const ResizedArgmax& p, void* shared) { place_columns(p.type, shared, p.width, p.out_width); }

int64_t units(const ResizedArgmax& p) { return p.batch * ceil_div(p.out_height, kRows); }

// The winners of kLanes pixels, whose channels are laid across the lanes of vectors one channel each.
template <class C>
Vector<Index<C>, kLanes<C>> winners(const C* mixed, const Between<C>* columns, int64_t count, int64_t channels) {
  constexpr int N = kLanes<C>;
  Vector<C, N> best{};
  Vector<Index<C>, N> winner{};
  for (int64_t c = 0; c < channels; c += N) {
    const int64_t valid = least(N, channels - c);
    Vector<C, N> v[N];
    for (int i = 0; i < N; ++i) {
      const Between<C>& column = columns[i < count ? i : count - 1];
      const Vector<C, N> a = load_first<N>(mixed + column.first * channels + c, valid);
      const Vector<C, N> b = load_first<N>(mixed + column.second * channels + c, valid);
      v[i] = column.mix(a, b);
    }
    transpose<N, C>(v);
    if (c == 0) best = v[0];
    for (int64_t k = c == 0; k < valid; ++k) {
      // Not at most, so that NaN wins; and nothing wins against NaN.
      const auto larger = ~(v[k] <= best) & (best == best);
      best = larger ? v[k] : best;
      winner = larger ? Vector<Index<C>, N>{} + static_cast<Index<C>>(c + k) : winner;
    }
  }
  return winner;
}

template <class To, class C>
void find_row(To* out, const C* mixed, const Between<C>* columns, const ResizedArgmax& p) {
  constexpr int N = kLanes<C>;
  for (int64_t x = 0; x < p.out_width; x += N) {
    const int64_t count = least(N, p.out_width - x);
    const auto winner = winners<C>(mixed, columns + x, count, p.channels);
    for (int64_t i = 0; i < count; ++i) out[x + i] = static_cast<To>(winner[i]);
  }
}

template <class T>
void run_type(const ResizedArgmax& p, const Between<Compute<T>>* columns, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t row = p.width * p.channels, strips = ceil_div(p.out_height, kRows);
  C* mixed = static_cast<C*>(scratch(Slot::rows, row * static_cast<int64_t>(sizeof(C))));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips, first = unit % strips * kRows;
    const T* x = static_cast<const T*>(p.x) + image * p.height * row;
    for (int64_t y = first; y < least(first + kRows, p.out_height); ++y) {
      mix_rows(mixed, x, Between<C>(y, p.height, p.out_height), row);
      const int64_t pixel = (image * p.out_height + y) * p.out_width;
      if (p.wide) {
        find_row(static_cast<int64_t*>(p.out) + pixel, mixed, columns, p);
      } else {
        find_row(static_cast<uint8_t*>(p.out) + pixel, mixed, columns, p);
      }
    }
  }
}

void run(const ResizedArgmax& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_type<T>(p, static_cast<const Between<Compute<T>>*>(shared), begin, end);
  });
}

}  // namespace

extern const Kernel<ResizedArgmax> resized_argmax = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
