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

template <class C>
Strips strips_of(const Problem& p) {
  const int64_t row_bytes = (p.width + 2) * p.in * kLanes<C> * static_cast<int64_t>(sizeof(C));
  return choose_strips(p.height, row_bytes, 2, p.batch * ceil_div(p.groups, kLanes<C>));
}

// A unit is a strip of rows of one block of groups.
int64_t units(const Problem& p) {
  int64_t count = 0;
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    count = p.batch * strips_of<C>(p).count * ceil_div(p.groups, kLanes<C>);
  });
  return count;
}

// Input j of `count` groups from `first` on, as a zero-bordered tile of N lanes.
template <class T>
void fill_input(const Problem& p, const Tile& tile, Compute<T>* to, int64_t image, int64_t first_row, int64_t j,
                int64_t first, int64_t count) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* maps = static_cast<const T*>(p.x);
  if (p.separate || p.in == 1) {
    const T* from = maps + (j * p.batch + image) * p.height * p.width * p.groups + first;
    fill_pixels(tile, to, from, first_row, p.height, {0, p.width}, true, p.groups, count);
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r, to += tile.row_pitch()) {
    const int64_t y = first_row - tile.border_rows + r;
    fill_zero(to, tile.row_pitch());
    if (y < 0 || y >= p.height) continue;
    for (int64_t x = 0; x < p.width; ++x) {
      const T* from = maps + ((image * p.height + y) * p.width + x) * p.in_channels() + first * p.in + j;
      C* lanes = to + (tile.border_columns + x) * N;
      for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = load_one(from + lane * p.in);
    }
  }
}

template <class T>
void run_type(const Problem& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const Strips strips = strips_of<C>(p);
  const int64_t blocks = ceil_div(p.groups, N);
  const BlockShape shape = choose_block(true, strips.rows, p.width);
  const Tile tile(1, N, least(1, p.height - 1), least(1, p.width - 1), strips.rows + shape.rows - 1,
                  round_up(p.width, shape.columns));
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
  const int64_t tile_bytes = p.in * tile.size() * static_cast<int64_t>(sizeof(C));
  C* tiles = static_cast<C*>(scratch(Slot::tile, tile_bytes));
  fill_zero(tiles, p.in * tile.size());
  C* results = static_cast<C*>(scratch(Slot::map, strips.rows * p.width * N * static_cast<int64_t>(sizeof(C))));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % blocks, strip = unit / blocks, image = strip / strips.count;
    const int64_t first_row = strip % strips.count * strips.rows, rows = least(strips.rows, p.height - first_row);
    const int64_t first = block * N, count = least(N, p.groups - first);
    if (rows <= 0) continue;
    for (int64_t j = 0; j < p.in; ++j) {
      fill_input<T>(p, tile, tiles + j * tile.size(), image, first_row, j, first, count);
    }
    for (int64_t t = 0; t < p.out_of_group; ++t) {
      const C* weights = static_cast<const C*>(shared) + (block * p.out_of_group + t) * block_size<C>(p);
      Sweep<C> s{};
      s.lanes = N;
      s.pixels = true;
      s.shape = shape;
      s.tile = tiles;
      s.row_step = tile.row_pitch();
      s.rows = rows;
      s.columns = p.width;
      s.panel = panel_columns((2 * tile.border_rows + shape.rows) * p.in, tile.border_columns, N * sizeof(C));
      s.taps = &taps;
      s.weights = weights;
      s.out = results;
      s.out_column = N;
      s.out_row = p.width * N;
      s.valid = N;
      s.scale = weights + 9 * p.in * N;
      s.shift = s.scale + N;
      s.slope = s.shift + N;
      sweep(s);
      T* out = static_cast<T*>(p.out) + (image * p.height + first_row) * p.width * p.out_channels() +
               first * p.out_of_group + t;
      for (int64_t i = 0; i < rows * p.width; ++i, out += p.out_channels()) {
        if (p.out_of_group == 1) {
          copy_row(out, results + i * N, count);
        } else {
          for (int64_t lane = 0; lane < count; ++lane) store_one(out + lane * p.out_of_group, results[i * N + lane]);
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
