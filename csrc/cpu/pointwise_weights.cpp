#include "pointwise_weights.h"

#include "row.h"

namespace espk::ESPK_ISA {
namespace {

void prepare_pairs(const PointwiseWeights& w, const uint16_t* weight, uint16_t* to) {
  const int64_t in = w.in, out = w.out;
  for (int64_t g = 0; g < w.groups; ++g, weight += in * out, to += packed_pairs_size(in, out)) {
    pack_pairs(to, in, out, [&](int64_t i, int64_t o) { return weight[w.transposed ? i * out + o : o * in + i]; });
  }
}

}  // namespace

void PointwiseWeights::prepare(const void* weight, void* shared) const {
  if (in_pairs()) return prepare_pairs(*this, static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(shared));
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = Compute<T>;
    if (is_narrow<C>()) {
      return pack_narrow_groups(narrow<C>(), static_cast<C*>(shared), static_cast<const T*>(weight), transposed);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const T* from = static_cast<const T*>(weight) + g * in * out;
      C* to = static_cast<C*>(shared) + g * group_size<C>();
      const Matrix<T> in_by_out{from, transposed ? out : 1, transposed ? 1 : in};
      if (pixels) {
        pack_columns(to, in_by_out, in, out);
      } else {
        pack_rows(to, Matrix<T>{from, in_by_out.column, in_by_out.row}, out, in);
      }
    }
  });
}

template <class T>
void multiply_into(MatrixProduct<Compute<T>>& product, T* out, const T* residual, int64_t out_row,
                   const NarrowGroups<Compute<T>>* narrow) {
  using C = Compute<T>;
  auto run = [&] { return narrow ? multiply_narrow_groups(*narrow, product) : multiply(product); };
  if constexpr (std::is_same_v<T, C>) {
    product.out = out;
    product.out_row = out_row;
    if (residual) {
      product.residual = residual;
      product.residual_row = out_row;
    }
    run();
  } else {
    const int64_t size = product.rows * product.columns;
    C* results = static_cast<C*>(scratch(Slot::results, 2 * size * static_cast<int64_t>(sizeof(C))));
    product.out = results;
    product.out_row = product.columns;
    if (residual) {
      for (int64_t i = 0; i < product.rows; ++i) {
        copy_row(results + size + i * product.columns, residual + i * out_row, product.columns);
      }
      product.residual = results + size;
      product.residual_row = product.columns;
    }
    run();
    for (int64_t i = 0; i < product.rows; ++i) {
      copy_row(out + i * out_row, results + i * product.columns, product.columns);
    }
  }
}

template <class T>
void multiply_pixels(const PointwiseWeights& weights, const Compute<T>* packed, const Compute<T>* values,
                     int64_t value_row, int64_t rows, const Epilogue& epilogue, T* out, int64_t out_row, Ahead* ahead,
                     const Compute<T>* added) {
  using C = Compute<T>;
  const bool is_narrow = weights.is_narrow<C>();
  const NarrowGroups<C> narrow = weights.narrow<C>();
  const T* residual = static_cast<const T*>(epilogue.residual);
  for (int64_t group = 0; group < (is_narrow ? 1 : weights.groups); ++group) {
    MatrixProduct<C> product{};
    product.ahead = ahead;
    product.rows = rows;
    product.columns = is_narrow ? weights.groups * weights.out : weights.out;
    product.depth = weights.in;
    product.a = values + group * weights.in;
    product.a_row = value_row;
    product.a_depth = 1;
    product.b = packed + group * weights.group_size<C>();
    product.b_packed = true;
    const int64_t channel = group * weights.out;
    set_epilogue(product, epilogue, channel, true);
    if (added) {
      product.residual = added + channel;
      product.residual_row = weights.groups * weights.out;
    }
    multiply_into(product, out + channel, residual ? residual + channel : nullptr, out_row,
                  is_narrow ? &narrow : nullptr);
  }
}

template void multiply_into<float>(MatrixProduct<float>&, float*, const float*, int64_t, const NarrowGroups<float>*);
template void multiply_pixels<float>(const PointwiseWeights&, const float*, const float*, int64_t, int64_t,
                                     const Epilogue&, float*, int64_t, Ahead*, const float*);
template void multiply_into<double>(MatrixProduct<double>&, double*, const double*, int64_t,
                                    const NarrowGroups<double>*);
template void multiply_pixels<double>(const PointwiseWeights&, const double*, const double*, int64_t, int64_t,
                                      const Epilogue&, double*, int64_t, Ahead*, const double*);
template void multiply_into<bfloat16>(MatrixProduct<float>&, bfloat16*, const bfloat16*, int64_t,
                                      const NarrowGroups<float>*);
template void multiply_pixels<bfloat16>(const PointwiseWeights&, const float*, const float*, int64_t, int64_t,
                                        const Epilogue&, bfloat16*, int64_t, Ahead*, const float*);
template void multiply_into<float16>(MatrixProduct<float>&, float16*, const float16*, int64_t,
                                     const NarrowGroups<float>*);
template void multiply_pixels<float16>(const PointwiseWeights&, const float*, const float*, int64_t, int64_t,
                                       const Epilogue&, float16*, int64_t, Ahead*, const float*);

}  // namespace espk::ESPK_ISA
