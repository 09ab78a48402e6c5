// The EESP unit in one kernel, over a rectangle of its result: the reduced map with the halo of the largest dilation in
// shared memory, hierarchical feature fusion in registers, the concatenated map a branch at a time as the factor of a
// matrix product, residual, shortcut and PReLU on the way out. Neither the reduced nor the concatenated map reaches
// memory.
//
// Group k*m+j of the expansion must read channels of branch k alone, as it does where the groups are a multiple of K.
#pragma once

#include "output.cuh"
#include "pyramid.cuh"

namespace espk::cuda {

// Threads of a block and blocks of a multiprocessor, which bound the registers: 128 a thread where 512 threads are to
// be there. A thread carries the sums of up to kCarried pixels of four channels from branch to branch.
constexpr int kCarried = 8, kCarriedChannels = 4;

template <int Threads, int Blocks>
struct UnitTraits {
  static constexpr int threads = Threads, warps = Threads / 32, blocks = Blocks;
};

// A warp's share of the expansion is one row of fragments by two; the columns staged at a time are the next.
constexpr int kUnitColumns = 2;

// Shared memory of a block, offsets in bytes. The reduction's factors lie where the expansion's come after it.
struct UnitMemory {
  int64_t branch_weights, concatenated, expand_weight, patches, centers, reduce_weight, total;
};

// The pooled half of a down-sampler: the means of `map`, finished and written in front of the unit's half.
template <class T>
struct Pooling {
  const T* map;  // null where there is none
  Strides strides;
  int64_t channels;
  Output<T> out;
};

template <class T>
struct UnitParams {
  const T* x;  // the map to reduce, or the reduced map where there is no weight to do so
  const T* reduce_weight;  // [d, M / reduce_groups]
  const T* weight;
  const T* expand_weight;
  Epilogue reduce, pyramid;
  Output<T> out;
  Pooling<T> pooling;
  PyramidShape shape;
  Strides source;  // of x
  Window window;  // the reduced map, [pixel][channels], its pitch padded
  UnitMemory memory;
  int64_t in_channels, reduce_groups, outputs, depth;  // outputs and inputs of one group of the expansion
  int groups_a_branch, padded, staged_outputs;  // channels of a pixel with padding; outputs staged at a time
  bool vector_fill, vector_reduce, vector_expand;
};

// The reduced map: a group pointwise convolution of every pixel of the window that lies in the map, zero elsewhere.
template <class T, class Traits>
__device__ void reduce_window(const UnitParams<T>& p, int64_t image, int64_t top, int64_t left, T* window,
                              unsigned char* memory) {
  using C = Compute<T>;
  constexpr int kPitch = kDepth<T> + kPad<T>, kPixels = 16 * Traits::warps, kOutputs = 32;
  const PyramidShape& s = p.shape;
  T* x = reinterpret_cast<T*>(memory);
  T* weight = reinterpret_cast<T*>(memory + p.memory.reduce_weight);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  C* patches = reinterpret_cast<C*>(shared_memory() + p.memory.patches) + warp * 2 * kPatchElements;
  const int64_t inputs = p.in_channels / p.reduce_groups, outputs = s.channels / p.reduce_groups;
  const int pixels = p.window.rows * p.window.columns;
  const T* map = p.x + image * p.source.image;

  // What pads the channels of a pixel is zero, as are their weights.
  const int padding = p.padded - static_cast<int>(s.channels);
  for (int i = threadIdx.x; i < pixels * padding; i += Traits::threads) {
    window[i / padding * p.window.column_step + s.channels + i % padding] = narrow<T>(C(0));
  }
  for (int first = 0; first < pixels; first += kPixels) {
    for (int64_t group = 0; group < p.reduce_groups; ++group) {
      for (int64_t n = 0; n < outputs; n += kOutputs) {
        WarpProduct<T, 1, 2> product;
        for (int64_t d = 0; d < inputs; d += kDepth<T>) {
          const int64_t there = least(kDepth<T>, inputs - d);
          const int depth = static_cast<int>(round_up(there, 16));
          const int vector = p.vector_reduce ? kWidest<T> : 1, vectors = depth / vector;
          __syncthreads();
          for (int i = threadIdx.x; i < kPixels * vectors; i += Traits::threads) {
            // Neighbouring threads read neighbours in memory.
            const int pixel = s.channels_last ? i / vectors : i % kPixels;
            const int c = (s.channels_last ? i % vectors : i / kPixels) * vector;
            const int64_t y = top + (first + pixel) / p.window.columns, z = left + (first + pixel) % p.window.columns;
            const bool inside = first + pixel < pixels && y >= 0 && y < s.height && z >= 0 && z < s.width && c < there;
            const T* from = map + y * p.source.row + z * p.source.column + (group * inputs + d + c) * p.source.channel;
            T* to = x + pixel * kPitch + c;
            if (p.vector_reduce) {
              using Vector = Pack<T, kWidest<T>>;
              *reinterpret_cast<Vector*>(to) = inside ? *reinterpret_cast<const Vector*>(from) : Vector{};
            } else {
              *to = inside ? *from : narrow<T>(C(0));
            }
          }
          const Factor<T> factor{p.reduce_weight + (group * outputs + n) * inputs + d, inputs, 1};
          stage(weight, kPitch, kOutputs, depth, factor, outputs - n, there, false);
          __syncthreads();
          product.add(x + warp * 16 * kPitch, kPitch, weight, kPitch, depth);
        }
        product.store_all(patches);
        __syncwarp();
        auto write = [&](int i) {
          const int pixel = first + warp * 16 + i / kOutputs, c = i % kOutputs;
          if (pixel >= pixels || n + c >= outputs) return;
          const int64_t y = top + pixel / p.window.columns, z = left + pixel % p.window.columns;
          const bool inside = y >= 0 && y < s.height && z >= 0 && z < s.width;
          const int64_t channel = group * outputs + n + c;
          const C value = patches[c / 16 * kPatchElements + i / kOutputs * kPatchPitch + c % 16];
          window[pixel * p.window.column_step + channel] =
              narrow<T>(inside ? channel_epilogue(p.reduce, channel, value) : C(0));
        };
        // One at a time where several spill registers beside the fragments (sm_80).
        if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll 1
          for (int i = lane; i < 16 * kOutputs; i += 32) write(i);
        } else {
          for (int i = lane; i < 16 * kOutputs; i += 32) write(i);
        }
        __syncwarp();
      }
    }
  }
}

