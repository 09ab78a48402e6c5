#include "branch_weights.h"

namespace espk::ESPK_ISA {

void prepare_branch_weights(const Pyramid& p, const void* weight, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const T* from = static_cast<const T*>(weight);
    C* to = static_cast<C*>(shared);
    // f(the first channel's weight of a tap); a channel's taps lie side by side.
    auto for_tap_weights = [&](int64_t channel, auto&& f) {
      for (int64_t k = 0; k < p.branches; ++k) {
        for (int64_t tap = 0; tap < 9; ++tap) f(from + (k * p.channels + channel) * 9 + tap);
      }
    };
    if (p.layout == Layout::contiguous) {
      for (int64_t c = 0; c < p.channels; ++c) for_tap_weights(c, [&](const T* at) { *to++ = load_one(at); });
      return;
    }
    for (int64_t first = 0; first < p.channels; first += kLanes<C>) {
      const int64_t channels = least(kLanes<C>, p.channels - first);
      with_lanes<C>(channels, [&](auto lanes) {
        constexpr int N = decltype(lanes)::value;
        for_tap_weights(first, [&](const T* at) {
          for (int64_t c = 0; c < N; ++c) *to++ = c < channels ? load_one(at + c * 9) : C(0);
        });
      });
    }
  });
}

}  // namespace espk::ESPK_ISA
