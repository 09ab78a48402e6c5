// 3x3 convolution in many groups of few channels: a vector runs over groups, so that input j of every group is one map, and
// an output is the sum over the inputs of depthwise convolutions: the taps of all of them form one list. The map is taken
// panel by panel, so that a zero-bordered tile of each input stays in the cache.
// Bytes: M read + N written a pixel; multiply-adds: 9*N*M/groups a pixel.
#include "depthwise_taps.h"
#include "grouped_tiles.h"
#include "kernels.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupedConvolution;

// Numbers of packed weights of a block of groups and one output: [9 * in][N], then scale, shift and slope [3][N].
template <class C>
int64_t block_size(const Problem& p) {
  return (9 * p.in + 3) * kLanes<C>;
}

template <class T>
void pack(const Problem& p, Compute<T>* to) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
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
}

// Stores the outputs of N groups side by side, from Out vectors `pitch` apart that hold one output of all.
template <int Out, class T, class C>
inline void store_in_turn(T* to, const C* from, int64_t pitch) {
  constexpr int N = kLanes<C>;
  Vector<C, N> v[Out];
#pragma GCC unroll 8
  for (int t = 0; t < Out; ++t) v[t] = load<N>(from + t * pitch);
  if constexpr (Out == 3) {
    constexpr std::make_index_sequence<N> lanes{};
    const Vector<C, N> turned[] = {three_in_turn<0>(v, lanes), three_in_turn<1>(v, lanes), three_in_turn<2>(v, lanes)};
    __builtin_memcpy(&v, &turned, sizeof v);
  } else {
    transpose<N, C>(v);
  }
#pragma GCC unroll 8
  for (int t = 0; t < Out; ++t) store<N>(to + t * N, v[t]);
}

// One thread's strips: of each panel the groups block by block, whose inputs go into tiles.
template <class T>
struct GroupStrips {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;

  // Pixels and groups of one filling of the tiles.
  struct Part {
    int64_t image, first_row, rows, first_column, columns, first_group, groups;
  };

  GroupStrips(const Problem& problem, const void* shared)
      : p(problem),
        packed(static_cast<const C*>(shared)),
        panel(group_panel(p)),
        strips(group_strips<C>(p)),
        shape(choose_block<C>(true, N, strips.rows, panel)),
        tile(1, N, least(1, p.height - 1), least(1, p.width - 1), strips.rows + shape.rows - 1,
             round_up(panel, shape.columns)),
        tiles(static_cast<C*>(scratch(Slot::tile, p.in * tile.size() * static_cast<int64_t>(sizeof(C))))) {
    taps.begin_segment();
    for (int64_t j = 0; j < p.in; ++j) {
      for_taps(1, p.height, p.width,
               [&](int64_t tap, int64_t y, int64_t x) { taps.add(j * tile.size() + tile.offset(y, x), 9 * j + tap); });
    }
    taps.end_segment(N);
  }

  // A unit is a strip of rows. Blocks of groups share the cache lines of a pixel: all go by before the next panel.
  void run(int64_t unit) const {
    const int64_t first_row = unit % strips.count * strips.rows;
    Part part{unit / strips.count, first_row, least(strips.rows, p.height - first_row), 0, 0, 0, 0};
    if (part.rows <= 0) return;
    for (; part.first_column < p.width; part.first_column += panel) {
      part.columns = least(panel, p.width - part.first_column);
      for (part.first_group = 0; part.first_group < p.groups; part.first_group += N) {
        part.groups = least(N, p.groups - part.first_group);
        const GroupTiles<T> inputs{p, tile, tiles, part.image, part.first_group, part.groups};
        inputs.fill(part.first_row, {part.first_column, p.width});
        run_part(part);
      }
    }
  }

