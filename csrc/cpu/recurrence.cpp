// All steps of a recurrent layer, for some rows of the batch at a time: the state of a row stays in the cache from its
// first step to its last. Multiply-adds: 4 H^2 a row and step; numbers: 4 H read and H written, and 4 H^2 of weights that
// all rows of a call share. With few rows the weights are what takes the time.
#include <type_traits>

#include "exponential.h"
#include "recurrent_rows.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = Recurrence;

// So few rows and steps that reading the weights as they lie costs less than to pack them first, as in generation.
bool few(const Problem& p) { return p.steps * p.batch <= 4 && (p.type == Type::float32 || p.type == Type::float64); }

int64_t shared_bytes(const Problem& p) { return few(p) ? 0 : packed_recurrent_bytes(p, p.hidden, kGates * p.hidden); }

void before(const Problem& p, void* shared) {
  if (few(p)) return;
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pack_columns(static_cast<Compute<T>*>(shared), Matrix<T>{static_cast<const T*>(p.weight), 1, p.hidden}, p.hidden,
                 kGates * p.hidden);
  });
}

int64_t units(const Problem& p) { return p.batch; }

// One row behind the product of its step; pointers are to the row's numbers.
template <class T>
struct Row {
  int64_t size;
  const T* gates;
  const Compute<T>* sums;
  Compute<T>*hidden, *cell;
  T *out, *activated, *cells;

  void step() const {
    using C = Compute<T>;
    constexpr int N = kLanes<C>;
    for (int64_t j = 0; j < size; j += N) {
      const int64_t valid = least(N, size - j);
      auto sum = [&](int64_t gate) {
        return load_first<N>(gates + gate * size + j, valid) + load_first<N>(sums + gate * size + j, valid);
      };
      const auto entry = sigmoid<C, N>(sum(0)), forget = sigmoid<C, N>(sum(1));
      const auto candidate = hyperbolic_tangent<C, N>(sum(2)), exit = sigmoid<C, N>(sum(3));
      const auto now = forget * load_first<N>(cell + j, valid) + entry * candidate;
      store_first<N>(cell + j, now, valid);
      store_first<N>(out + j, exit * hyperbolic_tangent<C, N>(now), valid);
      // The next step reads what the caller gets, rounded as that is.
      store_first<N>(hidden + j, load_first<N>(out + j, valid), valid);
      if (!activated) continue;
      store_first<N>(activated + j, entry, valid);
      store_first<N>(activated + size + j, forget, valid);
      store_first<N>(activated + 2 * size + j, candidate, valid);
      store_first<N>(activated + 3 * size + j, exit, valid);
      store_first<N>(cells + j, now, valid);
    }
  }
};

template <class T>
void run_rows(const Problem& p, const void* weight, int64_t first, int64_t rows) {
  using C = Compute<T>;
  const int64_t size = p.hidden;
  const RecurrentRows<C> state(rows, size);
  for (int64_t i = 0; i < rows * size; ++i) {
    state.hidden[i] = load_one(static_cast<const T*>(p.first_hidden) + first * size + i);
    state.cell[i] = load_one(static_cast<const T*>(p.first_cell) + first * size + i);
  }
  MatrixProduct<C> product = recurrent_product(rows, size, kGates * size, state.hidden, weight, state.sums);
  product.shift = static_cast<const C*>(p.bias);
  // bias + weight h of every row.
  auto add_up = [&] {
    if constexpr (std::is_same_v<T, C>) {
      if (few(p)) {
        for (int64_t i = 0; i < rows; ++i) {
          C* sums = state.sums + i * kGates * size;
          for (int64_t j = 0; j < kGates * size; ++j) sums[j] = product.shift ? product.shift[j] : C(0);
          add_dots(DotProducts<C>{kGates * size, 1, size, 1, static_cast<const T*>(p.weight), size, 0,
                                  state.hidden + i * size, 0, 0, sums, 1});
        }
        return;
      }
    }
    multiply(product);
  };
  for (int64_t t = 0; t < p.steps; ++t) {
    add_up();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (t * p.batch + first + i) * size;
      Row<T>{size,
             static_cast<const T*>(p.gates) + kGates * at,
             state.sums + i * kGates * size,
             state.hidden + i * size,
             state.cell + i * size,
             static_cast<T*>(p.out) + at,
             p.activated ? static_cast<T*>(p.activated) + kGates * at : nullptr,
             p.activated ? static_cast<T*>(p.cells) + at : nullptr}
          .step();
    }
  }
  for (int64_t i = 0; i < rows * size; ++i) {
    store_one(static_cast<T*>(p.last_cell) + first * size + i, state.cell[i]);
  }
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  for_recurrent_rows(p, begin, end, [&](auto* type, int64_t first, int64_t rows) {
    run_rows<std::remove_pointer_t<decltype(type)>>(p, shared, first, rows);
  });
}

}  // namespace

extern const Kernel<Problem> recurrence = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
