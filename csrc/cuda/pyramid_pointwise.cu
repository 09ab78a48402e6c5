// The EESP unit after its reduction, in one kernel: see unit.cuh.
// Bytes: d read (the halo again) + N written a pixel (+ N for a residual); multiply-adds: 9*K*d + K*d*N/groups a pixel.
#include "unit.h"

namespace espk::cuda {
namespace {

int64_t scratch_bytes(const PyramidPointwise& p) { return unit_scratch_bytes(unit_of(p)); }

Outcome run(const PyramidPointwise& p, void* scratch, void* stream) { return run_unit(unit_of(p), scratch, stream); }

}  // namespace

extern const Kernel<PyramidPointwise> pyramid_pointwise = {scratch_bytes, run};

}  // namespace espk::cuda
