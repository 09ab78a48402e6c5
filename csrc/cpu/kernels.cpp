// The table of one instruction set.
#include "kernels.h"

#include "vector.h"

namespace espk::ESPK_ISA {

extern const Kernel<SpatialPyramid> spatial_pyramid;
extern const Kernel<SpatialPyramidBackwardInput> spatial_pyramid_backward_input;
extern const Kernel<SpatialPyramidBackwardWeight> spatial_pyramid_backward_weight;
extern const Kernel<GroupPointwise> group_pointwise;
extern const Kernel<GroupPointwiseBackwardWeight> group_pointwise_backward_weight;
extern const Kernel<PyramidPointwise> pyramid_pointwise;

extern const Kernels kernels = {
    spatial_pyramid, spatial_pyramid_backward_input,  spatial_pyramid_backward_weight,
    group_pointwise, group_pointwise_backward_weight, pyramid_pointwise,
};

}  // namespace espk::ESPK_ISA
