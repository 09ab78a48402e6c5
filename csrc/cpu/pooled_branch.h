// Branches of efficient pyramid pooling at the size of its map, made where the merge reads them: in its zero-bordered tile,
// a block of channels at a time.
//
// A branch above that size is resized, convolved depthwise 3x3 and averaged back without a map of the larger size: every
// average is one of 2x2 (sizes of 2 times, and of 1.5 times an even one), so it and the convolution are one 4x4 convolution
// of four resized rows, 16 multiply-adds where nine a larger pixel were 36 or 20.
#pragma once

#include "normalise.h"
#include "pyramid_strip.h"
#include "resized_rows.h"

namespace espk::ESPK_ISA {

// Most columns of a panel, and of what is filled for it in whole steps: one more to each side.
constexpr int64_t kMostPooledPanel = 48, kMostPooledColumns = 64;

// Rows [first_row, end_row) and columns [first_column, end_column) of the map, and where they go.
template <class C>
struct PooledPart {
  int64_t first_row, end_row, first_column, end_column;
  C* to;
  int64_t pitch;  // numbers from row to row

  int64_t rows() const { return end_row - first_row; }
  int64_t columns() const { return end_column - first_column; }
};

// What the calls share of one branch: for each block of channels its filter [4*4 or 9][N], scale, shift and slope [3][N];
// where the resized columns lie in x; the first resized column of each window.
template <class C>
struct SharedBranch {
  static constexpr int N = kLanes<C>;
  static constexpr int64_t kTaps = 16, kNumbers = (kTaps + 3) * N;

  C* blocks = nullptr;
  Between<C>* columns = nullptr;
  int64_t* windows = nullptr;

  SharedBranch() = default;
  SharedBranch(const PyramidPooling& p, const PooledBranch& b, Carving& memory)
      : blocks(memory.take<C>(ceil_div(p.channels(), N) * kNumbers)),
        columns(memory.take<Between<C>>(p.enlarges(b) ? b.width : p.width)),
        windows(memory.take<int64_t>(p.enlarges(b) ? p.width : 0)) {}
};

template <class T>
class PooledRows {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  static constexpr int64_t kSide = 4;
  static constexpr int64_t kStep = 8;  // columns whose sums are in registers

 public:
  PooledRows(const PyramidPooling& problem, const PooledBranch& branch, const SharedBranch<C>& prepared)
      : p(problem), b(branch), shared(prepared) {}

  // The filter of a larger branch is moved over a window of 2x2 whose mean is taken.
  void prepare() const {
    const T* weight = static_cast<const T*>(b.weight);
    fill_zero(shared.blocks, ceil_div(p.channels(), N) * SharedBranch<C>::kNumbers);
    for (int64_t c = 0; c < p.channels(); ++c) {
      C* filter = shared.blocks + c / N * SharedBranch<C>::kNumbers + c % N;
      for (int64_t i = 0; b.filtered && i < 9; ++i) {
        const C number = load_one(weight + c * 9 + i);
        if (!p.enlarges(b)) filter[i * N] = number;
        for (int64_t w = 0; p.enlarges(b) && w < 4; ++w) {
          filter[((i / 3 + w / 2) * kSide + i % 3 + w % 2) * N] += number / 4;
        }
      }
      C* affine = filter + SharedBranch<C>::kTaps * N;
      auto number = [&](const void* values, C otherwise) {
        return values ? static_cast<const C*>(values)[c] : otherwise;
      };
      affine[0] = number(b.epilogue.scale, 1);
      affine[N] = number(b.epilogue.shift, 0);
      affine[2 * N] = number(b.epilogue.slope, 1);
    }
    if (p.enlarges(b)) {
      place_columns(shared.columns, p.width, b.width);
      for (int64_t i = 0; i < p.width; ++i) shared.windows[i] = AdaptiveWindow(i, b.width, p.width).first;
    } else {
      place_columns(shared.columns, b.width, p.width);
    }
  }

  // The part of channels [channel, channel + valid) of an image.
  void fill(const PooledPart<C>& part, int64_t image, int64_t channel, int64_t valid) const {
    const C* filter = shared.blocks + channel / N * SharedBranch<C>::kNumbers;
    const T* x = static_cast<const T*>(b.x) + image * p.pixels_of(b) * p.channels() + channel;
    if (p.enlarges(b)) {
      fill_enlarged(part, x, valid, filter);
    } else if (b.filtered) {
      fill_filtered(part, x, valid, filter);
    } else {
      fill_map(part, x, valid, filter);
    }
  }

 private:
  using Finish = AffinePreluLanes<C, N>;

  static Finish finish_of(const C* filter) {
    auto numbers = [&](int64_t i) { return load<N>(filter + (SharedBranch<C>::kTaps + i) * N); };
    return {numbers(0), numbers(1), numbers(2)};
  }

