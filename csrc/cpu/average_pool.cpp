// 3x3 average pooling in steps of 2 with residual and PReLU: the pooled half of the down-sampler, and the image pyramid
// of the long-range shortcut. Bytes: 4 read + 1 written (+ 1 of the residual) for each number of the result.
#include "image_shortcut.h"
#include "kernels.h"
#include "row.h"

namespace espk::ESPK_ISA {
namespace {

// Rows of the window around output `i` that lie in the map: the others are zeros, and count.
struct Window {
  int64_t first, end;

  Window(int64_t i, int64_t size) : first(most(2 * i - 1, 0)), end(least(2 * i + 2, size)) {}
};

// The window moves by two columns: the sum of its last one is that of the next window's first.
template <class T>
void pool_pixels(const AveragePool& p, const ShortcutRows<T>& shortcut, int64_t image, int64_t y) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  const int64_t pixel = (image * p.out_height + y) * p.out_width, at = pixel * p.out_pixel;
  const T* residual = p.epilogue.residual ? static_cast<const T*>(p.epilogue.residual) + at : nullptr;
  const C* added = shortcut.of(pixel, p.out_width);
  const C* slope = static_cast<const C*>(p.epilogue.slope);
  T* out = static_cast<T*>(p.out) + at;

  const Window rows(y, p.height);
  const int64_t pitch = p.width * p.channels;
  const T* first_row = static_cast<const T*>(p.x) + (image * p.height + rows.first) * pitch;
  const int64_t more_rows = rows.end - rows.first - 1;
  auto column_sum = [&](int64_t column, int64_t c, int64_t valid) {
    if (column >= p.width) return V{};
    const T* from = first_row + column * p.channels + c;
    V sum = load_first<N>(from, valid);
    for (int64_t i = 0; i < more_rows; ++i) sum += load_first<N>(from += pitch, valid);
    return sum;
  };
  C* before = static_cast<C*>(scratch(Slot::rows, round_up(p.channels, N) * static_cast<int64_t>(sizeof(C))));
  fill_zero(before, round_up(p.channels, N));
  for (int64_t column = 0; column < p.out_width; ++column, out += p.out_pixel) {
    for (int64_t c = 0; c < p.channels; c += N) {
      const int64_t valid = least(N, p.channels - c);
      const V last = column_sum(2 * column + 1, c, valid);
      V value = (load<N>(before + c) + column_sum(2 * column, c, valid) + last) / broadcast<C, N>(9);
      store<N>(before + c, last);
      if (residual) value += load_first<N>(residual + column * p.out_pixel + c, valid);
      if (added) value += load_first<N>(added + column * p.channels + c, valid);
      if (slope) value = value > V{} ? value : value * load_first<N>(slope + c, valid);
      store_first<N>(out + c, value, valid);
    }
  }
}

// One row of one plane: three rows are summed as they lie, then three columns of the sums.
template <class T>
void pool_plane_row(const AveragePool& p, int64_t plane, int64_t y) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* x = static_cast<const T*>(p.x) + plane * p.height * p.width;
  const int64_t at = (plane * p.out_height + y) * p.out_width, channel = plane % p.channels;
  // Sums of columns, one zero before the first and some behind the last; then every other one, from each of three starts.
  const int64_t pitch = round_up(p.out_width, N);
  C* sums = static_cast<C*>(scratch(Slot::rows, (p.width + 3 + 3 * pitch) * static_cast<int64_t>(sizeof(C))));
  C* starts[3] = {sums + p.width + 3, sums + p.width + 3 + pitch, sums + p.width + 3 + 2 * pitch};
  fill_zero(sums, p.width + 3);
  const Window rows(y, p.height);
  for (int64_t i = 0; i < p.width; i += N) {
    const int64_t valid = least(N, p.width - i);
    Vector<C, N> sum{};
    for (int64_t row = rows.first; row < rows.end; ++row) sum += load_first<N>(x + row * p.width + i, valid);
    store_first<N>(sums + 1 + i, sum, valid);
  }
  for (int64_t start = 0; start < 3; ++start) gather_in(starts[start], sums + start, p.out_width, 2);
  const T* residual = p.epilogue.residual ? static_cast<const T*>(p.epilogue.residual) + at : nullptr;
  const C* slope = static_cast<const C*>(p.epilogue.slope);
  T* out = static_cast<T*>(p.out) + at;
  for (int64_t i = 0; i < p.out_width; i += N) {
    const int64_t valid = least(N, p.out_width - i);
    Vector<C, N> value = load_first<N>(starts[0] + i, valid) + load_first<N>(starts[1] + i, valid);
    value = (value + load_first<N>(starts[2] + i, valid)) / broadcast<C, N>(9);
    if (residual) value += load_first<N>(residual + i, valid);
    if (slope) value = value > Vector<C, N>{} ? value : value * broadcast<C, N>(slope[channel]);
    store_first<N>(out + i, value, valid);
  }
}

int64_t shared_bytes(const AveragePool&) { return 0; }

void before(const AveragePool&, void*) {}

// A unit is a row of an image, or of a plane.
int64_t units(const AveragePool& p) {
  return p.batch * p.out_height * (p.layout == Layout::channels_last ? 1 : p.channels);
}

void run(const AveragePool& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ShortcutRows<T> shortcut(p.shortcut, p.channels, p.out_width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t map = unit / p.out_height, y = unit % p.out_height;
      if (p.layout == Layout::channels_last) {
        pool_pixels<T>(p, shortcut, map, y);
      } else {
        pool_plane_row<T>(p, map, y);
      }
    }
  });
}

}  // namespace

extern const Kernel<AveragePool> average_pool = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