 private:
  // A few rows at a time, so that those of all outputs of a group wait in the first-level cache for one another.
  void run_part(const Part& part) const {
    const bool at_once = std::is_same_v<T, C> && p.out_of_group == 1;
    constexpr int64_t kWaiting = 16 * 1024 / sizeof(C);  // numbers
    const int64_t blocks = most(kWaiting / (p.out_of_group * part.columns * N * shape.rows), 1);
    const int64_t step = at_once ? part.rows : least(blocks * shape.rows, part.rows), plane = step * part.columns * N;
    C* waiting = at_once
                     ? nullptr
                     : static_cast<C*>(scratch(Slot::map, p.out_of_group * plane * static_cast<int64_t>(sizeof(C))));
    for (int64_t y = 0; y < part.rows; y += step) {
      const int64_t rows = least(step, part.rows - y);
      const int64_t pixel = (part.image * p.height + part.first_row + y) * p.width + part.first_column;
      T* out = static_cast<T*>(p.out) + pixel * p.out_channels() + part.first_group * p.out_of_group;
      for (int64_t t = 0; t < p.out_of_group; ++t) {
        Sweep<C> s = sweep_of(part, y, rows, t);
        s.out = at_once ? reinterpret_cast<C*>(out) : waiting + t * plane;
        s.out_column = at_once ? p.out_channels() : N;
        s.out_row = at_once ? p.width * p.out_channels() : part.columns * N;
        s.valid = at_once ? part.groups : N;
        ESPK_ISA::sweep(s);
      }
      if (at_once) continue;
      for (int64_t i = 0; i < rows; ++i) {
        store_row(out + i * p.width * p.out_channels(), waiting + i * part.columns * N, plane, part);
      }
    }
  }

  // Rows [y, y + rows) of output `t` of the groups of a part, but for where they go.
  Sweep<C> sweep_of(const Part& part, int64_t y, int64_t rows, int64_t t) const {
    const C* weights = packed + (part.first_group / N * p.out_of_group + t) * block_size<C>(p);
    Sweep<C> s{};
    s.lanes = N;
    s.pixels = true;
    s.shape = shape;
    s.tile = tiles;
    s.first = y * tile.row_pitch();
    s.row_step = tile.row_pitch();
    s.rows = rows;
    s.columns = part.columns;
    s.panel = panel_columns((2 * tile.border_rows + shape.rows) * p.in, tile.border_columns, N * sizeof(C));
    s.taps = &taps;
    s.weights = weights;
    s.scale = weights + 9 * p.in * N;
    s.shift = s.scale + N;
    s.slope = s.shift + N;
    return s;
  }

  // A row of the result from the outputs of its groups, `plane` apart.
  void store_row(T* to, const C* from, int64_t plane, const Part& part) const {
    for (int64_t x = 0; x < part.columns; ++x, to += p.out_channels(), from += N) {
      if (part.groups == N && p.out_of_group == 1) {
        store<N>(to, load<N>(from));
      } else if (part.groups == N && p.out_of_group == 2) {
        store_in_turn<2>(to, from, plane);
      } else if (part.groups == N && p.out_of_group == 3) {
        store_in_turn<3>(to, from, plane);
      } else if (part.groups == N && p.out_of_group == 4) {
        store_in_turn<4>(to, from, plane);
      } else if (part.groups == N && p.out_of_group == 8) {
        store_in_turn<8>(to, from, plane);
      } else {
        for (int64_t lane = 0; lane < part.groups; ++lane) {
          for (int64_t t = 0; t < p.out_of_group; ++t)
            store_one(to + lane * p.out_of_group + t, from[t * plane + lane]);
        }
      }
    }
  }

  const Problem& p;
  const C* packed;
  const int64_t panel;
  const Strips strips;
  const BlockShape shape;
  const Tile tile;  // of each input
  C* const tiles;
  TapList taps;
};

int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return ceil_div(p.groups, kLanes<C>) * p.out_of_group * block_size<C>(p) * static_cast<int64_t>(sizeof(C));
  });
}

void before(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack<T>(p, static_cast<Compute<T>*>(shared));
  });
}

int64_t units(const Problem& p) {
  return p.batch * with_type(p.type, [&](auto* type) {
           return group_strips<Compute<std::remove_pointer_t<decltype(type)>>>(p).count;
         });
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    const GroupStrips<std::remove_pointer_t<decltype(type)>> strips(p, shared);
    for (int64_t unit = begin; unit < end; ++unit) strips.run(unit);
  });
}

}  // namespace

extern const Kernel<Problem> grouped_convolution = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
