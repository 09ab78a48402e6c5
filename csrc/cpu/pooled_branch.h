// Branches of efficient pyramid pooling at the size of its map, made where the merge reads them: some rows of a panel of
// vectors at a time.
//
// A branch above that size is resized, convolved depthwise 3x3 and averaged back without a map of the larger size: every
// average is one of 2x2 (sizes of 2 times, and of 1.5 times an even one), so it and the convolution are one convolution of
// four resized rows by four resized columns. The columns lie between 3 of the map (5), which they are mixed from: each
// column of the result has weights of its own, 12 multiply-adds (20) where nine a larger pixel were 36 (20) after as many
// mixes. Only rows are resized.
#pragma once

#include "bilinear.h"
#include "flat_rows.h"

namespace espk::ESPK_ISA {

// Rows that the windows of kFlatRows rows touch, which begin at most two apart.
constexpr int kWindow = 4;
constexpr int64_t kMostWindowRows = window_of<4, 0>(kFlatRows - 1) + kWindow;

// Rows [row, end_row) of the map, at most kFlatRows, of vectors [first, end), and where they go.
template <class C>
struct PooledPart {
  int64_t row, end_row, first, end;
  FlatRows<C> to;

  int64_t rows() const { return end_row - row; }
};

// Two rows of a smaller map, resized to the width of a panel: neighbouring rows of the result lie between the same two.
template <class C>
struct ResizedRows {
  C* numbers;
  int64_t held[2] = {-1, -1};
};

// What the calls share of one branch: its weights, and where resized columns lie in the map that it reads.
template <class C>
struct SharedBranch {
  static constexpr int N = kLanes<C>;

  FlatWeights<C> weights;
  Between<C>* columns = nullptr;
  int64_t reach = 0;  // columns to each side that the weights of a larger branch touch

  SharedBranch() = default;
  SharedBranch(const PyramidPooling& p, const PooledBranch& b, Carving& memory) {
    if (p.enlarges(b)) {
      reach = b.width < 2 * p.width ? 2 : 1;
      weights = {kWindow * (2 * reach + 1), ceil_div(p.row(), N), memory};
      columns = memory.take<Between<C>>(b.width);
    } else {
      weights = FlatWeights<C>::of_channels(b.filtered ? 9 : 0, p.row(), p.channels(), memory);
      columns = memory.take<Between<C>>(b.filtered ? 0 : p.width);
    }
  }
};

template <class T>
class PooledRows {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  using V = Vector<C, N>;

 public:
  PooledRows(const PyramidPooling& problem, const PooledBranch& branch, const SharedBranch<C>& prepared)
      : p(problem), b(branch), shared(prepared) {}

  void prepare() const {
    if (p.enlarges(b)) {
      place_columns(shared.columns, p.width, b.width);
      shared.weights.fill(p.channels(), b.epilogue, [](int64_t, int64_t) { return C(0); });
      for (int64_t channel = 0; channel < p.channels(); ++channel) prepare_windows(channel);
    } else {
      if (!b.filtered) place_columns(shared.columns, b.width, p.width);
      shared.weights.fill_filters(static_cast<const T*>(b.weight), 1, p.channels(), b.epilogue);
    }
  }

  void fill(const PooledPart<C>& part, int64_t image, ResizedRows<C>& resized) const {
    const T* x = static_cast<const T*>(b.x) + image * p.pixels_of(b) * p.channels();
    if (p.enlarges(b)) {
      fill_enlarged(part, x);
    } else if (b.filtered) {
      filter_rows(x, p.height, part.row, p.channels(), shared.weights, sums_of(part));
    } else if (b.height == p.height && b.width == p.width) {
      fill_map(part, x);
    } else {
      fill_resized(part, x, resized);
    }
  }

  // Numbers of the rows that are held of a panel of `vectors`, which may begin and end within a pixel.
  static int64_t resized_pitch(int64_t vectors, int64_t channels) {
    return flat_pitch<C>((vectors + 1) * N + 2 * channels);
  }

 private:
  // The filter of a larger branch is moved over a window of 2x2 whose mean is taken, and each of its columns shared out.
  void prepare_windows(int64_t channel) const {
    const T* weight = static_cast<const T*>(b.weight) + channel * 9;
    C filter[kWindow][kWindow] = {};
    for (int64_t i = 0; i < 9; ++i) {
      for (int64_t w = 0; w < 4; ++w) filter[i / 3 + w / 2][i % 3 + w % 2] += load_one(weight + i) / 4;
    }
    for (int64_t x = 0; x < p.width; ++x) {
      const int64_t number = x * p.channels() + channel, left = AdaptiveWindow(x, b.width, p.width).first - 1;
      C* to = shared.weights.of(number / N) + number % N;
      for (int64_t v = 0; v < kWindow; ++v) {
        if (left + v < 0 || left + v >= b.width) continue;
        const Between<C>& at = shared.columns[left + v];
        auto add = [&](int64_t column, C share) {
          if (share == 0) return;  // as of a second column beside the map
          C* taps = to + (column - x + shared.reach) * kWindow * N;
          for (int64_t u = 0; u < kWindow; ++u) taps[u * N] += filter[u][v] * share;
        };
        add(at.first, at.share_of_first);
        add(at.second, at.share_of_second);
      }
    }
  }

