// What the torch door sees of the CUDA kernels: one row an operator, over the structs of shapes.h and training.h. No torch,
// no CUDA header: pointers are device pointers, a stream is the cudaStream_t as void*.
#pragma once

#include "../shapes.h"
#include "training.h"

namespace espk::cuda {

// What a launch came to: no reason where all went well.
struct Outcome {
  const char* kernel = nullptr;
  const char* reason = nullptr;

  bool failed() const { return reason != nullptr; }
};

// One operator. `run` starts its kernels on `stream` of the current device and waits for nothing; `scratch` holds
// `scratch_bytes` bytes, aligned to 256. Neither allocates, so that a call can be captured in a graph.
template <class Problem>
struct Kernel {
  int64_t (*scratch_bytes)(const Problem&);
  Outcome (*run)(const Problem&, void* scratch, void* stream);
};

extern const Kernel<SpatialPyramid> spatial_pyramid;
extern const Kernel<SpatialPyramidBackwardInput> spatial_pyramid_backward_input;
extern const Kernel<SpatialPyramidBackwardWeight> spatial_pyramid_backward_weight;
extern const Kernel<GroupPointwise> group_pointwise;
extern const Kernel<GroupPointwiseBackwardWeight> group_pointwise_backward_weight;
extern const Kernel<PyramidPointwise> pyramid_pointwise;
extern const Kernel<Eesp> eesp;
extern const Kernel<DownSampler> down_sampler;

extern const Kernel<EespTraining> eesp_training;
extern const Kernel<EespTrainingBackward> eesp_training_backward;
// What these two are made of.
extern const Kernel<BatchNorm> known_moments;
extern const Kernel<NormalisedPointwise> normalised_pointwise;
extern const Kernel<NormalisedPointwiseBackward> normalised_pointwise_backward;
extern const Kernel<NormalisedPyramid> normalised_pyramid;
extern const Kernel<NormalisedPyramidBackward> normalised_pyramid_backward;
extern const Kernel<NormalisedOutput> normalised_output;
extern const Kernel<NormalisedOutputBackward> normalised_output_backward;

}  // namespace espk::cuda
