// The EESP unit after its reduction in one pass: pyramid, HFF, affine and PReLU of a few rows go into a map that stays in
// the cache, and the group pointwise convolution with its epilogue reads it from there.
// Bytes: d read + N written (+ N of the residual) a pixel; multiply-adds: 9*K*d + K*d*N/groups a pixel.
#include "pyramid_pointwise.h"

#include "image_shortcut.h"
#include "pointwise_weights.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = PyramidPointwise;

PointwiseWeights weights_of(const Problem& p) {
  return {p.type,
          p.layout == Layout::channels_last,
          p.groups,
          p.out_channels() / p.groups,
          p.pointwise_channels / p.groups,
          false,
          p.bfloat16};
}

// The affine and PReLU of the concatenated map, all three present, in the compute type.
template <class C>
struct PyramidEpilogue {
  C *scale, *shift, *slope;

  PyramidEpilogue(const Problem& p, void* memory) {
    scale = static_cast<C*>(memory);
    shift = scale + p.out_channels();
    slope = shift + p.out_channels();
  }
};

int64_t epilogue_offset(const Problem& p) { return round_up(branch_weight_bytes(p), 64); }

int64_t pointwise_offset(const Problem& p) { return epilogue_offset(p) + round_up(3 * p.out_channels() * 8, 64); }

int64_t shared_bytes(const Problem& p) { return pointwise_offset(p) + weights_of(p).bytes(); }

void before(const Problem& p, void* shared) {
  char* memory = static_cast<char*>(shared);
  prepare_branch_weights(p, p.weight, memory);
  weights_of(p).prepare(p.pointwise_weight, memory + pointwise_offset(p));
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const PyramidEpilogue<C> epilogue(p, memory + epilogue_offset(p));
    auto fill = [&](C* to, const void* from, C otherwise) {
      for (int64_t i = 0; i < p.out_channels(); ++i) to[i] = from ? static_cast<const C*>(from)[i] : otherwise;
    };
    fill(epilogue.scale, p.pyramid_epilogue.scale, 1);
    fill(epilogue.shift, p.pyramid_epilogue.shift, 0);
    fill(epilogue.slope, p.pyramid_epilogue.slope, 1);
  });
}

// A unit is a strip of one image with all its channels. It goes through its tiles a few rows at a time, and their rows
// come round: they hold no more than these rows need, and a strip is as long as the threads allow.
Strips strips_of(const Problem& p) {
  const int64_t overlap = ceil_div(2 * reach(p, p.height) + 1, p.stride);
  return choose_strips(p.out_height, 0, overlap, p.batch, most(p.threads, 1));
}

int64_t units(const Problem& p) { return p.batch * strips_of(p).count; }

// `z` is rounded to bfloat16, as every framework stores it.
void multiply_pairs(const PointwiseWeights& weights, const void* packed, const float* z, int64_t rows,
                    const Epilogue& epilogue, const float* added, uint16_t* out, int64_t out_row) {
  const int64_t channels = weights.groups * weights.in;
  uint16_t* rounded = static_cast<uint16_t*>(scratch(Slot::results, rows * channels * 2));
  weights.bfloat16->round(rounded, z, rows * channels);
  Bfloat16Product product = weights.pairs(rows, weights.groups, weights.out);
  product.a = rounded;
  product.a_row = channels;
  product.b = static_cast<const uint16_t*>(packed);
  product.out = out;
  product.out_row = out_row;
  set_parameters(product, epilogue, 0);
  product.residual = static_cast<const uint16_t*>(epilogue.residual);
  product.added = added;
  product.added_row = weights.groups * weights.out;
  weights.bfloat16->multiply(product);
}

// One thread's strips: all blocks of channels of a strip go into tiles, then a few rows at a time through the map.
template <class T>
struct UnitStrips {
  using C = Compute<T>;

