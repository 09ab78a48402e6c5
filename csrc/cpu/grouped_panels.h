// 3x3 convolution in many groups of few channels: a vector runs over groups, so that input j of every group is one map, and
// an output is the sum over the inputs of depthwise convolutions: the taps of all of them form one list. The map is taken
// panel by panel, so that a zero-bordered tile of each input stays in the cache; whoever calls fills them.
// Multiply-adds: 9*N*in a pixel.
#pragma once

#include "depthwise_taps.h"
#include "kernels.h"

namespace espk::ESPK_ISA {

template <class T>
class GroupedPanels {
 public:
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;

  // Pixels and groups of one filling of the tiles.
  struct Part {
    int64_t image, first_row, rows, first_column, columns, first_group, groups;
  };

  GroupedPanels(const GroupedConvolution& p, int64_t panel)
      : p_(p),
        panel_(panel),
        strips_(strips_of(p, panel)),
        shape_(choose_block<C>(true, N, strips_.rows, panel)),
        tile(1, N, least(1, p.height - 1), least(1, p.width - 1), strips_.rows + shape_.rows - 1,
             round_up(panel, shape_.columns)) {
    taps_.begin_segment();
    for (int64_t j = 0; j < p.in; ++j) {
      for_taps(1, p.height, p.width,
               [&](int64_t tap, int64_t y, int64_t x) { taps_.add(j * tile.size() + tile.offset(y, x), 9 * j + tap); });
    }
    taps_.end_segment(N);
  }

  // A unit is a strip of rows. Blocks of groups share the cache lines of a pixel: all go by before the next panel.
  static int64_t units(const GroupedConvolution& p, int64_t panel) { return p.batch * strips_of(p, panel).count; }

  // Numbers of packed weights: of each block of groups and output [9 * in][N], then scale, shift and slope [3][N].
  static int64_t packed_size(const GroupedConvolution& p) {
    return ceil_div(p.groups, N) * p.out_of_group * block_size(p);
  }

  static void pack(const GroupedConvolution& p, C* to) {
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

  // Units [begin, end) of the result. fill(part, tiles) fills one `tile` for each input, with zeros beside the map.
  template <class Fill>
  void run(const C* packed, int64_t begin, int64_t end, Fill&& fill) const {
    C* tiles = static_cast<C*>(scratch(Slot::tile, p_.in * tile.size() * static_cast<int64_t>(sizeof(C))));
    // Results wait here only where the map wants another type, or the outputs of a group side by side.
    C* waiting = static_cast<C*>(scratch(Slot::map, strips_.rows * panel_ * N * static_cast<int64_t>(sizeof(C))));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first_row = unit % strips_.count * strips_.rows;
      Part part{unit / strips_.count, first_row, least(strips_.rows, p_.height - first_row), 0, 0, 0, 0};
      if (part.rows <= 0) continue;
      for (; part.first_column < p_.width; part.first_column += panel_) {
        part.columns = least(panel_, p_.width - part.first_column);
        for (part.first_group = 0; part.first_group < p_.groups; part.first_group += N) {
          part.groups = least(N, p_.groups - part.first_group);
          fill(part, tiles);
          for (int64_t t = 0; t < p_.out_of_group; ++t) {
            sweep(part, t, packed + (part.first_group / N * p_.out_of_group + t) * block_size(p_), tiles, waiting);
          }
        }
      }
    }
  }

 private:
  static int64_t block_size(const GroupedConvolution& p) { return (9 * p.in + 3) * N; }

  static Strips strips_of(const GroupedConvolution& p, int64_t panel) {
    const int64_t row_bytes = (panel + 2) * p.in * N * static_cast<int64_t>(sizeof(C));
    return choose_strips(p.height, row_bytes, 2, p.batch);
  }

  // Output `t` of the groups of a part.
  void sweep(const Part& part, int64_t t, const C* weights, const C* tiles, C* waiting) const {
    const bool at_once = std::is_same_v<T, C> && p_.out_of_group == 1;
    const int64_t pixel = (part.image * p_.height + part.first_row) * p_.width + part.first_column;
    T* out = static_cast<T*>(p_.out) + pixel * p_.out_channels() + part.first_group * p_.out_of_group + t;
    Sweep<C> s{};
    s.lanes = N;
    s.pixels = true;
    s.shape = shape_;
    s.tile = tiles;
    s.row_step = tile.row_pitch();
    s.rows = part.rows;
    s.columns = part.columns;
    s.panel = panel_columns((2 * tile.border_rows + shape_.rows) * p_.in, tile.border_columns, N * sizeof(C));
    s.taps = &taps_;
    s.weights = weights;
    s.out = at_once ? reinterpret_cast<C*>(out) : waiting;
    s.out_column = at_once ? p_.out_channels() : N;
    s.out_row = at_once ? p_.width * p_.out_channels() : part.columns * N;
    s.valid = at_once ? part.groups : N;
    s.scale = weights + 9 * p_.in * N;
    s.shift = s.scale + N;
    s.slope = s.shift + N;
    ESPK_ISA::sweep(s);
    if (at_once) return;
    for (int64_t y = 0; y < part.rows; ++y) {
      T* to = out + y * p_.width * p_.out_channels();
      for (int64_t x = 0; x < part.columns; ++x, to += p_.out_channels(), waiting += N) {
        for (int64_t lane = 0; lane < part.groups; ++lane) store_one(to + lane * p_.out_of_group, waiting[lane]);
      }
    }
  }

  const GroupedConvolution& p_;
  const int64_t panel_;
  const Strips strips_;
  const BlockShape shape_;
  TapList taps_;

 public:
  const Tile tile;  // of each input
};

}  // namespace espk::ESPK_ISA
