// The branches of efficient pyramid pooling and their merge, a 3x3 convolution in groups: every branch is made in the tile
// that the merge reads, so that none of them is ever a map. Ten channels of fifty, concatenated, would fill lines of the
// cache by halves.
// Bytes: C read + C written a pixel, and the branches below the size of the map, which are maps; multiply-adds: 9*C*S a pixel,
// and those of the branches.
#include "grouped_panels.h"
#include "pooled_branch.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = PyramidPooling;

// Equal panels: a fifth of what is filled lies beside the panel or the strip, and is filled twice.
int64_t panel_of(const Problem& p) { return ceil_div(p.width, ceil_div(p.width, kMostPooledPanel)); }

// Zeros in a tile but for `rows` rows from row `above` on and `columns` positions from position `beside` on.
template <class C>
void fill_zero_around(const Tile& tile, C* to, int64_t above, int64_t rows, int64_t beside, int64_t columns) {
  const int64_t pitch = tile.row_pitch(), behind = beside + columns;
  fill_zero(to, above * pitch);
  for (int64_t y = above; y < above + rows; ++y) {
    fill_zero(to + y * pitch, beside * tile.lanes);
    fill_zero(to + y * pitch + behind * tile.lanes, pitch - behind * tile.lanes);
  }
  fill_zero(to + (above + rows) * pitch, (tile.rows - above - rows) * pitch);
}

// What the calls share: the packed weights of the merge, and what is prepared of each branch. Without memory it counts bytes.
template <class T>
struct Shared {
  using C = Compute<T>;

  C* merge;
  SharedBranch<C> branch[kMaxBranches];
  int64_t bytes;

  Shared(const Problem& p, void* given) {
    Carving memory(given);
    merge = memory.take<C>(GroupedPanels<T>::packed_size(p));
    for (int64_t k = 0; k < p.branches(); ++k) branch[k] = SharedBranch<C>(p, p.branch[k], memory);
    bytes = memory.bytes();
  }
};

int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) { return Shared<std::remove_pointer_t<decltype(type)>>(p, nullptr).bytes; });
}

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Shared<T> shared(p, memory);
    GroupedPanels<T>::pack(p, shared.merge);
    for (int64_t k = 0; k < p.branches(); ++k) PooledRows<T>(p, p.branch[k], shared.branch[k]).prepare();
  });
}

int64_t units(const Problem& p) {
  return with_type(
      p.type, [&](auto* type) { return GroupedPanels<std::remove_pointer_t<decltype(type)>>::units(p, panel_of(p)); });
}

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const Shared<T> shared(p, memory);
  const GroupedPanels<T> panels(p, panel_of(p));
  const Tile& tile = panels.tile;
  panels.run(shared.merge, begin, end, [&](const typename GroupedPanels<T>::Part& part, C* tiles) {
    // What the part's taps reach of the map; beside it the tiles are zero.
    PooledPart<C> reached{};
    reached.first_row = most(part.first_row - tile.border_rows, 0);
    reached.end_row = least(part.first_row + part.rows + tile.border_rows, p.height);
    reached.first_column = most(part.first_column - tile.border_columns, 0);
    reached.end_column = least(part.first_column + part.columns + tile.border_columns, p.width);
    reached.pitch = tile.row_pitch();
    const int64_t above = reached.first_row - (part.first_row - tile.border_rows);
    const int64_t beside = reached.first_column - (part.first_column - tile.border_columns);
    for (int64_t k = 0; k < p.branches(); ++k) {
      C* to = tiles + k * tile.size();
      reached.to = to + above * tile.row_pitch() + beside * N;
      fill_zero_around(tile, to, above, reached.rows(), beside, reached.columns());
      PooledRows<T>(p, p.branch[k], shared.branch[k]).fill(reached, part.image, part.first_group, part.groups);
    }
  });
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<Problem> pyramid_pooling = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
