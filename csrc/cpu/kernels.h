// What the torch door sees of the CPU kernels: one table of functions for each instruction set in the binary.
#pragma once

#include "../recurrence.h"
#include "../training.h"

namespace espk {

// One operator. The caller provides `shared_bytes` of memory aligned to 64 bytes, runs `before` once, then `run` over
// [0, units) in any split and on any threads, then `after` once. The split never changes a bit of the result.
template <class Problem>
struct Kernel {
  int64_t (*shared_bytes)(const Problem&);
  void (*before)(const Problem&, void* shared);  // weights into the order and type that `run` reads
  int64_t (*units)(const Problem&);
  void (*run)(const Problem&, void* shared, int64_t begin, int64_t end);
  void (*after)(const Problem&, void* shared);  // second stage of a sum; null where there is none
};

struct Kernels {
  const Kernel<SpatialPyramid>& spatial_pyramid;
  const Kernel<SpatialPyramidBackwardInput>& spatial_pyramid_backward_input;
  const Kernel<SpatialPyramidBackwardWeight>& spatial_pyramid_backward_weight;
  const Kernel<GroupPointwise>& group_pointwise;
  const Kernel<GroupPointwiseBackwardWeight>& group_pointwise_backward_weight;
  const Kernel<PyramidPointwise>& pyramid_pointwise;
  const Kernel<Eesp>& eesp;  // of pixels
  const Kernel<Convolution>& convolution;
  const Kernel<AveragePool>& average_pool;
  const Kernel<GlobalAverage>& global_average;
  const Kernel<Resize>& resize;
  const Kernel<AdaptiveAverage>& adaptive_average;
  const Kernel<GroupedConvolution>& grouped_convolution;
  const Kernel<SpatialPyramid>& depthwise;
  const Kernel<PyramidPooling>& pyramid_pooling;
  const Kernel<ResizedArgmax>& resized_argmax;
  const Kernel<Affine>& affine;
  const Kernel<ChangeLayout>& change_layout;
  const Kernel<Concatenate>& concatenate;
  const Kernel<NormalisedPointwise>& normalised_pointwise;
  const Kernel<NormalisedPointwiseBackward>& normalised_pointwise_backward;
  const Kernel<SpatialPyramid>& normalised_pyramid;  // with its moments, which are a second stage
  const Kernel<NormalisedPyramidBackward>& normalised_pyramid_backward;
  const Kernel<NormalisedOutput>& normalised_output;
  const Kernel<NormalisedOutputBackward>& normalised_output_backward;
  const Kernel<MapMoments>& map_moments;
  const Kernel<BatchNormBackward>& batch_norm_backward;
  const Kernel<ConvolutionBackwardWeight>& convolution_backward_weight;  // of pixels
  const Kernel<GroupedConvolutionBackwardWeight>& grouped_convolution_backward_weight;
  const Kernel<ResamplingBackward>& average_pool_backward;
  const Kernel<ResamplingBackward>& adaptive_average_backward;
  const Kernel<ResamplingBackward>& resize_backward;
  const Kernel<LongRangeShortcut>& long_range_shortcut;
  const Kernel<LongRangeShortcutBackward>& long_range_shortcut_backward;
  const Kernel<Recurrence>& recurrence;
  const Kernel<RecurrenceBackward>& recurrence_backward;
  const Bfloat16Arithmetic* bfloat16 = nullptr;  // for the problems that take one
};

// The kernels compiled for each instruction set; only those that the build lists exist.
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

// Instructions beside those of avx512, whose kernels they serve.
namespace avx512_bf16 { extern const Bfloat16Arithmetic bfloat16_arithmetic; }
namespace amx { extern const Bfloat16Arithmetic bfloat16_arithmetic; }

// The kernels in use: the best that this machine runs, or what ESPKERNELS_ISA or set_isa named.
const Kernels& kernels();

const char* isa();
bool isa_available(const char* name);  // in the binary, and this machine runs it
bool set_isa(const char* name);        // false, and no change, where it is not available

// Memory of the calling thread, aligned to 64 bytes, kept for its next call; each slot holds one block.
enum class Slot { shared, tile, map, rows, results, shortcut, turned };
constexpr int kSlots = static_cast<int>(Slot::turned) + 1;
void* scratch(Slot slot, int64_t bytes);

}  // namespace espk
