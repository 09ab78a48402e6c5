// The long-range shortcut of a few pixels at a time, for the epilogue that adds it: a map of it would be written and read
// once for 3 multiply-adds a number.
#pragma once

#include "kernels.h"
#include "matrix_product.h"
#include "row.h"

namespace espk::ESPK_ISA {

template <class T>
class ShortcutRows {
 public:
  using C = Compute<T>;

  // For at most `most_pixels` at a time, all `out_channels` of them.
  ShortcutRows(const ImageShortcut& shortcut, int64_t out_channels, int64_t most_pixels)
      : shortcut_(shortcut), out_channels_(out_channels) {
    if (!shortcut.image) return;
    const int64_t weights = packed_columns_size<C>(shortcut.channels, out_channels);
    const int64_t results = round_up(most_pixels * out_channels, kLanes<C>);
    const int64_t values = std::is_same_v<T, C> ? 0 : most_pixels * shortcut.channels;
    packed_ = static_cast<C*>(scratch(Slot::shortcut, (weights + results + values) * static_cast<int64_t>(sizeof(C))));
    results_ = packed_ + weights;
    values_ = results_ + results;
    pack_columns(packed_, Matrix<T>{static_cast<const T*>(shortcut.weight), 1, shortcut.channels}, shortcut.channels,
                 out_channels);
  }

  // [count][out_channels] of the pixels from `pixel` on, until the next call; null where there is no shortcut.
  const C* of(int64_t pixel, int64_t count) const {
    if (!shortcut_.image) return nullptr;
    const T* from = static_cast<const T*>(shortcut_.image) + pixel * shortcut_.channels;
    MatrixProduct<C> product{};
    product.rows = count;
    product.columns = out_channels_;
    product.depth = shortcut_.channels;
    if constexpr (std::is_same_v<T, C>) {
      product.a = from;
    } else {
      copy_row(values_, from, count * shortcut_.channels);
      product.a = values_;
    }
    product.a_row = shortcut_.channels;
    product.a_depth = 1;
    product.b = packed_;
    product.b_packed = true;
    product.shift = static_cast<const C*>(shortcut_.shift);
    product.out = results_;
    product.out_row = out_channels_;
    multiply(product);
    return results_;
  }

 private:
  const ImageShortcut& shortcut_;
  int64_t out_channels_;
  C *packed_ = nullptr, *results_ = nullptr, *values_ = nullptr;
};

}  // namespace espk::ESPK_ISA