  UnitStrips(const Problem& problem, void* shared, const ReducedRows* rows)
      : p(problem),
        reduced(rows),
        pixels(p.layout == Layout::channels_last),
        branch_weights(p, shared),
        affine(p, static_cast<char*>(shared) + epilogue_offset(p)),
        pointwise(reinterpret_cast<const C*>(static_cast<char*>(shared) + pointwise_offset(p))),
        weights(weights_of(p)),
        strips(strips_of(p)),
        lanes(pixels ? kLanes<C> : 1),
        blocks(ceil_div(p.channels, lanes)),
        step(rows_of_map()),
        pitch(pixels ? p.out_channels() : round_up(step * p.out_width, kLanes<C>)),
        shortcut(p.shortcut, p.pointwise_channels, step * p.out_width),
        whole(p, step, pixels ? least(lanes, p.channels) : p.out_width),
        last(p, step, pixels ? p.channels - (blocks - 1) * lanes : p.out_width),
        tiles(whole.zeroed_tiles(blocks)) {}

  void run(int64_t unit) const {
    const int64_t image = unit / strips.count, first = unit % strips.count * strips.rows;
    const int64_t rows = least(strips.rows, p.out_height - first);
    if (rows <= 0) return;
    int64_t filled = 0;
    for (int64_t y = 0; y < rows; y += step) {
      const int64_t map_rows = least(step, rows - y), count = map_rows * p.out_width;
      const int64_t needed = (y + map_rows - 1) * p.stride + 2 * whole.tile.border_rows + 1;
      fill_tiles(image, first * p.stride, filled, needed);
      filled = needed;
      const int64_t numbers = pixels ? count * pitch : p.out_channels() * pitch;
      C* map = static_cast<C*>(scratch(Slot::map, numbers * static_cast<int64_t>(sizeof(C))));
      sweep_into(map, y, map_rows);
      if (pixels) {
        multiply_map_of_pixels(map, image, (first + y) * p.out_width, count);
      } else {
        multiply_map_of_planes(map, image, (first + y) * p.out_width, count);
      }
    }
  }

  // Enough pixels for the blocks of the product, and a map of at most 128 KiB.
  int64_t rows_of_map() const {
    const int64_t row_bytes = p.out_channels() * p.out_width * static_cast<int64_t>(sizeof(C));
    return least(strips.rows, least(ceil_div(48, p.out_width), most(128 * 1024 / row_bytes, 1)));
  }

  // The last block of channels may be narrower.
  const PyramidStrip<C>& strip_of(int64_t block) const { return block + 1 < blocks ? whole : last; }
  C* tile_of(int64_t block) const { return tiles + block * whole.tile.size(); }

  // Rows of the reduced map: `count` of them from row `first` on.
  struct MapRows {
    const T* data;
    int64_t first, count;
  };

  // At least those of an image that rows [filled, needed) of the strip's tiles hold.
  MapRows rows_of(int64_t image, int64_t first, int64_t filled, int64_t needed) const {
    if (!reduced) return {static_cast<const T*>(p.x) + image * p.channels * p.height * p.width, 0, p.height};
    auto row_of_map = [&](int64_t row) { return most(0, least(first + row - whole.tile.border_rows, p.height)); };
    const int64_t begin = row_of_map(filled), end = row_of_map(needed);
    return {static_cast<const T*>(reduced->rows(reduced->context, image, begin, end)), begin, end - begin};
  }

  // Rows [filled, needed) of the strip that begins at row `first`.
  void fill_tiles(int64_t image, int64_t first, int64_t filled, int64_t needed) const {
    const MapRows map = rows_of(image, first, filled, needed);
    const T* x = map.data;
    const bool moving = strips.count > 1 || step < strips.rows;
    for (int64_t block = 0; block < blocks; ++block) {
      const PyramidStrip<C>& strip = strip_of(block);
      strip.tile.for_rounds(filled, needed, [&](const Tile& rows, int64_t offset, int64_t row) {
        C* to = tile_of(block) + offset;
        if (pixels) {
          fill_pixels(rows, to, x + block * lanes, first + row - map.first, map.count, {0, p.width}, moving, p.channels,
                      strip.valid);
        } else {
          fill_plane(rows, to, x + block * p.height * p.width, first + row, p.height, {0, p.width}, moving);
        }
      });
    }
  }

