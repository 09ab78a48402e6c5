// Group pointwise convolution of a map that is normalised on the way in, with the moments of its result: what the batch
// norm in front asks of a map and what the one behind asks, in one pass.
// Bytes: M read (once for every 64 outputs of a group) + N written a pixel, and 4 numbers a channel for each part, at most
// 3 in a hundred; multiply-adds: M*N/groups a pixel.
#include "normalised_pointwise.cuh"

namespace espk::cuda {
namespace {

GroupPointwise product_of(const NormalisedPointwise& p) {
  return product_of_pixels(p, p.x, p.in_channels, p.out_channels);
}

int64_t scratch_bytes(const NormalisedPointwise& p) {
  return p.behind->batch_statistics ? pointwise_part_bytes(product_of(p)) : 0;
}

Outcome run(const NormalisedPointwise& p, void* scratch, void* stream) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool moments = p.behind->batch_statistics;
    const LeavesMoments<T> finish{static_cast<T*>(p.out),
                                  moments ? static_cast<PartSums<Compute<T>>*>(scratch) : nullptr};
    return run_with_parts<T>(
        "normalised_pointwise", product_of(p), normalised_by<T>(p.front), finish, stream,
        [&](int64_t parts) { return take_moments(*p.behind, scratch, moments ? parts : 0, stream); });
  });
}

}  // namespace

extern const Kernel<NormalisedPointwise> normalised_pointwise = {scratch_bytes, run};

}  // namespace espk::cuda
