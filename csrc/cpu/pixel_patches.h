// The spatial pyramid of a map of pixels: how it is cut into patches, and the way of one thread through them.
#pragma once

#include "channel_sums.h"
#include "far_map.h"
#include "kernels.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {

// Rows and columns of the result of one image.
struct Patch {
  int64_t number, image, first_row, rows, first_column, columns;
};

// How a map of pixels is cut: strips of rows, and panels of columns where rows are long. A unit is one block of channels
// of a patch, or all blocks in turn where the result outgrows the second-level cache: their numbers share cache lines,
// which then leave the cache once, and not half written and once a block. A result that outgrows every cache is stored
// past them, since whole lines save fetching what they overwrite: vectors that are lines as they are computed, and others
// gathered, a few rows of all blocks at a time; but where dilations are so large that tiles of all blocks would hold
// little beside the rows that strips share. In training lines are gathered too: their moments are taken from the cache.
struct Patches {
  Strips strips;
  int64_t columns, panels, blocks, blocks_of_unit;
  bool far, gathered;  // past the caches, and gathered first
  int64_t group, step;  // blocks that go through the rows of a patch together, and how many rows at a time

  int64_t of_image() const { return strips.count * panels; }
  int64_t turns() const { return blocks / blocks_of_unit; }  // units of a patch

  Patch at(const SpatialPyramid& p, int64_t number) const {
    const int64_t first_row = number / panels % strips.count * strips.rows, first_column = number % panels * columns;
    return {number,       number / of_image(),
            first_row,    most(least(strips.rows, p.out_height - first_row), 0),
            first_column, least(columns, p.out_width - first_column)};
  }
};

template <class C>
inline Patches patches_of(const SpatialPyramid& p) {
  // Timed together with what reads the result next, 12 MiB are faster past the caches, by 3 to 34 %, and 4 MiB no faster.
  constexpr int64_t kWidest = 32, kNearBytes = 768 * 1024, kFarResult = kFarBytes / 2, kRowsTogether = 16 * 1024;
  Patches cut{};
  cut.panels = ceil_div(p.out_width, kWidest);
  cut.columns = ceil_div(p.out_width, cut.panels);
  cut.panels = ceil_div(p.out_width, cut.columns);
  cut.blocks = pyramid_maps<C>(p);
  const int64_t lanes = least(kLanes<C>, p.channels), overlap = ceil_div(2 * reach(p, p.height) + 1, p.stride);
  const int64_t columns = least(p.width, cut.columns * p.stride) + 2 * reach(p, p.width);
  const int64_t row_bytes = p.stride * columns * lanes * static_cast<int64_t>(sizeof(C));  // of a block's tile
  const int64_t pixel = p.out_channels() * bytes_of(p.type), result = pixel * p.out_height * p.out_width;
  const bool vectors_are_lines = kRegisterBytes == kLineBytes && p.channels % kLanes<C> == 0 && !p.moments.mean;
  cut.far = kFarStores && bytes_of(p.type) == sizeof(C) && p.batch * result >= kFarResult &&
            p.out_pixel == p.out_channels() && pixel % kLineBytes == 0 &&
            (vectors_are_lines || 2 * overlap * cut.blocks * row_bytes <= kMostTileBytes);
  cut.gathered = cut.far && !vectors_are_lines;
  cut.blocks_of_unit = cut.gathered || (result > kNearBytes && !cut.far) ? cut.blocks : 1;
  cut.group = cut.gathered ? cut.blocks : 1;
  cut.strips = choose_strips(p.out_height, cut.group * row_bytes, overlap, p.batch * cut.panels * cut.turns());
  cut.step = cut.gathered ? least(cut.strips.rows, most(kRowsTogether / (cut.columns * pixel), 1)) : cut.strips.rows;
  return cut;
}

// What the calls share beside the weights: in training one piece of moments a patch.
template <class C>
struct SharedPyramid {
  void* weights;
  NormaliseVectors<C> normalise;
  PieceMoments<C> moments;
  int64_t bytes;

  SharedPyramid(const SpatialPyramid& p, void* memory) : SharedPyramid(p, Carving(memory)) {}

