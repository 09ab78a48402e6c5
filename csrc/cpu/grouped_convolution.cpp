// 3x3 convolution in many groups of few channels: a vector runs over groups, so that input j of every group is one map, and
// an output is the sum over the inputs of depthwise convolutions: the taps of all of them form one list.
// Bytes: M read + N written a pixel; multiply-adds: 9*N*in a pixel.
#include "depthwise_taps.h"
#include "grouped_tiles.h"
#include "kernels.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupedConvolution;

// Weights and epilogue of one block of groups and one output of each: [9 * in][N], then scale, shift and slope [3][N].
template <class C>
int64_t block_size(const Problem& p) {
  return (9 * p.in + 3) * kLanes<C>;
}

int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return ceil_div(p.groups, kLanes<C>) * p.out_of_group * block_size<C>(p) * static_cast<int64_t>(sizeof(C));
  });
}

void before(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    constexpr int64_t N = kLanes<C>;
    C* to = static_cast<C*>(shared);
    for (int64_t first = 0; first < p.groups; first += N) {
      for (int64_t t = 0; t < p.out_of_group; ++t) {
        auto fill = [&](auto&& value) {
          for (int64_t lane = 0; lane < N; ++lane) {
            *to++ = first + lane < p.groups ? value((first + lane) * p.out_of_group + t) : C(0);
          }
        };
        for (int64_t tap = 0; tap < 9 * p.in; ++tap) {
          fill([&](int64_t channel) { return load_one(static_cast<const T*>(p.weight) + channel * 9 * p.in + tap); });
        }
        auto vector = [&](const void* values, C otherwise) {
          fill([&](int64_t channel) { return values ? static_cast<const C*>(values)[channel] : otherwise; });
        };
        vector(p.epilogue.scale, 1);
        vector(p.epilogue.shift, 0);
        vector(p.epilogue.slope, 1);
      }
    }
  });
}

// A strip goes panel by panel, so that the tiles of all inputs stay in the cache: columns that blocks of 4, 7 and 14 divide.
constexpr int64_t kPanel = 84;

template <class C>
Strips strips_of(const Problem& p) {
  const int64_t columns = least(p.width, kPanel) + 2;
  const int64_t row_bytes = columns * p.in * kLanes<C> * static_cast<int64_t>(sizeof(C));
  return choose_strips(p.height, row_bytes, 2, p.batch);
}

// A unit is a strip of rows. Blocks of groups share the cache lines of a pixel: all go by before the next panel.
int64_t units(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return p.batch * strips_of<C>(p).count;
  });
}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const Strips strips = strips_of<C>(p);
  const int64_t blocks = ceil_div(p.groups, N), panel = least(p.width, kPanel);
  const BlockShape shape = choose_block<C>(true, N, strips.rows, panel);
  const Tile tile(1, N, least(1, p.height - 1), least(1, p.width - 1), strips.rows + shape.rows - 1,
                  round_up(panel, shape.columns));
  TapList taps;
  taps.begin_segment();
  for (int64_t j = 0; j < p.in; ++j) {
    for (int64_t i = -1; i <= 1; ++i) {
      for (int64_t k = -1; k <= 1; ++k) {
        const bool touches = (i == 0 || p.height > 1) && (k == 0 || p.width > 1);
        if (touches) taps.add(j * tile.size() + tile.offset(i, k), 9 * j + 3 * (i + 1) + k + 1);
      }
    }
  }
  taps.end_segment(N);
  C* tiles = static_cast<C*>(scratch(Slot::tile, p.in * tile.size() * static_cast<int64_t>(sizeof(C))));
  // Results wait here only where the map wants another type, or the outputs of a group side by side.
  const bool at_once = std::is_same_v<T, C> && p.out_of_group == 1;
  C* waiting = static_cast<C*>(scratch(Slot::map, strips.rows * panel * N * static_cast<int64_t>(sizeof(C))));
  auto sweep_panel = [&](const C* weights, int64_t rows, int64_t columns, int64_t count, T* out) {
    Sweep<C> s{};
    s.lanes = N;
    s.pixels = true;
    s.shape = shape;
    s.tile = tiles;
    s.row_step = tile.row_pitch();
    s.rows = rows;
    s.columns = columns;
    s.panel = panel_columns((2 * tile.border_rows + shape.rows) * p.in, tile.border_columns, N * sizeof(C));
    s.taps = &taps;
    s.weights = weights;
    s.out = at_once ? reinterpret_cast<C*>(out) : waiting;
    s.out_column = at_once ? p.out_channels() : N;
    s.out_row = at_once ? p.width * p.out_channels() : columns * N;
    s.valid = at_once ? count : N;
    s.scale = weights + 9 * p.in * N;
    s.shift = s.scale + N;
    s.slope = s.shift + N;
    sweep(s);
    if (at_once) return;
    const C* from = waiting;
    for (int64_t y = 0; y < rows; ++y) {
      T* to = out + y * p.width * p.out_channels();
      for (int64_t x = 0; x < columns; ++x, to += p.out_channels(), from += N) {
        for (int64_t lane = 0; lane < count; ++lane) store_one(to + lane * p.out_of_group, from[lane]);
      }
    }
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips.count, first_row = unit % strips.count * strips.rows;
    const int64_t rows = least(strips.rows, p.height - first_row);
    if (rows <= 0) continue;
    for (int64_t column = 0; column < p.width; column += panel) {
      T* out = static_cast<T*>(p.out) + ((image * p.height + first_row) * p.width + column) * p.out_channels();
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * N, count = least(N, p.groups - first);
        GroupTiles<T>{p, tile, tiles, image, first, count}.fill(first_row, {column, p.width});
        for (int64_t t = 0; t < p.out_of_group; ++t) {
          const C* weights = static_cast<const C*>(shared) + (block * p.out_of_group + t) * block_size<C>(p);
          sweep_panel(weights, rows, least(panel, p.width - column), count, out + first * p.out_of_group + t);
        }
      }
    }
  }
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<Problem> grouped_convolution = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
