// The kernels of recurrent layers, from their definition. Exponentials round, so results are compared and not their bits;
// the ways to cut the work must still give the same ones.
#pragma once

#include "check.h"

struct RecurrentCase {
  int64_t steps, batch, hidden;
};

// Nothing, one number, less than a vector, a vector and a part, more rows than are kept in the cache at once.
inline const RecurrentCase kRecurrentCases[] = {{0, 2, 4}, {2, 0, 4}, {1, 1, 1}, {3, 4, 5}, {2, 101, 33}};

using Results = std::vector<std::pair<Tensor, void**>>;  // what is expected, and where the problem points to it

template <class Problem>
void check_recurrent(const char* what, const espk::Kernel<Problem>& kernel, Problem& problem, const Results& results) {
  // A number is stored in 8 or 11 bits and goes through a few steps and sums; gradients here are below 100.
  const double unit = problem.type == Type::float64    ? 1e-13
                      : problem.type == Type::float32  ? 1e-5
                      : problem.type == Type::bfloat16 ? 0.1
                                                       : 0.01;
  std::vector<std::vector<unsigned char>> first;
  for (auto split : kSplits) {
    std::vector<std::unique_ptr<Buffer>> buffers;
    for (const auto& [expected, pointer] : results) {
      buffers.push_back(std::make_unique<Buffer>(problem.type, Layout::contiguous, expected.sizes));
      *pointer = buffers.back()->data();
    }
    const auto shared = aligned(kernel.shared_bytes(problem));
    kernel.before(problem, shared.get());
    const int64_t units = kernel.units(problem);
    if (units > 0) split(units, [&](int64_t begin, int64_t end) { kernel.run(problem, shared.get(), begin, end); });
    for (size_t i = 0; i < results.size(); ++i) {
      ++checks;
      const Tensor& expected = results[i].first;
      bool right = buffers[i]->guards_intact();
      for (int64_t at = 0; at < expected.count(); ++at) {
        const double value = expected.values[static_cast<size_t>(at)];
        right = right && std::fabs(buffers[i]->get(at) - value) <= unit * (1 + std::fabs(value));
      }
      if (first.size() == i) first.push_back(buffers[i]->bits());
      if (right && first[i] == buffers[i]->bits()) continue;
      ++failures;
      std::printf("FAIL %s, result %zu, type %d, %lld steps of %lld\n", what, i, static_cast<int>(problem.type),
                  static_cast<long long>(problem.steps), static_cast<long long>(problem.hidden));
    }
  }
}

template <class Problem>
Problem described(const RecurrentCase& s, Type type) {
  Problem p{};
  p.type = type;
  p.steps = s.steps;
  p.batch = s.batch;
  p.hidden = s.hidden;
  return p;
}

inline double squashed(double x) { return 1 / (1 + std::exp(-x)); }

inline void check_recurrence(Type type, const RecurrentCase& s) {
  Draw draw;
  const int64_t T = s.steps, B = s.batch, H = s.hidden;
  const Tensor gates = draw.one_of({-1, -0.5, 0.25, 1}, T * B * 4 * H), weight = draw.one_of({-0.25, 0.125}, 4 * H * H);
  const Tensor shift = draw.one_of({-0.5, 0, 0.5}, 4 * H), grad = draw.one_of({-1, 0.5}, T * B * H);
  const Tensor hidden = draw.one_of({-0.5, 0.25}, B * H), cell = draw.one_of({-1, 0.5}, B * H);
  const Tensor grad_last = draw.one_of({-1, 1}, B * H);
  Tensor out({T * B * H}), activated({T * B * 4 * H}), cells({T * B * H}), last = cell;
  auto at = [](auto& tensor, int64_t i) -> auto& { return tensor.values[static_cast<size_t>(i)]; };
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < H; ++j) {
        const int64_t row = (t * B + b) * H;
        double gate[4];
        for (int64_t q = 0; q < 4; ++q) {
          double sum = at(gates, 4 * row + q * H + j) + at(shift, q * H + j);
          for (int64_t i = 0; i < H; ++i) {
            sum += at(weight, (q * H + j) * H + i) * (t ? at(out, row - B * H + i) : at(hidden, b * H + i));
          }
          gate[q] = at(activated, 4 * row + q * H + j) = q == 2 ? std::tanh(sum) : squashed(sum);
        }
        double& c = at(last, b * H + j);
        c = at(cells, row + j) = gate[1] * c + gate[0] * gate[2];
        at(out, row + j) = gate[3] * std::tanh(c);
      }
    }
  }
  Tensor grad_gates({T * B * 4 * H}), of_hidden({B * H}), of_cell = grad_last;
  for (int64_t t = T; t-- > 0;) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t row = (t * B + b) * H;
      for (int64_t j = 0; j < H; ++j) {
        auto gate = [&](int64_t q) { return at(activated, 4 * row + q * H + j); };
        auto into = [&](int64_t q) -> double& { return at(grad_gates, 4 * row + q * H + j); };
        const double h = at(grad, row + j) + at(of_hidden, b * H + j), c = std::tanh(at(cells, row + j));
        const double of_c = at(of_cell, b * H + j) + h * gate(3) * (1 - c * c);
        const double before = t ? at(cells, row - B * H + j) : at(cell, b * H + j);
        into(0) = of_c * gate(2) * gate(0) * (1 - gate(0));
        into(1) = of_c * before * gate(1) * (1 - gate(1));
        into(2) = of_c * gate(0) * (1 - gate(2) * gate(2));
        into(3) = h * c * gate(3) * (1 - gate(3));
        at(of_cell, b * H + j) = of_c * gate(1);
      }
      for (int64_t i = 0; i < H; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < 4 * H; ++k) sum += at(grad_gates, 4 * row + k) * at(weight, k * H + i);
        at(of_hidden, b * H + i) = sum;
      }
    }
  }

  const Type compute = type == Type::float64 ? Type::float64 : Type::float32;
  constexpr Layout plain = Layout::contiguous;
  const Buffer gates_buffer(type, plain, gates), weight_buffer(type, plain, weight),
      shift_buffer(compute, plain, shift);
  const Buffer hidden_buffer(type, plain, hidden), cell_buffer(type, plain, cell);
  auto forward = described<espk::Recurrence>(s, type);
  forward.gates = gates_buffer.data();
  forward.weight = weight_buffer.data();
  forward.bias = shift_buffer.data();
  forward.first_hidden = hidden_buffer.data();
  forward.first_cell = cell_buffer.data();
  check_recurrent(
      "recurrence", kernels.recurrence, forward,
      {{out, &forward.out}, {last, &forward.last_cell}, {activated, &forward.activated}, {cells, &forward.cells}});

  const Buffer grad_buffer(type, plain, grad), last_buffer(type, plain, grad_last);
  const Buffer activated_buffer(type, plain, activated), cells_buffer(type, plain, cells);
  auto backward = described<espk::RecurrenceBackward>(s, type);
  backward.grad = grad_buffer.data();
  backward.grad_last_cell = last_buffer.data();
  backward.activated = activated_buffer.data();
  backward.cells = cells_buffer.data();
  backward.first_cell = cell_buffer.data();
  backward.weight = weight_buffer.data();
  check_recurrent("recurrence_backward", kernels.recurrence_backward, backward,
                  {{grad_gates, &backward.grad_gates},
                   {of_hidden, &backward.grad_first_hidden},
                   {of_cell, &backward.grad_first_cell}});
}
