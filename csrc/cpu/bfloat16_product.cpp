// Blocks of at most 32 rows by 32 columns: sums of the whole depth first, into memory that the first-level cache holds,
// then the epilogue. Bytes: 2 * (depth read + columns written) a row of a group; multiply-adds: depth * columns.
#include "bfloat16_product.h"

#include "bfloat16_pairs.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int kLanesOfSums = 16;
static_assert(kLanesOfSums == kPairColumns && kRegisterBytes == 64);
constexpr int kBlockRows = 32, kBlockVectors = 2;
// From row to row of sums. Groups narrower than a vector lie side by side in a row, and each is stored as a whole vector,
// the next one over what it leaves behind its own columns.
constexpr int kSumPitch = (kBlockVectors + 1) * kLanesOfSums;

inline __m512 widen_half(__m256i bits) {
  return (__m512)(__builtin_convertvector((Vector<uint16_t, 16>)bits, Vector<uint32_t, 16>) << 16);
}

inline int64_t whole_depth(const Bfloat16Product& p) { return p.parts * p.depth; }

inline __m256i round_half(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

// The epilogue of `rows` rows of sums, J vectors each, into the result from (row, column) on. `column` counts those of all
// groups; of the last vector `valid` are wanted.
template <int J>
void finish(const Bfloat16Product& p, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t valid) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
  __m512 scale[J], shift[J], slope[J];
  __mmask16 mask[J];
#pragma GCC unroll 2
  for (int j = 0; j < J; ++j) {
    const int64_t first = column + j * kLanesOfSums;
    mask[j] = j == J - 1 ? static_cast<__mmask16>((1u << valid) - 1u) : static_cast<__mmask16>(0xffff);
    scale[j] = p.scale ? _mm512_maskz_loadu_ps(mask[j], p.scale + first) : one;
    shift[j] = p.shift ? _mm512_maskz_loadu_ps(mask[j], p.shift + first) : zero;
    slope[j] = p.slope ? _mm512_maskz_loadu_ps(mask[j], p.slope + first) : one;
  }
  uint16_t* out = p.out + row * p.out_row + column;
  const uint16_t* residual = p.residual ? p.residual + row * p.out_row + column : nullptr;
  const float* added = p.added ? p.added + row * p.added_row + column : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
      __m512 v = _mm512_fmadd_ps(_mm512_loadu_ps(sums + j * kLanesOfSums), scale[j], shift[j]);
      if (residual) {
        v = _mm512_add_ps(v, widen_half(_mm256_maskz_loadu_epi16(mask[j], residual + j * kLanesOfSums)));
      }
      if (added) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask[j], added + j * kLanesOfSums));
      v = _mm512_mask_mul_ps(v, _mm512_cmp_ps_mask(v, zero, _CMP_NGT_UQ), v, slope[j]);
      _mm256_mask_storeu_epi16(out + j * kLanesOfSums, mask[j], round_half(v));
    }
    sums += kSumPitch;
    out += p.out_row;
    if (residual) residual += p.out_row;
    if (added) added += p.added_row;
  }
}

#if !defined(__AMX_BF16__)

struct Tiles {
  explicit Tiles(const Bfloat16Product&) {}
};

constexpr int kMostRows = 12;  // whose sums stay in registers

// The sums of I rows and J vectors over the whole depth.
template <int I, int J>
void add_pairs(const Bfloat16Product& p, const uint16_t* a, const uint16_t* b, float* sums) {
  // Four rows share a pointer, so that all addresses fit the integer registers.
  constexpr int kQuads = (I + 3) / 4;
  const uint16_t* quad[kQuads];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) quad[q] = a + 4 * q * p.a_row;
  __m512 sum[I][J];
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t part = 0; part < p.parts; ++part) {
    for (int64_t k = part * p.a_part, end = k + p.depth; k < end; k += 2, b += 2 * kPairColumns) {
      __m512bh vector[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) vector[j] = (__m512bh)_mm512_loadu_si512(b + j * whole_depth(p) * kPairColumns);
#pragma GCC unroll 12
      for (int i = 0; i < I; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, quad[i / 4] + (i % 4) * p.a_row + k, sizeof pair);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)_mm512_set1_epi32(pair), vector[j]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(sums + i * kSumPitch + j * kLanesOfSums, sum[i][j]);
  }
}

// The sums of `rows` rows, at most kBlockRows, of one group and J vectors of its columns.
template <int J>
float* add_rows(const Bfloat16Product& p, const Tiles&, const uint16_t* a, const uint16_t* b, int64_t rows,
                float* sums) {
  int64_t i = 0;
  for (; i + kMostRows <= rows; i += kMostRows) add_pairs<kMostRows, J>(p, a + i * p.a_row, b, sums + i * kSumPitch);
  for (; i + 4 <= rows; i += 4) add_pairs<4, J>(p, a + i * p.a_row, b, sums + i * kSumPitch);
  for (; i < rows; ++i) add_pairs<1, J>(p, a + i * p.a_row, b, sums + i * kSumPitch);
  return sums;
}

#else

constexpr int kTileRows = 16, kTilePairs = 16;

