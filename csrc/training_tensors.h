// What the doors of training share: vectors of channels in float64 from tensors and back, and kernels with a second stage.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_run.h"
#include "training_unit.h"

namespace espk {

template <class Problem>
void run_kernel(const Kernel<Problem>& kernel, const Problem& problem) {
  void* shared = scratch(Slot::shared, kernel.shared_bytes(problem));
  kernel.before(problem, shared);
  run_units(kernel, problem, shared);
}

// A vector of `count` numbers in float64.
inline std::vector<double> numbers(const Tensor& t, int64_t count, ScalarType type, const char* name) {
  check_numbers(t, count, type, name);
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
  auto fill = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (const auto* part : parts) {
      to = std::transform(part->begin(), part->end(), to, [](double value) { return static_cast<T>(value); });
    }
  };
  if (like.scalar_type() == ScalarType::Double) {
    fill(static_cast<double*>(result.mutable_data_ptr()));
  } else {
    fill(static_cast<float*>(result.mutable_data_ptr()));
  }
  return result;
}

inline int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

inline Tensor map_like(const Tensor& x) {
  return empty_map({x.size(0), x.size(1), x.size(2), x.size(3)}, x, Layout::channels_last);
}

inline void check_like(const Tensor& grad, const Tensor& x, int64_t channels, const char* name) {
  check_same_type(x, grad);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  name, ": expected a map of the result's shape");
}

}  // namespace espk
