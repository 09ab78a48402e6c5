// The inner loop of every depthwise pass: a block of outputs stays in registers while the taps go by. Where registers
// suffice, a vector of the tile is loaded once for all taps of a run, 16 to 22 loads instead of 42 for a row of three taps
// and 14 outputs; a load for each fused multiply-add would keep the load ports as busy as the multipliers, and the slower.
#include "depthwise_taps.h"

#include <algorithm>

#include "affine_prelu.h"
#include "far_map.h"

namespace espk::ESPK_ISA {
namespace {

// Pixels put neighbouring pixels side by side, planes also rows, since few vectors make a row of a plane. Eight sums hide
// the latency of the multiply-adds, seven nearly; of sixteen registers ten leave room for the weights of a run and for what
// compilers make of it.
constexpr BlockShape kPixelShapesOf32[] = {{1, 14}, {1, 8}, {1, 16}, {2, 7}};
constexpr BlockShape kPixelShapesOf16[] = {{1, 7}, {1, 8}, {1, 10}, {2, 4}};
constexpr const BlockShape (&kPixelShapes)[4] = kRegisters == 32 ? kPixelShapesOf32 : kPixelShapesOf16;
constexpr BlockShape kPlaneShapes[] = {{1, 8}, {2, 4}, {4, 2}, {8, 1}};

// Every shape is compiled. Part of a vector of channels and float64 are rare where a map has few columns: of pixels, they
// have the first two shapes alone.
template <class C>
constexpr int shape_count(bool pixels, int64_t lanes) {
  return pixels && (lanes < kLanes<C> || sizeof(C) == 8) ? 2 : 4;
}

// Affine and PReLU of one segment; `Pixels` have a number for each lane, of which no more than the channels are read.
template <class C, int N, bool Pixels>
AffinePreluLanes<C, N> epilogue(const Sweep<C>& s, int64_t segment) {
  auto numbers = [&](const C* from) {
    from += segment * s.epilogue_segment;
    return Pixels ? load_first<N>(from, s.valid) : broadcast<C, N>(*from);
  };
  return {numbers(s.scale), numbers(s.shift), numbers(s.slope)};
}

// Where a block's first output lies in the tile, and how the rows below it follow.
template <class C>
struct BlockRows {
  const C* tile;
  int64_t first, row_step, round;

  const C* at(int64_t offset, int row) const {
    const int64_t from = first + offset + row * row_step;
    return tile + (from < round ? from : from - round);
  }
};

template <class C, int N, int R, int X, int Count, int Step>
[[gnu::always_inline]] inline void add_run(Vector<C, N> (&sum)[R][X], const TapRun& run, const BlockRows<C>& rows,
                                           const C* weights) {
  Vector<C, N> w[Count];
#pragma GCC unroll 4
  for (int t = 0; t < Count; ++t) w[t] = load<N>(weights + run.weights[t] * N);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const C* p = rows.at(run.offset, r);
#pragma GCC unroll 32
    for (int j = 0; j < X + (Count - 1) * Step; ++j) {
      Vector<C, N> v = load<N>(p + j * N);
      hold(v);
#pragma GCC unroll 4
      for (int t = 0; t < Count; ++t) {
        const int i = j - t * Step;
        if (i >= 0 && i < X) sum[r][i] += w[t] * v;
      }
    }
  }
}

// One tap of weight `w` whose inputs lie at `offset` from their outputs.
template <class C, int N, int R, int X>
[[gnu::always_inline]] inline void add_tap(Vector<C, N> (&sum)[R][X], Vector<C, N> w, const BlockRows<C>& rows,
                                           int64_t offset) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const C* from = rows.at(offset, r);
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) sum[r][i] += w * load<N>(from + i * N);
  }
}

template <class C, int N, int R, int X, int Count, int Step>
[[gnu::always_inline]] inline void add_alike(Vector<C, N> (&sum)[R][X], const TapRun* run, const BlockRows<C>& rows,
                                             const C* weights) {
  for (const TapRun* end = run + run->alike; run < end; ++run) {
    add_run<C, N, R, X, Count, Step>(sum, *run, rows, weights);
  }
}

constexpr int run_kind(int count, int step) { return count * (TapRun::kMostStep + 1) + step; }