// The shapes of the tiles: 0 to 3 hold sums, 4 and 5 rows of `a`, 6 and 7 weights. What the thread's caller had set is
// set again at the end.
class Tiles {
 public:
  explicit Tiles(const Bfloat16Product& p) : rows(least(p.rows, kTileRows)), pairs(tile_pairs(p.depth)) {
    _tile_storeconfig(&before_);
    written_whole();
    Configuration wanted{};
    wanted.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      wanted.row_bytes[tile] = tile == 4 || tile == 5 ? static_cast<uint16_t>(4 * pairs) : uint16_t{64};
      wanted.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : pairs);
    }
    written_whole();
    _tile_loadconfig(&wanted);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  const int64_t rows, pairs;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Configuration before_;

  // To gcc these instructions touch eight bytes of a configuration: the others must neither be kept back nor be guessed.
  static void written_whole() { __asm__ volatile("" ::: "memory"); }

  // All steps take the same number of pairs, so that no tile reads beyond its group.
  static int64_t tile_pairs(int64_t depth) {
    int64_t pairs = least(depth / 2, kTilePairs);
    while (depth / 2 % pairs != 0) --pairs;
    return pairs;
  }
};

// The sums of R tiles of rows, the second `second` rows behind the first, and J of columns over the whole depth.
template <int R, int J>
void add_tiles(const Bfloat16Product& p, const Tiles& tiles, const uint16_t* a, const uint16_t* b, int64_t second,
               float* sums) {
  _tile_zero(0);
  if constexpr (J > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && J > 1) _tile_zero(3);
  const int64_t a_bytes = 2 * p.a_row;
  constexpr int64_t kWeightBytes = 4 * kPairColumns;
  for (int64_t part = 0; part < p.parts; ++part) {
    for (int64_t k = part * p.a_part, end = k + p.depth; k < end; k += 2 * tiles.pairs) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b, kWeightBytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (J > 1) {
        _tile_loadd(7, b + whole_depth(p) * kPairColumns, kWeightBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        _tile_loadd(5, a + second * p.a_row + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (R > 1 && J > 1) _tile_dpbf16ps(3, 5, 7);
      b += 2 * tiles.pairs * kPairColumns;
    }
  }
  constexpr int64_t kSumBytes = 4 * kSumPitch;
  _tile_stored(0, sums, kSumBytes);
  if constexpr (J > 1) _tile_stored(1, sums + kLanesOfSums, kSumBytes);
  if constexpr (R > 1) _tile_stored(2, sums + second * kSumPitch, kSumBytes);
  if constexpr (R > 1 && J > 1) _tile_stored(3, sums + second * kSumPitch + kLanesOfSums, kSumBytes);
}

// The sums of `rows` rows, at most kBlockRows, of one group and J vectors of its columns. They begin where it says: a tile
// that is not whole takes in rows before its own, whose results are stored already, or are computed twice.
template <int J>
float* add_rows(const Bfloat16Product& p, const Tiles& tiles, const uint16_t* a, const uint16_t* b, int64_t rows,
                float* sums) {
  if (rows > kTileRows) {
    add_tiles<2, J>(p, tiles, a, b, rows - kTileRows, sums);
    return sums;
  }
  const int64_t again = tiles.rows - rows;
  add_tiles<1, J>(p, tiles, a - again * p.a_row, b, 0, sums);
  return sums + again * kSumPitch;
}

#endif

// All rows of `groups` groups from `group` on and `columns` columns of each from `first` on, which J vectors hold.
template <int J>
void multiply_columns(const Bfloat16Product& p, const Tiles& tiles, int64_t group, int64_t groups, int64_t first,
                      int64_t columns) {
  alignas(64) float sums[kBlockRows * kSumPitch];
  const int64_t column = group * p.columns + first, valid = groups * columns - (J - 1) * kLanesOfSums;
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    const int64_t rows = least(kBlockRows, p.rows - row);
    const uint16_t* a = p.a + row * p.a_row + group * p.depth;
    const uint16_t* b = p.b + group * p.b_group + first * whole_depth(p);
    float* begin = sums;
    if (groups == 1) {
      begin = add_rows<J>(p, tiles, a, b, rows, sums);
    } else {
      for (int64_t g = 0; g < groups; ++g) {
        begin = add_rows<1>(p, tiles, a + g * p.depth, b + g * p.b_group, rows, sums + g * columns) - g * columns;
      }
    }
    finish<J>(p, begin, row, rows, column, valid);
  }
}

void multiply(const Bfloat16Product& p) {
  if (p.rows == 0 || p.depth == 0) return;
  constexpr int64_t kBlockColumns = kBlockVectors * kLanesOfSums;
  const Tiles tiles(p);
  const int64_t together = p.columns < kLanesOfSums ? least(kBlockColumns / p.columns, p.groups) : 1;
  for (int64_t group = 0; group < p.groups; group += together) {
    const int64_t groups = least(together, p.groups - group);
    for (int64_t first = 0; first < p.columns; first += kBlockColumns) {
      const int64_t columns = least(kBlockColumns, p.columns - first);
      if (groups * columns > kLanesOfSums) {
        multiply_columns<2>(p, tiles, group, groups, first, columns);
      } else {
        multiply_columns<1>(p, tiles, group, groups, first, columns);
      }
    }
  }
}

void round(uint16_t* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    _mm512_storeu_si512(to + i, (__m512i)both);
  }
  for (; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1u);
    _mm256_mask_storeu_epi16(to + i, mask, round_half(_mm512_maskz_loadu_ps(mask, from + i)));
  }
}

}  // namespace

extern const Bfloat16Arithmetic bfloat16_arithmetic = {multiply, round};

}  // namespace espk::ESPK_ISA
