// One warp's share of a matrix product: 16 * Rows rows by 16 * Columns columns, of factors in shared memory that both
// keep the depth together. bfloat16, float16 and Tf32 go to the tensor cores, float32 and float64 are multiplied exactly.
//
// The result leaves by patches of 16 x 16, through which a warp turns it into the order of memory.
#pragma once

#include <mma.h>

#include "normalise.cuh"

namespace espk::cuda {

// A staged row of depth holds 128 bytes and 16 more, so that neighbouring rows begin in other banks.
template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPad = 16 / static_cast<int>(sizeof(T));

constexpr int kPatchPitch = 20;
constexpr int kPatchElements = 16 * kPatchPitch;

// What the tensor cores call the factors, and how deep a fragment is.
template <class T>
struct Fragments {
  using Element = T;
  static constexpr int depth = 16;
};
template <>
struct Fragments<Tf32> {
  using Element = nvcuda::wmma::precision::tf32;
  static constexpr int depth = 8;
};

template <class Fragment, class T>
__device__ __forceinline__ void load_fragment(Fragment& to, const T* from, int pitch) {
  if constexpr (std::is_same_v<T, Tf32>) {
    nvcuda::wmma::load_matrix_sync(to, reinterpret_cast<const float*>(from), pitch);
#pragma unroll
    for (int i = 0; i < to.num_elements; ++i) to.x[i] = nvcuda::wmma::__float_to_tf32(to.x[i]);
  } else {
    nvcuda::wmma::load_matrix_sync(to, from, pitch);
  }
}

template <class T, int Rows, int Columns>
class WarpProduct {
  using Element = typename Fragments<T>::Element;
  static constexpr int kStep = Fragments<T>::depth;

 public:
  __device__ WarpProduct() {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) nvcuda::wmma::fill_fragment(sums_[r][c], 0.0f);
    }
  }

  // Adds a [rows][depth] times b [columns][depth]; depth is a multiple of kStep.
  __device__ void add(const T* a, int a_pitch, const T* b, int b_pitch, int depth) {
    namespace wmma = nvcuda::wmma;
    for (int d = 0; d < depth; d += kStep) {
      wmma::fragment<wmma::matrix_b, 16, 16, kStep, Element, wmma::col_major> right[Columns];
#pragma unroll
      for (int c = 0; c < Columns; ++c) load_fragment(right[c], b + c * 16 * b_pitch + d, b_pitch);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        wmma::fragment<wmma::matrix_a, 16, 16, kStep, Element, wmma::row_major> left;
        load_fragment(left, a + r * 16 * a_pitch + d, a_pitch);
#pragma unroll
        for (int c = 0; c < Columns; ++c) wmma::mma_sync(sums_[r][c], left, right[c], sums_[r][c]);
      }
    }
  }

  // Patches of one row of fragments follow each other.
  __device__ void store_all(float* patches) const {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
        nvcuda::wmma::store_matrix_sync(patches + (r * Columns + c) * kPatchElements, sums_[r][c], kPatchPitch,
                                        nvcuda::wmma::mem_row_major);
      }
    }
  }

 private:
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kStep, float> sums_[Rows][Columns];
};

// Of each 16 x 16 a lane holds four rows that follow each other and two columns eight apart, which reads both factors
// four deep at a time without bank conflicts.
template <class T, int Rows, int Columns>
class ExactProduct {
 public:
  __device__ void add(const T* a, int a_pitch, const T* b, int b_pitch, int depth) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    a += lane / 8 * 4 * a_pitch;
    b += lane % 8 * b_pitch;
    for (int d = 0; d < depth; d += 4) {
      T right[Columns][2][4];
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
        load<4>(right[c][0], b + c * 16 * b_pitch + d);
        load<4>(right[c][1], b + (c * 16 + 8) * b_pitch + d);
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T left[4];
          load<4>(left, a + (r * 16 + i) * a_pitch + d);
#pragma unroll
          for (int c = 0; c < Columns; ++c) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sums_[r][c][i][0] += left[k] * right[c][0][k];
              sums_[r][c][i][1] += left[k] * right[c][1][k];
            }
          }
        }
      }
    }
  }

  __device__ void store_all(T* patches) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    patches += lane / 8 * 4 * kPatchPitch + lane % 8;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          patches[(r * Columns + c) * kPatchElements + i * kPatchPitch] = sums_[r][c][i][0];
          patches[(r * Columns + c) * kPatchElements + i * kPatchPitch + 8] = sums_[r][c][i][1];
        }
      }
    }
  }

 private:
  T sums_[Rows][Columns][4][2] = {};
};

