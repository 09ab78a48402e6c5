// The whole down-sampler for inference: the strided unit, its average pooling and the long-range shortcut in the kernel
// of unit.cuh. Concatenation is where each half writes.
// Bytes: four pixels of M read (the halo again) + M + N written a pixel of the result, and a few for the image;
// multiply-adds: those of the unit + 9*M + (M + N)*3.
#include "unit.h"

namespace espk::cuda {
namespace {

Unit unit_of_half(const DownSampler& p) {
  Unit u = unit_of(static_cast<const Eesp&>(p));
  u.whole_channels = p.in_channels + p.pointwise_channels;
  u.first_channel = p.in_channels;
  u.epilogue.slope = p.slope;
  u.pooled_map = p.x;
  u.pooled_channels = p.in_channels;
  return u;
}

int64_t scratch_bytes(const DownSampler& p) { return unit_scratch_bytes(unit_of_half(p)); }

Outcome run(const DownSampler& p, void* scratch, void* stream) { return run_unit(unit_of_half(p), scratch, stream); }

}  // namespace

extern const Kernel<DownSampler> down_sampler = {scratch_bytes, run};

}  // namespace espk::cuda