// For the pixels of one block: 3x3 means in steps of 2, zeros of the padding counted.
template <class T>
__device__ void pool_rectangle(const Pooling<T>& p, const PyramidShape& s, const Place& place) {
  using C = Compute<T>;
  const int pixels = s.cut.rows * s.cut.columns;
  for (int64_t i = threadIdx.x; i < p.channels * pixels; i += blockDim.x) {
    const int64_t channel = s.channels_last ? i % p.channels : i / pixels;
    const int pixel = static_cast<int>(s.channels_last ? i / p.channels : i % pixels);
    const int64_t y = place.row + pixel / s.cut.columns, z = place.column + pixel % s.cut.columns;
    if (y >= s.out_height || z >= s.out_width) continue;
    const T* from = p.map + place.image * p.strides.image + channel * p.strides.channel;
    C sum = 0;
    for (int64_t row = most(2 * y - 1, 0); row < least(2 * y + 2, s.height); ++row) {
      for (int64_t column = most(2 * z - 1, 0); column < least(2 * z + 2, s.width); ++column) {
        sum += widen(from[row * p.strides.row + column * p.strides.column]);
      }
    }
    const int64_t to = y * s.out_width + z;
    p.out.out[place.image * p.out.image_stride + to * p.out.pixel_stride + channel * p.out.channel_stride] =
        narrow<T>(finished(p.out, place.image, to, channel, sum / 9, C(0)));
  }
}

