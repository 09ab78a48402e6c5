// A rectangle of a map in shared memory, with zeros where it leaves the map, and how maps are cut into rectangles.
#pragma once

#include "normalise.cuh"

namespace espk::cuda {

struct Strides {
  int64_t image, channel, row, column;
};

inline Strides strides_of(Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::channels_last) return {channels * height * width, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// A block's share: `rows` x `columns` pixels of `channels` channels of one image.
struct Cut {
  int rows, columns, channels;
  int64_t down, across, slices;

  int64_t blocks(int64_t batch) const { return batch * down * across * slices; }
};

inline Cut cut_into(int64_t rows, int64_t columns, int64_t channels, int64_t height, int64_t width, int64_t depth) {
  return {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(channels),
          ceil_div(height, rows), ceil_div(width, columns),  ceil_div(depth, channels)};
}

// Where a block's share begins. Slices of channels are neighbours, so that they find each other's sectors in L2.
struct Place {
  int64_t image, row, column, channel;

  __device__ Place(const Cut& cut, int64_t block) {
    channel = block % cut.slices * cut.channels;
    block /= cut.slices;
    column = block % cut.across * cut.columns;
    block /= cut.across;
    row = block % cut.down * cut.rows;
    image = block / cut.down;
  }
};

// The furthest tap that can touch a map of `size`: longer dilations see zeros only, and need no room for them.
inline int64_t reach(const Pyramid& p, int64_t size) {
  int64_t furthest = 0;
  for (int64_t k = 0; k < p.branches; ++k) {
    if (p.dilations[k] < size) furthest = most(furthest, p.dilations[k]);
  }
  return furthest;
}

// Sizes of a window, and the distance of neighbours in it; `channels_last` is the order of the map that fills it.
struct Window {
  int rows, columns, channels;
  int row_step, column_step, channel_step;
  bool channels_last;

  int64_t count() const { return int64_t{rows} * columns * channels; }
};

// Neighbours in the map stay neighbours.
inline Window window_of(Layout layout, int64_t rows, int64_t columns, int64_t channels) {
  const int r = static_cast<int>(rows), c = static_cast<int>(columns), d = static_cast<int>(channels);
  if (layout == Layout::channels_last) return {r, c, d, c * d, d, 1, true};
  return {r, c, d, c, 1, r * c, false};
}

// The map that a window looks at, from its first channel on.
template <class T>
struct MapView {
  const T* first;  // channel `first`, row 0, column 0 of one image
  Strides strides;
  int64_t height, width;
  int channels;  // those that exist; a window may be wider
};

// What to do with an element that is there already.
enum class Fill { replace, add };

// All threads of the block fill the window whose corner is at (row, column) of the map. `vectors` promises that 16-byte
// loads are aligned and that channels come in whole vectors. What lies in the map goes through a prologue (normalise.cuh),
// whose channels begin at `first_channel`; then the map is channels_last and the window has 32 channels at most.
template <Fill fill, class T, class S, class Prologue = AsItIs>
__device__ void fill_window(S* to, const Window& window, const MapView<T>& map, int64_t row, int64_t column,
                            bool vectors, const Prologue& prologue = {}, int64_t first_channel = 0) {
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto put = [](S& element, Compute<T> value) {
    if constexpr (fill == Fill::add) {
      element += value;
    } else {
      element = narrow<S>(value);
    }
  };
  if constexpr (kChanges<Prologue>) {
    // A lane stays with its channels, and keeps their numbers while it walks over pixels.
    auto walk = [&](auto width) {
      constexpr int N = decltype(width)::value;
      const int of_pixel = window.channels / N, step = 32 / of_pixel, channel = lane % of_pixel * N;
      if (lane >= step * of_pixel) return;
      const bool there = channel < map.channels;
      const auto channels = prologue.template channels<N>(first_channel + (there ? channel : 0));
      // All rows of the warp, and of each the columns of the lane.
      const int first = lane / of_pixel, of_row = (window.columns - first + step - 1) / step;
      each_place<N,
                 N == 1   ? 8
                 : N <= 4 ? 4
                          : 2,
                 T>(
          of_row > 0 ? (window.rows - warp + warps - 1) / warps * of_row : 0, channels,
          [&](int i) -> const T* {
            const int64_t y = row + warp + i / of_row * warps, x = column + first + i % of_row * step;
            if (!there || y < 0 || y >= map.height || x < 0 || x >= map.width) return nullptr;
            return map.first + y * map.strides.row + x * map.strides.column + channel;
          },
          [&](int i, Compute<T>(&numbers)[N]) {
            const int r = warp + i / of_row * warps, c = first + i % of_row * step;
            S* element = to + r * window.row_step + c * window.column_step + channel;
            if constexpr (fill == Fill::add) {
              Compute<T> before[N];
              load<N>(before, element);
#pragma unroll
              for (int v = 0; v < N; ++v) numbers[v] += before[v];
            }
            store<N>(element, numbers);
          });
    };
    if (vectors) {
      walk(std::integral_constant<int, kWidest<T>>{});
    } else {
      walk(std::integral_constant<int, 1>{});
    }
  } else if (window.channels_last) {
    for (int r = warp; r < window.rows; r += warps) {
      const bool row_inside = row + r >= 0 && row + r < map.height;
      const T* line = map.first + (row + r) * map.strides.row;
      S* line_to = to + r * window.row_step;
      if (vectors) {
        constexpr int kVector = kWidest<T>;
        const int vectors_a_pixel = window.channels / kVector;
        for (int i = lane; i < window.columns * vectors_a_pixel; i += 32) {
          const int c = i / vectors_a_pixel, channel = i % vectors_a_pixel * kVector;
          const int64_t at = column + c;
          const bool inside = row_inside && at >= 0 && at < map.width && channel < map.channels;
          Pack<T, kVector> values = {};
          if (inside) values = *reinterpret_cast<const Pack<T, kVector>*>(line + at * map.strides.column + channel);
          if constexpr (fill == Fill::replace && std::is_same_v<S, T>) {
            *reinterpret_cast<Pack<T, kVector>*>(line_to + c * window.column_step + channel) = values;
          } else {
#pragma unroll
            for (int v = 0; v < kVector; ++v) put(line_to[c * window.column_step + channel + v], widen(values.at[v]));
          }
        }
      } else {
        for (int i = lane; i < window.columns * window.channels; i += 32) {
          const int c = i / window.channels, channel = i % window.channels;
          const int64_t at = column + c;
          const bool inside = row_inside && at >= 0 && at < map.width && channel < map.channels;
          put(line_to[c * window.column_step + channel],
              inside ? widen(line[at * map.strides.column + channel]) : Compute<T>(0));
        }
      }
    }
  } else {
    for (int line = warp; line < window.channels * window.rows; line += warps) {
      const int channel = line / window.rows, r = line % window.rows;
      const bool line_inside = row + r >= 0 && row + r < map.height && channel < map.channels;
      const T* from = map.first + channel * map.strides.channel + (row + r) * map.strides.row;
      S* line_to = to + channel * window.channel_step + r * window.row_step;
      for (int c = lane; c < window.columns; c += 32) {
        const int64_t at = column + c;
        const bool inside = line_inside && at >= 0 && at < map.width;
        put(line_to[c * window.column_step], inside ? widen(from[at]) : Compute<T>(0));
      }
    }
  }
}

}  // namespace espk::cuda
