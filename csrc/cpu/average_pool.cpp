// 3x3 average pooling in steps of 2 with what the image adds and PReLU: the pooled half of the down-sampler, and the image
// pyramid of the long-range shortcut. Bytes: 4 read + 1 written for each number of the result.
#include "affine_prelu.h"
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

// to[i] = the sum of number i of `rows` rows, `pitch` apart.
template <int Rows, class T>
void add_rows(Compute<T>* to, const T* from, int64_t pitch, int64_t n) {
  constexpr int N = kLanes<Compute<T>>;
  for_whole_vectors<N>(n, [&](int64_t i, int64_t valid) {
    Vector<Compute<T>, N> sum = load_first<N>(from + i, valid);
#pragma GCC unroll 3
    for (int row = 1; row < Rows; ++row) sum += load_first<N>(from + row * pitch + i, valid);
    store_first<N>(to + i, sum, valid);
  });
}

template <class T>
void sum_rows(Compute<T>* to, const T* map, const Window& rows, int64_t pitch, int64_t first, int64_t n) {
  const T* from = map + rows.first * pitch + first;
  switch (rows.end - rows.first) {
    case 1: return add_rows<1>(to, from, pitch, n);
    case 2: return add_rows<2>(to, from, pitch, n);
    default: return add_rows<3>(to, from, pitch, n);
  }
}

// One row: some columns at a time, the sums of their rows stay in the first-level cache.
template <class T>
void pool_pixels(const AveragePool& p, const ShortcutRows<T>& shortcut, int64_t image, int64_t y) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  constexpr int64_t kNearBytes = 16 * 1024;
  const int64_t pixel = (image * p.out_height + y) * p.out_width;
  const C* added = shortcut.of(pixel, p.out_width);
  const C* slope = static_cast<const C*>(p.slope);
  const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
  T* out = static_cast<T*>(p.out) + pixel * p.out_pixel;

  const int64_t column_bytes = p.channels * static_cast<int64_t>(sizeof(C));
  const int64_t together = most(least(p.out_width, kNearBytes / (2 * column_bytes)), 1);
  C* sums = static_cast<C*>(scratch(Slot::rows, (2 * together + 1) * column_bytes));
  for (int64_t first = 0; first < p.out_width; first += together) {
    const int64_t count = least(together, p.out_width - first);
    // Columns [begin, end) of the map, of which the first may lie to its left and the last to its right.
    const int64_t begin = 2 * first - 1, end = 2 * (first + count), inside = most(begin, 0);
    const int64_t numbers = (least(end, p.width) - inside) * p.channels;
    if (begin < 0) fill_zero(sums, p.channels);
    sum_rows(sums + (inside - begin) * p.channels, x, Window(y, p.height), p.width * p.channels, inside * p.channels,
             numbers);
    if (end > p.width) fill_zero(sums + (p.width - begin) * p.channels, p.channels);
    for (int64_t column = first; column < first + count; ++column) {
      const C* left = sums + 2 * (column - first) * p.channels;
      for_whole_vectors<N>(p.channels, [&](int64_t c, int64_t valid) {
        const C* from = left + c;
        auto value = load_first<N>(from, valid) + load_first<N>(from + p.channels, valid);
        value = (value + load_first<N>(from + 2 * p.channels, valid)) / broadcast<C, N>(9);
        if (added) value += load_first<N>(added + column * p.channels + c, valid);
        if (slope) value = prelu(value, load_first<N>(slope + c, valid));
        store_first<N>(out + column * p.out_pixel + c, value, valid);
      });
    }
  }
}

// One row of one plane: three rows are summed as they lie, then three columns of the sums.
template <class T>
void pool_plane_row(const AveragePool& p, int64_t plane, int64_t y) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  constexpr std::make_index_sequence<N> lanes{};
  const T* x = static_cast<const T*>(p.x) + plane * p.height * p.width;
  // The columns between zeros: one to the left, and to the right what whole vectors of results read.
  const int64_t columns = 2 * round_up(p.out_width, N) + 2;
  C* sums = static_cast<C*>(scratch(Slot::rows, columns * static_cast<int64_t>(sizeof(C))));
  sums[0] = 0;
  sum_rows(sums + 1, x, Window(y, p.height), p.width, 0, p.width);
  fill_zero(sums + 1 + p.width, columns - 1 - p.width);
  const C* slope = static_cast<const C*>(p.slope);
  T* out = static_cast<T*>(p.out) + (plane * p.out_height + y) * p.out_width;
  for (int64_t i = 0; i < p.out_width; i += N) {
    const int64_t valid = least(N, p.out_width - i);
    const C* from = sums + 2 * i;
    const auto lower = load<N>(from), upper = load<N>(from + N);
    auto value = every_other<0>(lower, upper, lanes) + every_other<1>(lower, upper, lanes);
    value += every_other<0>(load<N>(from + 2), load<N>(from + 2 + N), lanes);
    value = value / broadcast<C, N>(9);
    if (slope) value = prelu(value, broadcast<C, N>(slope[plane % p.channels]));
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
