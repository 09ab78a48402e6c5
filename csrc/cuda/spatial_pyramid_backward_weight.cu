// Gradient of the spatial pyramid's weight, of maps as they are.
#include "spatial_pyramid_backward_weight.cuh"

namespace espk::cuda {
namespace {

int64_t scratch_bytes(const SpatialPyramidBackwardWeight& p) { return pyramid_weight_scratch_bytes(p, true); }

Outcome run(const SpatialPyramidBackwardWeight& p, void* scratch, void* stream) {
  auto as_it_is = [](auto*) { return AsItIs{}; };
  return run_pyramid_weight(p, true, as_it_is, as_it_is, scratch, stream);
}

}  // namespace

extern const Kernel<SpatialPyramidBackwardWeight> spatial_pyramid_backward_weight = {scratch_bytes, run};

}  // namespace espk::cuda