// Weights [9][channels] of branch k with the affine and slope of its outputs behind them; the identity for padding.
template <class T>
__device__ void load_unit_branch(Compute<T>* to, const UnitParams<T>& p, int k) {
  using C = Compute<T>;
  const PyramidShape& s = p.shape;
  auto number = [](const void* vector, int64_t i, C otherwise) {
    return vector ? static_cast<const C*>(vector)[i] : otherwise;
  };
  for (int i = threadIdx.x; i < 12 * p.padded; i += static_cast<int>(blockDim.x)) {
    const int what = i / p.padded, channel = i % p.padded;
    const int64_t whole = k * s.channels + channel;
    const bool there = channel < s.channels;
    if (what < 9) to[i] = there ? widen(p.weight[whole * 9 + what]) : C(0);
    if (what == 9) to[i] = there ? number(p.pyramid.scale, whole, C(1)) : C(1);
    if (what == 10) to[i] = there ? number(p.pyramid.shift, whole, C(0)) : C(0);
    if (what == 11) to[i] = there ? number(p.pyramid.slope, whole, C(1)) : C(1);
  }
}

// What a thread does of every branch: four channels, so that it reads their weights once, of every `step`th pixel.
struct BranchShare {
  int channel, first_pixel, step, pixels, pitch;  // pixels of the block; pitch of the concatenated map
};

// Branch k is added to what the branches before it left in `carried`; affine and PReLU of that are its part of the
// concatenated map. Tap by tap over all pixels: four weights in registers at a time instead of 36.
template <class T>
__device__ __forceinline__ void fuse_branch(const UnitParams<T>& p, int k, const BranchShare share, const T* window,
                                            const int* centers, const Compute<T>* branch,
                                            Compute<T> (&carried)[kCarried][kCarriedChannels], T* concatenated) {
  using C = Compute<T>;
  constexpr int kVector = kCarriedChannels;
  const PyramidShape& s = p.shape;
  const bool tall = s.dilations[k] < s.height, wide = s.dilations[k] < s.width;
  const int d = tall || wide ? static_cast<int>(s.dilations[k]) : 0;
  int center[kCarried];  // pixels that are none look at the first
#pragma unroll
  for (int i = 0; i < kCarried; ++i) {
    const int pixel = share.first_pixel + i * share.step;
    center[i] = centers[pixel < share.pixels ? pixel : 0];
  }
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const int up = tap / 3 - 1, along = tap % 3 - 1;
    if ((up != 0 && !tall) || (along != 0 && !wide)) continue;
    const T* from = window + up * d * p.window.row_step + along * d * p.window.column_step + share.channel;
    C w[kVector];
    load<kVector>(w, branch + tap * p.padded + share.channel);
#pragma unroll
    for (int i = 0; i < kCarried; ++i) {
      C values[kVector];
      load<kVector>(values, from + center[i]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) carried[i][v] += w[v] * values[v];
    }
  }
  C scale[kVector], shift[kVector], slope[kVector];
  load<kVector>(scale, branch + 9 * p.padded + share.channel);
  load<kVector>(shift, branch + 10 * p.padded + share.channel);
  load<kVector>(slope, branch + 11 * p.padded + share.channel);
