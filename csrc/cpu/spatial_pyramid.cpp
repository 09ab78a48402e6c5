// Forward of the spatial pyramid: each strip of the input is read once into a zero-bordered tile, and all K branches of
// it are computed with the sums of hierarchical feature fusion carried in registers from branch to branch.
// In training the map is normalised on its way into the tile, and the moments of the result are taken while it is near.
// Bytes: d read + K*d written a pixel; multiply-adds: 9*K*d a pixel.
#include "channel_sums.h"
#include "far_map.h"
#include "kernels.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {
namespace {

// Channels `channel` and on of the first branch; all three vectors, or none.
template <class C>
void set_epilogue(Sweep<C>& sweep, const SpatialPyramid& p, int64_t channel) {
  if (!p.epilogue.scale) return;
  sweep.scale = static_cast<const C*>(p.epilogue.scale) + channel;
  sweep.shift = static_cast<const C*>(p.epilogue.shift) + channel;
  sweep.slope = static_cast<const C*>(p.epilogue.slope) + channel;
  sweep.epilogue_segment = p.channels;
}

template <class T>
void run_planes(const SpatialPyramid& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const BranchWeights<C> weights(p, shared);
  const Strips strips = pyramid_strips<C>(p);
  const PyramidStrip<C> strip(p, strips.rows, p.out_width);
  const int64_t out_plane = p.out_height * p.out_width;
  C* tile = strip.zeroed_tiles();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / strips.count, first = unit % strips.count * strips.rows;
    const int64_t image = plane / p.channels, channel = plane % p.channels;
    const int64_t rows = least(strips.rows, p.out_height - first);
    if (rows <= 0) continue;
    fill_plane(strip.tile, tile, static_cast<const T*>(p.x) + plane * p.height * p.width, first * p.stride, p.height,
               {0, p.width}, strips.count > 1);
    Sweep<C> sweep = strip.sweep(tile, rows, weights.of_channel(channel));
    set_epilogue(sweep, p, channel);
    T* out = static_cast<T*>(p.out) + (image * p.out_channels() + channel) * out_plane + first * p.out_width;
    const int64_t branch = p.channels * out_plane;
    if constexpr (std::is_same_v<T, C>) {
      sweep.out = out;
      sweep.out_segment = branch;
      sweep.out_row = p.out_width;
      ESPK_ISA::sweep(sweep);
    } else {
      const int64_t pitch = rows * p.out_width;
      C* results = static_cast<C*>(scratch(Slot::map, p.branches * pitch * static_cast<int64_t>(sizeof(C))));
      sweep.out = results;
      sweep.out_segment = pitch;
      sweep.out_row = p.out_width;
      ESPK_ISA::sweep(sweep);
      for (int64_t k = 0; k < p.branches; ++k) copy_row(out + k * branch, results + k * pitch, pitch);
    }
  }
}

// How a map of pixels is cut: strips of rows, and panels of columns where rows are long. A unit is one block of channels
// of a patch, or all blocks in turn where the result outgrows the second-level cache: their numbers share cache lines,
// which then leave the cache once, and not half written and once a block.
struct Patches {
  Strips strips;
  int64_t columns, panels, blocks, blocks_of_unit;

  int64_t patches_of_image() const { return strips.count * panels; }
  int64_t units_of_image() const { return patches_of_image() * ceil_div(blocks, blocks_of_unit); }
};

template <class C>
Patches patches_of(const SpatialPyramid& p) {
  constexpr int64_t kWidest = 28, kNearBytes = 768 * 1024;
  Patches cut{};
  cut.panels = ceil_div(p.out_width, kWidest);
  cut.columns = ceil_div(p.out_width, cut.panels);
  cut.panels = ceil_div(p.out_width, cut.columns);
  cut.blocks = pyramid_maps<C>(p);
  const int64_t result = p.out_channels() * p.out_height * p.out_width * bytes_of(p.type);
  cut.blocks_of_unit = result > kNearBytes ? cut.blocks : 1;
  const int64_t lanes = least(kLanes<C>, p.channels);
  const int64_t columns = least(p.width, cut.columns * p.stride) + 2 * reach(p, p.width);
  const int64_t row_bytes = p.stride * columns * lanes * static_cast<int64_t>(sizeof(C));
  cut.strips = choose_strips(p.out_height, row_bytes, ceil_div(2 * reach(p, p.height) + 1, p.stride),
                             p.batch * cut.panels * ceil_div(cut.blocks, cut.blocks_of_unit));
  return cut;
}

