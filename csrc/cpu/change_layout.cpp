// From contiguous to channels_last or back: a matrix an image, transposed in squares of registers.
// Bytes: 1 read + 1 written for each number of the map.
#include "kernels.h"
#include "vector.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kColumns = 64;  // of a unit

int64_t shared_bytes(const ChangeLayout&) { return 0; }

void before(const ChangeLayout&, void*) {}

// A unit is a strip of columns of one image, over all rows: it writes its rows of the result whole.
int64_t units(const ChangeLayout& p) { return p.batch * ceil_div(p.columns, kColumns); }

// Types of two bytes go through float32 and back, which changes no number.
template <class T>
void run_type(const ChangeLayout& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const int64_t strips = ceil_div(p.columns, kColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips * p.rows * p.columns, first = unit % strips * kColumns;
    const T* x = static_cast<const T*>(p.x) + image;
    T* out = static_cast<T*>(p.out) + image;
    for (int64_t column = first; column < least(first + kColumns, p.columns); column += N) {
      const int64_t wide = least(N, p.columns - column);
      for (int64_t row = 0; row < p.rows; row += N) {
        const int64_t high = least(N, p.rows - row);
        Vector<C, N> square[N]{};
        for (int64_t i = 0; i < high; ++i) square[i] = load_first<N>(x + (row + i) * p.columns + column, wide);
        transpose<N, C>(square);
        for (int64_t i = 0; i < wide; ++i) store_first<N>(out + (column + i) * p.rows + row, square[i], high);
      }
    }
  }
}

void run(const ChangeLayout& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace

extern const Kernel<ChangeLayout> change_layout = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
