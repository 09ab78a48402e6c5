// Pixels times weights where the machine multiplies bfloat16: two neighbours along the depth are a pair, and one step adds
// the products of a pair to a float32 sum. Compiled for avx512_bf16 (a vector of sums a step) and amx (a tile of 16 by 16
// sums and up to 16 pairs a step) alone; the kernels of avx512 call the one in use through the problem they are given.
// Subnormal numbers count as zero, as these instructions have it.
#pragma once

#include <cstdint>

namespace espk {

// Rows of `a` hold the depths of all groups one behind the other, rows of `out` their columns. The depth may come in parts,
// each a_part behind the one before, as the rows of a filter do: rows of `a` may overlap.
struct Bfloat16Product {
  int64_t rows, groups, columns, depth;  // columns of one group, and depth of one of its parts, which is even
  int64_t parts = 1;
  const uint16_t* a;
  int64_t a_row, a_part;
  const uint16_t* b;  // from pack_pairs (bfloat16_pairs.h), groups b_group apart
  int64_t b_group;
  uint16_t* out;
  int64_t out_row;

  // prelu(product * scale + shift + residual + added, slope), one parameter a column; null leaves a step out.
  const float *scale, *shift, *slope;
  const uint16_t* residual;  // rows out_row apart
  const float* added;  // rows added_row apart
  int64_t added_row;
};

struct Bfloat16Arithmetic {
  void (*multiply)(const Bfloat16Product&);
  void (*round)(uint16_t* to, const float* from, int64_t count);  // to the nearest, of two the even
};

}  // namespace espk