// Pixels: all runs alike, where their weights and one more vector fit beside the sums, or tap by tap. Compilers keep sums
// in registers through a loop, and not through the cases of a switch. float64, which the other types are checked with,
// goes tap by tap: the cases are most of the compile time.
template <class C, int N, int R, int X>
[[gnu::always_inline]] inline void add_taps(Vector<C, N> (&sum)[R][X], const TapRun* run, const BlockRows<C>& rows,
                                            const C* weights) {
  if constexpr (sizeof(C) < 8 && R * X + TapRun::kMostTaps + 1 <= kRegisters) {
    switch (run_kind(run->count, run->step)) {
      case run_kind(3, 1): return add_alike<C, N, R, X, 3, 1>(sum, run, rows, weights);
      case run_kind(3, 2): return add_alike<C, N, R, X, 3, 2>(sum, run, rows, weights);
      case run_kind(3, 3): return add_alike<C, N, R, X, 3, 3>(sum, run, rows, weights);
      case run_kind(3, 4): return add_alike<C, N, R, X, 3, 4>(sum, run, rows, weights);
      case run_kind(2, 1): return add_alike<C, N, R, X, 2, 1>(sum, run, rows, weights);
      case run_kind(2, 3): return add_alike<C, N, R, X, 2, 3>(sum, run, rows, weights);
      default: return add_alike<C, N, R, X, 1, 1>(sum, run, rows, weights);
    }
  } else {
    for (const TapRun* end = run + run->alike; run < end; ++run) {
      for (int t = 0; t < run->count; ++t) {
        add_tap<C, N, R, X>(sum, load<N>(weights + run->weights[t] * N), rows, run->offset + t * run->step * N);
      }
    }
  }
}

// The results of one segment of a block that reaches beyond the map: out of the way of whole blocks, whose loop would
// otherwise keep the places and masks of each. `sums` are block.rows x block.columns vectors.
template <class C, int N, bool Pixels>
[[gnu::noinline]] void store_part(const Sweep<C>& s, BlockShape block, int segment, int64_t y, int64_t x,
                                  const C* sums) {
  C* out = s.out + segment * s.out_segment + y * s.out_row + x * s.out_column;
  for (int64_t r = 0; r < least(block.rows, s.rows - y); ++r) {
    for (int64_t i = 0; i < least(block.columns, s.columns - x); ++i) {
      Vector<C, N> v = load<N>(sums + (r * block.columns + i) * N);
      if (s.scale) v = epilogue<C, N, Pixels>(s, segment)(v);
      store_first<N>(out + r * s.out_row + i * s.out_column, v, s.valid - (x + i) * s.valid_step);
    }
  }
}

// The results of one segment of a whole block; last(sum) is each.
template <class C, int N, int R, int X, class Last>
[[gnu::always_inline]] inline void store_whole(const Sweep<C>& s, C* out, const Vector<C, N> (&sum)[R][X],
                                               const Last& last) {
  if constexpr (N * sizeof(C) == kLineBytes) {
    if (s.far) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < X; ++i) store_far<N>(out + r * s.out_row + i * s.out_column, last(sum[r][i]));
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) store<N>(out + r * s.out_row + i * s.out_column, last(sum[r][i]));
  }
}

template <class C, int N, bool Pixels, int R, int X>
void sweep_blocks(const Sweep<C>& given) {
  using V = Vector<C, N>;
  const Sweep<C> s = given;  // a copy that no store can alias
  for (int64_t y = 0; y < s.rows; y += R) {
    for (int64_t x = 0; x < s.columns; x += X) {
      const bool whole = y + R <= s.rows && x + X <= s.columns && s.valid - (x + X - 1) * s.valid_step >= N;
      V sum[R][X];
      for (int g = 0; g < s.taps->segment_count; ++g) {
        if (g == 0 || !s.carry) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) sum[r][i] = V{};
          }
        }
        const Segment segment = s.taps->segments[g];
        const TapRun *run = s.taps->runs + segment.first_run, *end = run + segment.run_count;
        const BlockRows<C> rows{s.tile, s.first + y * s.row_step + x * N, s.row_step, s.round};
        if constexpr (Pixels) {
          for (; run < end; run += run->alike) add_taps<C, N, R, X>(sum, run, rows, s.weights);
        } else {
          for (; run < end; ++run) {
            add_tap<C, N, R, X>(sum, broadcast<C, N>(s.weights[run->weights[0]]), rows, run->offset);
          }
        }
        if (!whole) {
          C sums[R * X * N];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) store<N>(sums + (r * X + i) * N, sum[r][i]);
          }
          store_part<C, N, Pixels>(given, {R, X}, g, y, x, sums);
          continue;
        }
        C* out = s.out + g * s.out_segment + y * s.out_row + x * s.out_column;
        if (s.scale) {
          store_whole<C, N, R, X>(s, out, sum, epilogue<C, N, Pixels>(s, g));
        } else {
          store_whole<C, N, R, X>(s, out, sum, [](Vector<C, N> v) { return v; });
        }
      }
    }
  }
}

