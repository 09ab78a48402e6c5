// A branch of efficient pyramid pooling that works above the size of its map: resized, convolved depthwise 3x3, averaged
// back, normalised and activated, without a map of the larger size ever leaving the cache. Where every average is one of
// 2x2 (sizes of 2 times, and of 1.5 times an even one), it and the convolution are one 4x4 convolution of the resized map,
// 16 multiply-adds where nine a larger pixel were 36 or 20.
// Bytes: C read + C written a pixel; multiply-adds: 16*C a pixel of the result, and 4 to 9 operations to resize.
#include "affine_prelu.h"
#include "bilinear.h"
#include "kernels.h"
#include "row.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = EnlargedBranch;

constexpr int64_t kTaps = 16, kSide = 4;
constexpr int64_t kPanel = 64;  // columns of the result: four resized rows of them stay near
constexpr int64_t kStep = 8;  // of them whose sums are in registers

int64_t rows_of(const Problem& p) { return most(least(ceil_div(p.height, 8), 16), 1); }

template <class C>
int64_t blocks_of(const Problem& p) {
  return ceil_div(p.channels, kLanes<C>);
}

// What `run` reads: the filters [blocks][4*4][N], where each resized column lies in x, and the first column of each window.
int64_t columns_offset(const Problem& p) { return round_up(p.channels, 16) * kTaps * 8; }

int64_t windows_offset(const Problem& p) {
  return columns_offset(p) + p.inner_width * static_cast<int64_t>(sizeof(Between));
}

int64_t shared_bytes(const Problem& p) { return windows_offset(p) + p.width * static_cast<int64_t>(sizeof(int64_t)); }

// The 3x3 filter, moved over a window of 2x2 whose mean is taken.
template <class T>
void prepare(const Problem& p, void* shared) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* weight = static_cast<const T*>(p.weight);
  C* to = static_cast<C*>(shared);
  fill_zero(to, blocks_of<C>(p) * kTaps * N);
  for (int64_t c = 0; c < p.channels; ++c) {
    C* filter = to + c / N * kTaps * N + c % N;
    for (int64_t i = 0; i < 9; ++i) {
      const C share = load_one(weight + c * 9 + i) / 4;
      for (int64_t w = 0; w < 4; ++w) filter[((i / 3 + w / 2) * kSide + i % 3 + w % 2) * N] += share;
    }
  }
}

void before(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) { prepare<std::remove_pointer_t<decltype(type)>>(p, shared); });
  Between* columns = reinterpret_cast<Between*>(static_cast<char*>(shared) + columns_offset(p));
  place_columns(columns, p.width, p.inner_width);
  int64_t* windows = reinterpret_cast<int64_t*>(static_cast<char*>(shared) + windows_offset(p));
  for (int64_t i = 0; i < p.width; ++i) windows[i] = AdaptiveWindow(i, p.inner_width, p.width).first;
}

// A unit is a few rows of the result, all channels.
int64_t units(const Problem& p) { return p.batch * ceil_div(p.height, rows_of(p)); }

// Resized columns `first` to `end` of row `row`, N channels a column; zeros beside the resized map.
template <class T>
void resize_row(const Problem& p, const Between* places, const T* x, int64_t row, int64_t first, int64_t end,
                int64_t valid, Compute<T>* mixed, Compute<T>* to) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  if (row < 0 || row >= p.inner_height) return fill_zero(to, (end - first) * N);
  const int64_t begin = most(first, 0), stop = least(end, p.inner_width);
  const int64_t left = places[begin].first, right = places[stop - 1].second + 1;
  const Between rows(row, p.height, p.inner_height);
  const T* upper = x + (rows.first * p.width + left) * p.channels;
  const T* lower = x + (rows.second * p.width + left) * p.channels;
  const C down = static_cast<C>(rows.weight);
  for (int64_t i = 0; i < right - left; ++i) {
    const Vector<C, N> a = load_first<N>(upper + i * p.channels, valid);
    store<N>(mixed + i * N, mix(a, load_first<N>(lower + i * p.channels, valid), down));
  }
  fill_zero(to, (begin - first) * N);
  fill_zero(to + (stop - first) * N, (end - stop) * N);
  for (int64_t i = begin; i < stop; ++i) {
    const Vector<C, N> a = load<N>(mixed + (places[i].first - left) * N);
    const Vector<C, N> b = load<N>(mixed + (places[i].second - left) * N);
    store<N>(to + (i - first) * N, mix(a, b, static_cast<C>(places[i].weight)));
  }
}

