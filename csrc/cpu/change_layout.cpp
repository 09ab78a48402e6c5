// From contiguous to channels_last or back: a matrix an image, turned.
// Bytes: 1 read + 1 written for each number of the map.
#include "kernels.h"
#include "turn.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kColumns = 64;  // of a unit

int64_t shared_bytes(const ChangeLayout&) { return 0; }

void before(const ChangeLayout&, void*) {}

// A unit is a strip of columns of one image, over all rows: it writes its rows of the result whole.
int64_t units(const ChangeLayout& p) { return p.batch * ceil_div(p.columns, kColumns); }

template <class T>
void run_type(const ChangeLayout& p, int64_t begin, int64_t end) {
  const int64_t strips = ceil_div(p.columns, kColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips * p.rows * p.columns, first = unit % strips * kColumns;
    turn(static_cast<T*>(p.out) + image + first * p.rows, p.rows, static_cast<const T*>(p.x) + image + first, p.columns,
         p.rows, least(kColumns, p.columns - first));
  }
}

void run(const ChangeLayout& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace

extern const Kernel<ChangeLayout> change_layout = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
