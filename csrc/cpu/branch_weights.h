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

void prepare_branch_weights(const Pyramid& p, const void* weight, void* shared);

}  // namespace espk::ESPK_ISA
