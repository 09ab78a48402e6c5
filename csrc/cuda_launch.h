// How a door runs a kernel of a CUDA device: on the stream that torch is using, with scratch from torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "cuda/kernels.h"
#include "door.h"

namespace espk {

using torch::stable::accelerator::DeviceGuard;

// Whether torch allows float32 products with factors of eleven digits; python says so before a call where it changed.
extern std::atomic<bool> tf32_allowed;

// torch reuses the scratch for later work of the same stream only, so that it may go while the kernels run.
template <class Problem>
void launch(const cuda::Kernel<Problem>& kernel, const Problem& problem, const Tensor& like) {
  // Stream::id() numbers torch's streams and is no cudaStream_t; this is.
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const int64_t bytes = kernel.scratch_bytes(problem);
  std::optional<Tensor> scratch;
  if (bytes > 0) {
    scratch = torch::stable::empty(std::vector<int64_t>{bytes}, ScalarType::Byte, std::nullopt, like.device());
  }
  const cuda::Outcome outcome = kernel.run(problem, scratch ? scratch->mutable_data_ptr() : nullptr, stream);
  STD_TORCH_CHECK(!outcome.failed(), "CUDA kernel ", outcome.kernel, " did not start: ", outcome.reason);
}

}  // namespace espk