// What the calls share beside the weights: in training one piece of moments a patch.
template <class C>
struct Shared {
  void* weights;
  NormaliseVectors<C> normalise;
  PieceMoments<C> moments;
  int64_t bytes;

  Shared(const SpatialPyramid& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const SpatialPyramid& p, Carving memory)
      : weights(memory.take<char>(branch_weight_bytes(p))),
        normalise(p.normalise.scale ? p.channels : 0, memory),
        moments(p.moments.mean ? p.batch * patches_of<C>(p).patches_of_image() : 0, p.out_channels(), memory),
        bytes(memory.bytes()) {}
};

// The strip's input into its tile, normalised in training.
template <class T>
void fill(const SpatialPyramid& p, const NormaliseVectors<Compute<T>>& normalise, const Tile& tile, Compute<T>* to,
          const T* from, int64_t first_row, Columns columns, bool moving, int64_t first_channel, int64_t channels,
          bool far) {
  if (!p.normalise.scale) {
    return fill_pixels(tile, to, from, first_row, p.height, columns, moving, p.channels, channels, far);
  }
  with_lanes<Compute<T>>(tile.lanes, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const auto normalised = normalise.template at<N>(first_channel);
    fill_positions<N>(tile, to, first_row, p.height, columns, moving,
                      [&](int64_t at) { return normalised(load_first<N>(from + at * p.channels, channels)); });
  });
}

// How the branches, rows and columns of a patch lie in memory; a pixel's channels are side by side.
template <class T>
struct PatchMap {
  T* first;
  int64_t branch, row, column;

  T* at(int64_t k, int64_t y, int64_t x) const { return first + k * branch + y * row + x * column; }
};

// One block of channels of a patch.
struct Block {
  int64_t patch, rows, columns, first_channel, channels;
};

template <class C>
void sweep_into(Sweep<C> sweep, const PatchMap<C>& to) {
  sweep.out = to.first;
  sweep.out_segment = to.branch;
  sweep.out_row = to.row;
  sweep.out_column = to.column;
  ESPK_ISA::sweep(sweep);
}

// `store(to, from)` for every branch of every pixel, pixel after pixel.
template <class T, class C, class Store>
void copy_block(const PatchMap<T>& to, const PatchMap<C>& from, const SpatialPyramid& p, const Block& block,
                Store&& store) {
  for (int64_t y = 0; y < block.rows; ++y) {
    for (int64_t x = 0; x < block.columns; ++x) {
      for (int64_t k = 0; k < p.branches; ++k) store(to.at(k, y, x), from.at(k, y, x));
    }
  }
}

template <class T>
void take_moments(const PieceMoments<Compute<T>>& moments, const PatchMap<T>& map, const SpatialPyramid& p,
                  const Block& block) {
  for (int64_t k = 0; k < p.branches; ++k) {
    const int64_t channel = k * p.channels + block.first_channel;
    const T* origin = map.at(k, 0, 0);
    moments.begin(block.patch, channel, block.channels);
    for (int64_t y = 0; y < block.rows; ++y) {
      moments.add(block.patch, channel, block.channels, origin, map.at(k, y, 0), map.column, block.columns);
    }
    moments.finish(block.patch, channel, block.channels, origin, block.rows * block.columns);
  }
}

// The branches of a block, from its tile to the result, and in training their moments while they are near.
template <class T>
void run_block(const SpatialPyramid& p, const Sweep<Compute<T>>& sweep, const PatchMap<T>& out, const Block& block,
               const PieceMoments<Compute<T>>& moments) {
  using C = Compute<T>;
  constexpr bool kInPlace = std::is_same_v<T, C>;
  constexpr int N = kLanes<C>;
  const bool far = kInPlace && p.moments.mean && block.channels == N && p.channels % N == 0 &&
                   is_far(static_cast<const T*>(p.out), p.batch * p.out_height * p.out_width, p.out_pixel);
  if constexpr (kInPlace) {
    if (!far) {
      sweep_into(sweep, out);
      if (p.moments.mean) take_moments(moments, out, p, block);
      return;
    }
  }
  const int64_t pixel = p.branches * block.channels, numbers = block.rows * block.columns * pixel;
  C* results = static_cast<C*>(scratch(Slot::map, numbers * static_cast<int64_t>(sizeof(C))));
  const PatchMap<C> near{results, block.channels, block.columns * pixel, pixel};
  sweep_into(sweep, near);
  if constexpr (kInPlace) {
    copy_block(out, near, p, block, [](C* to, const C* from) { store_far<N>(to, load<N>(from)); });
    finish_far_stores();
    take_moments(moments, near, p, block);
  } else {
    copy_block(out, near, p, block, [&](T* to, const C* from) { copy_row(to, from, block.channels); });
    if (p.moments.mean) take_moments(moments, out, p, block);
  }
}

