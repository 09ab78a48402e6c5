// Batch norms as a kernel meets them: the affine and PReLU of a map that it reads, and the gradient in front of a norm.
#pragma once

#include "../training.h"
#include "affine_prelu.h"
#include "far_map.h"

namespace espk::ESPK_ISA {

// Hands out pieces of the memory that a kernel's calls share, each aligned to 64 bytes; without memory it only counts.
class Carving {
 public:
  explicit Carving(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class X>
  X* take(int64_t count) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// How much memory the calls of a kernel share: what its Shared<C> carves out of it.
template <template <class> class Shared, class Problem>
int64_t carved_bytes(const Problem& p) {
  return with_type(
      p.type, [&](auto* type) { return Shared<Compute<std::remove_pointer_t<decltype(type)>>>(p, nullptr).bytes; });
}

// Numbers of a vector of channels with room for whole vectors at its end, wherever among the channels they begin.
template <class C>
inline int64_t padded(int64_t channels) {
  return round_up(channels, kLanes<C>) + kLanes<C>;
}

// A float64 vector of channels in the compute type; `otherwise` where there is none, zeros behind its end.
template <class C>
void fill_vector(C* to, const double* from, int64_t channels, C otherwise);

// Calls f(Lanes<N>, Lanes<J>, first channel, valid) for blocks of J vectors of N channels; only the last vector of all may
// have fewer than N valid ones, for the others `valid` is a constant. Few vectors at a time keep their channels' numbers in
// registers over all pixels; float64, which the other types are checked with, goes vector by vector.
template <class C, class F>
inline void for_channel_blocks(int64_t channels, F&& f) {
  constexpr int N = kLanes<C>;
  constexpr std::integral_constant<int64_t, N> all{};
  int64_t first = 0;
  if constexpr (sizeof(C) < 8) {
    for (; first + 4 * N <= channels; first += 4 * N) f(Lanes<N>{}, Lanes<4>{}, first, all);
  }
  for (; first + N <= channels; first += N) f(Lanes<N>{}, Lanes<1>{}, first, all);
  if (first < channels) {
    with_lanes<C>(channels - first, [&](auto lanes) { f(lanes, Lanes<1>{}, first, channels - first); });
  }
}

// Fetches the J vectors of a block's channels some pixels ahead: a block's rows lie apart, which hides from the machine
// that they are read one after the other.
constexpr int64_t kPixelsAhead = 8;
template <int N, int J, class T>
inline void fetch_ahead(const T* at, int64_t pitch) {
#pragma GCC unroll 4
  for (int64_t j = 0; j < J * N * static_cast<int64_t>(sizeof(T)); j += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const char*>(at + kPixelsAhead * pitch) + j);
  }
}

// Stores a vector of a block's channels, past the cache where its map is far.
template <int N, class T, class Valid>
inline void store_rows(T* p, Vector<Compute<T>, N> v, Valid valid, bool far) {
  if constexpr (!std::is_same_v<Valid, int64_t>) {
    if (far) return store_far<N>(p, v);
  }
  store_first<N>(p, v, valid);
}

// Normalise in the compute type; a missing slope is 1.
template <class C>
struct NormaliseVectors {
  C *scale, *shift, *slope;

  NormaliseVectors(int64_t channels, Carving& memory)
      : scale(memory.take<C>(padded<C>(channels))),
        shift(memory.take<C>(padded<C>(channels))),
        slope(memory.take<C>(padded<C>(channels))) {}

  void fill(const Normalise& from, int64_t channels) const {
    fill_vector<C>(scale, from.scale, channels, 1);
    fill_vector<C>(shift, from.shift, channels, 0);
    fill_vector<C>(slope, from.slope, channels, 1);
  }

  template <int N>
  AffinePreluLanes<C, N> at(int64_t channel) const {
    return {load<N>(scale + channel), load<N>(shift + channel), load<N>(slope + channel)};
  }
};

// NormGradient of one vector of channels.
template <class C, int N>
struct NormGradientLanes {
  using V = Vector<C, N>;
  V of_grad, of_map, constant;
  bool has_map;

  V operator()(V grad, V map) const { return has_map ? grad * of_grad + (map * of_map + constant) : grad * of_grad; }
};

// NormGradient in the compute type.
template <class C>
struct NormGradientVectors {
  C *of_grad, *of_map, *constant;
  bool has_map;

  NormGradientVectors(const NormGradient& from, int64_t channels, Carving& memory)
      : of_grad(memory.take<C>(padded<C>(channels))),
        of_map(memory.take<C>(padded<C>(channels))),
        constant(memory.take<C>(padded<C>(channels))),
        has_map(from.of_map) {}

  void fill(const NormGradient& from, int64_t channels) const {
    fill_vector<C>(of_grad, from.of_grad, channels, 1);
    fill_vector<C>(of_map, from.of_map, channels, 0);
    fill_vector<C>(constant, from.constant, channels, 0);
  }

  template <int N>
  NormGradientLanes<C, N> at(int64_t channel) const {
    return {load<N>(of_grad + channel), load<N>(of_map + channel), load<N>(constant + channel), has_map};
  }
};

}  // namespace espk::ESPK_ISA
