// The EESP unit as its three operators ask for it: all of it, without its reduction, or as a half of a down-sampler.
#pragma once

#include "output.cuh"

namespace espk::cuda {

struct Unit : Eesp {
  // The result may be the channels from `first_channel` on of a map of `whole_channels`.
  int64_t whole_channels, first_channel;
  // The map whose means are the channels before; null where there are none. Its height and width are those of x.
  const void* pooled_map;
  int64_t pooled_channels;

  bool reduces() const { return reduce_weight != nullptr; }
};

// A unit without reduction, shortcut and pooling.
inline Unit unit_of(const PyramidPointwise& p) {
  Unit u{};
  static_cast<PyramidPointwise&>(u) = p;
  u.in_channels = p.channels;
  u.whole_channels = p.pointwise_channels;
  return u;
}

inline Unit unit_of(const Eesp& p) {
  Unit u{};
  static_cast<Eesp&>(u) = p;
  u.whole_channels = p.pointwise_channels;
  return u;
}

inline Shortcut shortcut_of(const Unit& u) {
  return {u.shortcut, strides_of(u.layout, u.shortcut.channels, 1, u.out_height * u.out_width)};
}

// One kernel where a block has room for what it needs; else the reduced map goes through memory, and only where that is
// not enough, as with groups that read several branches, the concatenated map too.
int64_t unit_scratch_bytes(const Unit&);
Outcome run_unit(const Unit&, void* scratch, void* stream);

}  // namespace espk::cuda