template <class C, int N, bool Pixels>
void sweep_lanes(const Sweep<C>& s) {
  constexpr const BlockShape* shapes = Pixels ? kPixelShapes : kPlaneShapes;
  auto is = [&](int i) { return s.shape.rows == shapes[i].rows && s.shape.columns == shapes[i].columns; };
  if (is(0)) return sweep_blocks<C, N, Pixels, shapes[0].rows, shapes[0].columns>(s);
  if (is(1)) return sweep_blocks<C, N, Pixels, shapes[1].rows, shapes[1].columns>(s);
  if constexpr (shape_count<C>(Pixels, N) == 4) {
    if (is(2)) return sweep_blocks<C, N, Pixels, shapes[2].rows, shapes[2].columns>(s);
    sweep_blocks<C, N, Pixels, shapes[3].rows, shapes[3].columns>(s);
  }
}

}  // namespace

// Taps of a row come one after the other, from left to right or back, and a stride puts every other one elsewhere.
void TapList::end_segment(int64_t lanes) {
  Segment& segment = segments[segment_count - 1];
  segment.count = count - segment.first;
  // Columns from tap i to tap j, 0 where they form no run.
  auto columns = [&](int i, int j) -> int64_t {
    const int64_t distance = j < count && lanes > 0 ? taps[j].offset - taps[i].offset : 0;
    const int64_t step = distance / most(lanes, 1);
    return distance % most(lanes, 1) == 0 && step >= -TapRun::kMostStep && step <= TapRun::kMostStep ? step : 0;
  };
  bool taken[kMaxTaps] = {};
  for (int i = segment.first; i < count; ++i) {
    if (taken[i]) continue;
    int members[TapRun::kMostTaps] = {i}, size = 1;
    int64_t step = 0;
    for (int j = i + 1; j <= i + 2 && size == 1; ++j) {
      if (j < count && !taken[j]) step = columns(i, j);
      if (step != 0) members[size++] = j;
    }
    if (members[1] == i + 1 && columns(i + 1, i + 2) == step) members[size++] = i + 2;
    // Taps of 3x3 filters an even number of columns apart have a third between them: other filters' go one by one, since
    // no loop of add_taps is compiled for such a pair.
    if (size == 2 && step % 2 == 0) {
      size = 1;
      step = 0;
    }
    if (step < 0) std::reverse(members, members + size);
    TapRun& run = runs[run_count++];
    run = {taps[members[0]].offset, {}, size, static_cast<int>(step < 0 ? -step : most(step, 1)), 1};
    for (int t = 0; t < size; ++t) {
      run.weights[t] = taps[members[t]].weight;
      taken[members[t]] = true;
    }
  }
  segment.run_count = run_count - segment.first_run;
  std::sort(runs + segment.first_run, runs + run_count, [](const TapRun& a, const TapRun& b) {
    const int kind_a = run_kind(a.count, a.step), kind_b = run_kind(b.count, b.step);
    return kind_a != kind_b ? kind_a > kind_b : a.weights[0] < b.weights[0];
  });
  for (int i = run_count - 2; i >= segment.first_run; --i) {
    const TapRun& next = runs[i + 1];
    if (runs[i].count == next.count && runs[i].step == next.step) runs[i].alike = next.alike + 1;
  }
}

template <class C>
BlockShape choose_block(bool pixels, int64_t lanes, int64_t rows, int64_t columns) {
  BlockShape best{};
  int64_t best_cost = INT64_MAX;
  for (int i = 0; i < shape_count<C>(pixels, lanes); ++i) {
    const BlockShape& shape = (pixels ? kPixelShapes : kPlaneShapes)[i];
    constexpr int64_t kStep = 3, kHidden = 8;  // from tap to tap, and in the latency of one, in multiply-adds
    const int64_t cost = ceil_div(rows, shape.rows) * ceil_div(columns, shape.columns) *
                         (most(shape.rows * shape.columns, kHidden) + kStep);
    if (cost < best_cost) {
      best = shape;
      best_cost = cost;
    }
  }
  return best;
}

template <class C>
void sweep(const Sweep<C>& s) {
  const int64_t panel = round_up(most(s.panel, 1), s.shape.columns);
  for (int64_t x = 0; x < s.columns; x += panel) {
    Sweep<C> part = s;
    part.first += x * s.lanes;
    part.columns = least(panel, s.columns - x);
    part.out += x * s.out_column;
    part.valid -= x * s.valid_step;
    with_lanes<C>(s.lanes, [&](auto lanes) {
      constexpr int N = decltype(lanes)::value;
      if (s.pixels) {
        sweep_lanes<C, N, true>(part);
      } else {
        sweep_lanes<C, N, false>(part);
      }
    });
  }
}

template BlockShape choose_block<float>(bool, int64_t, int64_t, int64_t);
template BlockShape choose_block<double>(bool, int64_t, int64_t, int64_t);
template void sweep(const Sweep<float>& s);
template void sweep(const Sweep<double>& s);

}  // namespace espk::ESPK_ISA
