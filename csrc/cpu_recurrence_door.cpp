// Where torch ends on the CPU for recurrent layers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu_launch.h"
#include "recurrence.h"

namespace espk {
namespace {

void check_array(const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& like, const char* name) {
  check_same_type(t, like);
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": wrong number of dimensions");
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(t.size(static_cast<int64_t>(i)) == sizes[i], name, ": wrong size of dimension ", i);
  }
}

// The sizes, from gates [T, B, 4 H] and weight [4 H, H].
template <class Problem>
Problem described(const Tensor& gates, const Tensor& weight) {
  STD_TORCH_CHECK(is_here(gates) && gates.dim() == 3, "gates: expected a CPU tensor [T, B, 4 H]");
  Problem p{};
  p.type = type_of(gates);
  p.steps = gates.size(0);
  p.batch = gates.size(1);
  p.hidden = gates.size(2) / 4;
  STD_TORCH_CHECK(p.hidden >= 1 && gates.size(2) == 4 * p.hidden, "gates: expected [T, B, 4 H]");
  check_array(weight, {4 * p.hidden, p.hidden}, gates, "weight");
  return p;
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) { return torch::stable::new_empty(like, sizes); }

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence(const Tensor& gates, const Tensor& weight,
                                                      std::optional<Tensor> bias, const Tensor& hidden,
                                                      const Tensor& cell, bool save) {
  auto p = described<Recurrence>(gates, weight);
  check_array(hidden, {p.batch, p.hidden}, gates, "hidden");
  check_array(cell, {p.batch, p.hidden}, gates, "cell");
  const Tensor g = dense_weight(gates), w = dense_weight(weight), h = dense_weight(hidden), c = dense_weight(cell);
  std::optional<Tensor> b;
  if (bias) {
    const ScalarType compute = p.type == Type::float64 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(
        is_here(*bias) && bias->dim() == 1 && bias->size(0) == 4 * p.hidden && bias->scalar_type() == compute,
        "bias: expected [4 H], float64 beside float64, else float32");
    b = dense_weight(*bias);
    p.bias = b->const_data_ptr();
  }
  Tensor out = empty(gates, {p.steps, p.batch, p.hidden}), last_cell = empty(gates, {p.batch, p.hidden});
  Tensor activated =
      empty(gates, save ? std::vector<int64_t>{p.steps, p.batch, 4 * p.hidden} : std::vector<int64_t>{0});
  Tensor cells = empty(gates, save ? std::vector<int64_t>{p.steps, p.batch, p.hidden} : std::vector<int64_t>{0});
  p.gates = g.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.first_hidden = h.const_data_ptr();
  p.first_cell = c.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.last_cell = last_cell.mutable_data_ptr();
  p.activated = save ? activated.mutable_data_ptr() : nullptr;
  p.cells = save ? cells.mutable_data_ptr() : nullptr;
  launch("recurrence", kernels().recurrence, p);
  return {out, last_cell, activated, cells};
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward(const Tensor& grad, std::optional<Tensor> grad_cell,
                                                       const Tensor& activated, const Tensor& cells, const Tensor& cell,
                                                       const Tensor& weight) {
  auto p = described<RecurrenceBackward>(activated, weight);
  check_array(grad, {p.steps, p.batch, p.hidden}, activated, "grad");
  check_array(cells, {p.steps, p.batch, p.hidden}, activated, "cells");
  check_array(cell, {p.batch, p.hidden}, activated, "cell");
  const Tensor g = dense_weight(grad), a = dense_weight(activated), all = dense_weight(cells);
  const Tensor first = dense_weight(cell), w = dense_weight(weight);
  std::optional<Tensor> last;
  if (grad_cell) {
    check_array(*grad_cell, {p.batch, p.hidden}, activated, "grad_cell");
    last = dense_weight(*grad_cell);
    p.grad_last_cell = last->const_data_ptr();
  }
  Tensor grad_gates = empty(activated, {p.steps, p.batch, 4 * p.hidden});
  Tensor grad_first_hidden = empty(activated, {p.batch, p.hidden});
  Tensor grad_first_cell = empty(activated, {p.batch, p.hidden});
  p.grad = g.const_data_ptr();
  p.activated = a.const_data_ptr();
  p.cells = all.const_data_ptr();
  p.first_cell = first.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_first_hidden = grad_first_hidden.mutable_data_ptr();
  p.grad_first_cell = grad_first_cell.mutable_data_ptr();
  launch("recurrence_backward", kernels().recurrence_backward, p);
  return {grad_gates, grad_first_hidden, grad_first_cell};
}

}  // namespace
}  // namespace espk

STABLE_TORCH_LIBRARY_IMPL(espkernels, CPU, m) {
  using namespace espk;
  m.impl("recurrence", TORCH_BOX(&recurrence));
  m.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
}
