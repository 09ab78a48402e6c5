// The inner loop of every depthwise pass: a block of outputs stays in registers while the taps go by, one fused
// multiply-add with one memory operand for each tap and output vector.
#include "depthwise_taps.h"

namespace espk::ESPK_ISA {
namespace {

// Pixels put neighbouring pixels side by side, planes also rows, since few vectors make a row of a plane. Eight sums hide
// the latency of the multiply-adds, fourteen still fit sixteen registers.
constexpr BlockShape kPixelShapes[] = {{1, 14}, {1, 8}, {2, 7}, {2, 4}};
constexpr BlockShape kPlaneShapes[] = {{1, 8}, {2, 4}, {4, 2}, {8, 1}};

// Affine and PReLU of one segment; `Pixels` have a number for each lane, of which no more than the channels are read.
template <class C, int N, bool Pixels>
struct AffinePrelu {
  using V = Vector<C, N>;
  V scale, shift, slope;

  AffinePrelu(const Sweep<C>& s, int64_t at)
      : scale(numbers(s.scale + at, s.valid)),
        shift(numbers(s.shift + at, s.valid)),
        slope(numbers(s.slope + at, s.valid)) {}

  V operator()(V v) const {
    v = v * scale + shift;
    return v > V{} ? v : v * slope;
  }

 private:
  static V numbers(const C* from, int64_t valid) {
    if constexpr (Pixels) {
      return load_first<N>(from, valid);
    } else {
      return broadcast<C, N>(*from);
    }
  }
};

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
        const Tap* tap = s.taps->taps + segment.first;
        const C* origin = s.tile + y * s.row_step + x * N;
        for (int t = 0; t < segment.count; ++t, ++tap) {
          V w;
          if constexpr (Pixels) {
            w = load<N>(s.weights + tap->weight * N);
          } else {
            w = broadcast<C, N>(s.weights[tap->weight]);
          }
          const C* p = origin + tap->offset;
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) sum[r][i] += w * load<N>(p + r * s.row_step + i * N);
          }
        }
        C* out = s.out + g * s.out_segment + y * s.out_row + x * s.out_column;
        V result[R][X];
        if (s.scale) {
          const AffinePrelu<C, N, Pixels> epilogue(s, g * s.epilogue_segment);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) {
              result[r][i] = epilogue(sum[r][i]);
            }
          }
        } else {
          __builtin_memcpy(&result, &sum, sizeof sum);
        }
        if (whole) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) store<N>(out + r * s.out_row + i * s.out_column, result[r][i]);
          }
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            if (y + r >= s.rows) break;
#pragma GCC unroll 16
            for (int i = 0; i < X; ++i) {
              if (x + i >= s.columns) break;
              store_first<N>(out + r * s.out_row + i * s.out_column, result[r][i], s.valid - (x + i) * s.valid_step);
            }
          }
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
  if (is(2)) return sweep_blocks<C, N, Pixels, shapes[2].rows, shapes[2].columns>(s);
  sweep_blocks<C, N, Pixels, shapes[3].rows, shapes[3].columns>(s);
}

}  // namespace

BlockShape choose_block(bool pixels, int64_t rows, int64_t columns) {
  BlockShape best{};
  int64_t best_cost = INT64_MAX;
  for (const BlockShape& shape : pixels ? kPixelShapes : kPlaneShapes) {
    constexpr int64_t kStep = 3;  // from tap to tap, in multiply-adds
    const int64_t cost =
        ceil_div(rows, shape.rows) * ceil_div(columns, shape.columns) * (shape.rows * shape.columns + kStep);
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
    part.tile += x * s.lanes;
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

template void sweep(const Sweep<float>& s);
template void sweep(const Sweep<double>& s);

}  // namespace espk::ESPK_ISA
