#include "narrow_groups.h"

namespace espk::ESPK_ISA {
namespace {

// `count` pixels of one set from `a` on: P at a time share the loads of weights and places.
template <class C, int P>
void multiply_narrow(const NarrowGroups<C>& n, const MatrixProduct<C>& p, const C* weights, const Index<C>* places,
                     int64_t row, int64_t inputs, int64_t outputs) {
  constexpr int N = kLanes<C>;
  using V = Vector<C, N>;
  V low[P], high[P], sum[P];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    const C* a = p.a + (row + i) * p.a_row;
    low[i] = load_first<N>(a, inputs);
    high[i] = inputs > N ? load_first<N>(a + N, inputs - N) : V{};
    sum[i] = V{};
  }
  for (int64_t j = 0; j < n.in; ++j, weights += N, places += N) {
    const V weight = load<N>(weights);
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) sum[i] += weight * pick<C>(low[i], high[i], places);
  }
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    V v = sum[i];
    if (p.scale) v = v * load_first<N>(p.scale, outputs);
    if (p.shift) v = v + load_first<N>(p.shift, outputs);
    if (p.residual) v = v + load_first<N>(p.residual + (row + i) * p.residual_row, outputs);
    if (p.slope) v = v > V{} ? v : v * load_first<N>(p.slope, outputs);
    store_first<N>(p.out + (row + i) * p.out_row, v, outputs);
  }
}

}  // namespace

template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  auto number = [&](int64_t group, int64_t o, int64_t i) {
    return load_one(weight + group * n.in * n.out + (transposed ? i * n.out + o : o * n.in + i));
  };
  for (int64_t set = 0; set < n.sets(); ++set) {
    for (int64_t j = 0; j < n.in; ++j) {
      for (int64_t lane = 0; lane < N; ++lane) {
        const int64_t group = set * n.together + lane / n.out;
        *to++ = lane < n.together * n.out && group < n.groups ? number(group, lane % n.out, j) : C(0);
      }
    }
  }
  Index<C>* places = reinterpret_cast<Index<C>*>(to);
  for (int64_t j = 0; j < n.in; ++j) {
    for (int64_t lane = 0; lane < N; ++lane) {
      *places++ = static_cast<Index<C>>(lane < n.together * n.out ? lane / n.out * n.in + j : 0);
    }
  }
}

template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole) {
  constexpr int N = kLanes<C>, P = kRegisters == 32 ? 8 : 4;
  const Index<C>* places = reinterpret_cast<const Index<C>*>(whole.b + n.sets() * n.in * N);
  for (int64_t set = 0; set < n.sets(); ++set) {
    const int64_t groups = least(n.together, n.groups - set * n.together), channel = set * n.together * n.out;
    MatrixProduct<C> p = whole;
    p.a += set * n.together * n.in;
    p.out += channel;
    if (p.scale) p.scale += channel;
    if (p.shift) p.shift += channel;
    if (p.slope) p.slope += channel;
    if (p.residual) p.residual += channel;
    const C* weights = whole.b + set * n.in * N;
    int64_t row = 0;
    for (; row + P <= p.rows; row += P) {
      multiply_narrow<C, P>(n, p, weights, places, row, groups * n.in, groups * n.out);
    }
    for (; row < p.rows; ++row) multiply_narrow<C, 1>(n, p, weights, places, row, groups * n.in, groups * n.out);
  }
}

template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float*, bool);
template void pack_narrow_groups(const NarrowGroups<double>&, double*, const double*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const bfloat16*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float16*, bool);
template void multiply_narrow_groups(const NarrowGroups<float>&, const MatrixProduct<float>&);
template void multiply_narrow_groups(const NarrowGroups<double>&, const MatrixProduct<double>&);

}  // namespace espk::ESPK_ISA