 private:
  SharedPyramid(const SpatialPyramid& p, Carving memory)
      : weights(memory.take<char>(branch_weight_bytes(p))),
        normalise(p.normalise.scale ? p.channels : 0, memory),
        moments(p.moments.mean ? p.batch * patches_of<C>(p).of_image() : 0, p.out_channels(), memory),
        bytes(memory.bytes()) {}
};

// How the branches, rows and columns of a patch lie in memory; a pixel's channels are side by side.
template <class T>
struct PatchMap {
  T* first;
  int64_t branch, row, column;

  T* at(int64_t k, int64_t y, int64_t x) const { return first + k * branch + y * row + x * column; }
  PatchMap from_row(int64_t y) const { return {at(0, y, 0), branch, row, column}; }
};

// One thread's patches of a map of pixels.
template <class T>
class PixelPatches {
  using C = Compute<T>;
  static constexpr bool kInPlace = std::is_same_v<T, C>;
  static constexpr int N = kLanes<C>;

 public:
  PixelPatches(const SpatialPyramid& problem, void* memory)
      : p(problem),
        shared(p, memory),
        weights(p, shared.weights),
        cut(patches_of<C>(p)),
        whole(p, cut.strips.rows, least(N, p.channels), cut.step, cut.columns),
        last(p, cut.strips.rows, p.channels - (cut.blocks - 1) * N, cut.step, cut.columns),
        tile_of_last(last.lanes < whole.lanes ? cut.group : cut.group - 1),
        tiles(whole.zeroed_tiles(tile_of_last + 1)) {}

  void run(int64_t unit) const {
    const Patch patch = cut.at(p, unit / cut.turns());
    const int64_t first = unit % cut.turns() * cut.blocks_of_unit;
    for (int64_t block = first; block < first + cut.blocks_of_unit; block += cut.group) run_group(patch, block);
    if (cut.far) finish_far_stores();  // once: it waits for memory, which is written meanwhile
  }

 private:
  // The channels of a group of blocks in a patch, and where they go.
  struct Group {
    Patch patch;
    int64_t first_block, first_channel, channels;
    PatchMap<T> out;
  };

  void run_group(const Patch& patch, int64_t first_block) const {
    const int64_t channel = first_block * N;
    const int64_t pixel = (patch.image * p.out_height + patch.first_row) * p.out_width + patch.first_column;
    T* out = static_cast<T*>(p.out) + pixel * p.out_pixel + channel;
    const Group group{patch,
                      first_block,
                      channel,
                      least(cut.group * N, p.channels - channel),
                      {out, p.channels, p.out_width * p.out_pixel, p.out_pixel}};
    if (p.moments.mean) {
      for_branches(group, [&](int64_t, int64_t at) { shared.moments.begin(patch.number, at, group.channels); });
    }
    int64_t filled = 0;
    for (int64_t y = 0; y < patch.rows; y += cut.step) {
      filled = run_rows(group, y, least(cut.step, patch.rows - y), filled);
    }
    if (p.moments.mean) {
      for_branches(group, [&](int64_t k, int64_t at) {
        shared.moments.finish(patch.number, at, group.channels, group.out.at(k, 0, 0), patch.rows * patch.columns);
      });
    }
  }

  // `rows` rows of the result from row `y` of the patch on. `filled` rows of the tiles hold their input already; returns
  // how many do afterwards.
  int64_t run_rows(const Group& group, int64_t y, int64_t rows, int64_t filled) const {
    const PatchMap<T> out = group.out.from_row(y);
    const PatchMap<C> to = swept_into(group, out, rows);
    const int64_t needed = (y + rows - 1) * p.stride + 2 * whole.tile.border_rows + 1;
    for (int64_t i = 0; i < cut.group; ++i) {
      const int64_t block = group.first_block + i;
      const bool is_last = block + 1 == cut.blocks;
      const PyramidStrip<C>& strip = is_last ? last : whole;
      C* tile = tiles + (is_last ? tile_of_last : i) * whole.tile.size();
      fill(strip, tile, group.patch, block, filled, needed);
      Sweep<C> sweep = strip.sweep(tile + y * p.stride * strip.tile.row_pitch(), rows, weights.of_block(block));
      set_epilogue(sweep, p, block * N);
      sweep.columns = group.patch.columns;
      sweep.out = to.first + i * N;
      sweep.out_segment = to.branch;
      sweep.out_row = to.row;
      sweep.out_column = to.column;
      sweep.far = cut.far && !cut.gathered && starts_a_line(p.out);
      ESPK_ISA::sweep(sweep);
    }
    if (gathers()) {
      store_gathered(group, out, to, rows);
    }
    if (p.moments.mean) {
      if constexpr (kInPlace) {
        add_moments(group, to, rows);
      } else {
        add_moments(group, out, rows);
      }
    }
    return needed;
  }

