// Gradient of the spatial pyramid for its input. HFF turns around: branch j feeds outputs j..K, so its gradient is the
// suffix sum g_j = grad_j + ... + grad_K, and the input's gradient is the sum over j of the transposed convolution of
// g_j. Input pixels s*y + a, s*x + b of one class (a, b) all meet the same taps, which makes a stride s simply s*s sweeps.
// Bytes: K*d' read + d written a pixel; multiply-adds: those of the forward pass.
#include "kernels.h"
#include "pyramid_gradient.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = SpatialPyramidBackwardInput;

// Strips of rows of a class: the first class has the most.
template <class C>
Strips strips_of(const Problem& p) {
  const int64_t lanes = p.layout == Layout::channels_last ? least(kLanes<C>, p.channels) : 1;
  const int64_t row = p.branches * (p.out_width + 2 * gradient_reach(p, p.width)) * lanes;
  return choose_strips(class_size(p, p.height, 0), row * static_cast<int64_t>(sizeof(C)),
                       2 * gradient_reach(p, p.height), p.batch * pyramid_maps<C>(p));
}

// The gradients of all branches into their tiles, summed as HFF asks.
template <class T>
void fill_gradients(const Problem& p, const Tile& tile, Compute<T>* tiles, int64_t image, int64_t first_channel,
                    int64_t channels, int64_t first_row, bool moving) {
  const int64_t out_plane = p.out_height * p.out_width;
  const T* grad = static_cast<const T*>(p.grad) + image * p.out_channels() * out_plane;
  for (int64_t k = 0; k < p.branches; ++k) {
    Compute<T>* to = tiles + k * tile.size();
    const int64_t channel = k * p.channels + first_channel;
    if (p.layout == Layout::channels_last) {
      fill_pixels(tile, to, grad + channel, first_row, p.out_height, {0, p.out_width}, moving, p.out_channels(),
                  channels);
    } else {
      fill_plane(tile, to, grad + channel * out_plane, first_row, p.out_height, {0, p.out_width}, moving);
    }
  }
  if (p.hff) sum_suffixes(tiles, p.branches, tile.size());
}

// rows x columns results of a class, `channels` numbers each, rounded to half types and spread out by the stride.
template <class T>
void spread(const Problem& p, T* to, const Compute<T>* results, int64_t rows, int64_t columns, int64_t channels) {
  const bool pixels = p.layout == Layout::channels_last;
  const int64_t column = p.stride * (pixels ? p.channels : 1), row = column * p.width;
  for (int64_t y = 0; y < rows; ++y, to += row, results += columns * channels) {
    if (column == 1) {
      copy_row(to, results, columns);
    } else if (!pixels) {
      for (int64_t x = 0; x < columns; ++x) store_one(to + x * column, results[x]);
    } else {
      for (int64_t x = 0; x < columns; ++x) copy_row(to + x * column, results + x * channels, channels);
    }
  }
}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr bool direct = std::is_same_v<T, C>;
  const bool pixels = p.layout == Layout::channels_last;
  const BranchWeights<C> weights(p, shared);
  const Strips strips = strips_of<C>(p);
  const int64_t s = p.stride, map_count = pyramid_maps<C>(p);
  // The last block of channels may be narrower.
  GradientStrip<C> whole(p, strips.rows, pixels ? least(kLanes<C>, p.channels) : 1);
  GradientStrip<C> last(p, strips.rows, pixels ? p.channels - (map_count - 1) * kLanes<C> : 1);
  C* tiles = nullptr;
  int tile_lanes = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    // channels_last works through the blocks of one strip before the next, planes through the strips of one plane.
    const int64_t image = unit / (map_count * strips.count), in_image = unit % (map_count * strips.count);
    const int64_t map = pixels ? in_image % map_count : in_image / strips.count;
    const int64_t first = (pixels ? in_image / map_count : in_image % strips.count) * strips.rows;
    const int64_t first_channel = pixels ? map * kLanes<C> : map;
    GradientStrip<C>& strip = map + 1 < map_count ? whole : last;
    const int64_t channels = strip.channels, tile_size = p.branches * strip.tile.size();
    if (strip.lanes != tile_lanes) {
      tiles = static_cast<C*>(scratch(Slot::tile, tile_size * static_cast<int64_t>(sizeof(C))));
      fill_zero(tiles, tile_size);
      tile_lanes = strip.lanes;
    }
    fill_gradients<T>(p, strip.tile, tiles, image, first_channel, channels, first, strips.count > 1);

    T* grad_x = static_cast<T*>(p.grad_x) + image * p.channels * p.height * p.width +
                (pixels ? first_channel : map * p.height * p.width);
    const int64_t column = pixels ? p.channels : 1;  // from column to column of grad_x
    for (int64_t a = 0; a < s; ++a) {
      const int64_t rows = least(strips.rows, class_size(p, p.height, a) - first);
      for (int64_t b = 0; b < s; ++b) {
        const int64_t columns = class_size(p, p.width, b);
        if (rows <= 0 || columns <= 0) continue;
        Sweep<C> sweep = strip.sweep(a, b, rows, tiles, pixels ? weights.of_block(map) : weights.of_channel(map));
        T* to = grad_x + ((first * s + a) * p.width + b) * column;
        if constexpr (direct) {
          if (pixels || s == 1) {
            sweep.out = to;
            sweep.out_row = s * p.width * column;
            sweep.out_column = pixels ? s * column : strip.lanes;
            ESPK_ISA::sweep(sweep);
            continue;
          }
        }
        C* results = static_cast<C*>(scratch(Slot::map, rows * columns * channels * static_cast<int64_t>(sizeof(C))));
        sweep.out = results;
        sweep.out_row = columns * channels;
        sweep.out_column = pixels ? channels : strip.lanes;
        ESPK_ISA::sweep(sweep);
        spread(p, to, results, rows, columns, channels);
      }
    }
  }
}

int64_t shared_bytes(const Problem& p) { return branch_weight_bytes(p); }

void before(const Problem& p, void* shared) { prepare_branch_weights(p, p.weight, shared); }

int64_t units(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return p.batch * pyramid_maps<C>(p) * strips_of<C>(p).count;
  });
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<Problem> spatial_pyramid_backward_input = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
