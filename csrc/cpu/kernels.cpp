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
extern const Kernel<Convolution> convolution;
extern const Kernel<AveragePool> average_pool;
extern const Kernel<GlobalAverage> global_average;
extern const Kernel<Resize> resize;
extern const Kernel<AdaptiveAverage> adaptive_average;
extern const Kernel<EnlargedBranch> enlarged_branch;
extern const Kernel<GroupedConvolution> grouped_convolution;
extern const Kernel<ResizedArgmax> resized_argmax;
extern const Kernel<Affine> affine;
extern const Kernel<ChangeLayout> change_layout;

extern const Kernels kernels = {
    spatial_pyramid,
    spatial_pyramid_backward_input,
    spatial_pyramid_backward_weight,
    group_pointwise,
    group_pointwise_backward_weight,
    pyramid_pointwise,
    convolution,
    average_pool,
    global_average,
    resize,
    adaptive_average,
    enlarged_branch,
    grouped_convolution,
    resized_argmax,
    affine,
    change_layout,
};

}  // namespace espk::ESPK_ISA
