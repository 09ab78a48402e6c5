// The pointwise weights [N, M/groups] in the compute type and in the order in which the matrix product reads them:
// packed columns of a group for pixels, packed rows of a group for planes, and pairs of bfloat16 for pixels where the
// machine multiplies those.
#pragma once

#include "bfloat16_pairs.h"
#include "bfloat16_product.h"
#include "kernels.h"
#include "matrix_product.h"
#include "narrow_groups.h"

namespace espk::ESPK_ISA {

struct PointwiseWeights {
  Type type;
  bool pixels;
  int64_t groups, in, out;  // channels of one group
  bool transposed;          // the weight is [groups * in, out] instead of [groups * out, in]
  const Bfloat16Arithmetic* bfloat16 = nullptr;

  // Whether bfloat16 stays bfloat16. Blocks of packed columns are cut alike for both where a vector has 16 numbers.
  bool in_pairs() const {
    return kLanes<float> == kPairColumns && bfloat16 && type == Type::bfloat16 && pixels && in % 2 == 0;
  }

  template <class C>
  int64_t group_size() const {
    return pixels ? packed_columns_size<C>(in, out) : packed_rows_size(in, out);
  }

  // Pixels of narrow groups have their weights packed for all groups together.
  template <class C>
  NarrowGroups<C> narrow() const {
    return {groups, in, out};
  }
  template <class C>
  bool is_narrow() const {
    return pixels && !in_pairs() && narrow<C>().pays();
  }

  int64_t bytes() const {
    if (in_pairs()) return groups * packed_pairs_size(in, out) * bytes_of(type);
    int64_t total = 0;
    with_type(type, [&](auto* t) {
      using C = Compute<std::remove_pointer_t<decltype(t)>>;
      const int64_t size = is_narrow<C>() ? narrow<C>().packed_size() : groups * group_size<C>();
      total = size * static_cast<int64_t>(sizeof(C));
    });
    return total;
  }

  void prepare(const void* weight, void* shared) const;

  // The product of `rows` pixels, `outputs` channels of each of `groups_now` groups, with weights from prepare.
  Bfloat16Product pairs(int64_t rows, int64_t groups_now, int64_t outputs) const {
    Bfloat16Product product{};
    product.rows = rows;
    product.groups = groups_now;
    product.depth = in;
    product.columns = outputs;
    product.b_group = packed_pairs_size(in, out);
    return product;
  }
};

// The parameters of an epilogue that belong to the channels from `first` on, for a product of either kind.
template <class Product>
inline void set_parameters(Product& product, const Epilogue& epilogue, int64_t first) {
  using Numbers = decltype(product.scale);
  auto at = [&](const void* values) { return values ? static_cast<Numbers>(values) + first : nullptr; };
  product.scale = at(epilogue.scale);
  product.shift = at(epilogue.shift);
  product.slope = at(epilogue.slope);
}

// The same where pixels may also be columns.
template <class C>
inline void set_epilogue(MatrixProduct<C>& product, const Epilogue& epilogue, int64_t first, bool pixels) {
  product.epilogue_of_columns = pixels;
  set_parameters(product, epilogue, first);
}

// The product into `out` of stored type T, rows `out_row` apart. The epilogue's residual lies like `out`; where there is
// none, the product may have one of the compute type. Types other than the compute type go through a map of results.
// With `narrow`, the product is that of all groups at once.
template <class T>
void multiply_into(MatrixProduct<Compute<T>>& product, T* out, const T* residual, int64_t out_row,
                   const NarrowGroups<Compute<T>>* narrow = nullptr);

// Pixels times the packed weights of all groups: `rows` pixels in the compute type, value_row apart, into `out` of stored
// type T, out_row apart, with the epilogue of all channels, whose residual may also be `added`, one row behind the other.
template <class T>
void multiply_pixels(const PointwiseWeights& weights, const Compute<T>* packed, const Compute<T>* values,
                     int64_t value_row, int64_t rows, const Epilogue& epilogue, T* out, int64_t out_row,
                     Ahead* ahead = nullptr, const Compute<T>* added = nullptr);

}  // namespace espk::ESPK_ISA
