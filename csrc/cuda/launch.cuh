// How a kernel starts, and the little that every kernel needs to know about the device.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace espk::cuda {

// Blocks of one launch; a kernel whose work is more goes around again. The tests set this and the next to see each path.
#if !defined(ESPK_GRID_LIMIT)
#define ESPK_GRID_LIMIT 0x7fffffff
#endif

// Below two blocks a multiprocessor, smaller blocks are the faster choice; 108 multiprocessors are an A100. A constant
// and no question to the device: the same shape is the same work on all that have as much shared memory.
#if !defined(ESPK_ENOUGH_BLOCKS)
#define ESPK_ENOUGH_BLOCKS (2 * 108)
#endif
inline int64_t enough_blocks() { return ESPK_ENOUGH_BLOCKS; }

// With at most this much a block, two blocks share a multiprocessor of an A100 (164 KiB), and three one of an H100.
constexpr int64_t kSharedForTwo = 75 * 1024;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What a block of the current device may ask for: 163 KiB on sm_80, 227 on sm_90, 99 on sm_86 and sm_89.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// The block's dynamic shared memory, the only kind used here.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_memory_block[];
  return shared_memory_block;
}

// Starts `blocks` blocks, or as many as a grid can have; none is no launch.
template <class Params>
Outcome launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared, void* stream,
               Params params) {
  if (blocks <= 0) return {};
  if (shared > 48 * 1024) {
    // The most there is, not what this launch asks for: another thread may set the same attribute before it starts.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_memory_limit()));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return {name, cudaGetErrorString(error)};
    }
  }
  void* arguments[] = {&params};
  const dim3 grid{static_cast<unsigned>(least(blocks, ESPK_GRID_LIMIT)), 1, 1};
  cudaLaunchKernel(kernel, grid, dim3{static_cast<unsigned>(threads), 1, 1}, arguments, static_cast<size_t>(shared),
                   static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Outcome{} : Outcome{name, cudaGetErrorString(error)};
}

}  // namespace espk::cuda