  void fill_enlarged(const PooledPart<C>& part, const T* x) const {
    auto top_of = [&](int64_t y) { return AdaptiveWindow(y, b.height, p.height).first - 1; };
    const int64_t top = top_of(part.row), bottom = top_of(part.end_row - 1) + kWindow;
    const FlatRows<C> resized = rows_around<C>(kMostWindowRows, part.first, part.end, shared.reach * p.channels());
    for (int64_t y = top; y < bottom; ++y) {
      if (y < 0 || y >= b.height) {
        fill_zero(resized.at(y - top, resized.origin), resized.pitch);
        continue;
      }
      const Between<C> rows(y, p.height, b.height);
      const T *upper = x + rows.first * p.row(), *lower = x + rows.second * p.row();
      fill_row(resized, y - top, p.row(), [&](int64_t i, int64_t valid) {
        const V a = load_first<N>(upper + i, valid);
        return rows.mix(a, load_first<N>(lower + i, valid));
      });
    }
    if (b.height == 2 * p.height) {
      sweep<kWindow, 4, 0>(resized, part);
    } else if (part.row % 2 == 0) {
      sweep<kWindow, 3, 0>(resized, part);
    } else {
      sweep<kWindow, 3, 1>(resized, part);
    }
  }

  template <int Window, int Halves, int Odd>
  void sweep(const FlatRows<C>& rows, const PooledPart<C>& part) const {
    sweep_flat<Window, Halves, Odd>(rows, 1, 0, shared.reach, p.channels(), shared.weights, sums_of(part));
  }

  FlatSums<C> sums_of(const PooledPart<C>& part) const { return {part.to, part.first, part.end, part.rows(), p.row()}; }

  // A map of this size may hold numbers that no mix must meet.
  void fill_map(const PooledPart<C>& part, const T* x) const {
    for (int64_t y = part.row; y < part.end_row; ++y) {
      const T* from = x + y * p.row() + part.first * N;
      fill_finished(part, y, [&](int64_t i, int64_t valid) { return load_first<N>(from + i, valid); });
    }
  }

  void fill_resized(const PooledPart<C>& part, const T* x, ResizedRows<C>& resized) const {
    const int64_t first = part.first * N / p.channels();
    const int64_t end = least(ceil_div(part.end * N, p.channels()), p.width);
    const FlatRows<C> held{resized.numbers, first * p.channels(), resized_pitch(part.end - part.first, p.channels())};
    auto row_of = [&](int64_t y) {
      int64_t& holds = resized.held[y % 2];
      if (holds != y) resize_columns(x + y * b.width * p.channels(), first, end, held.at(y % 2, held.origin));
      holds = y;
      return y % 2;
    };
    for (int64_t y = part.row; y < part.end_row; ++y) {
      const Between<C> rows(y, b.height, p.height);
      const C* upper = held.at(row_of(rows.first), part.first * N);
      const C* lower = held.at(row_of(rows.second), part.first * N);
      fill_finished(part, y, [&](int64_t i, int64_t) { return rows.mix(load<N>(upper + i), load<N>(lower + i)); });
    }
  }

  // Columns [first, end); behind the last there is room for a vector.
  void resize_columns(const T* row, int64_t first, int64_t end, C* to) const {
    const int64_t channels = p.channels();
    for (int64_t column = first; column < end; ++column, to += channels) {
      const Between<C>& at = shared.columns[column];
      const T *left = row + at.first * channels, *right = row + at.second * channels;
      for_whole_vectors<N>(channels, [&](int64_t i, int64_t valid) {
        const V a = load_first<N>(left + i, valid);
        store<N>(to + i, at.mix(a, load_first<N>(right + i, valid)));
      });
    }
  }

  // Row `y` of the part: number(i, valid) is the vector from its number i on, before the epilogue.
  template <class Number>
  void fill_finished(const PooledPart<C>& part, int64_t y, Number&& number) const {
    const C *affine = shared.weights.of(part.first), *end = shared.weights.end();
    C* to = part.to.at(y - part.row, part.first * N);
    const int64_t numbers = least(part.end * N, p.row()) - part.first * N;
    for (int64_t i = 0; i < numbers; i += N) {
      const AffinePreluLanes<C, N> finish{load<N>(affine), load<N>(affine + N), load<N>(affine + 2 * N)};
      store_first<N>(to + i, finish(number(i, numbers - i)), numbers - i);
      affine += 3 * N;
      if (affine == end) affine = shared.weights.blocks;
    }
  }

  const PyramidPooling& p;
  const PooledBranch& b;
  const SharedBranch<C>& shared;
};

}  // namespace espk::ESPK_ISA
