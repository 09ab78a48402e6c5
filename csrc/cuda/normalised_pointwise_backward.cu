// Both gradients of a group pointwise convolution between two batch norms. Each makes the gradient in front of the norm
// behind it where it stages a tile, and each reads the maps for itself: the weights' gradient wants all pixels of few
// channels in a block, the input's all channels of few pixels.
// Bytes: of the weights' 2*N + M read a pixel; of the input's 2*N + M read (+ M of a residual) + M written.
// Multiply-adds: 2*M*N/groups a pixel.
#include "group_pointwise_backward_weight.cuh"
#include "normalised_pointwise.cuh"

namespace espk::cuda {
namespace {

GroupPointwise product_of(const NormalisedPointwiseBackward& p) {
  GroupPointwise g = product_of_pixels(p, p.grad, p.out_channels, p.in_channels);
  g.weight_transposed = true;
  return g;
}

GroupPointwiseBackwardWeight weight_of(const NormalisedPointwiseBackward& p) {
  return {p.type, Layout::channels_last, 1,     p.pixels, p.in_channels, p.out_channels, p.groups, p.grad,
          p.x,    p.grad_weight,         p.tf32};
}

// The two gradients use the same memory one after the other.
int64_t scratch_bytes(const NormalisedPointwiseBackward& p) {
  return most(p.grad_weight ? pointwise_weight_scratch_bytes(weight_of(p)) : 0,
              p.grad_x && p.front ? pointwise_part_bytes(product_of(p)) : 0);
}

Outcome run(const NormalisedPointwiseBackward& p, void* scratch, void* stream) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ThroughNorm<T> through = through_norm<T>(*p.behind, p.grad, p.out);
    const Normalised<T> normalised = normalised_by<T>(p.front);
    if (p.grad_weight) {
      const Outcome outcome = run_pointwise_weight<T>(weight_of(p), through, normalised, scratch, stream);
      if (outcome.failed()) return outcome;
    }
    if (!p.grad_x) return Outcome{};
    const LeavesGradients<T> finish{static_cast<T*>(p.grad_x),
                                    p.front ? static_cast<PartSums<Compute<T>>*>(scratch) : nullptr,
                                    static_cast<const T*>(p.x),
                                    static_cast<const T*>(p.residual),
                                    normalised,
                                    p.front ? p.front->mean : nullptr};
    return run_with_parts<T>(
        "normalised_pointwise_backward", product_of(p), through, finish, stream,
        [&](int64_t parts) { return p.front ? take_gradients(*p.front, scratch, parts, stream) : Outcome{}; });
  });
}

}  // namespace

extern const Kernel<NormalisedPointwiseBackward> normalised_pointwise_backward = {scratch_bytes, run};

}  // namespace espk::cuda