template <int Rows, int Columns>
class WarpProduct<float, Rows, Columns> : public ExactProduct<float, Rows, Columns> {};
template <int Rows, int Columns>
class WarpProduct<double, Rows, Columns> : public ExactProduct<double, Rows, Columns> {};

// A factor in memory: element (row, depth) is first[row * row_stride + depth * depth_stride].
template <class T>
struct Factor {
  const T* first;
  int64_t row_stride, depth_stride;

  // Whether 16-byte loads along the depth are aligned, whatever the row.
  bool vectors() const {
    return depth_stride == 1 && row_stride % kWidest<T> == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
  }
};

// `threads` threads, this one the `thread`th, bring rows x depth elements to [rows][pitch]; what is beyond `rows_there`
// and `depth_there` becomes zero. Neighbouring threads read neighbours in memory. `vectors` promises aligned 16-byte
// loads and whole vectors.
template <class T>
__device__ void stage(T* to, int pitch, int rows, int depth, const Factor<T>& from, int64_t rows_there,
                      int64_t depth_there, bool vectors) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (vectors) {
    constexpr int kVector = kWidest<T>;
    const int vectors_a_row = depth / kVector;
    for (int i = thread; i < rows * vectors_a_row; i += threads) {
      const int r = i / vectors_a_row, d = i % vectors_a_row * kVector;
      Pack<T, kVector> pack = {};
      if (r < rows_there && d < depth_there) {
        pack = *reinterpret_cast<const Pack<T, kVector>*>(from.first + r * from.row_stride + d);
      }
      *reinterpret_cast<Pack<T, kVector>*>(to + r * pitch + d) = pack;
    }
    return;
  }
  const bool along_depth = from.depth_stride == 1;
  for (int i = thread; i < rows * depth; i += threads) {
    const int r = along_depth ? i / depth : i % rows, d = along_depth ? i % depth : i / rows;
    T value = {};
    if (r < rows_there && d < depth_there) value = from.first[r * from.row_stride + d * from.depth_stride];
    to[r * pitch + d] = value;
  }
}

// The same through a prologue, whose channels begin at `first_channel` and lie along the depth or along the rows, which
// then divide the threads. A thread stays with its channels, and keeps their numbers while it walks over pixels.
template <bool kAlongDepth, class T, class Prologue>
__device__ __forceinline__ void stage(T* to, int pitch, int rows, int depth, const Factor<T>& from, int64_t rows_there,
                                      int64_t depth_there, bool vectors, const Prologue& prologue,
                                      int64_t first_channel) {
  using C = Compute<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if constexpr (!kChanges<Prologue>) {
    stage(to, pitch, rows, depth, from, rows_there, depth_there, vectors);
  } else if constexpr (kAlongDepth) {
    auto walk = [&](auto width) {
      constexpr int N = decltype(width)::value;
      const int of_row = depth / N, step = threads / of_row, d = thread % of_row * N;
      if (thread >= step * of_row) return;
      const bool there = d < depth_there;
      const auto channels = prologue.template channels<N>(first_channel + (there ? d : 0));
      const int first = thread / of_row;
      each_place<N, N == 1 ? 8 : 4, T>(
          (rows - first + step - 1) / step, channels,
          [&](int i) {
            const int r = first + i * step;
            return there && r < rows_there ? from.first + r * from.row_stride + d : nullptr;
          },
          [&](int i, const C(&numbers)[N]) { store<N>(to + (first + i * step) * pitch + d, numbers); });
    };
    if (vectors) {
      walk(std::integral_constant<int, kWidest<T>>{});
    } else {
      walk(std::integral_constant<int, 1>{});
    }
  } else {
    const int r = thread % rows, step = threads / rows;
    const bool there = r < rows_there;
    const auto channels = prologue.template channels<1>(first_channel + (there ? r : 0));
    const int first = thread / rows;
    each_place<1, 8, T>((depth - first + step - 1) / step, channels,
                        [&](int i) {
                          const int d = first + i * step;
                          return there && d < depth_there ? from.first + r * from.row_stride + d * from.depth_stride
                                                          : nullptr;
                        },
                        [&](int i, const C(&number)[1]) { store<1>(to + r * pitch + first + i * step, number); });
  }
}

}  // namespace espk::cuda
