// The branch weights [K, d, 3, 3] in the compute type and in the order in which the taps read them:
// contiguous [d][9 K]; channels_last [blocks][9 K][N], N lanes a block (the last block as many as hold its channels).
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

template <class C>
class BranchWeights {
 public:
  BranchWeights(const Pyramid& p, const void* shared) : taps_(9 * p.branches), data_(static_cast<const C*>(shared)) {}

  const C* of_channel(int64_t channel) const { return data_ + channel * taps_; }
  const C* of_block(int64_t block) const { return data_ + block * taps_ * kLanes<C>; }

 private:
  int64_t taps_;
  const C* data_;
};

inline int64_t branch_weight_bytes(const Pyramid& p) { return 9 * p.branches * round_up(p.channels, 16) * 8; }

inline void prepare_branch_weights(const Pyramid& p, const void* weight, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const T* from = static_cast<const T*>(weight);
    C* to = static_cast<C*>(shared);
    const int64_t taps = 9 * p.branches;
    auto weight_of = [&](int64_t channel, int64_t tap) {
      return load_one(from + (tap / 9 * p.channels + channel) * 9 + tap % 9);
    };
    if (p.layout == Layout::contiguous) {
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t t = 0; t < taps; ++t) *to++ = weight_of(c, t);
      }
      return;
    }
    for (int64_t first = 0; first < p.channels; first += kLanes<C>) {
      const int64_t channels = least(kLanes<C>, p.channels - first);
      with_lanes<C>(channels, [&](auto lanes) {
        constexpr int N = decltype(lanes)::value;
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t c = 0; c < N; ++c) *to++ = c < channels ? weight_of(first + c, t) : C(0);
        }
      });
    }
  });
}

}  // namespace espk::ESPK_ISA
