// What the doors of training share: vectors of channels in float64 from tensors and back, and kernels with a second stage.
#pragma once

#include <vector>

#include "cpu_run.h"
#include "door.h"

namespace espk {

template <class Problem>
void run_kernel(const Kernel<Problem>& kernel, const Problem& problem) {
  void* shared = scratch(Slot::shared, kernel.shared_bytes(problem));
  kernel.before(problem, shared);
  run_units(kernel, problem, shared);
}

inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A vector of `count` numbers in float64.
inline std::vector<double> numbers(const Tensor& t, int64_t count, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == count && t.scalar_type() == type, name,
                  ": expected a CPU vector of the unit's channels, float64 for float64 maps and moments, else float32");
  const Tensor dense = dense_weight(t);
  if (type == ScalarType::Double) {
    const double* from = static_cast<const double*>(dense.const_data_ptr());
    return {from, from + count};
  }
  const float* from = static_cast<const float*>(dense.const_data_ptr());
  return {from, from + count};
}

// A vector in the type of the norms' parameters from parts in float64.
inline Tensor vector_of(const std::vector<const std::vector<double>*>& parts, const Tensor& like) {
  int64_t count = 0;
  for (const auto* part : parts) count += static_cast<int64_t>(part->size());
  Tensor result = torch::stable::new_empty(like, std::vector<int64_t>{count});
  int64_t at = 0;
  for (const auto* part : parts) {
    for (double value : *part) {
      if (like.scalar_type() == ScalarType::Double) {
        static_cast<double*>(result.mutable_data_ptr())[at++] = value;
      } else {
        static_cast<float*>(result.mutable_data_ptr())[at++] = static_cast<float>(value);
      }
    }
  }
  return result;
}

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); }

}  // namespace espk