  // All branches of `rows` rows from row `y` of the strip on.
  void sweep_into(C* map, int64_t y, int64_t rows) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const PyramidStrip<C>& strip = strip_of(block);
      const int64_t channel = block * lanes;
      Sweep<C> sweep =
          strip.sweep(tile_of(block), rows, pixels ? branch_weights.of_block(block) : branch_weights.of_channel(block));
      sweep.first = y * p.stride % strip.tile.rows * strip.tile.row_pitch();
      sweep.round = strip.tile.size();
      sweep.scale = affine.scale + channel;
      sweep.shift = affine.shift + channel;
      sweep.slope = affine.slope + channel;
      sweep.epilogue_segment = p.channels;
      if (pixels) {
        sweep.out = map + channel;
        sweep.out_segment = p.channels;
        sweep.out_column = pitch;
        sweep.out_row = p.out_width * pitch;
      } else {
        sweep.out = map + channel * pitch;
        sweep.out_segment = p.channels * pitch;
        sweep.out_row = p.out_width;
      }
      ESPK_ISA::sweep(sweep);
    }
  }

  // `pixel` is the first of `count` in its image.
  void multiply_map_of_pixels(const C* map, int64_t image, int64_t pixel, int64_t count) const {
    const int64_t first = image * p.out_height * p.out_width + pixel, at = first * p.out_pixel;
    Epilogue epilogue = p.epilogue;
    if (epilogue.residual) epilogue.residual = static_cast<const T*>(epilogue.residual) + at;
    const C* added = shortcut.of(first, count);
    T* out = static_cast<T*>(p.out) + at;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (weights.in_pairs()) {
        return multiply_pairs(weights, pointwise, map, count, epilogue, added, reinterpret_cast<uint16_t*>(out),
                              p.out_pixel);
      }
    }
    multiply_pixels<T>(weights, pointwise, map, pitch, count, epilogue, out, p.out_pixel, nullptr, added);
  }

  void multiply_map_of_planes(const C* map, int64_t image, int64_t pixel, int64_t count) const {
    const int64_t out_plane = p.out_height * p.out_width;
    for (int64_t group = 0; group < p.groups; ++group) {
      MatrixProduct<C> product{};
      product.rows = weights.out;
      product.columns = count;
      product.depth = weights.in;
      product.a = pointwise + group * weights.group_size<C>();
      product.a_packed = true;
      product.b = map + group * weights.in * pitch;
      product.b_depth = pitch;
      set_epilogue(product, p.epilogue, group * weights.out, false);
      const int64_t at = (image * p.pointwise_channels + group * weights.out) * out_plane + pixel;
      const T* residual = p.epilogue.residual ? static_cast<const T*>(p.epilogue.residual) + at : nullptr;
      multiply_into(product, static_cast<T*>(p.out) + at, residual, out_plane);
    }
  }

  const Problem& p;
  const ReducedRows* const reduced;
  const bool pixels;
  const BranchWeights<C> branch_weights;
  const PyramidEpilogue<C> affine;
  const C* pointwise;
  const PointwiseWeights weights;
  const Strips strips;
  const int64_t lanes, blocks;  // channels in a block, and blocks
  const int64_t step, pitch;  // rows that go through the map together; from its pixel to pixel, or plane to plane
  const ShortcutRows<T> shortcut;
  const PyramidStrip<C> whole, last;
  C* const tiles;  // those of all blocks, one behind another
};

void run(const Problem& p, void* shared, int64_t begin, int64_t end) { run_strips(p, shared, begin, end, nullptr); }

}  // namespace

void run_strips(const PyramidPointwise& p, void* shared, int64_t begin, int64_t end, const ReducedRows* reduced) {
  with_type(p.type, [&](auto* type) {
    const UnitStrips<std::remove_pointer_t<decltype(type)>> strips(p, shared, reduced);
    for (int64_t unit = begin; unit < end; ++unit) strips.run(unit);
  });
}

extern const Kernel<Problem> pyramid_pointwise = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