  bool gathers() const { return !kInPlace || cut.gathered; }

  // Where a group's rows come from the sweep: in place, or side by side in the cache.
  PatchMap<C> swept_into(const Group& group, [[maybe_unused]] const PatchMap<T>& out, int64_t rows) const {
    if constexpr (kInPlace) {
      if (!cut.gathered) return out;
    }
    const int64_t pixel = p.branches * group.channels, row = group.patch.columns * pixel;
    C* near = static_cast<C*>(scratch(Slot::map, rows * row * static_cast<int64_t>(sizeof(C))));
    return {near, group.channels, row, pixel};
  }

  void store_gathered(const Group& group, const PatchMap<T>& out, const PatchMap<C>& from, int64_t rows) const {
    if constexpr (kInPlace) {  // whole pixels
      const bool aligned = starts_a_line(p.out);
      for (int64_t y = 0; y < rows; ++y) {
        if (aligned) {
          copy_far(out.at(0, y, 0), from.at(0, y, 0), from.row);
        } else {
          copy_row(out.at(0, y, 0), from.at(0, y, 0), from.row);
        }
      }
    } else {
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < group.patch.columns; ++x) {
          for (int64_t k = 0; k < p.branches; ++k) copy_row(out.at(k, y, x), from.at(k, y, x), group.channels);
        }
      }
    }
  }

  // Rows [filled, needed) of a block's tile, normalised in training.
  void fill(const PyramidStrip<C>& strip, C* tile, const Patch& patch, int64_t block, int64_t filled,
            int64_t needed) const {
    const Tile rows = strip.tile.of_rows(needed - filled);
    C* to = tile + filled * rows.row_pitch();
    const T* x = static_cast<const T*>(p.x) + patch.image * p.height * p.width * p.channels + block * N;
    const int64_t first_row = patch.first_row * p.stride + filled;
    const Columns columns{patch.first_column * p.stride, p.width};
    const bool moving = cut.of_image() > 1;
    if (!p.normalise.scale) {
      const bool fetch = cut.far || (cut.blocks_of_unit > 1 && block == 0);
      return fill_pixels(rows, to, x, first_row, p.height, columns, moving, p.channels, strip.valid, fetch);
    }
    with_lanes<C>(strip.lanes, [&](auto lanes) {
      constexpr int L = decltype(lanes)::value;
      const auto normalised = shared.normalise.template at<L>(block * N);
      fill_positions<L>(rows, to, first_row, p.height, columns, moving,
                        [&](int64_t at) { return normalised(load_first<L>(x + at * p.channels, strip.valid)); });
    });
  }

  template <class M>
  void add_moments(const Group& group, const PatchMap<M>& map, int64_t rows) const {
    for_branches(group, [&](int64_t k, int64_t at) {
      for (int64_t y = 0; y < rows; ++y) {
        shared.moments.add(group.patch.number, at, group.channels, group.out.at(k, 0, 0), map.at(k, y, 0), map.column,
                           group.patch.columns);
      }
    });
  }

  // f(branch, its channel of the result) for the group's first channel in each branch.
  template <class F>
  void for_branches(const Group& group, F&& f) const {
    for (int64_t k = 0; k < p.branches; ++k) f(k, k * p.channels + group.first_channel);
  }

  const SpatialPyramid& p;
  const SharedPyramid<C> shared;
  const BranchWeights<C> weights;
  const Patches cut;
  const PyramidStrip<C> whole, last;  // the last block of channels may be narrower, and needs zeros of its own then
  const int64_t tile_of_last;
  C* const tiles;  // one for each block of a group
};

}  // namespace espk::ESPK_ISA
