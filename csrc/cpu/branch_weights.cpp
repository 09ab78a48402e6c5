#include "branch_weights.h"

namespace espk::ESPK_ISA {

void prepare_branch_weights(const Pyramid& p, const void* weight, void* shared) {
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
