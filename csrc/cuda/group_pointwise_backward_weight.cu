// Gradient of the group pointwise convolution's weight, of maps as they are.
#include "group_pointwise_backward_weight.cuh"

namespace espk::cuda {
namespace {

Outcome run(const GroupPointwiseBackwardWeight& p, void* scratch, void* stream) {
  return with_factor_type(p.type, p.tf32, [&](auto* type) {
    return run_pointwise_weight<std::remove_pointer_t<decltype(type)>>(p, AsItIs{}, AsItIs{}, scratch, stream);
  });
}

}  // namespace

extern const Kernel<GroupPointwiseBackwardWeight> group_pointwise_backward_weight = {pointwise_weight_scratch_bytes,
                                                                                     run};

}  // namespace espk::cuda
