// Gradient of the spatial pyramid for its weights: for tap t of branch k, the sum over all pixels of g_k times the input
// shifted by the tap, with g_k the suffix sum of the output gradients. Two stages: every strip of every image leaves its
// own sums, and these are added in order, so the result does not depend on the number of threads.
// Bytes: (K + 1)*d read a pixel; multiply-adds: those of the forward pass.
#include "kernels.h"
#include "pyramid_gradient.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = SpatialPyramidBackwardWeight;

// One strip: `gradient(k, y, to)` writes row y of branch k's gradient, `columns` vectors.
template <class C, class Gradient>
void add_strip(const PyramidStrip<C>& strip, C* sums, const C* tile, int64_t rows, Gradient&& gradient) {
  const Pyramid& p = strip.problem;
  with_lanes<C>(strip.lanes, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const int64_t columns = strip.columns, pitch = columns * N;
    const int64_t last = strip.pixels ? N : p.out_width - (columns - 1) * N;
    C* row = static_cast<C*>(scratch(Slot::rows, p.branches * pitch * static_cast<int64_t>(sizeof(C))));
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t k = p.branches - 1; k >= 0; --k) {
        gradient(k, y, row + k * pitch);
        if (p.hff && k < p.branches - 1) {
          for (int64_t i = 0; i < pitch; i += N) {
            store<N>(row + k * pitch + i, load<N>(row + k * pitch + i) + load<N>(row + (k + 1) * pitch + i));
          }
        }
      }
      const C* at = tile + y * p.stride * strip.tile.row_pitch();
      for (int64_t k = 0; k < p.branches; ++k) {
        add_row(N, sums, row + k * pitch, at, strip.taps, k, columns, last);
      }
    }
  });
}

// Numbers that one unit leaves for each tap of each branch: one for each channel of a block, or one for a plane.
template <class C>
int64_t partial_size(const Problem& p) {
  return 9 * p.branches * (p.layout == Layout::channels_last ? kLanes<C> : 1);
}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const bool pixels = p.layout == Layout::channels_last;
  const Strips strips = pyramid_strips<C>(p);
  const int64_t maps = pyramid_maps<C>(p), out_plane = p.out_height * p.out_width;
  // The last block of channels may be narrower.
  const PyramidStrip<C> whole(p, strips.rows, pixels ? least(kLanes<C>, p.channels) : p.out_width);
  const PyramidStrip<C> last(p, strips.rows, pixels ? p.channels - (maps - 1) * kLanes<C> : p.out_width);
  C* tile = nullptr;
  int tile_lanes = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / (maps * strips.count), in_image = unit % (maps * strips.count);
    const int64_t map = in_image % maps, first = in_image / maps * strips.rows;
    const int64_t first_channel = pixels ? map * kLanes<C> : map;
    const int64_t channels = pixels ? least(kLanes<C>, p.channels - first_channel) : 1;
    const int64_t rows = least(strips.rows, p.out_height - first);
    const int64_t vectors = 9 * p.branches;
    C* sums = static_cast<C*>(scratch(Slot::map, vectors * kLanes<C> * static_cast<int64_t>(sizeof(C))));
    fill_zero(sums, vectors * kLanes<C>);
    const PyramidStrip<C>& strip = map + 1 < maps ? whole : last;
    if (strip.lanes != tile_lanes) {
      tile = strip.zeroed_tiles();
      tile_lanes = strip.lanes;
    }
    const T* x = static_cast<const T*>(p.x) + image * p.channels * p.height * p.width;
    const T* grad = static_cast<const T*>(p.grad) + image * p.out_channels() * out_plane;
    if (pixels) {
      fill_pixels(strip.tile, tile, x + first_channel, first * p.stride, p.height, {0, p.width}, strips.count > 1,
                  p.channels, channels);
      add_strip(strip, sums, tile, rows, [&](int64_t k, int64_t y, C* to) {
        with_lanes<C>(strip.lanes, [&](auto lanes) {
          constexpr int N = decltype(lanes)::value;
          const T* from = grad + (first + y) * p.out_width * p.out_channels() + k * p.channels + first_channel;
          for (int64_t i = 0; i < p.out_width; ++i) {
            store<N>(to + i * N, load_first<N>(from + i * p.out_channels(), channels));
          }
        });
      });
    } else {
      fill_plane(strip.tile, tile, x + map * p.height * p.width, first * p.stride, p.height, {0, p.width},
                 strips.count > 1);
      add_strip(strip, sums, tile, rows, [&](int64_t k, int64_t y, C* to) {
        copy_row(to, grad + (k * p.channels + map) * out_plane + (first + y) * p.out_width, p.out_width);
        fill_zero(to + p.out_width, strip.columns * strip.lanes - p.out_width);
      });
      with_lanes<C>(strip.lanes, [&](auto lanes) {
        constexpr int N = decltype(lanes)::value;
        for (int64_t t = 0; t < vectors; ++t) {
          C sum = sums[t * N];
          for (int lane = 1; lane < N; ++lane) sum += sums[t * N + lane];
          sums[t] = sum;
        }
      });
    }
    __builtin_memcpy(static_cast<C*>(shared) + unit * partial_size<C>(p), sums,
                     static_cast<std::size_t>(partial_size<C>(p)) * sizeof(C));
  }
}

int64_t units(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return p.batch * pyramid_maps<C>(p) * pyramid_strips<C>(p).count;
  });
}

int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return units(p) * partial_size<C>(p) * static_cast<int64_t>(sizeof(C));
  });
}

void before(const Problem&, void*) {}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

// Adds the strips and images of each map in order.
void after(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const bool pixels = p.layout == Layout::channels_last;
    const int64_t maps = pyramid_maps<C>(p), partials = maps > 0 ? units(p) / maps : 0, size = partial_size<C>(p);
    const C* all = static_cast<const C*>(shared);
    C* sums = static_cast<C*>(scratch(Slot::rows, size * static_cast<int64_t>(sizeof(C))));
    for (int64_t map = 0; map < maps; ++map) {
      const int64_t channels = pixels ? least(kLanes<C>, p.channels - map * kLanes<C>) : 1;
      const int64_t lanes = pixels ? vector_lanes<C>(channels) : 1, count = 9 * p.branches * lanes;
      fill_zero(sums, count);
      for (int64_t i = 0; i < partials; ++i) {
        const C* partial = all + (i * maps + map) * size;
        for (int64_t j = 0; j < count; ++j) sums[j] += partial[j];
      }
      for (int64_t k = 0; k < p.branches; ++k) {
        for (int64_t c = 0; c < channels; ++c) {
          T* to = static_cast<T*>(p.grad_weight) + (k * p.channels + (pixels ? map * kLanes<C> : map) + c) * 9;
          for (int64_t t = 0; t < 9; ++t) store_one(to + t, sums[(9 * k + t) * lanes + c]);
        }
      }
    }
  });
}

}  // namespace

extern const Kernel<Problem> spatial_pyramid_backward_weight = {shared_bytes, before, units, run, after};

}  // namespace espk::ESPK_ISA
