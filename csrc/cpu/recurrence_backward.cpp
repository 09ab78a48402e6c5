// The steps of a recurrent layer from the last to the first: the gradients in front of the gates, of which those of the
// weights and of the bias are one product and one sum over all steps. Multiply-adds: 4 H^2 a row and step; numbers: 7 H
// read and 4 H written, and 4 H^2 of weights that all rows of a call share.
#include "exponential.h"
#include "recurrent_rows.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = RecurrenceBackward;

int64_t shared_bytes(const Problem& p) { return packed_recurrent_bytes(p, kGates * p.hidden, p.hidden); }

void before(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_columns(static_cast<Compute<T>*>(shared), Matrix<T>{static_cast<const T*>(p.weight), p.hidden, 1},
                 kGates * p.hidden, p.hidden);
  });
}

int64_t units(const Problem& p) { return p.batch; }

// One row in front of the product of its step; pointers are to the row's numbers, or gradients.
template <class T>
struct Row {
  int64_t size;
  const T *grad, *activated, *cells, *cells_before;
  const Compute<T>* hidden;
  Compute<T>*cell, *sums;
  T* grad_gates;

  void step() const {
    using C = Compute<T>;
    constexpr int N = kLanes<C>;
    for (int64_t j = 0; j < size; j += N) {
      const int64_t valid = least(N, size - j);
      auto gate = [&](int64_t i) { return load_first<N>(activated + i * size + j, valid); };
      auto put = [&](int64_t i, Vector<C, N> v) {
        store_first<N>(sums + i * size + j, v, valid);
        store_first<N>(grad_gates + i * size + j, v, valid);
      };
      const auto entry = gate(0), forget = gate(1), candidate = gate(2), exit = gate(3);
      const auto of_hidden = load_first<N>(grad + j, valid) + load_first<N>(hidden + j, valid);
      const auto squashed = hyperbolic_tangent<C, N>(load_first<N>(cells + j, valid));
      const auto of_cell = load_first<N>(cell + j, valid) + of_hidden * exit * (C(1) - squashed * squashed);
      put(0, of_cell * candidate * entry * (C(1) - entry));
      put(1, of_cell * load_first<N>(cells_before + j, valid) * forget * (C(1) - forget));
      put(2, of_cell * entry * (C(1) - candidate * candidate));
      put(3, of_hidden * squashed * exit * (C(1) - exit));
      store_first<N>(cell + j, of_cell * forget, valid);
    }
  }
};

template <class T>
void run_rows(const Problem& p, const void* weight, int64_t first, int64_t rows) {
  using C = Compute<T>;
  const int64_t size = p.hidden;
  const RecurrentRows<C> state(rows, size);
  for (int64_t i = 0; i < rows * size; ++i) {
    state.hidden[i] = C(0);
    state.cell[i] = p.grad_last_cell ? load_one(static_cast<const T*>(p.grad_last_cell) + first * size + i) : C(0);
  }
  const auto product = recurrent_product(rows, kGates * size, size, state.sums, weight, state.hidden);
  for (int64_t t = p.steps; t-- > 0;) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (t * p.batch + first + i) * size;
      const T* cells = static_cast<const T*>(p.cells) + at;
      Row<T>{size,
             static_cast<const T*>(p.grad) + at,
             static_cast<const T*>(p.activated) + kGates * at,
             cells,
             t > 0 ? cells - p.batch * size : static_cast<const T*>(p.first_cell) + (first + i) * size,
             state.hidden + i * size,
             state.cell + i * size,
             state.sums + i * kGates * size,
             static_cast<T*>(p.grad_gates) + kGates * at}
          .step();
    }
    multiply(product);
  }
  for (int64_t i = 0; i < rows * size; ++i) {
    store_one(static_cast<T*>(p.grad_first_hidden) + first * size + i, state.hidden[i]);
    store_one(static_cast<T*>(p.grad_first_cell) + first * size + i, state.cell[i]);
  }
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  for_recurrent_rows(p, begin, end, [&](auto* type, int64_t first, int64_t rows) {
    run_rows<std::remove_pointer_t<decltype(type)>>(p, shared, first, rows);
  });
}

}  // namespace

extern const Kernel<Problem> recurrence_backward = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