template <class T>
void run_pixels(const SpatialPyramid& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const BranchWeights<C> weights(p, shared.weights);
  const Patches cut = patches_of<C>(p);
  const int64_t turns = ceil_div(cut.blocks, cut.blocks_of_unit);
  // The last block of channels may be narrower.
  const PyramidStrip<C> whole(p, cut.strips.rows, least(kLanes<C>, p.channels), cut.strips.rows, cut.columns);
  const PyramidStrip<C> last(p, cut.strips.rows, p.channels - (cut.blocks - 1) * kLanes<C>, cut.strips.rows,
                             cut.columns);
  C* tile = nullptr;
  int tile_lanes = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t patch = unit / turns, image = patch / cut.panels / cut.strips.count;
    const int64_t first_column = patch % cut.panels * cut.columns;
    const int64_t first = patch / cut.panels % cut.strips.count * cut.strips.rows;
    const int64_t rows = least(cut.strips.rows, p.out_height - first);
    const int64_t columns = least(cut.columns, p.out_width - first_column);
    if (rows <= 0) continue;
    const int64_t first_block = unit % turns * cut.blocks_of_unit;
    for (int64_t number = first_block; number < first_block + cut.blocks_of_unit; ++number) {
      const PyramidStrip<C>& strip = number + 1 < cut.blocks ? whole : last;
      const Block block{patch, rows, columns, number * kLanes<C>, strip.valid};
      if (strip.lanes != tile_lanes) {
        tile = strip.zeroed_tiles();
        tile_lanes = strip.lanes;
      }
      const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels + block.first_channel;
      fill(p, shared.normalise, strip.tile, tile, x, first * p.stride, {first_column * p.stride, p.width},
           cut.strips.count * cut.panels > 1, block.first_channel, block.channels,
           cut.blocks_of_unit > 1 && number == 0);
      Sweep<C> sweep = strip.sweep(tile, rows, weights.of_block(number));
      sweep.columns = columns;
      set_epilogue(sweep, p, block.first_channel);
      const int64_t first_pixel = (image * p.out_height + first) * p.out_width + first_column;
      T* out = static_cast<T*>(p.out) + first_pixel * p.out_pixel + block.first_channel;
      run_block<T>(p, sweep, {out, p.channels, p.out_width * p.out_pixel, p.out_pixel}, block, shared.moments);
    }
  }
}

void before(const SpatialPyramid& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    prepare_branch_weights(p, p.weight, shared.weights);
    if (p.normalise.scale) shared.normalise.fill(p.normalise, p.channels);
  });
}

int64_t units(const SpatialPyramid& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return p.layout == Layout::channels_last ? p.batch * patches_of<C>(p).units_of_image()
                                             : p.batch * p.channels * pyramid_strips<C>(p).count;
  });
}

void run(const SpatialPyramid& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.layout == Layout::channels_last) {
      run_pixels<T>(p, shared, begin, end);
    } else {
      run_planes<T>(p, shared, begin, end);
    }
  });
}

void after(const SpatialPyramid& p, void* memory) {
  if (!p.moments.mean) return;
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const Patches cut = patches_of<C>(p);
    const Shared<C> shared(p, memory);
    shared.moments.merge(p.moments, p.batch * cut.patches_of_image(), [&](int64_t patch) {
      const int64_t first_column = patch % cut.panels * cut.columns;
      const int64_t first = patch / cut.panels % cut.strips.count * cut.strips.rows;
      return most(least(cut.strips.rows, p.out_height - first), 0) * least(cut.columns, p.out_width - first_column);
    });
  });
}

}  // namespace

extern const Kernel<SpatialPyramid> spatial_pyramid = {carved_bytes<Shared>, before, units, run, nullptr};
extern const Kernel<SpatialPyramid> normalised_pyramid = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