#pragma unroll
  for (int i = 0; i < kCarried; ++i) {
    C results[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const C value = carried[i][v] * scale[v] + shift[v];
      results[v] = value <= 0 ? value * slope[v] : value;
      if (!s.hff) carried[i][v] = 0;
    }
    const int pixel = share.first_pixel + i * share.step;
    if (pixel < share.pixels) store<kVector>(concatenated + pixel * share.pitch + share.channel, results);
  }
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks) unit_kernel(const UnitParams<T> p) {
  using C = Compute<T>;
  const PyramidShape& s = p.shape;
  unsigned char* memory = shared_memory();
  T* window = reinterpret_cast<T*>(memory);
  C* branch = reinterpret_cast<C*>(memory + p.memory.branch_weights);
  T* concatenated = reinterpret_cast<T*>(memory + p.memory.concatenated);
  T* expand = reinterpret_cast<T*>(memory + p.memory.expand_weight);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  C* patches = reinterpret_cast<C*>(memory + p.memory.patches) + warp * kUnitColumns * kPatchElements;

  const int pixels = s.cut.rows * s.cut.columns, pitch = p.padded + kPad<T>;
  const int vectors = p.padded / kCarriedChannels;
  const BranchShare share{thread % vectors * kCarriedChannels, thread / vectors, Traits::threads / vectors, pixels,
                          pitch};
  const int depth = static_cast<int>(round_up(p.depth, 16)), expand_pitch = depth + kPad<T>;

  // Where each pixel's own tap lies in the window: looked up, since eight of them in registers would cost more.
  int* centers = reinterpret_cast<int*>(memory + p.memory.centers);
  for (int pixel = thread; pixel < pixels; pixel += Traits::threads) {
    const int stride = static_cast<int>(s.stride);
    centers[pixel] = (pixel / s.cut.columns * stride + s.halo_rows) * p.window.row_step +
                     (pixel % s.cut.columns * stride + s.halo_columns) * p.window.column_step;
  }

  for (int64_t block = blockIdx.x; block < s.blocks; block += gridDim.x) {
    const Place place(s.cut, block);
    const int64_t top = place.row * s.stride - s.halo_rows, left = place.column * s.stride - s.halo_columns;
    __syncthreads();
    if (p.reduce_weight) {
      reduce_window<T, Traits>(p, place.image, top, left, window, memory + p.memory.branch_weights);
    } else {
      const MapView<T> map{p.x + place.image * s.in.image, s.in, s.height, s.width, static_cast<int>(s.channels)};
      fill_window<Fill::replace>(window, p.window, map, top, left, p.vector_fill);
    }
    if (p.pooling.map) pool_rectangle(p.pooling, s, place);

    C carried[kCarried][kCarriedChannels] = {};
    for (int k = 0; k < s.branches; ++k) {
      __syncthreads();
      load_unit_branch(branch, p, k);
      __syncthreads();
      if (share.first_pixel < share.step) fuse_branch(p, k, share, window, centers, branch, carried, concatenated);
      for (int j = 0; j < p.groups_a_branch; ++j) {
        const int64_t group = int64_t{k} * p.groups_a_branch + j;
        for (int64_t n = 0; n < p.outputs; n += p.staged_outputs) {
          const Factor<T> factor{p.expand_weight + (group * p.outputs + n) * p.depth, p.depth, 1};
          __syncthreads();
          stage(expand, expand_pitch, p.staged_outputs, depth, factor, p.outputs - n, p.depth, p.vector_expand);
          __syncthreads();
          const int shares = p.staged_outputs / (16 * kUnitColumns);
          for (int share = warp; share < (pixels + 15) / 16 * shares; share += Traits::warps) {
            const int row = share / shares * 16, column = share % shares * 16 * kUnitColumns;
            if (n + column >= p.outputs) continue;
            WarpProduct<T, 1, kUnitColumns> product;
            product.add(concatenated + row * pitch + j * static_cast<int>(p.depth), pitch,
                        expand + column * expand_pitch, expand_pitch, depth);
            __syncwarp();
            product.store_all(patches);
            __syncwarp();
#pragma unroll 1
            for (int i = 0; i < kUnitColumns; ++i) {
              const int64_t at = n + column + i * 16;
              write_patch(patches + i * kPatchElements, p.out, place.image, group * p.outputs + at, p.outputs - at,
                          [&](int r) {
                            const int64_t y = place.row + (row + r) / s.cut.columns;
                            const int64_t z = place.column + (row + r) % s.cut.columns;
                            const bool there = row + r < pixels && y < s.out_height && z < s.out_width;
                            return there ? y * s.out_width + z : int64_t{-1};
                          });
            }
            __syncwarp();  // lanes leave a narrow patch early, and the next product is the whole warp's
          }
        }
      }
    }
  }
}

// The pooled half alone, where the unit is not one kernel.
template <class T>
struct PoolParams {
  Pooling<T> pooling;
  PyramidShape shape;
};

template <class T>
__global__ void __launch_bounds__(256, 2) pool_kernel(const PoolParams<T> p) {
  for (int64_t block = blockIdx.x; block < p.shape.blocks; block += gridDim.x) {
    pool_rectangle(p.pooling, p.shape, Place(p.shape.cut, block));
  }
}

}  // namespace espk::cuda