// 4x4 sums of `count` windows; window i begins at[i] numbers to the right. `at` and `sums` hold whole steps.
template <class C>
void filter_row(const C* filter, const C* const* rows, const int64_t* at, int64_t count, C* sums) {
  constexpr int N = kLanes<C>;
  for (int64_t column = 0; column < count; column += kStep) {
    Vector<C, N> sum[kStep] = {};
    for (int64_t u = 0; u < kSide; ++u) {
      const C* row = rows[u];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kSide; ++v) {
        const Vector<C, N> w = load<N>(filter + (u * kSide + v) * N);
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) sum[i] += w * load<N>(row + at[column + i] + v * N);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i) store<N>(sums + (column + i) * N, sum[i]);
  }
}

template <class T>
void run_type(const Problem& p, const void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const C* filters = static_cast<const C*>(shared);
  const char* memory = static_cast<const char*>(shared);
  const Between* places = reinterpret_cast<const Between*>(memory + columns_offset(p));
  const int64_t* windows = reinterpret_cast<const int64_t*>(memory + windows_offset(p));
  const int64_t strip_rows = rows_of(p), strips = ceil_div(p.height, strip_rows);
  // Windows begin at most 2 columns apart in maps of at most twice the width.
  const int64_t pitch = (kPanel * ceil_div(p.inner_width, p.width) + kSide) * N;
  C* ring = static_cast<C*>(scratch(Slot::tile, kSide * pitch * static_cast<int64_t>(sizeof(C))));
  C* mixed = static_cast<C*>(scratch(Slot::rows, pitch * static_cast<int64_t>(sizeof(C))));
  C* sums = static_cast<C*>(scratch(Slot::results, kPanel * N * static_cast<int64_t>(sizeof(C))));
  const AffinePrelu<C> finish(p.epilogue);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips, first_row = unit % strips * strip_rows;
    const int64_t end_row = least(first_row + strip_rows, p.height);
    for (int64_t channel = 0; channel < p.channels; channel += N) {
      const int64_t valid = least(N, p.channels - channel);
      const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels + channel;
      const C* filter = filters + channel * kTaps;
      for (int64_t panel = 0; panel < p.width; panel += kPanel) {
        const int64_t panel_end = least(panel + kPanel, p.width);
        const int64_t left = windows[panel] - 1;
        const int64_t right = windows[panel_end - 1] + 3;
        int64_t at[kPanel];
        for (int64_t i = 0; i < kPanel; ++i) at[i] = (windows[least(panel + i, panel_end - 1)] - 1 - left) * N;
        int64_t next = -1;  // the resized row to come
        for (int64_t y = first_row; y < end_row; ++y) {
          const int64_t top = AdaptiveWindow(y, p.inner_height, p.height).first - 1;
          for (next = most(next, top); next < top + kSide; ++next) {
            resize_row<T>(p, places, x, next, left, right, valid, mixed, ring + (next + kSide) % kSide * pitch);
          }
          const C* rows[kSide];
          for (int64_t i = 0; i < kSide; ++i) rows[i] = ring + (top + i + kSide) % kSide * pitch;
          T* out = static_cast<T*>(p.out) + (image * p.height + y) * p.width * p.out_pixel + channel;
          filter_row<C>(filter, rows, at, panel_end - panel, sums);
          for (int64_t i = 0; i < panel_end - panel; ++i) {
            const Vector<C, N> v = load<N>(sums + i * N);
            store_first<N>(out + (panel + i) * p.out_pixel, finish.template operator()<N>(v, channel, valid), valid);
          }
        }
      }
    }
  }
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<Problem> enlarged_branch = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
