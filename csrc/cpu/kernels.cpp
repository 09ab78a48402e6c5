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
extern const Kernel<Eesp> eesp;
extern const Kernel<Convolution> convolution;
extern const Kernel<AveragePool> average_pool;
extern const Kernel<GlobalAverage> global_average;
extern const Kernel<Resize> resize;
extern const Kernel<AdaptiveAverage> adaptive_average;
extern const Kernel<GroupedConvolution> grouped_convolution;
extern const Kernel<SpatialPyramid> depthwise;
extern const Kernel<PyramidPooling> pyramid_pooling;
extern const Kernel<ResizedArgmax> resized_argmax;
extern const Kernel<Affine> affine;
extern const Kernel<ChangeLayout> change_layout;
extern const Kernel<Concatenate> concatenate;
extern const Kernel<NormalisedPointwise> normalised_pointwise;
extern const Kernel<NormalisedPointwiseBackward> normalised_pointwise_backward;
extern const Kernel<SpatialPyramid> normalised_pyramid;
extern const Kernel<NormalisedPyramidBackward> normalised_pyramid_backward;
extern const Kernel<NormalisedOutput> normalised_output;
extern const Kernel<NormalisedOutputBackward> normalised_output_backward;
extern const Kernel<MapMoments> map_moments;
extern const Kernel<BatchNormBackward> batch_norm_backward;
extern const Kernel<ConvolutionBackwardWeight> convolution_backward_weight;
extern const Kernel<GroupedConvolutionBackwardWeight> grouped_convolution_backward_weight;
extern const Kernel<ResamplingBackward> average_pool_backward;
extern const Kernel<ResamplingBackward> adaptive_average_backward;
extern const Kernel<ResamplingBackward> resize_backward;
extern const Kernel<LongRangeShortcut> long_range_shortcut;
extern const Kernel<LongRangeShortcutBackward> long_range_shortcut_backward;
extern const Kernel<Recurrence> recurrence;
extern const Kernel<RecurrenceBackward> recurrence_backward;

extern const Kernels kernels = {
    spatial_pyramid,
    spatial_pyramid_backward_input,
    spatial_pyramid_backward_weight,
    group_pointwise,
    group_pointwise_backward_weight,
    pyramid_pointwise,
    eesp,
    convolution,
    average_pool,
    global_average,
    resize,
    adaptive_average,
    grouped_convolution,
    depthwise,
    pyramid_pooling,
    resized_argmax,
    affine,
    change_layout,
    concatenate,
    normalised_pointwise,
    normalised_pointwise_backward,
    normalised_pyramid,
    normalised_pyramid_backward,
    normalised_output,
    normalised_output_backward,
    map_moments,
    batch_norm_backward,
    convolution_backward_weight,
    grouped_convolution_backward_weight,
    average_pool_backward,
    adaptive_average_backward,
    resize_backward,
    long_range_shortcut,
    long_range_shortcut_backward,
    recurrence,
    recurrence_backward,
};

}  // namespace espk::ESPK_ISA
