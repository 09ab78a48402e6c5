// One map of a concatenation, copied into its place in each row of the result.
// Bytes: 1 read + 1 written for each number of the map.
#include <cstring>

#include "kernels.h"
#include "vector.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kUnitBytes = 32 * 1024;

// How rows are cut into units: some of them whole, or one in runs of bytes.
struct Cut {
  int64_t row_bytes, rows_a_unit, units_a_row;

  explicit Cut(const Concatenate& p)
      : row_bytes(p.row * bytes_of(p.type)),
        rows_a_unit(row_bytes > 0 && row_bytes < kUnitBytes ? kUnitBytes / row_bytes : 1),
        units_a_row(row_bytes > kUnitBytes ? ceil_div(row_bytes, kUnitBytes) : 1) {}
};

int64_t shared_bytes(const Concatenate&) { return 0; }

void before(const Concatenate&, void*) {}

int64_t units(const Concatenate& p) {
  const Cut cut(p);
  return cut.row_bytes == 0 ? 0 : ceil_div(p.rows, cut.rows_a_unit) * cut.units_a_row;
}

void run(const Concatenate& p, void*, int64_t begin, int64_t end) {
  const Cut cut(p);
  const int64_t out_row_bytes = p.out_row * bytes_of(p.type);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / cut.units_a_row * cut.rows_a_unit, offset = unit % cut.units_a_row * kUnitBytes;
    const int64_t count = least(cut.row_bytes - offset, cut.units_a_row > 1 ? kUnitBytes : cut.row_bytes);
    for (int64_t row = first; row < least(first + cut.rows_a_unit, p.rows); ++row) {
      std::memcpy(static_cast<char*>(p.out) + row * out_row_bytes + offset,
                  static_cast<const char*>(p.x) + row * cut.row_bytes + offset, static_cast<std::size_t>(count));
    }
  }
}

}  // namespace

extern const Kernel<Concatenate> concatenate = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
