// What a kernel does to a map on its way in: nothing, a batch norm with its PReLU, or the gradient through a batch norm.
//
// Each has channels<N>(first): what a thread keeps of N neighbouring channels, aligned to them, while it walks over
// pixels. That turns numbers which were read at `at` into those that the kernel works with, by the help of what
// beside(at) has read. vectors() allows 16-byte loads.
#pragma once

#include "elements.cuh"
#include "launch.cuh"

namespace espk::cuda {

struct Nothing {};

struct AsItIs {
  template <int N>
  struct Channels {
    template <class T>
    __device__ __forceinline__ Nothing beside(const T*) const {
      return {};
    }
    template <class C>
    __device__ __forceinline__ void operator()(C (&)[N], Nothing) const {}
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

    __device__ __forceinline__ Nothing beside(const T*) const { return {}; }
    __device__ __forceinline__ void operator()(C (&values)[N], Nothing) const {
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

    __device__ __forceinline__ Pack<T, N> beside(const T* at) const {
      if (!map) return {};
      return *reinterpret_cast<const Pack<T, N>*>(map + (at - grad));
    }
    __device__ __forceinline__ void operator()(C (&values)[N], const Pack<T, N>& numbers) const {
      if (!map) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] *= of_grad[i];
        return;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = values[i] * of_grad[i] + (widen(numbers.at[i]) * of_map[i] + constant[i]);
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

template <int N, class T, class Channels>
__device__ __forceinline__ void load_through(Compute<T> (&to)[N], const T* at, const Channels& channels) {
  load<N>(to, at);
  channels(to, channels.beside(at));
}

// N channels of places 0..count, `Together` at a time so that their loads are under way together: put(i, numbers) gets
// those of place i, which lie at the address at(i), or zeros where that is null.
template <int N, int Together, class T, class Channels, class At, class Put>
__device__ __forceinline__ void each_place(int count, const Channels& channels, At at, Put put) {
  using Beside = decltype(channels.beside(static_cast<const T*>(nullptr)));
  constexpr int kTogether = std::is_same_v<Beside, Nothing> || N == 1 ? Together : Together / 2;
  for (int first = 0; first < count; first += kTogether) {
    Pack<T, N> values[kTogether];
    Beside beside[kTogether];
    bool inside[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const T* from = first + i < count ? at(first + i) : nullptr;
      inside[i] = from;
      if (!from) continue;
      values[i] = *reinterpret_cast<const Pack<T, N>*>(from);
      beside[i] = channels.beside(from);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= count) continue;
      Compute<T> numbers[N] = {};
      if (inside[i]) {
#pragma unroll
        for (int v = 0; v < N; ++v) numbers[v] = widen(values[i].at[v]);
        channels(numbers, beside[i]);
      }
      put(first + i, numbers);
    }
  }
}

}  // namespace espk::cuda
