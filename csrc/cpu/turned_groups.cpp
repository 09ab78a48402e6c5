// Narrow groups by turning: some pixels become planes, a product of each group's weights with them makes planes of results,
// and those become pixels. In AVX2's registers that is 3 shuffles for 8 numbers turned, where picking takes 3 for each
// vector of multiply-adds.
#include "kernels.h"
#include "narrow_groups.h"

#if !defined(__AVX512F__)
namespace espk::ESPK_ISA {
namespace {

// The first `pixels` columns of planes [round_up(channels, N)][pitch] as pixels `step` apart.
template <class C>
void turn_back(C* to, int64_t step, const C* planes, int64_t pitch, int64_t channels, int64_t pixels) {
  constexpr int N = kLanes<C>;
  for (int64_t channel = 0; channel < channels; channel += N) {
    const int64_t valid = least(N, channels - channel);
    for (int64_t pixel = 0; pixel < pixels; pixel += N) {
      Vector<C, N> square[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) square[i] = load<N>(planes + (channel + i) * pitch + pixel);
      transpose<N, C>(square);
      const int64_t count = least(N, pixels - pixel);
      C* out = to + pixel * step + channel;
      if (count == N && valid == N) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store<N>(out + i * step, square[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) store_first<N>(out + i * step, square[i], valid);
      }
    }
  }
}

}  // namespace

template <class T>
void pack_narrow_groups(const NarrowGroups<Compute<T>>& n, Compute<T>* to, const T* weight, bool transposed) {
  for (int64_t o = 0; o < n.groups * n.out; ++o) {
    const T* group = weight + o / n.out * n.in * n.out;
    for (int64_t i = 0; i < n.in; ++i) {
      *to++ = load_one(group + (transposed ? i * n.out + o % n.out : o % n.out * n.in + i));
    }
  }
}

template <class C>
void multiply_narrow_groups(const NarrowGroups<C>& n, const MatrixProduct<C>& whole) {
  constexpr int N = kLanes<C>;
  constexpr int64_t kPixels = 6 * N;  // two blocks of a product's columns
  const int64_t inputs = n.groups * n.in, outputs = n.groups * n.out, padded = round_up(outputs, N);
  const int64_t planes = inputs + (whole.residual ? 2 : 1) * padded;
  C* x = static_cast<C*>(scratch(Slot::turned, planes * kPixels * static_cast<int64_t>(sizeof(C))));
  C *results = x + inputs * kPixels, *residual = whole.residual ? results + padded * kPixels : nullptr;
  MatrixProduct<C> product{};
  product.rows = n.out;
  product.depth = n.in;
  product.a_row = n.in;
  product.a_depth = 1;
  product.epilogue_of_columns = false;
  for (int64_t row = 0; row < whole.rows; row += kPixels) {
    const int64_t pixels = least(kPixels, whole.rows - row), pitch = round_up(pixels, N);
    pack<N>(x, pitch, Matrix<C>{whole.a + row * whole.a_row, 1, whole.a_row}, inputs, pixels);
    if (residual) {
      pack<N>(residual, pitch, Matrix<C>{whole.residual + row * whole.residual_row, 1, whole.residual_row}, outputs,
              pixels);
    }
    product.columns = product.b_depth = product.out_row = product.residual_row = pitch;
    for (int64_t channel = 0; channel < outputs; channel += n.out) {
      auto of_group = [&](const C* values, int64_t step) { return values ? values + channel * step : nullptr; };
      product.a = whole.b + channel * n.in;
      product.b = x + channel / n.out * n.in * pitch;
      product.out = results + channel * pitch;
      product.residual = of_group(residual, pitch);
      product.scale = of_group(whole.scale, 1);
      product.shift = of_group(whole.shift, 1);
      product.slope = of_group(whole.slope, 1);
      multiply(product);
    }
    turn_back(whole.out + row * whole.out_row, whole.out_row, results, pitch, outputs, pixels);
  }
}

template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float*, bool);
template void pack_narrow_groups(const NarrowGroups<double>&, double*, const double*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const bfloat16*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float16*, bool);
template void multiply_narrow_groups(const NarrowGroups<float>&, const MatrixProduct<float>&);
template void multiply_narrow_groups(const NarrowGroups<double>&, const MatrixProduct<double>&);

}  // namespace espk::ESPK_ISA
#endif
