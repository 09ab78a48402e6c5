// The whole EESP unit for inference, in one kernel where the reduced map with its halo fits in shared memory: unit.cuh.
// Bytes: M read (the halo again) + N written a pixel (+ N for a residual), and 2*d where the reduced map goes through
// memory; multiply-adds: M*d/reduce_groups + 9*K*d + K*d*N/groups a pixel.
#include "unit.h"

namespace espk::cuda {
namespace {

int64_t scratch_bytes(const Eesp& p) { return unit_scratch_bytes(unit_of(p)); }

Outcome run(const Eesp& p, void* scratch, void* stream) { return run_unit(unit_of(p), scratch, stream); }

}  // namespace

extern const Kernel<Eesp> eesp = {scratch_bytes, run};

}  // namespace espk::cuda
