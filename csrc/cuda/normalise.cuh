// What a kernel does to a map on its way in: nothing, a batch norm with its PReLU, or the gradient through a batch norm.
//
// Each has channels<N>(first): what a thread keeps of N neighbouring channels, aligned to them, while it walks over
// pixels. That turns numbers which were read at `at` into those that the kernel works with. vectors() allows 16-byte loads.
#pragma once

#include "elements.cuh"
#include "launch.cuh"

namespace espk::cuda {

struct AsItIs {
  template <int N>
  struct Channels {
    template <class C, class T>
    __device__ __forceinline__ void operator()(C (&)[N], const T*) const {}
  };

  template <int N>
  __device__ __forceinline__ Channels<N> channels(int64_t) const {
    return {};
  }
  bool vectors() const { return true; }
};

template <class Prologue>
constexpr bool kChanges = !std::is_same_v<Prologue, AsItIs>;

// The numbers of a batch norm for N channels.
template <class C, int N>
struct NormChannels {
  C scale[N], shift[N], slope[N];

  __device__ __forceinline__ C before_prelu(int i, C value) const { return value * scale[i] + shift[i]; }
  __device__ __forceinline__ C prelu(int i, C value) const { return value > 0 ? value : value * slope[i]; }
};

// prelu(value * scale + shift); without scale the map is read as it is.
template <class T>
struct Normalised {
  using C = Compute<T>;
  const C *scale, *shift, *slope;

  template <int N>
  struct Channels : NormChannels<C, N> {
    bool given;

    __device__ __forceinline__ void operator()(C (&values)[N], const T*) const {
      if (!given) return;
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = this->prelu(i, this->before_prelu(i, values[i]));
    }
  };

  template <int N>
  __device__ __forceinline__ Channels<N> channels(int64_t first) const {
    Channels<N> c{};
    c.given = scale;
    if (scale) {
      load<N>(c.scale, scale + first);
      load<N>(c.shift, shift + first);
      load<N>(c.slope, slope + first);
    }
    return c;
  }
  bool vectors() const { return true; }
};

template <class T>
Normalised<T> normalised_by(const BatchNorm* norm) {
  using C = Compute<T>;
  if (!norm) return {};
  return {static_cast<const C*>(norm->scale), static_cast<const C*>(norm->shift), static_cast<const C*>(norm->prelu)};
}

// grad * of_grad + map * of_map + constant, where `map` is the norm's input, laid out like the gradient behind it. Without
// of_map the moments were not the batch's, and the map is not looked at.
template <class T>
struct ThroughNorm {
  using C = Compute<T>;
  const C *of_grad, *of_map, *constant;
  const T *grad, *map;

  template <int N>
  struct Channels {
    C of_grad[N], of_map[N], constant[N];
    const T *grad, *map;

    __device__ __forceinline__ void operator()(C (&values)[N], const T* at) const {
      if (!map) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] *= of_grad[i];
        return;
      }
      C numbers[N];
      load<N>(numbers, map + (at - grad));
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = values[i] * of_grad[i] + (numbers[i] * of_map[i] + constant[i]);
    }
  };

  template <int N>
  __device__ __forceinline__ Channels<N> channels(int64_t first) const {
    Channels<N> c{};
    c.grad = grad;
    load<N>(c.of_grad, of_grad + first);
    if (of_map) {
      c.map = map;
      load<N>(c.of_map, of_map + first);
      load<N>(c.constant, constant + first);
    }
    return c;
  }
  bool vectors() const { return !of_map || aligned(map, 16); }
};

template <class T>
ThroughNorm<T> through_norm(const BatchNorm& norm, const void* grad, const void* map) {
  using C = Compute<T>;
  const bool whole = norm.batch_statistics;
  return {static_cast<const C*>(norm.of_grad), whole ? static_cast<const C*>(norm.of_map) : nullptr,
          static_cast<const C*>(norm.constant), static_cast<const T*>(grad), static_cast<const T*>(map)};
}

}  // namespace espk::cuda
