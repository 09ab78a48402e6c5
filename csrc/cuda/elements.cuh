// The element types on the device: how each is widened to the type of its sums and narrowed back, and several of them
// as one aligned load or store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../shapes.h"

namespace espk::cuda {

// A float32 whose products the tensor cores may take with eleven digits of each factor. In memory a float.
struct Tf32 {
  float value;
};

// What an element is in memory.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Tf32 value) { return value.value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T narrow(Compute<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, Tf32>) {
    return {value};
  } else {
    return value;
  }
}

template <class T, int Count>
struct alignas(sizeof(T) * Count < 16 ? sizeof(T) * Count : 16) Pack {
  T at[Count];
};

// How many elements 16 bytes hold, the widest load and store there is.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <int Count, class T>
__device__ __forceinline__ void load(Compute<T> (&to)[Count], const T* from) {
  const Pack<Stored<T>, Count> pack = *reinterpret_cast<const Pack<Stored<T>, Count>*>(from);
#pragma unroll
  for (int i = 0; i < Count; ++i) to[i] = widen(pack.at[i]);
}

template <int Count, class T>
__device__ __forceinline__ void store(T* to, const Compute<T> (&from)[Count]) {
  Pack<Stored<T>, Count> pack;
#pragma unroll
  for (int i = 0; i < Count; ++i) pack.at[i] = narrow<Stored<T>>(from[i]);
  *reinterpret_cast<Pack<Stored<T>, Count>*>(to) = pack;
}

// Calls f with a null pointer to the element type on the device.
template <class F>
auto with_type(Type type, F&& f) {
  switch (type) {
    case Type::float64: return f(static_cast<double*>(nullptr));
    case Type::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Type::float16: return f(static_cast<__half*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

// The same for the factors of a matrix product.
template <class F>
auto with_factor_type(Type type, bool tf32, F&& f) {
  return type == Type::float32 && tf32 ? f(static_cast<Tf32*>(nullptr)) : with_type(type, f);
}

}  // namespace espk::cuda
