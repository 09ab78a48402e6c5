// 3x3 convolution in many groups of few channels: a vector runs over groups, so that input j of every group is one map, and
// an output is the sum over the inputs of depthwise convolutions: the taps of all of them form one list.
// Bytes: M read + N written a pixel; multiply-adds: 9*N*in a pixel.
#include "branch_weights.h"
#include "depthwise_taps.h"
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
  int64_t bytes = 0;
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    bytes = ceil_div(p.groups, kLanes<C>) * p.out_of_group * block_size<C>(p) * static_cast<int64_t>(sizeof(C));
  });
  return bytes;
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

// A strip goes panel by panel, so that the tiles of all inputs stay in the cache: columns that every block shape divides.
constexpr int64_t kPanel = 84;

template <class C>
Strips strips_of(const Problem& p) {
  const int64_t columns = least(p.width, kPanel) + 2;
  const int64_t row_bytes = columns * p.in * kLanes<C> * static_cast<int64_t>(sizeof(C));
  return choose_strips(p.height, row_bytes, 2, p.batch);
}

// A unit is a strip of rows. Blocks of groups share the cache lines of a pixel: all go by before the next panel.
int64_t units(const Problem& p) {
  int64_t count = 0;
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    count = p.batch * strips_of<C>(p).count;
  });
  return count;
}

// What a unit reads of an image: `count` groups from `first` on, in a tile for each input of a group.
template <class T>
struct Block {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  const Problem& p;
  const Tile& tile;
  C* tiles;
  int64_t image, first, count;

  void fill(int64_t first_row, Columns columns) const {
    if (p.separate || p.in == 1) {
      for (int64_t j = 0; j < p.in; ++j) {
        const T* map = static_cast<const T*>(p.x) + (j * p.batch + image) * p.height * p.width * p.groups;
        fill_pixels(tile, tiles + j * tile.size(), map + first, first_row, p.height, columns, true, p.groups, count);
      }
    } else if (count == N && p.in == 2) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<2>(to, from); });
    } else if (count == N && p.in == 4) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<4>(to, from); });
    } else if (count == N && p.in == 8) {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) { separate<8>(to, from); });
    } else {
      fill_in_turn(first_row, columns, [&](C* to, const T* from) {
        for (int64_t j = 0; j < p.in; ++j, to += tile.size()) {
          for (int64_t lane = 0; lane < N; ++lane) to[lane] = lane < count ? load_one(from + lane * p.in + j) : C(0);
        }
      });
    }
  }

 private:
  // Where the inputs of a group lie side by side: place(to, from) puts those of a pixel into their tiles.
  template <class Place>
  void fill_in_turn(int64_t first_row, Columns columns, Place&& place) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t y = first_row - tile.border_rows + r;
      C* row = tiles + r * tile.row_pitch();
      auto zero = [&](int64_t position, int64_t positions) {
        for (int64_t j = 0; j < p.in; ++j) fill_zero(row + j * tile.size() + position * N, positions * N);
      };
      if (y < 0 || y >= p.height) {
        zero(0, tile.positions);
        continue;
      }
      const T* map = static_cast<const T*>(p.x) + (image * p.height + y) * p.width * p.in_channels() + first * p.in;
      for_phases(
          tile, columns,
          [&](int64_t position, int64_t column, int64_t positions) {
            for (int64_t i = 0; i < positions; ++i) {
              place(row + (position + i) * N, map + (column + i) * p.in_channels());
            }
          },
          zero);
    }
  }

  // In, a power of two, inputs of N groups. Each round puts every other number of what the round before left in front,
  // first by the last bit of an input's number, in the end by its first; N inputs are a matrix to transpose.
  template <int In>
  void separate(C* to, const T* from) const {
    constexpr std::make_index_sequence<N> lanes{};
    Vector<C, N> v[In], last[In];
#pragma GCC unroll 8
    for (int i = 0; i < In; ++i) v[i] = load<N>(from + i * N);
    if constexpr (In == N) {
      transpose<N, C>(v);
    } else {
#pragma GCC unroll 3
      for (int bit = 1; bit < In; bit *= 2) {
        __builtin_memcpy(&last, &v, sizeof v);
#pragma GCC unroll 4
        for (int i = 0; i < In / 2; ++i) {
          v[i] = every_other<0>(last[2 * i], last[2 * i + 1], lanes);
          v[In / 2 + i] = every_other<1>(last[2 * i], last[2 * i + 1], lanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < In; ++i) store<N>(to + i * tile.size(), v[i]);
  }
};

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const Strips strips = strips_of<C>(p);
  const int64_t blocks = ceil_div(p.groups, N), panel = least(p.width, kPanel);
  const BlockShape shape = choose_block(true, strips.rows, panel);
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
    for (int64_t i = 0; i < rows * columns; ++i) {
      T* pixel = out + (i / columns * p.width + i % columns) * p.out_channels();
      for (int64_t lane = 0; lane < count; ++lane) store_one(pixel + lane * p.out_of_group, waiting[i * N + lane]);
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
        Block<T>{p, tile, tiles, image, first, count}.fill(first_row, {column, p.width});
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