  // Windows begin at most 2 columns apart in maps of at most twice the width.
  static int64_t ring_pitch(const PyramidPooling& p, const PooledBranch& b) {
    return (kMostPooledColumns * ceil_div(b.width, p.width) + kSide) * N;
  }

  static C* memory(int64_t numbers) {
    return static_cast<C*>(scratch(Slot::rows, numbers * static_cast<int64_t>(sizeof(C))));
  }

  void fill_enlarged(const PooledPart<C>& part, const T* x, int64_t valid, const C* filter) const {
    const ResizedRows<T> resized{x, valid, p.channels(), p.height, p.width, b.height, b.width, shared.columns};
    const int64_t left = shared.windows[part.first_column] - 1, right = shared.windows[part.end_column - 1] + 3;
    int64_t at[kMostPooledColumns];
    for (int64_t i = 0; i < kMostPooledColumns; ++i) {
      at[i] = (shared.windows[least(part.first_column + i, part.end_column - 1)] - 1 - left) * N;
    }
    const int64_t pitch = ring_pitch(p, b);
    C *ring = memory((kSide + 1) * pitch), *mixed = ring + kSide * pitch;
    const Finish finish = finish_of(filter);
    int64_t next = -1;  // the resized row to come
    for (int64_t y = part.first_row; y < part.end_row; ++y) {
      const int64_t top = AdaptiveWindow(y, b.height, p.height).first - 1;
      for (next = most(next, top); next < top + kSide; ++next) {
        resized.template make<N>(next, left, right, mixed, ring + (next + kSide) % kSide * pitch,
                                 [](V v) { return v; });
      }
      const C* rows[kSide];
      for (int64_t i = 0; i < kSide; ++i) rows[i] = ring + (top + i + kSide) % kSide * pitch;
      filter_row(filter, rows, at, part.columns(), finish, part.to + (y - part.first_row) * part.pitch);
    }
  }

  // 4x4 sums of `count` windows; window i begins at[i] numbers to the right. `at` holds whole steps.
  static void filter_row(const C* filter, const C* const* rows, const int64_t* at, int64_t count, const Finish& finish,
                         C* to) {
    for (int64_t column = 0; column < count; column += kStep) {
      V sum[kStep] = {};
      for (int64_t u = 0; u < kSide; ++u) {
        const C* row = rows[u];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kSide; ++v) {
          const V w = load<N>(filter + (u * kSide + v) * N);
#pragma GCC unroll 8
          for (int i = 0; i < kStep; ++i) sum[i] += w * load<N>(row + at[column + i] + v * N);
        }
      }
      if (column + kStep <= count) {
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) store<N>(to + (column + i) * N, finish(sum[i]));
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) {
          if (column + i < count) store<N>(to + (column + i) * N, finish(sum[i]));
        }
      }
    }
  }

  void fill_filtered(const PooledPart<C>& part, const T* x, int64_t valid, const C* filter) const {
    Pyramid one{};  // a block of channels, of which those that are none have weights of zero
    one.layout = Layout::channels_last;
    one.channels = N;
    one.height = p.height;
    one.width = p.width;
    one.branches = one.stride = one.dilations[0] = 1;
    const PyramidStrip<C> strip(one, part.rows(), N, part.rows(), part.columns());
    C* tile = memory(strip.tile.size());
    fill_pixels(strip.tile, tile, x, part.first_row, p.height, {part.first_column, p.width}, true, p.channels(), valid);
    Sweep<C> s = strip.sweep(tile, part.rows(), filter);
    s.out = part.to;
    s.out_row = part.pitch;
    s.scale = filter + SharedBranch<C>::kTaps * N;
    s.shift = s.scale + N;
    s.slope = s.shift + N;
    sweep(s);
  }

  // A map of this size, which may hold numbers that no mix must meet, or of another.
  void fill_map(const PooledPart<C>& part, const T* x, int64_t valid, const C* filter) const {
    const Finish finish = finish_of(filter);
    C* mixed = memory((b.width + 1) * N);
    const ResizedRows<T> resized{x, valid, p.channels(), b.height, b.width, p.height, p.width, shared.columns};
    for (int64_t y = part.first_row; y < part.end_row; ++y) {
      C* to = part.to + (y - part.first_row) * part.pitch;
      if (b.height != p.height || b.width != p.width) {
        resized.template make<N>(y, part.first_column, part.end_column, mixed, to, finish);
        continue;
      }
      const T* from = x + (y * p.width + part.first_column) * p.channels();
      for (int64_t i = 0; i < part.columns(); ++i) {
        store<N>(to + i * N, finish(load_first<N>(from + i * p.channels(), valid)));
      }
    }
  }

  const PyramidPooling& p;
  const PooledBranch& b;
  const SharedBranch<C>& shared;
};

}  // namespace espk::ESPK_ISA
