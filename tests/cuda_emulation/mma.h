// The warp matrix functions for the emulation, 16x16x16 and for tf32 16x16x8, with float32 sums: lane l of a warp holds elements 8l..8l+7 of
// the accumulator, and of the two factors exactly the rows and columns that these need. The alignment that the device
// demands is demanded here.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace precision { struct tf32; }

// Eleven digits, of two nearest the one further from zero: cvt.rna.tf32.f32.
inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float number(float value) { return value; }
inline float number(__half value) { return __half2float(value); }
inline float number(__nv_bfloat16 value) { return __bfloat162float(value); }

inline int lane() { return emulation::block.current % emulation::kWarp; }
inline int row_of_lane() { return lane() / 2; }
inline int first_column_of_lane() { return lane() % 2 * 8; }

template <class Use, int M, int N, int K, class T, class Order = void>
struct fragment;

// What a lane needs of a: its row. Of b: its eight columns, one behind the other.
template <int K, class T, class Order>
struct fragment<matrix_a, 16, 16, K, T, Order> {
  static constexpr int num_elements = K;
  float x[num_elements];
};

template <int K, class T, class Order>
struct fragment<matrix_b, 16, 16, K, T, Order> {
  static constexpr int num_elements = 8 * K;
  float x[num_elements];
};

template <int K>
struct fragment<accumulator, 16, 16, K, float> {
  static constexpr int num_elements = 8;
  float x[8];
};

inline void check(const void* address, unsigned pitch, size_t element) {
  if (reinterpret_cast<uintptr_t>(address) % 32 != 0 || pitch * element % 16 != 0) {
    emulation::fail("a matrix fragment is not aligned to 32 bytes, or its rows not to 16");
  }
}

template <int K, class Element, class T>
void load_matrix_sync(fragment<matrix_a, 16, 16, K, Element, row_major>& a, const T* from, unsigned pitch) {
  check(from, pitch, sizeof(T));
  for (int k = 0; k < K; ++k) a.x[k] = number(from[static_cast<unsigned>(row_of_lane()) * pitch + k]);
}

template <int K, class Element, class T>
void load_matrix_sync(fragment<matrix_b, 16, 16, K, Element, col_major>& b, const T* from, unsigned pitch) {
  check(from, pitch, sizeof(T));
  for (int n = 0; n < 8; ++n)
    for (int k = 0; k < K; ++k) {
      b.x[n * K + k] = number(from[static_cast<unsigned>(first_column_of_lane() + n) * pitch + k]);
    }
}

template <int K>
void fill_fragment(fragment<accumulator, 16, 16, K, float>& c, float value) {
  for (float& element : c.x) element = value;
}

template <int K, class Element>
void mma_sync(fragment<accumulator, 16, 16, K, float>& d, const fragment<matrix_a, 16, 16, K, Element, row_major>& a,
              const fragment<matrix_b, 16, 16, K, Element, col_major>& b,
              const fragment<accumulator, 16, 16, K, float>& c) {
  for (int n = 0; n < 8; ++n) {
    float sum = c.x[n];
    for (int k = 0; k < K; ++k) sum += a.x[k] * b.x[n * K + k];
    d.x[n] = sum;
  }
}

template <int K>
void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, K, float>& c, unsigned pitch, layout_t) {
  check(to, pitch, sizeof(float));
  for (int n = 0; n < 8; ++n) {
    to[static_cast<unsigned>(row_of_lane()) * pitch + static_cast<unsigned>(first_column_of_lane() + n)] = c.x[n];
  }
}

}  // namespace nvcuda::wmma
